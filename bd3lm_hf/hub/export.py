"""
An adapted network leaves this package: as the SDAR that serving engines read, or as the autoregressive model again.

What the engines read was taken from their published sources (SGLang's `models/sdar.py` and `dllm/config.py`,
LMDeploy's `pytorch/models/sdar.py` and `pytorch/configurations/sdar.py`); none of them was run.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.replacing import check_folder
from ..evaluation.loading import load_whole
from ..modeling.modeling_causal_lm import BlockDiffusionForMaskedLM
from .families import has_tokenizer
from .published_files import replaced_model


FORMATS = ("sdar", "causal-lm")
ENGINES = "SGLang (0.5.x) and LMDeploy (0.16 and later)"
# Of the tokenizer of SDAR; both engines have it in their code.
SDAR_MASK_TOKEN, SDAR_MASK_TOKEN_ID = "<|MASK|>", 151669
# Stock model type -> (SDAR's model type, architecture, configuration class, stock configuration class).
SDAR_CLASSES = {
    "qwen3": ("sdar", "SDARForCausalLM", "SDARConfig", "Qwen3Config"),
    "qwen3_moe": ("sdar_moe", "SDARMoeForCausalLM", "SDARMoeConfig", "Qwen3MoeConfig"),
}
# The engines read configurations by an older Transformers, which knows no such model type.
CONFIGURATION_CODE = '''\
"""Configuration of an SDAR model, whose network is that of Transformers' {stock}."""

from transformers import {stock}


class {name}({stock}):
    model_type = "{model_type}"
'''


def export_checkpoint(
    model: BlockDiffusionForMaskedLM | str | os.PathLike,
    destination: str | os.PathLike,
    format: str,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None = None,
    overwrite: bool = False,
) -> PreTrainedModel:
    """
    Writes an adapted network in a format of others.

    Args:
        model: the model, or its folder or Hub id.
        destination: the folder to write, new or empty; not that of the model.
        format: "sdar", which SGLang and LMDeploy serve as `SDARForCausalLM`; or "causal-lm", the folder of the stock
            autoregressive class.
        tokenizer: that of the model, or a folder or Hub id; by default the one beside the model, if there is one.
        overwrite: take the place of a model in `destination`, nothing of which stays, or of a file.

    Returns:
        The stock model that was written, which shares the weights.

    Raises:
        ValueError: the format is none of these, or the model is not what it can hold; the message says what it must
            be.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}, but got {format!r}.")
    name = None if isinstance(model, PreTrainedModel) else os.fspath(model)
    if name is not None:
        if Path(name).exists() and Path(name).resolve() == Path(destination).resolve():
            raise ValueError(f"`destination` must be another folder than `model`, but both are {name!r}.")
        check_folder("destination", destination, overwrite)
        model = load_whole(BlockDiffusionForMaskedLM, name, dtype="auto")
    if not isinstance(model, BlockDiffusionForMaskedLM):
        raise ValueError(f"`model` must be a BlockDiffusionForMaskedLM, but got a {type(model).__name__}.")
    check = check_sdar if format == "sdar" else check_causal_lm
    check(model)
    tokenizer = _load_tokenizer(tokenizer, name)
    stock = to_causal_lm(model)
    with replaced_model(destination, overwrite) as folder:
        stock.save_pretrained(folder)
        if format == "sdar":
            write_sdar_configuration(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return stock


def _load_tokenizer(
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None, beside: str | None
) -> PreTrainedTokenizerBase | None:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if tokenizer is None and beside is not None and has_tokenizer(beside):
        tokenizer = beside
    return None if tokenizer is None else AutoTokenizer.from_pretrained(os.fspath(tokenizer))


def check_causal_lm(model: BlockDiffusionForMaskedLM) -> None:
    """Raises a ValueError where the network's outputs score their own token, and not the next one."""
    if not model.config.shift_logits:
        raise ValueError(
            "`shift_logits` must be true for the format 'causal-lm', whose class reads the output at a token as "
            "scores of the next one, but got False."
        )


def check_sdar(model: BlockDiffusionForMaskedLM) -> None:
    """Raises a ValueError that says what the engines require of an SDAR model and where this one differs."""
    config = model.config
    network = config.text_config
    required = {
        "`text_config` a Qwen3 (qwen3 or qwen3_moe)": (network.model_type in SDAR_CLASSES, network.model_type),
        "`shift_logits` False": (config.shift_logits is False, config.shift_logits),
        f"`mask_token_id` {SDAR_MASK_TOKEN_ID}": (config.mask_token_id == SDAR_MASK_TOKEN_ID, config.mask_token_id),
        "`clean_attention` 'block'": (config.clean_attention == "block", config.clean_attention),
        "`hidden_act` 'silu'": (getattr(network, "hidden_act", None) == "silu", getattr(network, "hidden_act", None)),
        "no sliding windows": (set(config.sliding_windows.values()) == {None}, config.sliding_windows),
    }
    faults = [f"{rule}, but got {value!r}" for rule, (holds, value) in required.items() if not holds]
    if faults:
        raise ValueError(
            f"`model` must be what {ENGINES} serve as SDARForCausalLM, which takes {'; '.join(faults)}. `bd3lm adapt "
            "--for sdar` chooses these at the start."
        )


def to_causal_lm(model: BlockDiffusionForMaskedLM) -> PreTrainedModel:
    """The stock autoregressive model of an adapted network, which shares its modules."""
    text_config = copy.deepcopy(model.config.text_config)
    ids = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text_config.dtype = model.dtype
    for name, value in ids.items():
        setattr(text_config, name, value)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(text_config)
    for name, module in model.named_children():
        setattr(stock, name, module)
    stock.tie_weights()
    for name in ids:
        if getattr(model.generation_config, name) is not None:
            ids[name] = getattr(model.generation_config, name)
    # Block diffusion never writes the mask token, and has not taught the network to avoid it.
    stock.generation_config = GenerationConfig(suppress_tokens=[model.config.mask_token_id], **ids)
    return stock.eval()


def write_sdar_configuration(model: BlockDiffusionForMaskedLM, folder: Path) -> None:
    """Turns the stock `config.json` in a folder into SDAR's, with the fields under the names of Transformers 4."""
    model_type, architecture, name, stock_name = SDAR_CLASSES[model.config.text_config.model_type]
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config["torch_dtype"] = config.pop("dtype", None)
    rope = config.pop("rope_parameters", {})
    config["rope_theta"] = rope.pop("rope_theta", config.get("rope_theta"))
    config["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    config |= {
        "architectures": [architecture],
        "auto_map": {"AutoConfig": f"configuration_{model_type}.{name}"},
        "block_size": model.config.block_size,
        "mask_token_id": model.config.mask_token_id,
        "model_type": model_type,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    for foreign in ("layer_types", "transformers_version"):
        config.pop(foreign, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    code = CONFIGURATION_CODE.format(stock=stock_name, name=name, model_type=model_type)
    (folder / f"configuration_{model_type}.py").write_text(code, encoding="utf-8")
