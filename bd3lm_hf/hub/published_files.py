"""What of a saved folder is published: a list of what may be, and nothing in it that tells of this machine."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..data.replacing import replaced_folder
from ..evaluation.networks import LANGUAGE_MODELS
from .weights import check_saved_weights


ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
SUMMARY_FILE = "training_summary.json"
CARD_FILE = "README.md"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# Text that is a vocabulary, in which any word may occur, and files that are no text.
VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
CONFIG_FILES = (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    ADAPTER_CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
)
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
METRIC_FILES = (SUMMARY_FILE, "metrics.json", "all_results.json", "train_results.json", "eval_results.json")
# Beside its weights and its code, whose names its index and its configurations hold, a model consists of these.
MODEL_FILES = (*CONFIG_FILES, *VOCABULARY_FILES, *CHAT_TEMPLATES, *METRIC_FILES)
# What of an earlier model must not be left beside another: it would be read along with it, or in its place.
STALE_FILES = (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    ADAPTER_CONFIG_FILE,
    SAFE_WEIGHTS_NAME,
    "model-*-of-*.safetensors",
    SAFE_WEIGHTS_INDEX_NAME,
    ADAPTER_WEIGHTS_FILE,
)
# And what tells of it.
RECORDS = (*MODEL_FILES, "additional_chat_templates", CARD_FILE, "trainer_state.json", "training_args.bin")
# Where configurations name classes of the code beside them, as `module.Class`.
NAMES_OF_CODE = ("auto_map", "custom_pipelines")
# Where libraries note what was loaded from where. Nothing reads it again.
PLACES = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file")
# A module of code that was loaded from a folder.
REMOTE_CODE = "transformers_modules"


def replaced_model(destination: str | Path, overwrite: bool = False):
    """[`replaced_folder`] for a model: of another that was there, nothing stays."""
    return replaced_folder("destination", destination, overwrite=overwrite, stale=(*STALE_FILES, *RECORDS))


def published_files(folder: str | Path) -> dict[str, Path | bytes]:
    """
    What of a saved folder is published: weights, configurations, the code that loads them, the tokenizer, metrics.

    That is a list. Whatever else lies in the folder, such as logs, events, notebooks, state of training and pickled
    files, stays there. Configurations leave out where on this machine their parts were loaded from.

    Returns:
        The files, or what of them is published, by their path in the repository.

    Raises:
        ValueError: the folder holds no whole model or adapter of this kind, or weights that are no numbers; a file of
            the list is a symbolic link that leads out of the folder. The message says which.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`checkpoint` must be a folder that holds a saved model, but got {str(folder)!r}.")
    is_adapter = (folder / ADAPTER_CONFIG_FILE).is_file()
    if not is_adapter:
        _check_config(folder)
    weights = weight_files(folder, is_adapter)
    names = [*weights, *_matching(folder, MODEL_FILES), *([] if is_adapter else _code_files(folder, CONFIG_NAME))]
    if is_adapter:
        names = [name for name in names if name not in (CONFIG_NAME, GENERATION_CONFIG_NAME)]
    elif SAFE_WEIGHTS_NAME not in weights:
        names.append(SAFE_WEIGHTS_INDEX_NAME)
    if (folder / TOKENIZER_CONFIG_FILE).is_file():
        names += _code_files(folder, TOKENIZER_CONFIG_FILE)
    for name in names:
        check_place(folder, name)
    check_saved_weights(folder, weights)
    files = {name: folder / name for name in sorted(set(names))}
    return without_places(files)


def tokenizer_files(folder: str | Path) -> dict[str, Path | bytes]:
    """As [`published_files`], of a folder in which a tokenizer alone was saved."""
    folder = Path(folder)
    names = _matching(folder, (*CONFIG_FILES, *VOCABULARY_FILES, *CHAT_TEMPLATES))
    names += _code_files(folder, TOKENIZER_CONFIG_FILE)
    return without_places({name: folder / name for name in sorted(set(names))})


