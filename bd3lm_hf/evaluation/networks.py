"""Which networks this package takes: one place that tells a block diffusion model, and the class of a checkpoint."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ..modeling.modeling_bd3lm import BD3LMForMaskedLM
from ..modeling.modeling_causal_lm import BlockDiffusionForMaskedLM
from .loading import load_whole, model_type_of


LANGUAGE_MODELS = {
    model_class.config_class.model_type: model_class for model_class in (BD3LMForMaskedLM, BlockDiffusionForMaskedLM)
}
# What checkpoints of BD3-LMs call themselves, this package's and the published ones.
PUBLISHED_MODEL_TYPES = (BD3LMForMaskedLM.config_class.model_type, "mdlm", None)
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
    The class that loads a checkpoint, or an adapter's base: that of the published network, in any format of it, or of
    the stock networks, which reads the published families.

    Args:
        name_or_path: Folder or Hub id.

    Raises:
        ValueError: it is a model of Transformers, which `bd3lm adapt` makes a block diffusion model of.
        OSError: there is no such checkpoint.
    """
    model_type = model_type_of(name_or_path)
    if model_type in CONFIG_MAPPING_NAMES and model_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"`model` must be a block diffusion model, but {str(name_or_path)!r} is a {model_type!r}, which `bd3lm "
            "adapt` makes one of."
        )
    return BD3LMForMaskedLM if model_type in PUBLISHED_MODEL_TYPES else BlockDiffusionForMaskedLM


def load_language_model(name_or_path: str | Path, **options: Any) -> PreTrainedModel:
    """
    A block diffusion language model with all its weights, in evaluation mode; see [`load_whole`].

    Args:
        name_or_path: Folder or Hub id.
        options: `device`, and further arguments of `from_pretrained`.

    Raises:
        ValueError: see [`load_whole`] and [`language_model_class`].
    """
    return load_whole(language_model_class(name_or_path), name_or_path, **options)


def dropout_of(config: PreTrainedConfig) -> float:
    """The largest dropout probability in a configuration or its network's."""
    found = (stock_config(config) or config).to_dict()
    names = [name for name in found if name.endswith(("dropout", "_pdrop")) and isinstance(found[name], (int, float))]
    return max((found[name] for name in names), default=0.0)
