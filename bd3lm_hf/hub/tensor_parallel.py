"""What tensor parallelism cannot split is refused by name when a model is loaded, in place of an error of shapes."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling.modeling_bd3lm import BD3LMPreTrainedModel
from ..modeling.modeling_causal_lm import BlockDiffusionPreTrainedModel


# Projections whose output holds the keys, under the names that Transformers has for them.
KEY_PROJECTION = re.compile(r"(k_proj|qkv_proj|query_key_value)$")


def check_tensor_parallel(config: PreTrainedConfig, plan: Mapping[str, str], tp_size: int) -> None:
    """
    Raises a ValueError where a network has no plan, or heads that so many devices cannot share out evenly.

    Args:
        config: Of the model.
        plan: Its `tp_plan`, from names of modules to styles.
        tp_size: Devices that share each layer.
    """
    if tp_size == 1:
        return
    network = config.get_text_config(decoder=True)
    if not {"colwise", "rowwise", "rowwise_split_input"} & set(plan.values()):
        raise ValueError(
            f"`tp_size` must be 1 for {network.model_type!r}, whose network has no tensor-parallel plan, but got "
            f"{tp_size}. A `tp_plan` of your own may split it."
        )
    num_heads = getattr(network, "num_key_value_heads", None) or network.num_attention_heads
    splits_heads = any(style == "colwise" and KEY_PROJECTION.search(name) for name, style in plan.items())
    if splits_heads and num_heads % tp_size:
        raise ValueError(
            f"`tp_size` must be a divisor of the number of heads of keys and values, {num_heads}, but got {tp_size}."
        )


def _checked(distribute: Callable[..., PreTrainedModel]) -> classmethod:
    """`PreTrainedModel.maybe_distribute_model`, which checks before it distributes."""

    @functools.wraps(distribute)
    def maybe_distribute_model(cls, model: PreTrainedModel, distributed_config: Any, *mesh: Any) -> PreTrainedModel:
        own = getattr(distributed_config, "tp_plan", None)
        plan = {**(model.tp_plan or {}), **(own if isinstance(own, dict) else {})}
        check_tensor_parallel(model.config, plan, getattr(distributed_config, "tp_size", None) or 1)
        return distribute(cls, model, distributed_config, *mesh)

    return classmethod(maybe_distribute_model)


def register_tensor_parallel_check() -> None:
    """Has `from_pretrained` of this package's models check what is to be split."""
    for cls in (BD3LMPreTrainedModel, BlockDiffusionPreTrainedModel):
        cls.maybe_distribute_model = _checked(PreTrainedModel.maybe_distribute_model.__func__)
