"""LoRA adapters of one model, of which each request names one, or none."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


# What a name of PEFT's may be, and what comes after the colon of `model`.
NAME = re.compile(r"[A-Za-z0-9_-]+")


class Adapters:
    """
    The adapters of a model, loaded beside each other. Forwards are run with one of them in use, or none, so that
    requests of several take turns.

    Args:
        model: a block diffusion language model without adapters, which is changed: its layers get theirs.
        folders: by name, the folder or Hub id of each adapter, as PEFT saves them.

    Raises:
        ValueError: a name is not of letters, digits, `_` and `-`; there is no such adapter, or it is none for this
            model.
        ImportError: PEFT is not installed.
    """

    def __init__(self, model: Any, folders: Mapping[str, str | Path]):
        for name in folders:
            if not NAME.fullmatch(name):
                raise ValueError(f"`adapter` must have a name of letters, digits, '_' and '-', but got {name!r}.")
        self.names = tuple(folders)
        self._in_use: str | None = None
        # Of PEFT's own class, which knows the model's layers; the model itself stays what is called.
        self._layers: Any = None
        for name, folder in folders.items():
            try:
                self._load(model, name, str(folder))
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                rule = f"a LoRA adapter of this model, but got {str(folder)!r}"
                raise ValueError(f"`adapter` {name!r} must be {rule}: {error}") from error
        if self.names:
            model.eval()
            self._layers.base_model.disable_adapter_layers()

    def _load(self, model: Any, name: str, folder: str) -> None:
        try:
            import peft
            from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights
        except ImportError as error:
            raise ImportError(f"adapters need PEFT: pip install 'bd3lm-hf[peft]' ({error})") from error

        config = peft.PeftConfig.from_pretrained(folder)
        if config.is_prompt_learning:
            raise ValueError(f"`peft_type` must be one that changes layers, but got {config.peft_type.value!r}")
        if getattr(config, "bias", "none") != "none":
            raise ValueError(f"`bias` must be 'none', since biases are the model's own, but got {config.bias!r}")
        if self._layers is None:
            self._layers = peft.PeftModel.from_pretrained(model, folder, adapter_name=name)
        else:
            self._layers.load_adapter(folder, adapter_name=name)
        # What an adapter lacks PEFT fills with a beginning of training.
        expected = get_peft_model_state_dict(self._layers, adapter_name=name, save_embedding_layers=False).keys()
        if differing := sorted(expected ^ load_peft_weights(folder, device="cpu").keys()):
            raise ValueError(f"{len(differing)} weights, such as {differing[0]}, are in one of the two alone")

    def use(self, name: str | None) -> None:
        """The forwards that follow are with this adapter, or with none."""
        if name == self._in_use:
            return
        if name is None:
            self._layers.base_model.disable_adapter_layers()
        else:
            self._layers.base_model.enable_adapter_layers()
            self._layers.base_model.set_adapter(name, inference_mode=True)
        self._in_use = name


def parse_adapters(texts: list[str]) -> dict[str, str]:
    """
    Adapters by name, from what is written NAME=FOLDER.

    Raises:
        ValueError: it is written otherwise, or two have one name.
    """
    folders: dict[str, str] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise ValueError(f"`adapter` must be NAME=FOLDER, but got {text!r}")
        if name in folders:
            raise ValueError(f"`adapter` must have a name of its own, but got {name!r} twice")
        folders[name] = folder
    return folders
