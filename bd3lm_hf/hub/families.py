"""
Published families of adapted networks, in one table: what their networks are, and where block size, mask token and
shift come from.

Their weights have the names of a stock network, so that only the configuration differs. Importing the package
registers their model types with Transformers, whose `from_pretrained` then reads such a folder or repository as it is;
[`convert_checkpoint`] writes it in this package's format.
"""

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..modeling.configuration_causal_lm import BlockDiffusionConfig
from ..modeling.generation_block_diffusion import BD3LMGenerationConfig
from ..modeling.modeling_causal_lm import BlockDiffusionForMaskedLM


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        name: what the family calls itself.
        network: model type of the stock network that its weights belong to.
        block_size_field: of its `config.json`; where that is missing, `block_size` must be given.
        usual_block_size: what its scripts take, for the message that asks for it.
        shift_logits: as in [`BlockDiffusionConfig`].
        mask_token: what its tokenizer calls the mask token.
        mask_token_id: where neither `config.json` nor a tokenizer says it: the default of its code, if it has one.
        preset: its own decoding, as arguments of `generate`.
    """

    name: str
    network: str
    block_size_field: str
    usual_block_size: str
    shift_logits: bool | str
    mask_token: str
    mask_token_id: int | None = None
    preset: Mapping[str, Any] = field(default_factory=dict)


# SDAR's "low_confidence_dynamic" at its defaults, where the quota of a step is one token.
SDAR_PRESET = {"sampler": "confidence", "confidence_threshold": 0.85, "tokens_per_step": 1, "do_sample": True}
# The model card's threshold; the sub-blocks and the greedy choice are the defaults of its `generate`.
FAST_DLLM_PRESET = {"sampler": "confidence", "confidence_threshold": 0.9, "sub_block_size": 8, "do_sample": False}
# As many steps as tokens in a block (128 for 128 by default), and a new block right after the prompt.
A2D_PRESET = {"sampler": "confidence", "new_block": True, "do_sample": False}
# Of the model card.
EFFICIENT_DLM_PRESET = {
    "sampler": "confidence",
    "confidence_threshold": 0.9,
    "do_sample": True,
    "temperature": 0.7,
}


def _sdar(network: str) -> Family:
    return Family("SDAR and TraDo", network, "block_size", "4", False, "<|MASK|>", preset=SDAR_PRESET)


def _a2d(network: str) -> Family:
    return Family("dLLM A2D and OPDLM", network, "block_size", "32", False, "<|mask|>", preset=A2D_PRESET)


# By the `model_type` of their `config.json`.
FAMILIES = {
    "sdar": _sdar("qwen3"),
    "sdar_moe": _sdar("qwen3_moe"),
    "Fast_dLLM_Qwen": Family(
        "Fast-dLLM v2", "qwen2", "bd_size", "32", "noisy", "|<MASK>|", 151665, preset=FAST_DLLM_PRESET
    ),
    "a2d-qwen2": _a2d("qwen2"),
    "a2d-qwen3": _a2d("qwen3"),
    "a2d-llama": _a2d("llama"),
}
# Its model type is the stock network's; the class in its `auto_map` tells it apart.
EFFICIENT_DLM = Family(
    "Efficient-DLM", "qwen3", "block_size", "64 in training and 32 to generate", False, "<|mask|>",
    preset=EFFICIENT_DLM_PRESET,
)  # fmt: skip
OWN_NETWORK = "has a network of its own, which is none of Transformers' classes; use %s"
REFUSED = {
    "llada2_moe": OWN_NETWORK % "its own code, or SGLang, which serves `LLaDA2MoeModelLM`",
    "nemotron_labs_diffusion": OWN_NETWORK % "its own code with `trust_remote_code=True`",
    "nemotron_labs_diffusion_vlm": OWN_NETWORK % "its own code with `trust_remote_code=True`",
    "Dream": OWN_NETWORK % "its own code with `trust_remote_code=True`, or adapt Qwen2.5 with `from_causal_lm`",
    "llada": OWN_NETWORK % "its own code with `trust_remote_code=True`, or adapt Llama with `from_causal_lm`",
    "diffusion_gemma": "is native to Transformers; use its `DiffusionGemmaForBlockDiffusion`",
}
# Of every layer these families see the whole text; the rest concerns training code or the classes that read it.
UNREAD_FIELDS = (
    "architectures",
    "attn_implementation",
    "auto_map",
    "dtype",
    "layer_types",
    "max_window_layers",
    "model_type",
    "quantization_config",
    "sliding_window",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "use_sliding_window",
)
HUB_ARGUMENTS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")


def family_of(fields: Mapping[str, Any]) -> Family:
    """
    The family that the `fields` of a `config.json` belong to.

    Raises:
        ValueError: it is none of the table; the message says what to use instead.
    """
    model_type = fields.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type == EFFICIENT_DLM.network and fields.get("auto_map"):
        return EFFICIENT_DLM
    fault = REFUSED.get(
        model_type,
        "is another model; an autoregressive one is adapted with `BlockDiffusionForMaskedLM.from_causal_lm`",
    )
    raise ValueError(
        f"`model_type` must be {BlockDiffusionConfig.model_type!r} or that of a published family "
        f"({', '.join(FAMILIES)}, or qwen3 with a class of its own), but got {model_type!r}, which {fault}."
    )


def read_family(
    source: str | os.PathLike | None,
    fields: Mapping[str, Any],
    given: dict[str, Any],
    hub_arguments: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    The fields of a [`BlockDiffusionConfig`] for a published checkpoint.

    Args:
        source: its folder or repository, where a tokenizer may say the mask token.
        fields: those of its `config.json`.
        given: arguments of `from_pretrained`, of which `block_size`, `mask_token_id`, `shift_logits` and `ignore_bos`
            are read, and those taken away that the fields answer.
        hub_arguments: for the files of the tokenizer.

    Raises:
        ValueError: it is of no family of the table, or leaves the block size or the mask token open.
    """
    family = family_of(fields)
    stock = AutoConfig.for_model(family.network)
    names = [name for name in fields if hasattr(stock, name) or name in ("rope_scaling", "rope_theta")]
    network = {name: fields[name] for name in names if name not in UNREAD_FIELDS}
    block_size = fields.get(family.block_size_field)
    if block_size is None:
        block_size = given.pop("block_size", None)
    if block_size is None:
        raise ValueError(
            f"`block_size` must be given for this checkpoint of {family.name}, whose config.json has no "
            f"`{family.block_size_field}`, but got None; the published scripts take {family.usual_block_size}."
        )
    mask_token_id = given.pop("mask_token_id", None)
    if mask_token_id is None:
        mask_token_id = _mask_token_id(family, source, fields, hub_arguments or {})
    shift_logits = given.pop("shift_logits", family.shift_logits)
    read = {
        "model_type": BlockDiffusionConfig.model_type,
        "text_config": {**network, "model_type": family.network},
        "block_size": block_size,
        "mask_token_id": mask_token_id,
        "shift_logits": shift_logits,
        # Without a shift these families mask and score first tokens too.
        "ignore_bos": given.pop("ignore_bos", bool(shift_logits)),
        "predicts_mask_token": True,
        "dtype": fields.get("dtype", fields.get("torch_dtype")),
    }
    if fields.get("quantization_config") is not None:
        read["quantization_config"] = fields["quantization_config"]
    return read


