"""Whether a saved folder holds every tensor of its model, of the right shape, and numbers in all of them."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME

from ..evaluation.loading import holds_numbers
from ..evaluation.networks import language_model_class
from ..modeling.modeling_bd3lm import BD3LMForMaskedLM, BD3LMModel
from ..modeling.modeling_causal_lm import BlockDiffusionModel


# So many names stand in an error; the rest is counted.
MOST_NAMES = 6


def check_saved_weights(folder: str | Path, files: Sequence[str]) -> None:
    """
    Whether the weights of a saved BD3-LM or adapter are what its configuration says; tensors are read one by one.

    Transformers initializes at random what is missing, and says so in a log: nobody should meet that in a model that
    was published.

    Those of a quantized model have names and shapes of their quantizer, and only their numbers are looked at. What an
    adapter changes is known to its base alone; here each of its pairs of matrices must be whole and fit together.

    Args:
        folder: The folder.
        files: Names of the files of its weights, which are safetensors.

    Raises:
        ValueError: tensors are missing, of another shape, or none of the model's; one holds NaN, or infinities other
            than the -inf of a bias; a file is cut short. The message names them.
    """
    folder = Path(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    no_numbers, not_floating = [], []
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(key)
                    shapes[key] = tuple(tensor.shape)
                    if not holds_numbers(tensor):
                        no_numbers.append(key)
                    if not tensor.is_floating_point():
                        not_floating.append(key)
        except SafetensorError as error:
            raise ValueError(
                f"`checkpoint` ({folder}) holds no whole model: {name} is cut short ({error})."
            ) from error
    if not (folder / CONFIG_NAME).is_file() or "adapter_model.safetensors" in files:
        expected = _of_whole_pairs(shapes)
    elif "quantization_config" in json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")):
        expected = shapes
    else:
        expected = _of_model(folder, shapes)
    differing = shapes.keys() & expected.keys()
    _refuse(
        folder,
        missing=expected.keys() - shapes.keys(),
        shapes=[f"{name} {shapes[name]} for {expected[name]}" for name in differing if shapes[name] != expected[name]],
        surplus=shapes.keys() - expected.keys(),
        no_numbers=no_numbers,
        not_floating=[] if expected is shapes else not_floating,
    )


def _of_model(folder: Path, saved: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shapes that a configuration asks for; of the layers that are not there, one, whatever number it names."""
    model_class = language_model_class(folder)
    config = model_class.config_class.from_pretrained(folder)
    layers = [int(match[1]) for name in saved if (match := re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.", name))]
    network = config.get_text_config(decoder=True)
    network.num_hidden_layers = min(network.num_hidden_layers, max(layers, default=-1) + 2)
    if getattr(network, "layer_types", None):
        network.layer_types = network.layer_types[: network.num_hidden_layers]
    if config.architectures in ([BD3LMModel.__name__], [BlockDiffusionModel.__name__]):
        model_class = BD3LMModel if model_class is BD3LMForMaskedLM else BlockDiffusionModel
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
        "not_floating": "there are no floating-point numbers in {}",
    }
    found = []
    for kind, names in faults.items():
        if names := sorted(names):
            rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            found.append(told[kind].format(", ".join(names[:MOST_NAMES]) + rest))
    if found:
        raise ValueError(f"`checkpoint` ({checkpoint}) must hold the whole model, but {'; '.join(found)}.")
