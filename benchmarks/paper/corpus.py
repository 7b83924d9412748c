"""The text of the experiments, cut into documents, and packed sequences of it; without the package `datasets`."""

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bd3lm_hf.data.text_files import find_text_files, read_text_files


# Documents that are tokenized at once.
TOKENIZE_BATCH_SIZE = 20_000


class Sequences(torch.utils.data.Dataset):
    """
    Packed sequences, as rows that a trainer takes.

    Args:
        ids: [number, length], of any integer dtype.
        columns: names of the columns of a row, which all hold its ids.
    """

    def __init__(self, ids: np.ndarray, columns: Sequence[str] = ("input_ids",)):
        self.ids, self.columns = ids, tuple(columns)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.from_numpy(self.ids[index].astype(np.int64))
        return dict.fromkeys(self.columns, row)

    def select(self, indices: Sequence[int] | np.ndarray) -> "Sequences":
        """The rows of these numbers, in their order."""
        return Sequences(self.ids[np.asarray(indices, dtype=np.int64)], self.columns)

    def with_labels(self) -> "Sequences":
        """The same rows, each predicted whole: as a causal language model of Transformers takes them."""
        return Sequences(self.ids, (*self.columns, "labels"))

    def shuffled(self, seed: int) -> "Sequences":
        """All rows in an order that is drawn with a seed."""
        return self.select(np.random.default_rng(seed).permutation(len(self)))

    def lists(self) -> list[list[int]]:
        """The rows as lists of ids."""
        return self.ids.tolist()


def read_text(data: str, max_bytes: int) -> str:
    """
    The first `max_bytes` bytes (UTF-8) of a corpus, its documents joined by blank lines.

    Args:
        data: What `load_documents` takes. What is no text file (a table, the Hub) needs the package `datasets`.
        max_bytes: at least 1.
    """
    files = find_text_files(data)
    if files is None:
        from bd3lm_hf.data.documents import limit_bytes, load_documents

        texts = limit_bytes(load_documents(data), max_bytes)["text"]
    else:
        texts = read_text_files(files, data, max_bytes)
    return "\n\n".join(text for text in texts if text)


def paragraphs(text: str) -> list[str]:
    """The documents of a text: what lies between blank lines."""
    return [part.strip("\n") for part in text.split("\n\n") if part.strip()]


def first_bytes(texts: Iterable[str], max_bytes: int) -> list[str]:
    """The first texts, of so many bytes in all at least, or all."""
    first, num_bytes = [], 0
    for text in texts:
        first.append(text)
        num_bytes += len(text.encode())
        if num_bytes >= max_bytes:
            break
    return first


def tokenized(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The ids of all documents [tokens], EOS behind each. Special tokens spelled out in a text are ordinary text."""
    # Straight from the library, on all cores and without offsets: text by the hundred MB is to be read in seconds.
    backend, eos = tokenizer.backend_tokenizer, [tokenizer.eos_token_id]
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    parts = []
    with tqdm(total=len(texts), desc="Tokenizing", unit=" documents", delay=2) as bar:
        for start in range(0, len(texts), TOKENIZE_BATCH_SIZE):
            batch = list(texts[start : start + TOKENIZE_BATCH_SIZE])
            encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
            rows = chain.from_iterable((encoding.ids, eos) for encoding in encodings)
            parts.append(np.fromiter(chain.from_iterable(rows), dtype=np.int32))
            bar.update(len(batch))
    backend.encode_special_tokens = before
    return np.concatenate(parts)


def packed(ids: np.ndarray, length: int, bos_token_id: int) -> Sequences:
    """
    The tokens of a text [tokens] in sequences of `length`, BOS in front of each; what does not fill one is left out.

    Raises:
        ValueError: there is not enough for one.
    """
    num_sequences = len(ids) // (length - 1)
    if not num_sequences:
        raise ValueError(f"`length` must be at most {len(ids) + 1} for a text of {len(ids)} tokens, but got {length}.")
    rows = ids[: num_sequences * (length - 1)].reshape(num_sequences, length - 1)
    return Sequences(np.pad(rows, ((0, 0), (1, 0)), constant_values=bos_token_id))


def drawn(sequences: Sequences, number: int) -> Sequences:
    """A sample of so many sequences, or all of them if there are no more; the first ones are of few documents."""
    return sequences if number >= len(sequences) else sequences.shuffled(seed=0).select(range(number))