def _mask_token_id(
    family: Family, source: str | os.PathLike | None, fields: Mapping[str, Any], hub_arguments: Mapping[str, Any]
) -> int:
    """The id of the mask token: of the configuration, the tokenizer, or the family's code; see [`read_family`]."""
    if fields.get("mask_token_id") is not None:
        return fields["mask_token_id"]
    mask_token_id = None if source is None else mask_token_of_folder(source, family.mask_token, **hub_arguments)
    if mask_token_id is None and (family.mask_token_id or 0) < fields.get("vocab_size", 0):
        mask_token_id = family.mask_token_id
    if mask_token_id is None:
        raise ValueError(
            f"`mask_token_id` must be given for this checkpoint of {family.name}, whose config.json does not say it "
            f"and beside which lies no tokenizer with a mask token (such as {family.mask_token}), but got None."
        )
    return mask_token_id


def read_json(source: str | os.PathLike, name: str, **hub_arguments: Any) -> dict[str, Any]:
    """What a file of a folder or repository says; nothing where there is none."""
    chosen = {name: hub_arguments[name] for name in HUB_ARGUMENTS if hub_arguments.get(name) is not None}
    # Another fault of the repository shows when the model is loaded.
    missing_is_no_error = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    path = cached_file(os.fspath(source), name, **missing_is_no_error, **chosen)
    return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def has_tokenizer(source: str | os.PathLike) -> bool:
    """Whether a tokenizer lies in a folder or repository."""
    return any(read_json(source, name) for name in ("tokenizer_config.json", "tokenizer.json"))


