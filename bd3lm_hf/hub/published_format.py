"""Published checkpoints (kuleshov-group/bd3lm-owt-block_size4, mdlm-owt): their fields, and all of their tensors."""

from typing import Any

from ..modeling.configuration_bd3lm import PUBLISHED_FIELDS, BD3LMConfig
from ..modeling.modeling_bd3lm import BD3LMPreTrainedModel


def read_published_fields(config: BD3LMConfig, given: dict[str, Any]) -> None:
    """
    Sets the fields of a configuration that is being made.

    Args:
        config: its fields are changed.
        given: arguments that are no fields of it; those under published names are taken out.

    Raises:
        ValueError: the checkpoint is the published autoregressive baseline, or another model.
    """
    model_type = given.get("model_type", config.model_type)
    if model_type not in (config.model_type, "mdlm") and "hidden_dim" not in given:
        advice = "`AutoModelForMaskedLM` finds the class of a block diffusion model by its type"
        raise ValueError(f"`model_type` must be {config.model_type!r} or 'mdlm', but got {model_type!r}: {advice}.")
    config.is_published_format = "hidden_dim" in given
    for published, field in PUBLISHED_FIELDS.items():
        if published in given:
            setattr(config, field, given.pop(published))
    if given.pop("causal", False):
        rule = "`causal` must be false; a BD3-LM of `block_size` 1 is the autoregressive model of this package"
        got = "this is the published autoregressive baseline, which is no diffusion model"
        raise ValueError(f"`causal` is true: {got}. {rule}.")
    # "mdlm" checkpoints are older than `cross_attn` and `block_size`.
    if not given.pop("cross_attn", model_type != "mdlm"):
        config.block_size = config.max_position_embeddings
    if "sampling_eps_min" in given or "sampling_eps_max" in given:
        config.noise_interval = (given.pop("sampling_eps_min", 1e-3), given.pop("sampling_eps_max", 1.0))
    # Of the training run or of its machine; nothing here depends on them.
    for unused in ("attn_backend", "var_min"):
        given.pop(unused, None)
    if config.is_published_format:
        # Their `config.json` asks for tuples in place of outputs, and for remote code that no longer loads.
        config.return_dict, config.architectures = True, None
        given.pop("auto_map", None)


def from_whole_checkpoint(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs) -> Any:
    """
    `from_pretrained` of this package's models of a published network.

    Args:
        pretrained_model_name_or_path, model_args, kwargs: as in `PreTrainedModel.from_pretrained`.
        output_loading_info: as there.

    Raises:
        ValueError: a checkpoint in the published format lacks tensors of the model or has others.
    """
    kwargs["output_loading_info"] = True
    inherited = super(BD3LMPreTrainedModel, cls).from_pretrained
    model, info = inherited(pretrained_model_name_or_path, *model_args, **kwargs)
    missing, unknown = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if model.config.is_published_format and (missing or unknown):
        raise ValueError(
            f"`pretrained_model_name_or_path` ({pretrained_model_name_or_path}) is a checkpoint in the published "
            f"format whose tensors must be exactly those of the model, but it lacks {missing} and has the unknown "
            f"{unknown}."
        )
    return (model, info) if output_loading_info else model
