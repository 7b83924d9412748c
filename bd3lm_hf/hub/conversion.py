"""
Published checkpoints <-> this package's format: one table of names, read in both directions.

The published format is that of `kuleshov-group/bd3lm-owt-*` and `kuleshov-group/mdlm-owt` on the Hub. Importing the
package hands the table to Transformers, so that `from_pretrained` of [`BD3LMForMaskedLM`] and [`BD3LMModel`] reads
such a folder or repository as it is; [`convert_checkpoint`] writes it in this package's format. Families of adapted
networks have a table of their own, in `families.py`.
"""

import copy
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming, WeightTransform

from ..data.replacing import check_folder
from ..evaluation.loading import check_finite, load_whole, told_as_value_error
from ..evaluation.networks import PUBLISHED_MODEL_TYPES
from ..modeling.configuration_bd3lm import BD3LMConfig
from ..modeling.configuration_causal_lm import BlockDiffusionConfig
from ..modeling.modeling_bd3lm import BD3LMForMaskedLM, BD3LMPreTrainedModel
from ..modeling.modeling_causal_lm import BlockDiffusionForMaskedLM
from .families import fields_of, load_family
from .published_files import replaced_model
from .published_format import from_whole_checkpoint, read_published_fields


# In the order in which the published code registers its parameters: its moving averages are a list in that order.
PUBLISHED_NAMES = {
    "backbone.vocab_embed.embedding": ("model.embed_tokens.weight",),
    "backbone.sigma_map.mlp.0.weight": ("model.noise_embedding.linear_1.weight",),
    "backbone.sigma_map.mlp.0.bias": ("model.noise_embedding.linear_1.bias",),
    "backbone.sigma_map.mlp.2.weight": ("model.noise_embedding.linear_2.weight",),
    "backbone.sigma_map.mlp.2.bias": ("model.noise_embedding.linear_2.bias",),
    "backbone.blocks.{layer}.norm1.weight": ("model.layers.{layer}.input_layernorm.weight",),
    "backbone.blocks.{layer}.attn_qkv.weight": (
        "model.layers.{layer}.self_attn.q_proj.weight",
        "model.layers.{layer}.self_attn.k_proj.weight",
        "model.layers.{layer}.self_attn.v_proj.weight",
    ),
    "backbone.blocks.{layer}.attn_out.weight": ("model.layers.{layer}.self_attn.o_proj.weight",),
    "backbone.blocks.{layer}.norm2.weight": ("model.layers.{layer}.post_attention_layernorm.weight",),
    "backbone.blocks.{layer}.mlp.0.weight": ("model.layers.{layer}.mlp.up_proj.weight",),
    "backbone.blocks.{layer}.mlp.0.bias": ("model.layers.{layer}.mlp.up_proj.bias",),
    "backbone.blocks.{layer}.mlp.2.weight": ("model.layers.{layer}.mlp.down_proj.weight",),
    "backbone.blocks.{layer}.mlp.2.bias": ("model.layers.{layer}.mlp.down_proj.bias",),
    "backbone.blocks.{layer}.adaLN_modulation.weight": ("model.layers.{layer}.adaln_modulation.weight",),
    "backbone.blocks.{layer}.adaLN_modulation.bias": ("model.layers.{layer}.adaln_modulation.bias",),
    "backbone.output_layer.norm_final.weight": ("model.norm.weight",),
    "backbone.output_layer.linear.weight": ("lm_head.weight",),
    "backbone.output_layer.linear.bias": ("lm_head.bias",),
    "backbone.output_layer.adaLN_modulation.weight": ("model.adaln_modulation.weight",),
    "backbone.output_layer.adaLN_modulation.bias": ("model.adaln_modulation.bias",),
}
# Buffers of the published model: the configuration says the same.
PUBLISHED_BUFFERS = ("backbone.rotary_emb.inv_freq", "sampling_eps_min", "sampling_eps_max")
# What the published training code keeps in its `state_dict` beside the model.
TRAINING_PREFIXES = ("noise.", "metrics.", "train_metrics.", "valid_metrics.", "test_metrics.", "gen_ppl_metric.")


