"""Publishing a saved folder on the Hub: what is published, whether it is whole, and all of it in one commit."""

import contextlib
import importlib.metadata
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from ..evaluation.networks import LANGUAGE_MODELS
from .model_card import create_model_card
from .training_summary import ADAPTER_CONFIG_FILE, EMA_FILE, STATED, SUMMARY_FILE, TrainingSummary


CARD_FILE = "README.md"
REPO_ID = r"[\w.-]+(/[\w.-]+)?"
# State of training, and whatever a reader would have to unpickle; patterns of paths inside the folder.
NOT_PUBLISHED = (
    "_*",
    ".*",
    "*/.*",
    f"{PREFIX_CHECKPOINT_DIR}-*/*",
    "*__pycache__/*",
    "*.pt",
    "*.pth",
    "*.bin",
    "*.pkl",
    "*.ckpt",
    "*.distcp",
    "optimizer*",
    "trainer_state.json",
    EMA_FILE,
)
# The code of the model, which travels with it.
MODEL_CODE = ("*_bd3lm.py", "*_block_diffusion.py", "*_causal_lm.py")
# What would be read along with the published files, or in their place, if an earlier commit left it there.
SUPERSEDED = (
    CONFIG_NAME,
    ADAPTER_CONFIG_FILE,
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_model*.safetensors",
    "pytorch_model*.bin*",
    *MODEL_CODE,
)


