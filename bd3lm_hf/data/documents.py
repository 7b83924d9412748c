"""Text -> tokens -> packed sequences: corpora as tables in memory or on disk, or as streams."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from .tables import load_saved_dataset, read_files
from .text_files import BUILTIN, PACKAGES, TABLE_FORMATS, find_text_files, is_saved_dataset, read_text_files


# What a column of text may be to `datasets`; one of blanks alone has no type.
TEXT_TYPES = ("string", "large_string", "string_view", "null")

TOKENIZE_BATCH_SIZE = 100
# A batch of documents is packed by itself and can end in one short sequence: large batches keep those rare.
PACK_BATCH_SIZE = 10_000
# A stream gives its first sequence only when a batch is complete.
STREAM_PACK_BATCH_SIZE = 1000


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """
    The columns of a table, or of a stream, whose first row is read if the stream does not know them.

    Raises:
        ValueError: if `dataset` is something else (several splits, say) or a stream without rows.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        splits = f" with the splits {list(dataset)}; take one of them" if isinstance(dataset, dict) else ""
        raise ValueError(
            f"dataset must be a datasets.Dataset or IterableDataset, but got a {type(dataset).__name__}{splits}"
        )
    if dataset.column_names is not None:
        return list(dataset.column_names)
    for row in dataset:
        return list(row)
    raise ValueError("dataset is a stream without rows")


def map_batches(
    dataset: Dataset | IterableDataset,
    function: Callable[..., dict],
    features: Features,
    *,
    batch_size: int,
    desc: str,
    with_indices: bool = False,
    **fn_kwargs: Any,
) -> Dataset | IterableDataset:
    """Map `function(batch, **fn_kwargs)` over a table or a stream; its columns `features` replace all others."""
    # A stream has no progress to show.
    progress = {"desc": desc} if isinstance(dataset, Dataset) else {}
    return dataset.map(
        function,
        batched=True,
        batch_size=batch_size,
        with_indices=with_indices,
        remove_columns=column_names(dataset),
        features=features,
        fn_kwargs=fn_kwargs,
        **progress,
    )


