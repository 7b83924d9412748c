"""Loading a model that is whole: what its checkpoint lacks, or holds that is no number, is an error."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    is_peft_available,
)
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
from transformers.utils.peft_utils import find_adapter_config_file

from ..modeling.configuration_bd3lm import LARGEST


# What a folder says of its model.
JSON_FILES = (CONFIG_NAME, GENERATION_CONFIG_NAME, ADAPTER_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME)
# So many names tell what is wrong.
MOST_NAMES = 5


def load_whole(
    model_class: Any, name_or_path: str | Path, *, device: str | torch.device | None = None, **options: Any
) -> PreTrainedModel:
    """
    A model with all its weights, in evaluation mode on a device.

    Transformers draws at random what a checkpoint lacks, and goes on; here that is an error, raised before memory is
    taken for the weights.

    Args:
        model_class: Whose `from_pretrained` loads it: a model class, or an Auto class.
        name_or_path: Folder or Hub id of a checkpoint.
        device: Where to put it; see [`check_device`].
        options: Further arguments of `from_pretrained`.

    Raises:
        ValueError: the checkpoint cannot be read, lacks weights, has some that the model has not or that are of
            another shape, or that are NaN or infinite, or its configuration asks for an absurd size; the message names
            them. Also a device that there is not.
        SafetensorError: a file of weights is cut short.
        OSError: there is no such checkpoint.
    """
    if device is not None:
        device = check_device(device)
    name = str(name_or_path)
    check_json_files(name)
    with told_as_value_error(name):
        base = _base_of_adapter(name) or name
        config_class = getattr(model_class, "config_class", None) or AutoConfig
        config = config_class.from_pretrained(base, **_of_the_hub(options))
        check_size(config)
    # Names and shapes come first, without the weights: what is missing could be larger than the machine. What is told
    # of an adapter says nothing of its base.
    passes = [(base, {"device_map": "meta"}), (name, {})]
    is_quantized = "quantization_config" in options or getattr(config, "quantization_config", None) is not None
    for source, where in passes[1:] if is_quantized else passes:
        with told_as_value_error(source), _quiet(is_first_pass=bool(where)):
            model, info = model_class.from_pretrained(
                source, **{**options, "output_loading_info": True, "ignore_mismatched_sizes": True, **where}
            )
            if base != source:
                _load_rest_of_adapter(model, source, info, _of_the_hub(options))
        check_loading_info(info, source, model)
    check_finite(model.state_dict().items(), name)
    model.eval()
    return model if device is None else model.to(device)


def load_gguf(folder: str, gguf_file: str, **options: Any) -> PreTrainedModel:
    """
    An autoregressive model from a .gguf file, dense: for training and saving.

    Transformers keeps weights in their blocks where it finds kernels for them, and before 5.24 takes a model for
    quantized, which it then doesn't save, even after it unpacked everything.

    Args:
        folder: Folder or Hub id.
        gguf_file: The file in it.
        options: Further arguments of `from_pretrained`.

    Raises:
        ValueError: the file cannot be read, or holds NaN or infinite weights.
    """
    with told_as_value_error(folder, "source"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf_file, quantization_config=GgufConfig(dequantize=True), **options
        )
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    check_finite(model.state_dict().items(), folder)
    return model


def check_json_files(folder: str | Path) -> None:
    """
    Whether what a folder says of its model is JSON, and a mapping; without that, Transformers passes over some of it.

    Args:
        folder: The folder of a checkpoint. A Hub id, and a file that is not there, are passed over.

    Raises:
        ValueError: a file holds something else; the message names it.
    """
    for path in (Path(folder, name) for name in JSON_FILES):
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`{path.name}` of {str(folder)!r} must be JSON, but is not: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(
                f"`{path.name}` of {str(folder)!r} must be a JSON mapping, but got a {type(content).__name__}."
            )


def model_type_of(name_or_path: str | Path) -> str | None:
    """
    What the configuration of a checkpoint, or of an adapter's base, calls the kind of the model.

    Raises:
        ValueError: the configuration cannot be read.
        OSError: there is none.
    """
    name = str(name_or_path)
    check_json_files(name)
    with told_as_value_error(name):
        return PreTrainedConfig.get_config_dict(_base_of_adapter(name) or name)[0].get("model_type")


def check_loading_info(info: dict[str, Any], name: str, model: nn.Module) -> None:
    """
    Whether a model got each weight that it has, and a checkpoint held no more than that.

    A model of another kind than this package's may be a part of what its checkpoint holds, but not fewer layers.

    Args:
        info: What `from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)` returned.
        name: What the error calls the checkpoint.
        model: What was loaded.

    Raises:
        ValueError: it did not; the message names the weights.
    """
    faults = []
    if missing := sorted(info["missing_keys"]):
        faults.append(f"lacks {_some(missing)}")
    if mismatched := sorted(info["mismatched_keys"]):
        described = [f"{key} of shape {list(found)} for {list(wanted)}" for key, found, wanted in mismatched]
        faults.append(f"holds {_some(described)}")
    surplus = sorted(info["unexpected_keys"])
    if not hasattr(model, "token_nats"):
        of_a_layer = {re.sub(r"\d+", "*", key) for key in model.state_dict()}
        surplus = [key for key in surplus if re.sub(r"\d+", "*", key) in of_a_layer]
    if surplus:
        faults.append(f"holds {_some(surplus)}, which the model of its configuration has not")
    if faults:
        raise ValueError(f"`model` must be a whole checkpoint, but {name!r} {' and '.join(faults)}.")


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], name: str) -> None:
    """
    Whether weights are numbers.

    Args:
        tensors: Names and weights; integers are passed over, and what is offloaded.
        name: What the error calls the checkpoint.

    Raises:
        ValueError: there is NaN or infinity in one, other than -inf in a bias.
    """
    spoilt = [key for key, tensor in tensors if not holds_numbers(tensor)]
    if spoilt:
        raise ValueError(f"`model` must hold finite weights, but {name!r} has NaN or infinity in {_some(spoilt)}.")


def holds_numbers(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any shape is free of NaN and infinities; a bias may be -inf, for what must never come."""
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    # Types of eight bits have no such functions.
    tensor = tensor.float() if tensor.element_size() == 1 else tensor
    return bool(tensor.isfinite().all() or (tensor.dim() == 1 and (tensor < torch.inf).all()))


