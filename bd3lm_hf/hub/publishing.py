"""Publishing a saved folder on the Hub: with its card, and all of it in one commit."""

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
from transformers import PreTrainedTokenizerBase

from ..evaluation.loading import told_as_value_error
from .model_card import create_model_card
from .published_files import (
    ADAPTER_CONFIG_FILE,
    CARD_FILE,
    STALE_FILES,
    SUMMARY_FILE,
    check_private,
    check_repo_id,
    parse_object,
    published_files,
    tokenizer_files,
)
from .training_summary import STATED, TrainingSummary


# What would be read along with the published files, or in their place, if an earlier commit left it there. In a folder
# files of such names may be somebody's own, and stay.
SUPERSEDED = (
    *STALE_FILES,
    "model*.safetensors",
    "adapter_model*.safetensors",
    "pytorch_model*.bin*",
    "*_bd3lm.py",
    "*_block_diffusion.py",
    "*_causal_lm.py",
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
        held = [name for name in api.list_repo_files(repo_id, revision=revision, token=token) if "/" not in name]
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
    check_target(repo_id)
    unknown = sorted(set(stated) - set(STATED))
    if unknown:
        raise ValueError(f"`{unknown[0]}` is nothing that a card tells; it takes {', '.join(STATED)}.")
    with told_as_value_error(str(checkpoint), "checkpoint"):
        files = published_files(checkpoint)
        summary = TrainingSummary.from_folder(checkpoint)
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            saved = tokenizer_files(folder)
            files |= {name: file if isinstance(file, bytes) else file.read_bytes() for name, file in saved.items()}
        summary.has_tokenizer = True
    if base_model is not None:
        check_repo_id("base_model", base_model)
        summary.base_model, summary.has_unnamed_base = base_model, False
    if ADAPTER_CONFIG_FILE in files:
        files[ADAPTER_CONFIG_FILE] = _adapter_config(Path(checkpoint), files[ADAPTER_CONFIG_FILE], summary)
    for name, likelihood in (likelihoods or {}).items():
        summary.add_likelihood(name, likelihood)
    summary.stated |= {name: value for name, value in stated.items() if value is not None}
    files[SUMMARY_FILE] = summary.to_json().encode()
    files[CARD_FILE] = (str(create_model_card(summary, repo_id)) if card is None else card).encode()
    check_private(files)
    return dict(sorted(files.items()))


def check_target(repo_id: str) -> None:
    """
    Raises:
        ValueError: no repository of the Hub can have this id.
    """
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo_id) or ".." in repo_id or "--" in repo_id:
        raise ValueError(f"`repo_id` must be an id on the Hub (user/name), but got {repo_id!r}.")


def _adapter_config(folder: Path, config: Path | bytes, summary: TrainingSummary) -> bytes:
    """The adapter's configuration, with its base by the id on the Hub that everyone else can load."""
    content = parse_object(ADAPTER_CONFIG_FILE, config if isinstance(config, bytes) else config.read_bytes())
    if summary.base_model is None:
        base = Path(content.get("base_model_name_or_path") or "nothing that it names").name
        raise ValueError(
            f"`base_model` must name the adapter's base on the Hub (user/name), but {folder} was trained on {base!r}, "
            "which was not loaded from there: push the base first, and give its id."
        )
    content["base_model_name_or_path"] = summary.base_model
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


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
        ValueError: the folder holds no whole model, or what must not be published (see [`published_files`]), or an
            adapter's base is not on the Hub.
        HfHubHTTPError: the Hub refuses.
        ConnectionError: the upload was cut short.
    """
    # What is wrong with the folder is told before anything is created.
    files = prepare_files(checkpoint, repo_id, **kwargs)
    created = create_repository(repo_id, private=private, token=token)
    if created != repo_id:
        repo_id, files = created, prepare_files(checkpoint, created, **kwargs)
    return upload(files, repo_id, token=token, revision=revision, commit_message=commit_message)