def load_documents(
    source: str,
    *,
    split: str = "train",
    text_column: str = "text",
    dataset_config: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """
    Read a corpus as a dataset with one document per row in the single column `text`.

    Args:
        source: One of

            - `"builtin"`: the source files of the Python standard library, one document each, in sorted order;
            - `"packages"`: these and those of the installed packages that somebody wrote, each once, in a fixed order
              that mixes them;
            - a file: plain UTF-8 text is one document; `.jsonl`, `.json`, `.csv` and `.parquet` hold one per row;
            - a folder: every `.txt`, `.md`, `.rst` or `.py` file below it is one document, in sorted order;
            - a folder that `save_to_disk` wrote, or the id of a dataset on the Hub: one document per row.
        split: The split of a Hub dataset or saved one, in `datasets`' notation (`"train[:10%]"`).
        text_column: The column of a dataset or table that holds the text.
        dataset_config: The configuration of a Hub dataset that has several.
        streaming: Return an `IterableDataset`, which reads (and downloads) a table or Hub dataset as it is iterated
            over.

    Plain text is held in memory; tables and Hub datasets are memory-mapped from `datasets`' cache or streamed.

    Raises:
        ValueError: if there is no such source, a file cannot be read or is not UTF-8, the column is missing or there
            is no text (for which a streamed table is not searched).
    """
    files = find_text_files(source)
    if files is not None:
        return _text_documents(files, source, streaming)
    table = load_table(source, split=split, dataset_config=dataset_config, streaming=streaming)
    return select_text(table, source, text_column)


def load_table(
    source: str, *, split: str = "train", dataset_config: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """
    Read a table file (`.jsonl`, `.json`, `.csv`, `.parquet`), a folder that `save_to_disk` wrote, or a dataset of the
    Hub, with all its columns.

    Args:
        source, split, dataset_config, streaming: see [`load_documents`].

    Raises:
        ValueError: if there is no such source or it cannot be read.
    """
    path = Path(source).expanduser()
    if is_saved_dataset(path):
        return load_saved_dataset(path, split, streaming)
    if path.is_file() and path.suffix in TABLE_FORMATS:
        return read_files(TABLE_FORMATS[path.suffix], [path], f"data={source!r}", streaming)
    if path.exists():
        raise ValueError(
            f"data={source!r} is no table; it takes {', '.join(TABLE_FORMATS)}, a folder that `save_to_disk` wrote or "
            "a Hub dataset id"
        )
    if source.startswith((".", "/", "~")) or path.suffix in {*TABLE_FORMATS, ".txt"}:
        raise ValueError(
            f"data={source!r} does not exist; it takes a file, a folder, a Hub dataset id, {BUILTIN!r} or {PACKAGES!r}"
        )
    try:
        return datasets.load_dataset(source, dataset_config, split=split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data={source!r} is no file or folder here and could not be loaded as a Hub dataset "
            f"(split={split!r}, dataset_config={dataset_config!r}): {error}"
        ) from error


def _text_documents(files: list[Path], source: str, streaming: bool) -> Dataset | IterableDataset:
    texts = read_text_files(files, source)
    documents = Dataset.from_dict({"text": texts}, features=Features({"text": Value("string")}))
    documents = require_text(documents, f"data={source!r}")
    return documents.to_iterable_dataset() if streaming else documents


def select_text(table: Dataset | IterableDataset, source: str, text_column: str) -> Dataset | IterableDataset:
    """
    The column `text_column` of a table alone, under the name `text`.

    Args:
        table: A table or a stream.
        source: What the error calls the table.
        text_column: The name of the column.

    Raises:
        ValueError: if there is no such column, it holds something else than text, or a table, which unlike a stream is
            read for this, holds no text.
    """
    columns = column_names(table)
    if text_column not in columns:
        raise ValueError(f"text_column={text_column!r} is not a column of {source!r}; it has {columns}")
    _require_strings(table, source, text_column)
    documents = table.select_columns(text_column)
    if text_column != "text":
        documents = documents.rename_column(text_column, "text")
    return documents if isinstance(documents, IterableDataset) else require_text(documents, f"data={source!r}")


def _require_strings(table: Dataset | IterableDataset, source: str, text_column: str) -> None:
    if table.features is not None:
        kind = getattr(table.features[text_column], "dtype", None) or str(table.features[text_column])
    else:
        # A stream that does not know its columns' types has been asked for a row before.
        value = next(iter(table))[text_column]
        kind = "string" if isinstance(value, str | None) else type(value).__name__
    if kind not in TEXT_TYPES:
        raise ValueError(f"text_column={text_column!r} of {source!r} must hold text, but it holds {kind}")


def require_text(documents: Dataset, name: str) -> Dataset:
    """
    The documents as they are.

    Raises:
        ValueError: if there is nothing but blanks in them; `name` is what the error calls them.
    """
    if not any(text and not text.isspace() for text in documents["text"]):
        raise ValueError(f"{name} holds no text ({len(documents)} documents)")
    return documents


def split_documents(documents: Dataset, held_out_fraction: float, seed: int = 0) -> DatasetDict:
    """
    Set text aside for evaluation.

    Whole documents, drawn with `seed`, are held out, so that no document is on both sides. A corpus of one document
    is cut in two at the end of a line instead, and its end is held out.

    Args:
        documents: A table with the column `text`.
        held_out_fraction: The share of the documents, or of the characters of a single one, to hold out.
        seed: Of the draw.

    Returns:
        The splits `train` and `held_out`.

    Raises:
        ValueError: if `held_out_fraction` is not inside (0, 1) or leaves a split without text.
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction={held_out_fraction} must lie between 0 and 1, both excluded")
    if len(documents) > 1:
        parts = documents.train_test_split(test_size=held_out_fraction, seed=seed)
        splits = {"train": parts["train"], "held_out": parts["test"]}
    else:
        text = documents[0]["text"]
        cut = text.rfind("\n", 0, round(len(text) * (1 - held_out_fraction))) + 1
        splits = {
            "train": Dataset.from_dict({"text": [text[:cut]]}),
            "held_out": Dataset.from_dict({"text": [text[cut:]]}),
        }
    return DatasetDict(
        {
            name: require_text(split, f"held_out_fraction={held_out_fraction}: the split {name!r}")
            for name, split in splits.items()
        }
    )


def limit_bytes(documents: Dataset, max_bytes: int) -> Dataset:
    """
    The first `max_bytes` bytes (UTF-8) of a corpus: whole documents, and of the one that crosses the limit its start.

    Raises:
        ValueError: if `max_bytes` is not positive.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes} must be at least 1")
    remaining = max_bytes
    for index, text in enumerate(documents["text"]):
        encoded = (text or "").encode()
        if len(encoded) > remaining:
            start = encoded[:remaining].decode(errors="ignore")
            cut = Dataset.from_dict({"text": [start] if start else []}, features=documents.features)
            return datasets.concatenate_datasets([documents.select(range(index)), cut])
        remaining -= len(encoded)
    return documents


def pack_documents(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    drop_remainder: bool = True,
) -> Dataset | IterableDataset:
    """
    Tokenize a corpus and pack it into sequences of `length` tokens.

    The documents are joined, each followed by EOS, and cut into pieces of `length - 1` tokens; each piece gets BOS in
    front. As the model predicts every token but the first, each token of the corpus is predicted exactly once. Special
    tokens that are spelled out in a text are read as ordinary text. The documents of a sequence see each other;
    `pack_examples` packs those that shall not.

    Each batch of documents (10,000 of a table, 1000 of a stream) is packed by itself, so a sequence never holds text
    of two batches, and each batch has a remainder of its own.

    Args:
        documents: A dataset with the column `text`, a table or a stream; rows without text are passed over.
        tokenizer: A tokenizer with BOS and EOS.
        length: Tokens of a sequence, BOS included; a multiple of the model's block size wastes no part of a block.
        drop_remainder: Leave out what does not fill a sequence (training) or keep it as a shorter one (evaluation).

    Returns:
        What `documents` is, a table or a stream, with the columns `input_ids` and `num_bytes`: how many UTF-8 bytes of
        text the sequence encodes. With `drop_remainder=False` the latter add up to the bytes of the corpus.

    Raises:
        ValueError: if `length` is less than 2, there is no column `text`, or there is not enough text for one sequence
            (which a stream does not know).
    """
    if length < 2:
        raise ValueError(f"length={length} must be at least 2: the first token of a sequence is BOS")
    columns = column_names(documents)
    if "text" not in columns:
        raise ValueError(f"documents must have the column 'text'; it has {columns}")
    is_stream = isinstance(documents, IterableDataset)
    tokens = map_batches(
        documents,
        _tokenize_batch,
        Features({"input_ids": List(Value("int32")), "num_bytes": List(Value("int32"))}),
        batch_size=TOKENIZE_BATCH_SIZE,
        desc="Tokenizing",
        tokenizer=tokenizer,
    )
    sequences = map_batches(
        tokens.with_format("numpy"),
        _pack_batch,
        Features({"input_ids": List(Value("int32")), "num_bytes": Value("int64")}),
        batch_size=STREAM_PACK_BATCH_SIZE if is_stream else PACK_BATCH_SIZE,
        desc="Packing",
        bos_token_id=tokenizer.bos_token_id,
        length=length,
        drop_remainder=drop_remainder,
    ).with_format(None)
    if not is_stream and len(sequences) == 0:
        num_tokens = sum(len(ids) for ids in tokens["input_ids"])
        raise ValueError(
            f"length={length}: the corpus has only {num_tokens} tokens, which do not fill one sequence"
            if num_tokens
            else "the corpus holds no text"
        )
    return sequences


def draw_sequences(sequences: Dataset, num_sequences: int, seed: int = 0) -> Dataset:
    """
    A random sample of `num_sequences` sequences, or all of them if there are no more.

    The first ones would come from a few documents only, and stand badly for the others.

    Raises:
        ValueError: if `num_sequences` is not positive.
    """
    if num_sequences < 1:
        raise ValueError(f"num_sequences={num_sequences} must be at least 1")
    if num_sequences >= len(sequences):
        return sequences
    return sequences.shuffle(seed=seed).select(range(num_sequences))


def _tokenize_batch(batch, tokenizer):
    texts = [text for text in batch["text"] if text]
    if not texts:
        return {"input_ids": [], "num_bytes": []}
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    return {
        "input_ids": [ids + [tokenizer.eos_token_id] for ids in encoded["input_ids"]],
        "num_bytes": [
            _bytes_per_token(text, offsets) for text, offsets in zip(texts, encoded["offset_mapping"], strict=True)
        ],
    }


def _bytes_per_token(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """
    UTF-8 bytes that each token, and the EOS after them, adds to the text before it; they sum to the bytes of the text.

    `offsets` are in characters. Where tokens share a character the first counts it; EOS counts what no token covers.
    """
    ends = np.maximum.accumulate(np.array([0, *(end for _, end in offsets)]))
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000)
    bytes_before = np.concatenate([[0], np.cumsum(widths)])
    return np.diff(np.append(bytes_before[ends], bytes_before[-1]))


def _pack_batch(batch, bos_token_id, length, drop_remainder):
    input_ids, num_bytes = (np.concatenate(list(batch[name])) for name in ("input_ids", "num_bytes"))
    stop = len(input_ids)
    if drop_remainder:
        stop -= stop % (length - 1)
    starts = range(0, stop, length - 1)
    return {
        "input_ids": [[bos_token_id, *input_ids[start : start + length - 1].tolist()] for start in starts],
        "num_bytes": [int(num_bytes[start : start + length - 1].sum()) for start in starts],
    }