def check_size(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None) -> None:
    """
    Refuses what nobody could build, before it is built.

    Args:
        config: The configuration of a model.
        model_class: With it, a new model is to be made, which has to fit into memory.

    Raises:
        ValueError: a configuration asks for more layers than any network has, or for a new model whose float32 weights
            alone are larger than this machine's memory.
    """
    num_layers, most = getattr(config.get_text_config(), "num_hidden_layers", None), LARGEST["num_hidden_layers"]
    if isinstance(num_layers, int) and num_layers > most:
        raise ValueError(f"`num_hidden_layers` must be at most {most}, but got {num_layers}.")
    if model_class is None or "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return
    try:
        with torch.device("meta"):
            num_parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
    except RuntimeError as error:
        raise ValueError(f"`config` must describe a model that can be built, but: {error}") from error
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * num_parameters > memory:
        raise ValueError(
            f"`config` must describe a model that fits into this machine's memory, {memory / 2**30:,.0f} GiB, but its "
            f"{num_parameters:,} weights take {4 * num_parameters / 2**30:,.0f} GiB."
        )


def check_device(device: str | torch.device) -> torch.device:
    """
    The device of this name.

    Raises:
        ValueError: there is no such device on this machine.
    """
    try:
        # CUDA says only when it is used that it is not there, and in a build without it by an assertion.
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"`device` must be one of this machine, such as cpu, cuda or cuda:1, but got {str(device)!r}: {reason}"
        ) from error
    if found.type == "meta":
        raise ValueError("`device` must be one that holds numbers, such as cpu, cuda or cuda:1, but got 'meta'.")
    return found


def _base_of_adapter(name: str) -> str | None:
    """What an adapter's base is called; None of a checkpoint that is no adapter, or cannot be read as one."""
    path = find_adapter_config_file(name) if is_peft_available() else None
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))["base_model_name_or_path"]


def _load_rest_of_adapter(model: Any, name: str, info: dict[str, Any], hub_options: dict[str, Any]) -> None:
    """
    Lets PEFT load an adapter that has more than layers of its own: rows of `trainable_token_indices`, and
    `modules_to_save`. Of those older Transformers (5.17) knows the names in memory, but not those in files.

    Args:
        model: What Transformers made of the adapter; gets the adapter's weights.
        name: Folder or Hub id of the adapter.
        info: What Transformers says of the loading; gets what is missing and left over now.
        hub_options: Where on the Hub the adapter is.
    """
    if not info["missing_keys"] and not info["unexpected_keys"]:
        return
    from peft.utils.other import AuxiliaryTrainingWrapper
    from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    if not any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()):
        return
    hub_options = {key: value for key, value in hub_options.items() if key != "trust_remote_code"}
    weights = load_peft_weights(name, device="cpu", **hub_options)
    weights = {key.removeprefix("base_model.model."): weight for key, weight in weights.items()}
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    info["missing_keys"] = expected.keys() - weights.keys()
    info["unexpected_keys"] = weights.keys() - expected.keys()
    if not info["missing_keys"]:
        set_peft_model_state_dict(model, weights)


def _of_the_hub(options: dict[str, Any]) -> dict[str, Any]:
    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")
    return {name: options[name] for name in names if name in options}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


@contextlib.contextmanager
def told_as_value_error(name: str, argument: str = "model") -> Iterator[None]:
    """
    Within it a checkpoint is read; what its reader stumbles over is a ValueError that names the checkpoint, and what
    safetensors does a SafetensorError.

    A file that is cut short, or holds something else, fails wherever its reader happens to notice.
    """
    try:
        yield
    except (OSError, ValueError, ImportError):
        # Transformers and this package say themselves what is wrong.
        raise
    except Exception as error:
        told = SafetensorError if isinstance(error, SafetensorError) else ValueError
        raise told(
            f"`{argument}` must be a checkpoint that can be read, but {name!r} is not: {type(error).__name__}: {error}"
        ) from error


@contextlib.contextmanager
def _quiet(is_first_pass: bool) -> Iterator[None]:
    """Keeps back Transformers' table of what is missing, which the error tells in a line, and a first pass's bar."""
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "integrations.peft")]
    hides_bar = is_first_pass and is_progress_bar_enabled()
    for logger in loggers:
        logger.addFilter(_is_no_report)
    if hides_bar:
        disable_progress_bar()
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_no_report)
        if hides_bar:
            enable_progress_bar()


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()
