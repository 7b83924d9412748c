"""Which networks this package takes: one place that tells a block diffusion model, and the class of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import is_peft_available
from transformers.utils.peft_utils import find_adapter_config_file

from ..modeling.modeling_bd3lm import BD3LMForMaskedLM
from ..modeling.modeling_causal_lm import BlockDiffusionForMaskedLM


LANGUAGE_MODELS = {
    model_class.config_class.model_type: model_class for model_class in (BD3LMForMaskedLM, BlockDiffusionForMaskedLM)
}
# What says of a configuration that its model denoises blocks; remote code has classes of its own.
FIELDS = ("block_size", "mask_token_id", "noise_schedule", "noise_interval")


def is_block_diffusion(config: Any) -> bool:
    """Whether a configuration is that of a block diffusion language model, of any network and anyone's code."""
    return all(hasattr(config, field) for field in FIELDS)


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The configuration of the causal language model that is the network, or None where it is none of those."""
    return getattr(config, "text_config", None) if is_block_diffusion(config) else None


def fact_of_network(config: PreTrainedConfig, name: str) -> Any:
    """A field of the configuration, or else of its network's; None where neither has it."""
    value = getattr(config, name, None)
    return getattr(stock_config(config), name, None) if value is None else value


def language_model_class(name_or_path: str | Path) -> type[PreTrainedModel]:
    """
    The class that loads a checkpoint, or an adapter's base: that of the stock networks, or else the published one,
    which reads the published formats as well.

    Args:
        name_or_path: Folder or Hub id.

    Raises:
        ValueError: it is a model of Transformers, which `bd3lm adapt` makes a block diffusion model of.
        OSError: there is no such checkpoint.
    """
    name = str(name_or_path)
    adapter = find_adapter_config_file(name) if is_peft_available() else None
    if adapter is not None:
        name = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
    model_type = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    if model_type in CONFIG_MAPPING and model_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"`model` must be a block diffusion model, but {name!r} is a {model_type!r}, which `bd3lm "
            "adapt` makes one of."
        )
    return LANGUAGE_MODELS.get(model_type, BD3LMForMaskedLM)


def load_language_model(name_or_path: str | Path, **options: Any) -> PreTrainedModel:
    """
    A block diffusion language model, in evaluation mode.

    Args:
        name_or_path: Folder or Hub id.
        options: Further arguments of `from_pretrained`.

    Raises:
        ValueError: see [`language_model_class`].
    """
    return language_model_class(name_or_path).from_pretrained(name_or_path, **options)


def dropout_of(config: PreTrainedConfig) -> float:
    """The largest dropout probability in a configuration or its network's."""
    found = (stock_config(config) or config).to_dict()
    names = [name for name in found if name.endswith(("dropout", "_pdrop")) and isinstance(found[name], (int, float))]
    return max((found[name] for name in names), default=0.0)
