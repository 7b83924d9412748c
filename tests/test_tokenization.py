"""Tokenizers read any text, have the special tokens of block diffusion, and tell how many bytes a token encodes."""

import types

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bd3lm_hf.data import tokenization
from bd3lm_hf.data.tokenization import (
    check_tokenizer,
    encode_prompts,
    load_tokenizer,
    token_byte_counts,
    train_tokenizer,
)


TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "Größe: 3 µm, 日本語, 😀👍 and plain text\n",
    "the quick brown fox jumps over the lazy dog " * 20,
]


@pytest.fixture(scope="module")
def documents():
    return Dataset.from_dict({"text": TEXTS})


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents, vocab_size=300)


def test_prompts_start_as_training_sequences_do(tokenizer):
    batch = encode_prompts(["def add", ""], tokenizer)
    ids = tokenizer("def add", add_special_tokens=False)["input_ids"]
    pad, bos = tokenizer.pad_token_id, tokenizer.bos_token_id
    assert batch["input_ids"].tolist() == [[bos, *ids], [pad] * len(ids) + [bos]]
    assert batch["attention_mask"].tolist() == [[1] * (len(ids) + 1), [0] * len(ids) + [1]]


def test_trained_tokenizer_gives_the_mask_token_the_last_id(tokenizer):
    assert tokenizer.mask_token_id == len(tokenizer) - 1 <= 300
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id}
    assert len(special) == 4


def test_trained_tokenizer_reads_any_text_and_starts_it_with_bos(tokenizer):
    text = "\x00 never seen: Ω ≈ 𝔘\r\n\ttabs"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]


def test_trained_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert len(loaded) == len(tokenizer)
    assert loaded.mask_token_id == tokenizer.mask_token_id
    assert loaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


def test_gpt2_tokenizer_gets_the_mask_token_of_the_published_checkpoints(shared_dir):
    tokenizer = load_tokenizer(shared_dir / "tokenizers" / "gpt2")
    assert (tokenizer.mask_token_id, len(tokenizer)) == (50257, 50258)
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 50256


def test_tokenizers_that_cannot_serve_are_refused(monkeypatch, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="tokenizer=.* could not be loaded; it takes a folder"):
        load_tokenizer(tmp_path)

    slow = types.SimpleNamespace(is_fast=False)
    monkeypatch.setattr(tokenization.AutoTokenizer, "from_pretrained", lambda name: slow)
    with pytest.raises(ValueError, match="tokenizer='slow' .* without a fast implementation"):
        load_tokenizer("slow")

    no_boundaries = types.SimpleNamespace(is_fast=True, bos_token=None, eos_token=None, cls_token=None, sep_token=None)
    monkeypatch.setattr(tokenization.AutoTokenizer, "from_pretrained", lambda name: no_boundaries)
    with pytest.raises(ValueError, match="tokenizer='bare' has neither a BOS, EOS, CLS nor SEP"):
        load_tokenizer("bare")


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    size = len(tokenizer)
    check_tokenizer(tokenizer, types.SimpleNamespace(vocab_size=size, mask_token_id=size - 1))
    check_tokenizer(tokenizer, types.SimpleNamespace(vocab_size=size + 64, mask_token_id=size - 1))
    with pytest.raises(ValueError, match=f"tokenizer has {size} tokens, but the model's vocab_size is 100"):
        check_tokenizer(tokenizer, types.SimpleNamespace(vocab_size=100, mask_token_id=99))
    with pytest.raises(ValueError, match=f"mask_token_id is {size - 1}, the model's is 50257"):
        check_tokenizer(tokenizer, types.SimpleNamespace(vocab_size=50258, mask_token_id=50257))


def test_a_vocabulary_without_room_for_the_bytes_is_refused(documents):
    with pytest.raises(ValueError, match="vocab_size=259 is too small .* at least 260"):
        train_tokenizer(documents, 259)


# Bytes


@pytest.mark.parametrize("corpus", ["wikitext2_test.txt", "ptb_test.txt", "tiny_shakespeare.txt"])
def test_byte_counts_of_gpt2_add_up_to_the_bytes_of_a_corpus(shared_dir, corpus):
    tokenizer = load_tokenizer(shared_dir / "tokenizers" / "gpt2")
    text = (shared_dir / "corpora" / corpus).read_text(encoding="utf-8")
    counts = token_byte_counts(tokenizer)
    assert counts.shape == (50258,)
    assert counts[tokenizer(text, verbose=False)["input_ids"]].sum() == len(text.encode())


def test_byte_counts_of_every_prefix_are_those_of_its_bytes(tokenizer):
    # Four-byte characters, of which a token can hold a part.
    text = "\x00 Ω ≈ 𝔘\r\n\t日本語, 😀👍 and plain text"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    encoded = text.encode()
    ends = token_byte_counts(tokenizer)[ids].cumsum(0).tolist()
    assert ends[-1] == len(encoded)
    for number, end in enumerate(ends, start=1):
        assert tokenizer.decode(ids[:number]) == encoded[:end].decode(errors="replace")


def test_special_tokens_encode_no_text_and_added_ones_their_own(documents):
    tokenizer = train_tokenizer(documents, vocab_size=300)
    tokenizer.add_tokens(["<thinkß>"])
    counts = token_byte_counts(tokenizer)
    assert len(counts) == len(tokenizer)
    assert counts[tokenizer.all_special_ids].tolist() == [0] * 4
    assert counts[tokenizer.convert_tokens_to_ids("<thinkß>")] == 9
    text = "a <thinkß> b"
    assert counts[tokenizer(text)["input_ids"]].sum() == len(text.encode())


def test_a_tokenizer_of_words_does_not_say_which_bytes_it_encodes():
    words = Tokenizer(models.WordLevel({"hello": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert token_byte_counts(PreTrainedTokenizerFast(tokenizer_object=words)) is None
    assert token_byte_counts(types.SimpleNamespace(is_fast=False)) is None
