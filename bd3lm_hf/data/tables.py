"""Files that hold a document per row, and what `datasets` saved on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset

# The Hub's client has had several HTTP libraries, whose errors are the base of its own.
from huggingface_hub.errors import HTTPError


def read_files(
    builder: str, files: Sequence[Path | str], name: str, streaming: bool, **options: Any
) -> Dataset | IterableDataset:
    """
    Read files as one table.

    Args:
        builder: One of `datasets`' own: "csv", "json", "parquet" or "text".
        files: Paths or, for the Hub, addresses.
        name: What errors call them.
        options: The builder's.

    Raises:
        ValueError: if a file is empty, not UTF-8 or no such table (which a stream tells when it is iterated over).
    """
    sizes = [file.stat().st_size for file in files if isinstance(file, Path)]
    if sizes and not any(sizes):
        raise ValueError(f"{name} holds no text (0 bytes)")
    paths = [str(file) for file in files]
    where = name if paths[0] in name else f"{name} ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''})"
    try:
        rows = datasets.load_dataset(builder, data_files=paths, split="train", streaming=streaming, **options)
    except (OSError, ValueError, HTTPError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        problem = "is not UTF-8 text" if isinstance(cause, UnicodeDecodeError) else f"cannot be read as {builder}"
        raise ValueError(f"{where} {problem}: {cause}") from error
    if builder == "json" and not streaming:
        # Its strings are taken over byte by byte; the first row that is looked at would be the first to fail.
        try:
            rows.data.table.validate(full=True)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{where} is not UTF-8 text: {error}") from error
    return rows


def load_saved_dataset(path: Path, split: str, streaming: bool = False) -> Dataset | IterableDataset:
    """
    A split of what `save_to_disk` wrote; a single `Dataset` is taken for the split that is asked for.

    Raises:
        ValueError: if there is no such split.
    """
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, DatasetDict):
        name = split.partition("[")[0]
        if name not in saved:
            raise ValueError(f"split={split!r} is not a split of data={str(path)!r}; it has {', '.join(saved)}")
        saved = saved[name]
    rows = slice_rows(saved, split)
    return rows.to_iterable_dataset() if streaming else rows


def slice_rows(dataset: Dataset, split: str) -> Dataset:
    """The rows of a split that `datasets`' notation selects: `"train"` all, `"train[:10%]"` the first tenth."""
    instruction = datasets.ReadInstruction.from_spec(split)
    (rows,) = instruction.to_absolute({split.partition("[")[0]: len(dataset)})
    return dataset.select(range(rows.from_, rows.to))
