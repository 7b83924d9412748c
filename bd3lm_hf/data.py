"""Text -> tokens -> packed sequences, and the collator that batches them."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast


BUILTIN = "builtin"
MASK_TOKEN = "[MASK]"
# Files of these kinds hold one document per row; any other file is one document of plain text.
TABLE_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# Tests are optional parts of an installation, and `encodings` is tables of code points rather than text.
BUILTIN_EXCLUDED = {"dist-packages", "encodings", "idle_test", "site-packages", "test", "tests"}

TOKENIZE_BATCH_SIZE = 100
# A batch of documents is packed by itself and can end in one short sequence: large batches keep those rare.
PACK_BATCH_SIZE = 10_000


def load_documents(
    source: str, *, split: str = "train", text_column: str = "text", dataset_config: str | None = None
) -> Dataset:
    """
    Read a corpus as a dataset with one document per row in the single column `text`.

    Args:
        source: One of
            - `"builtin"`: the source files of the Python standard library, one document each, in sorted order;
            - a file: plain UTF-8 text is one document; `.jsonl`, `.json`, `.csv` and `.parquet` hold one per row;
            - a folder: every `.txt`, `.md`, `.rst` or `.py` file below it is one document, in sorted order;
            - the id of a dataset on the Hub: one document per row.
        split: The split of a Hub dataset, in `datasets`' notation (`"train[:10%]"`).
        text_column: The column of a Hub dataset or table that holds the text.
        dataset_config: The configuration of a Hub dataset that has several.

    Plain text is held in memory; tables and Hub datasets are memory-mapped from `datasets`' cache.

    Raises:
        ValueError: if there is no such source, a file is not UTF-8, the column is missing or there is no text.
    """
    path = Path(source).expanduser()
    if source == BUILTIN:
        return _read_text_files(_builtin_files(), source)
    if path.is_dir():
        suffixes = {".md", ".py", ".rst", ".txt"}
        files = sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file())
        return _read_text_files(files, source)
    if path.is_file() and path.suffix not in TABLE_FORMATS:
        return _read_text_files([path], source)
    if path.is_file():
        table = datasets.load_dataset(TABLE_FORMATS[path.suffix], data_files=str(path), split="train")
        return _select_text(table, source, text_column)
    if source.startswith((".", "/", "~")) or path.suffix in {*TABLE_FORMATS, ".txt"}:
        raise ValueError(f"data={source!r} does not exist; it takes a file, a folder, a Hub dataset id or {BUILTIN!r}")
    try:
        table = datasets.load_dataset(source, dataset_config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data={source!r} is no file or folder here and could not be loaded as a Hub dataset "
            f"(split={split!r}, dataset_config={dataset_config!r}): {error}"
        ) from error
    return _select_text(table, source, text_column)


def _builtin_files() -> list[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    return sorted(
        file for file in library.rglob("*.py") if not BUILTIN_EXCLUDED.intersection(file.relative_to(library).parts)
    )


def _read_text_files(files: list[Path], source: str) -> Dataset:
    texts = []
    for file in tqdm(files, desc="Reading", unit=" files", disable=len(files) < 2):
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"data={source!r}: {file} is not UTF-8 text: {error}") from error
    documents = Dataset.from_dict({"text": texts}, features=Features({"text": Value("string")}))
    return _require_text(documents, f"data={source!r}")


def _select_text(table: Dataset, source: str, text_column: str) -> Dataset:
    if text_column not in table.column_names:
        raise ValueError(f"text_column={text_column!r} is not a column of {source!r}; it has {table.column_names}")
    documents = table.select_columns(text_column)
    if text_column != "text":
        documents = documents.rename_column(text_column, "text")
    return _require_text(documents, f"data={source!r}")


def _require_text(documents: Dataset, name: str) -> Dataset:
    if not any(text and not text.isspace() for text in documents["text"]):
        raise ValueError(f"{name} holds no text ({len(documents)} documents)")
    return documents


def split_documents(documents: Dataset, held_out_fraction: float, seed: int = 0) -> DatasetDict:
    """
    Set text aside for evaluation.

    Whole documents, drawn with `seed`, are held out, so that no document is on both sides. A corpus of one document
    is cut in two at the end of a line instead, and its end is held out.

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
            name: _require_text(split, f"held_out_fraction={held_out_fraction}: the split {name!r}")
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


