"""Tokenizers: training one, loading one with the special tokens that block diffusion needs, and what tokens hold."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast


if TYPE_CHECKING:
    from datasets import Dataset

MASK_TOKEN = "[MASK]"
# Documents that are encoded at once.
ENCODING_BATCH_SIZE = 1000


def train_tokenizer(documents: "Dataset | Sequence[str]", vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer; its special tokens are `<s>`, `</s>`, `<pad>` and, with the last id, `[MASK]`.

    It puts `<s>` before a text by itself, so a prompt starts as the training sequences do, and an empty one is valid.

    Args:
        documents: Texts, or a dataset with the column `text`.
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
    texts = documents if isinstance(documents, (list, tuple)) else documents["text"]
    tokenizer.train_from_iterator((text for text in texts if text), trainer=trainer, length=len(documents))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos_token} $A", special_tokens=[(bos_token, tokenizer.token_to_id(bos_token))]
    )
    trained = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos_token, eos_token=eos_token, pad_token=pad_token
    )
    trained.add_special_tokens({"mask_token": MASK_TOKEN})
    return trained


def read_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """
    A tokenizer as it is.

    Args:
        name_or_path: A folder, or a repository id on the Hub.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:
        # A file that holds something else fails wherever its reader notices, in Rust with a plain exception.
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ValueError(
            f"tokenizer={str(name_or_path)!r} could not be loaded; it takes a folder that holds a tokenizer or the "
            f"id of a repository on the Hub: {kind}{error}"
        ) from error


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer and give it the special tokens that block diffusion needs.

    A missing mask token is added with the next free id; a missing BOS falls back to the CLS or EOS token, a missing
    EOS to the SEP or BOS token, and a missing padding token to the EOS token.

    Args:
        name_or_path: A folder, or a repository id on the Hub.

    Raises:
        ValueError: if it cannot be loaded, has no fast implementation or has none of the four boundary tokens.
    """
    tokenizer = read_tokenizer(name_or_path)
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


def encode_prompts(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    """
    Prompts as the training sequences start: BOS in front, no EOS behind, padded on the left.

    Returns:
        `input_ids` and `attention_mask` [batch, length].
    """
    encoded = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [[tokenizer.bos_token_id, *ids] for ids in encoded]
    return tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")


def token_byte_counts(tokenizer: PreTrainedTokenizerBase) -> torch.LongTensor | None:
    """
    How many UTF-8 bytes of text each token stands for, for a byte-level BPE tokenizer (that of GPT-2 and its heirs).

    There, each character of a token's string is one byte, so the counts of the tokens of a text add up to the bytes of
    what was tokenized: the text itself, unless the tokenizer normalizes it or puts a space in front. Special tokens
    count 0; a token that was added without being special counts the bytes of its text.

    Args:
        tokenizer: Any tokenizer.

    Returns:
        int64 [vocab], or None for a tokenizer whose tokens do not say which bytes they encode.
    """
    if not tokenizer.is_fast or not isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        return None
    vocabulary = tokenizer.get_vocab()
    counts = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.long)
    for token, token_id in vocabulary.items():
        counts[token_id] = len(token)
    for token_id, token in tokenizer.added_tokens_decoder.items():
        counts[token_id] = 0 if token.special else len(token.content.encode())
    return counts


def encode_documents(texts: Iterable[str | None], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """
    The ids of each document, BOS in front and EOS behind; what holds no text is passed over.

    Special tokens that are spelled out in a text are read as ordinary text.

    Args:
        texts: the documents.
        tokenizer: a tokenizer with BOS and EOS.
    """
    texts = [text for text in texts if text]
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    rows = []
    with tqdm(total=len(texts), desc="Tokenizing", unit=" documents", delay=2) as bar:
        for start in range(0, len(texts), ENCODING_BATCH_SIZE):
            batch = texts[start : start + ENCODING_BATCH_SIZE]
            rows += tokenizer(batch, verbose=False, **options)["input_ids"]
            bar.update(len(batch))
    return [[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] for ids in rows]