def weight_files(folder: Path, is_adapter: bool) -> list[str]:
    """
    The names of the files that hold the weights, as the folder's index has them.

    Raises:
        ValueError: one is missing, or the index names what is no file of weights in the folder.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = [ADAPTER_WEIGHTS_FILE if is_adapter else SAFE_WEIGHTS_NAME]
    if not is_adapter and not (folder / SAFE_WEIGHTS_NAME).is_file() and index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"`{index.name}` must hold a `weight_map`, but {index} does not.")
        names = sorted(set(weight_map.values()))
    for name in names:
        # An index is data: what it names must be a file of weights in this very folder.
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(f"`checkpoint` ({folder}) must hold safetensors, but its index names {name!r}.")
        if not (folder / name).is_file():
            raise ValueError(f"`checkpoint` ({folder}) holds no whole model: {name} is missing.")
    return names


def left_out(folder: str | Path, files: Iterable[str]) -> list[str]:
    """What lies in a folder beside `files`: names at its top, those of folders with a slash."""
    names = {name.split("/")[0] for name in files}
    return sorted(path.name + "/" * path.is_dir() for path in Path(folder).iterdir() if path.name not in names)


def is_on_hub(name: str | None) -> bool:
    """Whether a model of this name was loaded from the Hub: it is no folder's, and lies in this machine's cache."""
    return is_repo_id(name) and isinstance(try_to_load_from_cache(name, CONFIG_NAME), str)


def is_repo_id(name: str | None) -> bool:
    """Whether a name can be an id on the Hub, and is not that of a folder here."""
    try:
        validate_repo_id(name or "")
    except (HFValidationError, TypeError):
        return False
    return not os.path.isdir(name)


def is_path(text: str) -> bool:
    """Whether a text is an absolute path, of this system or another, or one from a home folder on."""
    if "\n" in text or text.startswith("//"):
        return False
    absolute = re.match(r"/[^/\s]+/", text) or (PureWindowsPath(text).is_absolute() and PureWindowsPath(text).drive)
    return bool(absolute) or text.startswith(("~/", "file:"))


def check_repo_id(argument: str, name: str) -> None:
    """
    Raises:
        ValueError: `name` is no id on the Hub, or it is one that a folder here has, too.
    """
    if not is_repo_id(name):
        there = " is a folder here" if os.path.isdir(name) else ""
        raise ValueError(f"`{argument}` must be an id on the Hub (user/name), but got {name!r}{there and ','}{there}.")


def read_object(path: Path) -> dict[str, Any]:
    """As [`parse_object`], of a file."""
    return parse_object(path, path.read_bytes())


def parse_object(name: str | Path, content: bytes) -> dict[str, Any]:
    """
    A JSON object.

    Raises:
        ValueError: it is no such thing.
    """
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ValueError(f"`{name}` must be JSON, but it is not: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must hold a JSON object, but it holds a {type(value).__name__}.")
    return value


def without_places(files: Mapping[str, Path | bytes]) -> dict[str, Path | bytes]:
    """The files, in whose configurations nothing notes where on this machine something was loaded from."""
    cleaned = dict(files)
    for name, file in files.items():
        if name in CONFIG_FILES and isinstance(file, Path):
            content = read_object(file)
            public = _without_places(content)
            if public != content:
                cleaned[name] = (json.dumps(public, indent=2, sort_keys=True) + "\n").encode()
    return cleaned


def check_place(folder: Path, name: str) -> None:
    """
    Raises:
        ValueError: the folder has no such file, or a symbolic link of this name that leads out of it.
    """
    if not (folder / name).is_file():
        raise ValueError(f"`checkpoint` ({folder}) must hold all that is published, but {name} is missing.")
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"`checkpoint` ({folder}) must hold all that is published, but {name} is a symbolic link that leads out "
            "of the folder: put a copy in its place."
        )


def check_private(files: Mapping[str, Path | bytes]) -> None:
    """
    Whether files tell of no path of this machine, as far as it can be told apart from other text.

    Raises:
        ValueError: a file holds the path of the home folder, or a configuration or metric an absolute path.
    """
    home = str(Path.home())
    # A home folder `/` is in every file.
    in_home = re.compile(re.escape(home.encode()) + rb"(?![\w-])") if len(Path(home).parts) > 1 else None
    for name, file in files.items():
        if name in VOCABULARY_FILES:
            continue
        content = _text_of(file)
        if in_home is not None and in_home.search(content):
            raise ValueError(f"`{name}` must not be published with a path of this machine, but it holds {home!r}.")
        is_object = name in CONFIG_FILES or name in METRIC_FILES
        path = next(filter(is_path, _strings_of(parse_object(name, content))), None) if is_object else None
        if path is not None:
            raise ValueError(f"`{name}` must not be published with a path of this machine, but it holds {path!r}.")


def _check_config(folder: Path) -> None:
    """Whether there is a configuration of a BD3-LM, and the code that it names."""
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"`checkpoint` ({folder}) holds neither {CONFIG_NAME} nor {ADAPTER_CONFIG_FILE}.")
    config = read_object(folder / CONFIG_NAME)
    # A published checkpoint has a width of another name.
    if config.get("model_type") not in LANGUAGE_MODELS or "hidden_dim" in config:
        raise ValueError(
            f"`checkpoint` ({folder}) must hold a model of the type {' or '.join(map(repr, LANGUAGE_MODELS))}, but "
            f"its type is {config.get('model_type')!r}; `bd3lm convert` converts a published checkpoint, and `bd3lm "
            "adapt` adapts a causal language model."
        )
    code, auto_map = _code_files(folder, CONFIG_NAME), config.get("auto_map")
    missing = sorted(name for name in code if not (folder / name).is_file())
    if not isinstance(auto_map, dict) or not {"AutoConfig", "AutoModel"} <= set(auto_map):
        missing.append("auto_map")
    if missing:
        raise ValueError(
            f"`checkpoint` ({folder}) lacks the code that loads it where this package is not installed "
            f"({', '.join(missing)}); `save_pretrained` writes it."
        )


def _code_files(folder: Path, config_name: str) -> list[str]:
    """The files of code that a configuration names, and those that they import from beside them."""
    config = read_object(folder / config_name)
    named = [re.fullmatch(r"(\w+)\.\w+", text) for text in _strings_of([config.get(key) for key in NAMES_OF_CODE])]
    # `user/name--module.Class` lies elsewhere on the Hub.
    waiting = [match[1] for match in named if match]
    found: list[str] = []
    while waiting:
        name = f"{waiting.pop()}.py"
        if name not in found:
            found.append(name)
            waiting += get_relative_imports(folder / name) if (folder / name).is_file() else []
    return found


def _matching(folder: Path, patterns: Iterable[str]) -> list[str]:
    paths = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in paths]


def _without_places(value: Any) -> Any:
    """The value without entries that note a place, and without names of modules in a cache of code."""
    if isinstance(value, dict):
        return {
            name: None if _is_of_remote_code(part) else _without_places(part)
            for name, part in value.items()
            if name not in PLACES
        }
    return [_without_places(part) for part in value] if isinstance(value, list) else value


def _is_of_remote_code(value: Any) -> bool:
    # PEFT's `auto_mapping`, which says what an adapter without a `task_type` was trained on.
    return isinstance(value, dict) and str(value.get("parent_library")).startswith(f"{REMOTE_CODE}.")


def _text_of(file: Path | bytes) -> bytes:
    """The content; of weights what their header says beside the tensors."""
    if isinstance(file, bytes):
        return file
    if file.suffix != ".safetensors":
        return file.read_bytes()
    try:
        with safe_open(file, framework="pt") as weights:
            return json.dumps(weights.metadata()).encode()
    except SafetensorError as error:
        raise ValueError(f"`{file.name}` must be safetensors, but {file} is not: {error}") from error


def _strings_of(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings_of(part)