def train_tokenizer(documents: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer; its special tokens are `<s>`, `</s>`, `<pad>` and, with the last id, `[MASK]`.

    It puts `<s>` before a text by itself, so a prompt starts as the training sequences do, and an empty one is valid.

    Args:
        documents: A dataset with the column `text`.
        vocab_size: Number of tokens, the special ones included. A small corpus can yield fewer.

    Raises:
        ValueError: if `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    bos_token, eos_token, pad_token = special_tokens = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(special_tokens) + 1
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small for a byte-level tokenizer; it takes at least {smallest} "
            f"({len(alphabet)} bytes, {', '.join(special_tokens)} and {MASK_TOKEN})"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=True
    )
    tokenizer.train_from_iterator((text for text in documents["text"] if text), trainer=trainer, length=len(documents))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos_token} $A", special_tokens=[(bos_token, tokenizer.token_to_id(bos_token))]
    )
    trained = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos_token, eos_token=eos_token, pad_token=pad_token
    )
    trained.add_special_tokens({"mask_token": MASK_TOKEN})
    return trained


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer and give it the special tokens that block diffusion needs.

    A missing mask token is added with the next free id; a missing BOS falls back to the CLS or EOS token, a missing
    EOS to the SEP or BOS token, and a missing padding token to the EOS token.

    Raises:
        ValueError: if it cannot be loaded, has no fast implementation or has none of the four boundary tokens.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer={str(name_or_path)!r} could not be loaded; it takes a folder that holds a tokenizer or the "
            f"id of a repository on the Hub: {error}"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer={str(name_or_path)!r} is a {type(tokenizer).__name__} without a fast implementation, which "
            "counting the bytes of each token needs"
        )
    tokenizer.bos_token = tokenizer.bos_token or tokenizer.cls_token or tokenizer.eos_token
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token or tokenizer.bos_token
    if tokenizer.eos_token is None:
        raise ValueError(
            f"tokenizer={str(name_or_path)!r} has neither a BOS, EOS, CLS nor SEP token to tell documents apart"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config) -> None:
    """
    Refuse a tokenizer that is not the one a model (`config`: its `BD3LMConfig`) was made for.

    A model may have spare rows in its embedding, so its vocabulary may be larger; the mask token tells them apart.

    Raises:
        ValueError: if the tokenizer has ids outside the model's vocabulary or another mask token.
    """
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's vocab_size is {config.vocab_size}; "
            "it takes the tokenizer that the model was trained with"
        )
    if tokenizer.mask_token_id != config.mask_token_id:
        raise ValueError(
            f"the tokenizer's mask_token_id is {tokenizer.mask_token_id}, the model's is {config.mask_token_id}; "
            "it takes the tokenizer that the model was trained with"
        )


def pack_documents(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, *, drop_remainder: bool = True
) -> Dataset:
    """
    Tokenize a corpus and pack it into sequences of `length` tokens.

    The documents are joined, each followed by EOS, and cut into pieces of `length - 1` tokens; each piece gets BOS in
    front. As the model predicts every token but the first, each token of the corpus is predicted exactly once. Special
    tokens that are spelled out in a text are read as ordinary text.

    Args:
        documents: A dataset with the column `text`; rows without text are passed over.
        length: Tokens of a sequence, BOS included; a multiple of the model's block size wastes no part of a block.
        drop_remainder: Leave out what does not fill a sequence (training) or keep it as a shorter one (evaluation).

    Returns:
        A dataset with the columns `input_ids` and `num_bytes`: how many UTF-8 bytes of text the sequence encodes. With
        `drop_remainder=False` the latter add up to the bytes of the corpus.

    Raises:
        ValueError: if `length` is less than 2 or there is not enough text for one sequence.
    """
    if length < 2:
        raise ValueError(f"length={length} must be at least 2: the first token of a sequence is BOS")
    tokens = documents.map(
        _tokenize_batch,
        batched=True,
        batch_size=TOKENIZE_BATCH_SIZE,
        fn_kwargs={"tokenizer": tokenizer},
        remove_columns=documents.column_names,
        features=Features({"input_ids": List(Value("int32")), "num_bytes": List(Value("int32"))}),
        desc="Tokenizing",
    )
    sequences = tokens.with_format("numpy").map(
        _pack_batch,
        batched=True,
        batch_size=PACK_BATCH_SIZE,
        fn_kwargs={"bos_token_id": tokenizer.bos_token_id, "length": length, "drop_remainder": drop_remainder},
        remove_columns=tokens.column_names,
        features=Features({"input_ids": List(Value("int32")), "num_bytes": Value("int64")}),
        desc="Packing",
    )
    if len(sequences) == 0:
        num_tokens = sum(len(ids) for ids in tokens["input_ids"])
        raise ValueError(
            f"length={length}: the corpus has only {num_tokens} tokens, which do not fill one sequence"
            if num_tokens
            else "the corpus holds no text"
        )
    return sequences.with_format(None)


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
        "input_ids": [np.append(bos_token_id, input_ids[start : start + length - 1]) for start in starts],
        "num_bytes": [num_bytes[start : start + length - 1].sum() for start in starts],
    }


def encode_prompts(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    """
    Prompts as the training sequences start: BOS in front, no EOS behind, padded on the left.

    Returns:
        `input_ids` and `attention_mask` [batch, length].
    """
    encoded = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [[tokenizer.bos_token_id, *ids] for ids in encoded]
    return tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")


@dataclass
class PackedSequenceCollator:
    """
    Batch sequences for training and evaluation, with the tokens themselves as labels.

    Shorter sequences are padded on the right, with label -100 and attention mask 0. With `ignore_bos`, the first token
    has label -100 too: the model predicts none there, and Trainer counts labels to scale the loss. Unlike
    `DataCollatorForLanguageModeling`, it tells padding by position and not by token, so an EOS stays a target for
    tokenizers that pad with EOS.

    Returns:
        `input_ids` and `labels` [batch, length], and, only where something was padded, `attention_mask`.
    """

    pad_token_id: int
    ignore_bos: bool = True

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        rows = [torch.as_tensor(feature["input_ids"], dtype=torch.long) for feature in features]
        lengths = torch.tensor([len(row) for row in rows])
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        batch = {"input_ids": input_ids, "labels": input_ids.masked_fill(attention_mask == 0, -100)}
        if self.ignore_bos:
            batch["labels"][:, 0] = -100
        if lengths.min() < lengths.max():
            batch["attention_mask"] = attention_mask
        return batch