RESAVING_RECIPE = """\
    import torch
    from omegaconf import OmegaConf
    checkpoint = torch.load("old.ckpt", map_location="cpu", weights_only=False)
    config = checkpoint["hyper_parameters"]["config"]
    keys = ("algo", "block_size", "model", "noise", "parameterization", "time_conditioning", "training")
    config = OmegaConf.masked_copy(config, [key for key in keys if key in config])
    kept = {key: checkpoint[key] for key in ("state_dict", "ema") if key in checkpoint}
    kept["hyper_parameters"] = {"config": OmegaConf.to_container(config, resolve=True)}
    torch.save(kept, "new.ckpt")"""


class SplitQueryKeyValue(Chunk):
    """The published fused projection [3 x hidden, hidden] as its three parts; the reverse concatenates them."""

    def convert(self, input_dict, source_patterns, target_patterns, config=None, **kwargs):
        fused = next(iter(input_dict.values()))
        fused = fused[0] if isinstance(fused, list) else fused
        # Tensor parallelism hands over a slice of the rows, whose thirds are not the query, the key and the value.
        if config is not None and fused.shape[0] != 3 * config.hidden_size:
            raise ValueError(
                f"A fused projection in the published format must have 3 x `hidden_size` = {3 * config.hidden_size} "
                f"rows, but {fused.shape[0]} arrived. To load it split over several devices, write it with "
                "`convert_checkpoint` (`bd3lm convert`) first and load what that wrote."
            )
        return super().convert(input_dict, source_patterns, target_patterns, config=config, **kwargs)


def weight_transforms() -> list[WeightTransform]:
    """[`PUBLISHED_NAMES`] as the entries by which Transformers loads (and can reverse) a checkpoint."""
    transforms = []
    for published, names in PUBLISHED_NAMES.items():
        target = names[0]
        if len(names) > 1:
            # A converter's names carry no layer number: the fused tensor first moves into its layer as it is.
            layer_prefix, fused = "model.layers.{layer}.", published.removeprefix("backbone.blocks.{layer}.")
            target = layer_prefix + fused
            parts = [name.removeprefix(layer_prefix) for name in names]
            transforms.append(WeightConverter(fused, parts, operations=[SplitQueryKeyValue(dim=0)]))
        source = "^" + re.escape(published).replace(re.escape("{layer}"), r"(\d+)")
        transforms.append(WeightRenaming(source, target.replace("{layer}", r"\1")))
    return transforms


def register_published_format() -> None:
    """Makes the configuration and `from_pretrained` of this package's models read the published names too."""
    BD3LMConfig.read_published_fields = read_published_fields
    BD3LMPreTrainedModel.from_pretrained = classmethod(from_whole_checkpoint)
    for class_name in ("BD3LMForMaskedLM", "BD3LMModel"):
        register_checkpoint_conversion_mapping(class_name, weight_transforms(), overwrite=True)


def published_parameters(num_hidden_layers: int, adaln: bool) -> dict[str, tuple[str, ...]]:
    """
    The table for one model: published name -> the names it has here, in the order of the published `parameters()`.

    Args:
        num_hidden_layers: number of transformer layers.
        adaln: whether the model is modulated by the noise level; otherwise it has none of those parameters.
    """
    parameters = {}
    for per_layer, entries in groupby(PUBLISHED_NAMES.items(), key=lambda entry: "{layer}" in entry[0]):
        entries = [entry for entry in entries if adaln or not re.search("adaLN|sigma_map", entry[0])]
        for layer in range(num_hidden_layers if per_layer else 1):
            for published, names in entries:
                parameters[published.format(layer=layer)] = tuple(name.format(layer=layer) for name in names)
    return parameters