def published_files(folder: str | Path) -> dict[str, Path]:
    """
    What of a saved folder is published: weights, configurations, the code that loads them, the tokenizer, the card,
    figures; no state of training and nothing pickled.

    Returns:
        The files by their path in the repository.

    Raises:
        ValueError: the folder holds no whole model or adapter of this kind; the message says what is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`checkpoint` must be a folder that holds a saved model, but got {str(folder)!r}.")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in files.items() if not any(fnmatch(name, item) for item in NOT_PUBLISHED)}
    is_adapter = ADAPTER_CONFIG_FILE in files
    if not is_adapter:
        _check_config(folder, files)
    index = folder / "model.safetensors.index.json"
    weights = ["adapter_model.safetensors" if is_adapter else "model.safetensors"]
    if not is_adapter and weights[0] not in files and index.is_file():
        weights = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in weights:
        if name not in files:
            raise ValueError(f"`checkpoint` ({folder}) holds no whole model: {name} is missing.")
        try:
            with safe_open(files[name], framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"`checkpoint` ({folder}) holds no whole model: {name} is cut short ({error})."
            ) from error
    return files


def _check_config(folder: Path, files: Mapping[str, Path]) -> None:
    """Whether there is a configuration of a BD3-LM, and the code that it names."""
    if CONFIG_NAME not in files:
        raise ValueError(f"`checkpoint` ({folder}) holds neither {CONFIG_NAME} nor {ADAPTER_CONFIG_FILE}.")
    config = json.loads(files[CONFIG_NAME].read_text(encoding="utf-8"))
    if config.get("model_type") not in LANGUAGE_MODELS:
        raise ValueError(
            f"`checkpoint` ({folder}) must hold a model of the type {' or '.join(map(repr, LANGUAGE_MODELS))}, but "
            f"its type is {config.get('model_type')!r}; `bd3lm convert` converts a published checkpoint, and `bd3lm "
            "adapt` adapts a causal language model."
        )
    sources = {f"{name.split('.')[0]}.py" for name in config.get("auto_map", {}).values()}
    missing = sorted(sources - set(files)) if sources else ["auto_map"]
    if missing:
        raise ValueError(
            f"`checkpoint` ({folder}) lacks the code that loads it where this package is not installed "
            f"({', '.join(missing)}); `save_pretrained` writes it."
        )


def upload(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    run_as_future: bool = False,
) -> CommitInfo | Future:
    """
    Publish files in a single commit to a repository that exists.

    `HfApi.upload_folder` may spread a folder over several commits; between them, or if it is cut short, the repository
    would hold half a model. Here it holds the earlier state until all files have arrived. Large files that had arrived
    are not sent again by the next upload. Weights and code of an earlier commit that these replace under other names
    (shards by a single file, a model by an adapter) are removed in the same commit.

    Args:
        files: A path on this machine, or the content, of each path in the repository.
        repo_id: `user/name`.
        revision: Branch to commit to, created where there is none. Main by default.
        run_as_future: Upload in the background.

    Returns:
        The commit, or with `run_as_future` a `Future` of it.

    Raises:
        HfHubHTTPError: the Hub refuses.
        ConnectionError: the upload was cut short.
    """
    api = _api()
    if run_as_future:
        arguments = {"token": token, "revision": revision, "commit_message": commit_message}
        return api.run_as_future(upload, files, repo_id, **arguments)
    with _told_as_connection_error(repo_id):
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        held = api.list_repo_files(repo_id, revision=revision, token=token)
        stale = [name for name in held if name not in files and any(fnmatch(name, item) for item in SUPERSEDED)]
        operations = [CommitOperationDelete(path_in_repo=name) for name in stale] + [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=file if isinstance(file, bytes) else str(file))
            for name, file in files.items()
        ]
        return api.create_commit(repo_id, operations, commit_message=commit_message, token=token, revision=revision)


def create_repository(repo_id: str, private: bool | None = None, token: str | bool | None = None) -> str:
    """
    Creates a repository unless there is one.

    Args:
        repo_id: `user/name`, or a name under which the token's user stores it.
        private: Whether only its owner can read it; of one that exists, this changes nothing.

    Returns:
        `user/name`.
    """
    with _told_as_connection_error(repo_id):
        return _api().create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id


def _api() -> HfApi:
    return HfApi(library_name="bd3lm-hf", library_version=importlib.metadata.version("bd3lm-hf"))


@contextlib.contextmanager
def _told_as_connection_error(repo_id: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError):
        # What the Hub refuses, and what it was asked wrongly, says itself what it is.
        raise
    except Exception as error:
        reason = error.__cause__ or error
        raise ConnectionError(
            f"The upload to {repo_id} was cut short ({type(reason).__name__}: {reason}). A commit is there as a whole "
            "or not at all, so no part of the model was published; another push completes it."
        ) from error


def prepare_files(
    checkpoint: str | Path,
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_model: str | None = None,
    likelihoods: Mapping[str, Mapping[str, Any]] | None = None,
    card: str | None = None,
    **stated: Any,
) -> dict[str, Path | bytes]:
    """
    What [`push_to_hub`] publishes, without doing so; the arguments are the same.

    Returns:
        A path on this machine, or the content, of each path in the repository.

    Raises:
        ValueError: as `push_to_hub`.
    """
    unknown = sorted(set(stated) - set(STATED))
    if unknown:
        raise ValueError(f"`{unknown[0]}` is nothing that a card tells; it takes {', '.join(STATED)}.")
    files: dict[str, Path | bytes] = dict(published_files(checkpoint))
    summary = TrainingSummary.from_folder(checkpoint)
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files |= {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
        summary.has_tokenizer = True
    if base_model is not None:
        summary.base_model, summary.base_folder = base_model, None
    if ADAPTER_CONFIG_FILE in files:
        files[ADAPTER_CONFIG_FILE] = _adapter_config(files[ADAPTER_CONFIG_FILE], summary)
    for name, likelihood in (likelihoods or {}).items():
        summary.add_likelihood(name, likelihood)
    summary.stated |= {name: value for name, value in stated.items() if value is not None}
    files[SUMMARY_FILE] = summary.to_json().encode()
    files[CARD_FILE] = (str(create_model_card(summary, repo_id)) if card is None else card).encode()
    return dict(sorted(files.items()))


def _adapter_config(path: Path, summary: TrainingSummary) -> bytes:
    """The adapter's configuration, with its base by the id on the Hub that everyone else can load."""
    if summary.base_model is None or re.fullmatch(REPO_ID, summary.base_model) is None:
        raise ValueError(
            f"`base_model` must name the adapter's base on the Hub (user/name), but {path.parent} was trained on "
            f"{summary.base_folder or summary.base_model!r}, which is not there: push the base first, and give its id."
        )
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = summary.base_model
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def push_to_hub(
    checkpoint: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    **kwargs: Any,
) -> CommitInfo:
    """
    Publish a saved model or adapter: weights, the code that loads them, tokenizer, generation configuration, and a
    model card of what was recorded when it was trained.

    Args:
        checkpoint: The folder.
        repo_id: `user/name`, or a name under which the token's user stores it.
        private, token, revision, commit_message: As [`upload`] takes them.
        kwargs: Any of the following.
        tokenizer: To be published with it, if none lies in the folder.
        base_model: Id on the Hub of the model that training went on from. An adapter whose base is a folder needs it,
            and refers to it from then on.
        likelihoods: Name of the data, and what `bd3lm evaluate --json` wrote of this model, for the card.
        card: Text of a model card in place of the generated one.
        license, language, tags, dataset, model_name, widget_prompts, sampler_results: What else the card shall tell:
            identifiers of the licence and the language(s), further tags, the name of the data, the title, prompts for
            the Hub's widget, and a list of mappings, the rows of a table of measured samplers.

    Returns:
        The commit.

    Raises:
        ValueError: the folder holds no whole model, or an adapter's base is not on the Hub.
        HfHubHTTPError: the Hub refuses.
        ConnectionError: the upload was cut short.
    """
    # What is wrong with the folder is told before anything is created.
    prepare_files(checkpoint, repo_id, **kwargs)
    repo_id = create_repository(repo_id, private=private, token=token)
    files = prepare_files(checkpoint, repo_id, **kwargs)
    return upload(files, repo_id, token=token, revision=revision, commit_message=commit_message)