def mask_token_of_folder(source: str | os.PathLike, mask_token: str, **hub_arguments: Any) -> int | None:
    """
    The id of the mask token of the tokenizer in a folder or repository: the one that it declares, otherwise the token
    called `mask_token`; None where there is none. The files are read as data, and no code that lies with them runs.
    """

    def read(name: str) -> dict[str, Any]:
        return read_json(source, name, **hub_arguments)

    config = read("tokenizer_config.json")
    declared = config.get("mask_token") or read("special_tokens_map.json").get("mask_token") or mask_token
    content = declared["content"] if isinstance(declared, dict) else declared
    tokenizer = read("tokenizer.json")
    ids = dict(read("added_tokens.json"))
    ids |= {token["content"]: int(index) for index, token in config.get("added_tokens_decoder", {}).items()}
    ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    return ids.get(content, vocabulary.get(content) if isinstance(vocabulary, dict) else None)


class FamilyConfig(PreTrainedConfig):
    """The configuration of a published family, as far as `AutoConfig` meets it: it reads as another class."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """A [`BlockDiffusionConfig`]; see [`read_family`] for what is raised."""
        fields = read_family(kwargs.get("name_or_path"), config_dict, kwargs)
        return BlockDiffusionConfig.from_dict(fields, **kwargs)


def register_families() -> None:
    """Makes `from_pretrained`, that of `AutoModelForMaskedLM` included, read the families of the table."""
    for model_type in FAMILIES:
        AutoConfig.register(model_type, type("FamilyConfig", (FamilyConfig,), {"model_type": model_type}))
    BlockDiffusionConfig.read_other_format = staticmethod(read_family)


def fields_of(source: str | os.PathLike) -> dict[str, Any]:
    """The fields of the `config.json` in a folder or repository, as they are."""
    return PreTrainedConfig.get_config_dict(os.fspath(source))[0]


def generation_preset(
    family: Family, model: BlockDiffusionForMaskedLM, tokenizer: PreTrainedTokenizerBase | None = None
) -> BD3LMGenerationConfig:
    """The family's own decoding, with the special tokens of the model or of its tokenizer."""
    ids = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids[name] = getattr(model.generation_config, name)
        if ids[name] is None:
            ids[name] = getattr(tokenizer, name, None)
    return BD3LMGenerationConfig(**family.preset, **ids)


def load_family(
    source: str | os.PathLike, tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None, **given: Any
) -> tuple[BlockDiffusionForMaskedLM, PreTrainedTokenizerBase | None]:
    """
    A checkpoint of a published family, with its own decoding as the generation configuration, and its tokenizer, if it
    has one; the arguments are those of [`convert_checkpoint`], `given` what the family leaves open.

    Raises:
        ValueError: it is of no family of the table, leaves something open, or its weights are not those of the stock
            network; or the tokenizer has no token of the mask's id.
    """
    family = family_of(fields_of(source))
    source = os.fspath(source)
    model, report = BlockDiffusionForMaskedLM.from_pretrained(source, dtype="auto", output_loading_info=True, **given)
    faults = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if faults:
        raise ValueError(
            f"`source` must hold the weights of the network {family.network!r} and nothing else, but got {faults}."
        )
    if tokenizer is None and has_tokenizer(source):
        tokenizer = source
    if tokenizer is not None:
        tokenizer = tokenizer_of_family(tokenizer, model)
    model.generation_config = generation_preset(family, model, tokenizer)
    return model, tokenizer


def tokenizer_of_family(
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase, model: BlockDiffusionForMaskedLM
) -> PreTrainedTokenizerBase:
    """
    The tokenizer with the model's mask token as its own.

    Raises:
        ValueError: it has no token of the model's `mask_token_id`, or can't be loaded.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = copy.deepcopy(tokenizer)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(os.fspath(tokenizer), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`tokenizer` must be one, or a folder or repository from which it loads without code of its own, but "
                f"got {str(tokenizer)!r}: {error}"
            ) from error
    wanted = model.config.mask_token_id
    if tokenizer.mask_token_id != wanted:
        token = tokenizer.convert_ids_to_tokens(wanted) if wanted < len(tokenizer) else None
        if token is None:
            raise ValueError(
                f"`tokenizer` must have a token of the model's `mask_token_id` {wanted}, but got one of "
                f"{len(tokenizer)} tokens without it."
            )
        tokenizer.mask_token = token
    return tokenizer