def _parameters_of(state_dict: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, ...]]:
    """
    The table for the model that a published `state_dict` belongs to.

    Raises:
        ValueError: it lacks a tensor of such a model, or has one that no such model has; the message names them.
    """
    layers = [int(match[1]) for name in state_dict if (match := re.match(r"backbone\.blocks\.(\d+)\.", name))]
    if max(layers, default=0) >= len(state_dict):
        raise ValueError(
            f"`state_dict` must hold the tensors of all layers, but it has {len(state_dict)} and a layer "
            f"{max(layers)}."
        )
    adaln = any(re.search("adaLN|sigma_map", name) for name in state_dict)
    parameters = published_parameters(max(layers, default=0) + 1, adaln)
    missing = [name for name in parameters if name not in state_dict]
    surplus = [name for name in state_dict if name not in parameters and name not in PUBLISHED_BUFFERS]
    if missing or surplus:
        raise ValueError(
            "`state_dict` must hold the tensors of a model in the published format and nothing else, but "
            f"it lacks {missing or 'none'} and has {surplus or 'none'} beyond them."
        )
    return parameters


def from_published_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Published weights under the names of [`BD3LMForMaskedLM`].

    Args:
        state_dict: published name -> tensor, linear weights [out, in]. Its buffers (rotary frequencies, noise
            interval) may be there; they are left out, because the configuration owns them.

    Returns:
        Name -> tensor; the parts of the fused projections, [out, in] of [parts * out, in], are views.

    Raises:
        ValueError: a tensor is missing or surplus.
    """
    converted = {}
    for published, names in _parameters_of(state_dict).items():
        converted.update(zip(names, state_dict[published].chunk(len(names))))
    return converted


def to_published_state_dict(model: BD3LMForMaskedLM) -> dict[str, torch.Tensor]:
    """
    The weights of `model` as the published code loads them: published names, fused projections, and its buffers
    (`sampling_eps_min` and `sampling_eps_max` hold `config.noise_interval`).

    Returns:
        Published name -> tensor, linear weights [out, in]; those that are fused there are copies, others are shared.
    """
    config, state_dict = model.config, model.state_dict()
    published = {}
    for name, names in published_parameters(config.num_hidden_layers, config.adaln).items():
        tensors = [state_dict[part] for part in names]
        published[name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    frequencies = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    buffers = (1.0 / config.rope_theta**frequencies, *map(torch.tensor, config.noise_interval))
    return {**published, **dict(zip(PUBLISHED_BUFFERS, buffers))}


def convert_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    use_ema: bool = True,
    *,
    overwrite: bool = False,
    num_attention_heads: int | None = None,
    block_size: int | None = None,
    max_position_embeddings: int | None = None,
    mask_token_id: int | None = None,
    shift_logits: bool | str | None = None,
) -> BD3LMForMaskedLM | BlockDiffusionForMaskedLM:
    """
    Writes a published checkpoint in this package's format: weights, configuration, generation configuration, the
    remote code beside them, and the tokenizer if one is given.

    Args:
        source: a folder or a Hub repository id in the published format, or a Lightning `.ckpt` file of the published
            training code. A `.ckpt` is read with `torch.load(weights_only=True)`: its sizes are those of its tensors,
            the rest comes from `hyper_parameters` if these are plain dictionaries. Or a checkpoint of a family of
            adapted networks, which is written with its own decoding as the generation configuration.
        destination: the folder to write to, new or empty; not `source` itself. An interruption leaves what was there,
            or the whole model.
        tokenizer: the tokenizer of the model, as an object, a folder or a repository id. It is saved beside the model
            with a mask token, which is added if it has none; its special ids become the model's. A family's own, in
            `source`, is the default there.
        use_ema: take the moving averages of the weights rather than the last step's. A `.ckpt` has both; what lies on
            the Hub has been averaged already.
        overwrite: take the place of a model in `destination`, nothing of which stays, or of a file. What else lies
            there stays.
        num_attention_heads, block_size, max_position_embeddings: what a `.ckpt` without readable `hyper_parameters`
            does not say. A block size equal to `max_position_embeddings` is a masked diffusion model. A family may
            leave the block size open.
        mask_token_id: id of the mask token, if the training tokenizer had one of its own; the last id otherwise. Of a
            family, where neither its configuration nor its tokenizer says it.
        shift_logits: of a family, in place of its usual shift; see [`BlockDiffusionConfig`].

    Returns:
        The model as it was written.

    Raises:
        ValueError: `source` is not in the published format, has missing or surplus tensors, holds objects that
            `weights_only=True` refuses, lacks moving averages or has some of other shapes, or leaves a size open; or
            the vocabulary of `tokenizer` is not that of the model; or `destination` is a file or holds something.
    """
    source_path = Path(source)
    if source_path.exists() and source_path.resolve() == Path(destination).resolve():
        raise ValueError(f"`destination` must be another folder than `source`, but both are {str(destination)!r}.")
    check_folder("destination", destination, overwrite)
    options = {
        "num_attention_heads": num_attention_heads,
        "block_size": block_size,
        "max_position_embeddings": max_position_embeddings,
    }
    is_checkpoint = source_path.suffix == ".ckpt" and not source_path.is_dir()
    is_folder = not is_checkpoint and not source_path.is_file()
    if is_folder and fields_of(source).get("model_type") not in PUBLISHED_MODEL_TYPES:
        options |= {"mask_token_id": mask_token_id, "shift_logits": shift_logits}
        model, tokenizer = _read_adapted(source, tokenizer, options)
        _write(destination, overwrite, model, tokenizer)
        return model
    if shift_logits is not None:
        raise ValueError(f"`shift_logits` must be None but for a family of adapted networks, but got {shift_logits}.")
    if is_checkpoint:
        with told_as_value_error(str(source), "source"):
            model = _load_lightning_checkpoint(source_path, use_ema, options)
        check_finite(model.state_dict().items(), str(source))
    elif not is_folder:
        raise ValueError(f"`source` must be a folder, a repository id or a file *.ckpt, but got {str(source)!r}.")
    else:
        given = {name: value for name, value in options.items() if value is not None}
        if given:
            raise ValueError(f"{given} were given, but only a `source` of the kind *.ckpt takes them; others say it.")
        model = load_whole(BD3LMForMaskedLM, source, dtype="auto")
        if not model.config.is_published_format:
            raise ValueError(
                "`source` must be in the published format, whose `config.json` has a `hidden_dim`, but "
                f"{str(source)!r} is not."
            )
    if mask_token_id is not None:
        vocab_size = model.config.vocab_size
        if not 0 <= mask_token_id < vocab_size:
            raise ValueError(f"`mask_token_id` must be an id 0 <= id < {vocab_size}, but got {mask_token_id}.")
        model.config.mask_token_id = mask_token_id
    if tokenizer is not None:
        tokenizer = _matching_tokenizer(tokenizer, model)
    _write(destination, overwrite, model, tokenizer)
    return model


def _write(destination: str | os.PathLike, overwrite: bool, *parts: Any) -> None:
    """Saves a model and its tokenizer, if there is one, in the place of what is at the destination."""
    with replaced_model(destination, overwrite) as folder:
        for part in parts:
            if part is not None:
                part.save_pretrained(folder)


def _read_adapted(
    source: str | os.PathLike,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None,
    options: dict[str, Any],
) -> tuple[BlockDiffusionForMaskedLM, PreTrainedTokenizerBase | None]:
    """[`load_family`] with the `options` of [`convert_checkpoint`] that it takes."""
    given = {name: value for name, value in options.items() if value is not None}
    if fields_of(source).get("model_type") == BlockDiffusionConfig.model_type:
        raise ValueError(
            f"`source` must be a published checkpoint, but {str(source)!r} is in this package's format already."
        )
    if surplus := sorted({"num_attention_heads", "max_position_embeddings"} & given.keys()):
        raise ValueError(f"`{surplus[0]}` must be None for a family of adapted networks, but got {given[surplus[0]]}.")
    return load_family(source, tokenizer, **given)


def _matching_tokenizer(
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase, model: BD3LMForMaskedLM
) -> PreTrainedTokenizerBase:
    """`tokenizer` with a mask token, by itself and the model's; the model takes over its special ids."""
    from ..data.tokenization import MASK_TOKEN, load_tokenizer

    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = copy.deepcopy(tokenizer)
        if tokenizer.mask_token is None:
            tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    else:
        tokenizer = load_tokenizer(os.fspath(tokenizer))
    config = model.config
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"`tokenizer` must have, with its mask token, as many tokens as the model, {config.vocab_size}, "
            f"but it has {len(tokenizer)}."
        )
    if tokenizer.mask_token_id != config.mask_token_id:
        raise ValueError(
            f"`tokenizer` must have a mask token of the model's `mask_token_id` {config.mask_token_id}, but "
            f"{tokenizer.mask_token!r} is {tokenizer.mask_token_id}. If the model was trained with that one, give it "
            "as `mask_token_id`."
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for owner in (config, model.generation_config):
            setattr(owner, name, getattr(tokenizer, name))
    return tokenizer


def _load_lightning_checkpoint(path: Path, use_ema: bool, options: dict[str, int | None]) -> BD3LMForMaskedLM:
    """The model of a `.ckpt` of the published training code; see [`convert_checkpoint`]."""
    checkpoint = _read_pickle(path)
    state_dict = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict) or not all(isinstance(name, str) for name in state_dict):
        raise ValueError(f"`source` must be a Lightning checkpoint, but {str(path)!r} has no `state_dict`.")
    state_dict = _without_training_state(state_dict)
    if others := [name for name, value in state_dict.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"`state_dict` of {str(path)!r} must hold tensors, but {others[0]} is none.")
    parameters = _parameters_of(state_dict)
    config = _infer_config(checkpoint, state_dict, options)
    if use_ema:
        state_dict.update(_moving_averages(checkpoint, state_dict, list(parameters)))
    return BD3LMForMaskedLM.from_pretrained(None, config=config, state_dict=state_dict, dtype="auto")


