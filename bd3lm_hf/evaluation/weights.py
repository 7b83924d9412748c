"""Whether a checkpoint holds every tensor of its model, of the right shape, and numbers in all of them."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, find_adapter_config_file

from ..modeling.configuration_bd3lm import BD3LMConfig
from ..modeling.modeling_bd3lm import BD3LMForMaskedLM, BD3LMModel


# So many names stand in an error; the rest is counted.
MOST_NAMES = 6
# Of the arguments of `from_pretrained`, those that say where on the Hub something is.
WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def load_whole(model_class: Any, checkpoint: str | Path, **options: Any) -> Any:
    """
    `model_class.from_pretrained`, for a model that is to be used as it is.

    Transformers initializes what a checkpoint lacks at random and says so in a log, which suits whoever is about to
    train it; what is computed with such a model would be silently wrong.

    Args:
        model_class: `BD3LMForMaskedLM`, or an Auto class of Transformers.
        checkpoint: Folder or Hub id.
        options: As `from_pretrained` takes them.

    Raises:
        ValueError: as [`check_weights`].
    """
    adapter = find_adapter_config_file(checkpoint, **{name: options[name] for name in WHERE if name in options})
    if adapter is not None:
        # What was missing in the base, Transformers does not tell.
        base = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
        load_whole(model_class, base, **{name: value for name, value in options.items() if name != "revision"})
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, loading_info = model_class.from_pretrained(checkpoint, **options)
    check_weights(model, loading_info, checkpoint)
    return model


def check_weights(model: Any, loading_info: Mapping[str, Any] | None = None, checkpoint: str | Path = "") -> None:
    """
    Whether a model has the weights of its checkpoint, all of them, and numbers in them.

    Args:
        model: Any model of Transformers, with or without an adapter.
        loading_info: What `from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)` returned with
            it. None if it was not loaded.
        checkpoint: Where it came from, for the error.

    Raises:
        ValueError: tensors were missing, or of another shape than the configuration says; a BD3-LM's checkpoint has
            others than the model; a tensor holds NaN, or infinities other than the -inf of a bias. The message names
            them.
    """
    info = loading_info or {}
    shapes = [f"{name} {tuple(there)} for {tuple(here)}" for name, there, here in info.get("mismatched_keys", ())]
    is_ours = model.config.model_type == BD3LMConfig.model_type
    _refuse(
        checkpoint or getattr(model, "name_or_path", ""),
        missing=info.get("missing_keys", ()),
        shapes=shapes,
        surplus=info.get("unexpected_keys", ()) if is_ours else (),
        # Tied weights have two names; the state dict would copy those of some quantizers.
        no_numbers=[
            name for name, weight in [*model.named_parameters(), *model.named_buffers()] if not holds_numbers(weight)
        ],
    )


def check_saved_weights(folder: str | Path, files: Sequence[str]) -> None:
    """
    As [`check_weights`], of a saved BD3-LM or adapter, without loading it: tensors are read one after the other.

    Those of a quantized model have names and shapes of their quantizer, and only their numbers are looked at. What an
    adapter changes is known to its base alone; here each of its pairs of matrices must be whole and fit together.

    Args:
        folder: The folder.
        files: Names of the files of its weights, which are safetensors.

    Raises:
        ValueError: as `check_weights`; or a file is cut short.
    """
    folder = Path(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    no_numbers = []
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(key)
                    shapes[key] = tuple(tensor.shape)
                    if not holds_numbers(tensor):
                        no_numbers.append(key)
        except SafetensorError as error:
            raise ValueError(
                f"`checkpoint` ({folder}) holds no whole model: {name} is cut short ({error})."
            ) from error
    if not (folder / CONFIG_NAME).is_file() or "adapter_model.safetensors" in files:
        expected = _of_whole_pairs(shapes)
    elif "quantization_config" in json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")):
        expected = shapes
    else:
        expected = _of_model(BD3LMConfig.from_pretrained(folder), shapes)
    differing = shapes.keys() & expected.keys()
    _refuse(
        folder,
        missing=expected.keys() - shapes.keys(),
        shapes=[f"{name} {shapes[name]} for {expected[name]}" for name in differing if shapes[name] != expected[name]],
        surplus=shapes.keys() - expected.keys(),
        no_numbers=no_numbers,
    )


def holds_numbers(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any shape is free of NaN and infinities; a bias may be -inf, for what must never come."""
    # Types of a byte are a quantizer's, a subclass is its packing, and a meta tensor's numbers are elsewhere.
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta"
    if not (is_plain and tensor.is_floating_point() and tensor.element_size() > 1):
        return True
    if tensor.isfinite().all():
        return True
    return tensor.dim() == 1 and not bool((tensor.isnan() | (tensor == math.inf)).any())


def _of_model(config: BD3LMConfig, saved: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shapes that a configuration asks for; of the layers that are not there, one, whatever number it names."""
    layers = [int(match[1]) for name in saved if (match := re.match(r"(?:model\.)?layers\.(\d+)\.", name))]
    config.num_hidden_layers = min(config.num_hidden_layers, max(layers, default=-1) + 2)
    model_class = BD3LMModel if config.architectures == [BD3LMModel.__name__] else BD3LMForMaskedLM
    with torch.device("meta"):
        model = model_class(config)
    tied = (model._tied_weights_keys or ()) if config.tie_word_embeddings else ()
    return {
        name: tuple(weight.shape) for name, weight in model.state_dict().items() if name not in tied or name in saved
    }


def _of_whole_pairs(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter in which every matrix A [rank, in] has its B [out, rank]."""
    expected = dict(shapes)
    for name in shapes:
        first, second = (re.sub(r"(lora_(?:embedding_)?)[AB]\b", rf"\g<1>{letter}", name) for letter in "AB")
        if first != second:
            expected.setdefault(first, ())
            expected[second] = ()
            if first in shapes and second in shapes:
                expected[second] = (shapes[second][0], shapes[first][0], *shapes[second][2:])
    return expected


def _refuse(checkpoint: str | Path, **faults: Iterable[str]) -> None:
    told = {
        "missing": "it lacks {}",
        "shapes": "it has other shapes than the configuration asks for: {}",
        "surplus": "the model has no {}",
        "no_numbers": "there are NaN or infinities in {}",
    }
    found = []
    for kind, names in faults.items():
        if names := sorted(names):
            rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            found.append(told[kind].format(", ".join(names[:MOST_NAMES]) + rest))
    if found:
        raise ValueError(f"`checkpoint` ({checkpoint}) must hold the whole model, but {'; '.join(found)}.")