def _read_pickle(path: Path) -> Any:
    # What torch wrote before version 1.6 is no archive, and cannot be mapped.
    is_archive = zipfile.is_zipfile(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        if not is_archive:
            raise
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        raise ValueError(
            f"`source` must be loadable by `torch.load(weights_only=True)`, but {str(path)!r} holds objects that this "
            f"refuses, because loading them may run any code: {', '.join(sorted(unsafe)) or error}. No exception is "
            "made for any of them. If you trust the file, write its weights and its configuration as plain data where "
            f"the training code is installed:\n\n{RESAVING_RECIPE}\n\nWithout its configuration, give "
            "`max_position_embeddings` and `block_size`."
        ) from error


def _without_training_state(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's own tensors under their published names, in their order."""
    kept = {}
    for name, tensor in state_dict.items():
        # `torch.compile` wraps modules, and a run that began from the Hub has that model as its backbone.
        name = name.replace("_orig_mod.", "").replace("backbone.backbone.", "backbone.")
        name = re.sub(r"^backbone\.(?=sampling_eps_)", "", name)
        if not name.startswith(TRAINING_PREFIXES):
            kept.setdefault(name, tensor)
    return kept


def _moving_averages(
    checkpoint: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor], parameters: list[str]
) -> dict[str, torch.Tensor]:
    """
    Name -> moving average, from the nameless list in which the published code keeps them.

    Raises:
        ValueError: there is no such list, or not one tensor of the right shape for each of `parameters`.
    """
    shadow = (checkpoint.get("ema") or {}).get("shadow_params")
    if shadow is None:
        raise ValueError(
            "`use_ema` takes the moving averages `ema.shadow_params` of `source`, but it has none. "
            "`use_ema=False` (`--no-ema`) takes the weights of its last step."
        )
    if [name for name in state_dict if name in set(parameters)] != parameters:
        raise ValueError(
            "`use_ema` relies on the order of the published code's parameters, but the `state_dict` of `source` has "
            "another, so that its nameless moving averages cannot be told apart. `use_ema=False` (`--no-ema`) takes "
            "the weights of its last step."
        )
    if len(shadow) != len(parameters):
        raise ValueError(
            f"`ema.shadow_params` of `source` must hold one tensor for each of the model's {len(parameters)} "
            f"parameters, but it holds {len(shadow)}."
        )
    for name, tensor in zip(parameters, shadow):
        if tensor.shape != state_dict[name].shape:
            raise ValueError(
                f"`ema.shadow_params` of `source` must follow the order of the model's parameters, but for {name} of "
                f"shape {tuple(state_dict[name].shape)} it holds one of shape {tuple(tensor.shape)}."
            )
    return {name: tensor.to(state_dict[name].dtype) for name, tensor in zip(parameters, shadow)}


def _infer_config(
    checkpoint: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor], options: dict[str, int | None]
) -> BD3LMConfig:
    """
    The configuration of a `.ckpt`: from the shapes of its tensors, `hyper_parameters["config"]`, or `options`.

    Raises:
        ValueError: something is left open, or an option contradicts the checkpoint; the message names the option.
    """
    recorded = (checkpoint.get("hyper_parameters") or {}).get("config") or {}
    model, training = recorded.get("model", {}), recorded.get("training", {})
    # The masked diffusion code that the published one grew out of keeps these at the top.
    algorithm = recorded.get("algo", recorded)
    parameterization = algorithm.get("parameterization", "subs")
    if parameterization != "subs":
        raise ValueError(
            f"`source` must be a masked diffusion model (parameterization 'subs'), but it is {parameterization!r}."
        )
    vocab_size, hidden_size = state_dict["backbone.vocab_embed.embedding"].shape
    frequencies = state_dict.get("backbone.rotary_emb.inv_freq")
    if frequencies is not None:
        num_attention_heads = hidden_size // (2 * len(frequencies))
    else:
        num_attention_heads = model.get("n_heads")
    num_attention_heads = _choose("num_attention_heads", num_attention_heads, options)
    length = _choose("max_position_embeddings", model.get("length"), options)
    block_size = recorded.get("block_size")
    if recorded and not algorithm.get("cross_attn", False):
        block_size = length
    block_size = _choose("block_size", block_size, options)

    parameters = _parameters_of(state_dict)
    fields = {
        "vocab_size": vocab_size,
        "hidden_dim": hidden_size,
        "n_blocks": sum(name.endswith(".norm1.weight") for name in parameters),
        "n_heads": num_attention_heads,
        "intermediate_size": len(state_dict["backbone.blocks.0.mlp.0.bias"]),
        "model_length": length,
        "block_size": block_size,
        "adaln": "backbone.sigma_map.mlp.0.bias" in parameters,
    }
    for field, section, key in (
        ("cond_dim", model, "cond_dim"),
        ("dropout", model, "dropout"),
        ("time_conditioning", algorithm, "time_conditioning"),
        ("ignore_bos", algorithm, "ignore_bos"),
        ("noise_schedule", recorded.get("noise", {}), "type"),
        ("sampling_eps_min", training, "sampling_eps_min"),
        ("sampling_eps_max", training, "sampling_eps_max"),
    ):
        if key in section:
            fields[field] = section[key]
    if fields["adaln"]:
        fields["cond_dim"] = len(state_dict["backbone.sigma_map.mlp.0.bias"])
    for name in ("sampling_eps_min", "sampling_eps_max"):
        if name in state_dict:
            # What the run ended with, in float32, whose tail of digits means nothing.
            fields[name] = round(state_dict[name].item(), 6)
    return BD3LMConfig(**fields)


def _choose(name: str, recorded: int | None, options: dict[str, int | None]) -> int:
    option = options[name]
    if recorded is None and option is None:
        raise ValueError(f"`source` does not say its `{name}` in a readable way: give `{name}` (an integer >= 1).")
    if recorded is not None and option is not None and recorded != option:
        raise ValueError(f"`{name}` must be that of `source`, {recorded}, but got {option}.")
    return option if recorded is None else recorded
