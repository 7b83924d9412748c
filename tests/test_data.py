"""Text becomes sequences without losing, inventing or reordering anything."""

import json

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from bd3lm_hf.data.documents import (
    _bytes_per_token,
    draw_sequences,
    limit_bytes,
    load_documents,
    pack_documents,
    split_documents,
)
from bd3lm_hf.data.tokenization import train_tokenizer


TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "Größe: 3 µm, 日本語, 😀👍 and plain text\n",
    "",
    "the quick brown fox jumps over the lazy dog " * 20,
]


@pytest.fixture(scope="module")
def documents():
    return Dataset.from_dict({"text": TEXTS})


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents, vocab_size=300)


def num_bytes(documents):
    return sum(len(text.encode()) for text in documents["text"])


# Packing


def test_packing_keeps_every_token_in_order(documents, tokenizer):
    sequences = pack_documents(documents, tokenizer, 16, drop_remainder=False)
    stream = [token for row in sequences["input_ids"] for token in row[1:]]
    assert tokenizer.decode(stream) == "".join(text + tokenizer.eos_token for text in TEXTS if text)


def test_training_sequences_are_full_and_start_with_bos(documents, tokenizer):
    sequences = pack_documents(documents, tokenizer, 16)
    assert len(sequences) > 10
    assert {len(row) for row in sequences["input_ids"]} == {16}
    assert {row[0] for row in sequences["input_ids"]} == {tokenizer.bos_token_id}


def test_dropping_the_remainder_drops_only_what_does_not_fill_a_sequence(documents, tokenizer):
    everything = pack_documents(documents, tokenizer, 16, drop_remainder=False)["input_ids"][:]
    full = pack_documents(documents, tokenizer, 16)["input_ids"][:]
    assert full == [row for row in everything if len(row) == 16]
    assert len(everything) - len(full) == 1


def test_bytes_of_the_sequences_add_up_to_the_corpus(documents, tokenizer):
    sequences = pack_documents(documents, tokenizer, 7, drop_remainder=False)
    assert sum(sequences["num_bytes"]) == num_bytes(documents)


def test_bytes_are_counted_where_their_tokens_are():
    # "日" (3 bytes) in three tokens, "é" (2 bytes) in one, " a" in one; the last entry is EOS.
    offsets = [(0, 1), (0, 1), (0, 1), (1, 2), (2, 4)]
    assert _bytes_per_token("日é a", offsets).tolist() == [3, 0, 0, 2, 2, 0]
    # A tokenizer that strips blanks covers them with no token.
    assert _bytes_per_token("ab \n", [(0, 2)]).tolist() == [2, 2]


def test_special_tokens_spelled_out_in_a_text_are_ordinary_text(tokenizer):
    text = "a [MASK] and </s> and <s>"
    (row,) = pack_documents(Dataset.from_dict({"text": [text]}), tokenizer, 64, drop_remainder=False)["input_ids"]
    assert tokenizer.mask_token_id not in row
    assert row.count(tokenizer.bos_token_id) == row.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(row[1:-1]) == text


def test_a_sample_of_sequences_is_of_the_corpus_and_without_repeats():
    sequences = Dataset.from_dict({"input_ids": [[index] for index in range(100)]})
    sample = draw_sequences(sequences, 20, seed=1)["input_ids"][:]
    assert len({ids[0] for ids in sample}) == len(sample) == 20
    assert sample != sequences["input_ids"][:20]
    assert draw_sequences(sequences, 20, seed=1)["input_ids"][:] == sample
    assert draw_sequences(sequences, 200)["input_ids"][:] == sequences["input_ids"][:]
    with pytest.raises(ValueError, match="num_sequences=0 must be at least 1"):
        draw_sequences(sequences, 0)


# Streams


def stream(texts):
    """A stream that knows its columns only once it is read, as one from a generator or some Hub datasets."""
    return IterableDataset.from_generator(lambda: ({"text": text} for text in texts))


@pytest.mark.parametrize("drop_remainder", [True, False])
def test_a_stream_is_packed_as_a_table_is(documents, tokenizer, drop_remainder):
    expected = pack_documents(documents, tokenizer, 16, drop_remainder=drop_remainder)
    for documents_of_stream in (documents.to_iterable_dataset(), stream(TEXTS)):
        sequences = pack_documents(documents_of_stream, tokenizer, 16, drop_remainder=drop_remainder)
        assert isinstance(sequences, IterableDataset)
        assert sequences.column_names == expected.column_names
        assert list(sequences) == list(expected)


def test_a_stream_is_read_only_as_far_as_it_is_needed(tokenizer, monkeypatch):
    monkeypatch.setattr("bd3lm_hf.data.documents.TOKENIZE_BATCH_SIZE", 2)
    monkeypatch.setattr("bd3lm_hf.data.documents.STREAM_PACK_BATCH_SIZE", 4)
    read = []

    def texts():
        for number in range(1000):
            read.append(number)
            yield {"text": f"document {number} " * 5}

    sequences = pack_documents(IterableDataset.from_generator(texts), tokenizer, 8)
    assert len(list(sequences.take(3))) == 3
    assert len(read) < 20


def test_each_batch_of_documents_is_packed_by_itself(tokenizer, monkeypatch):
    monkeypatch.setattr("bd3lm_hf.data.documents.STREAM_PACK_BATCH_SIZE", 2)
    texts = [f"document {number} " * 4 for number in range(6)]
    sequences = list(pack_documents(stream(texts), tokenizer, 16, drop_remainder=False))
    expected = [
        row
        for start in (0, 2, 4)
        for row in pack_documents(Dataset.from_dict({"text": texts[start : start + 2]}), tokenizer, 16,
                                  drop_remainder=False)
    ]  # fmt: skip
    assert sequences == expected


def test_a_table_streams(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": text, "id": 1}) + "\n" for text in ("x", "y")), encoding="utf-8")
    documents = load_documents(str(path), text_column="body", streaming=True)
    assert isinstance(documents, IterableDataset)
    assert list(documents) == [{"text": "x"}, {"text": "y"}]
    with pytest.raises(ValueError, match="text_column='text' is not a column of .*it has .*body"):
        load_documents(str(path), streaming=True)


def test_a_folder_streams(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name, encoding="utf-8")
    documents = load_documents(str(tmp_path), streaming=True)
    assert isinstance(documents, IterableDataset)
    assert list(documents) == [{"text": "a"}, {"text": "b"}]


def test_a_hub_dataset_streams(monkeypatch):
    def load_dataset(*args, streaming, **kwargs):
        assert streaming
        return stream(["x", None, "y"])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(load_documents("org/name", streaming=True)) == [{"text": "x"}, {"text": None}, {"text": "y"}]


def test_what_is_no_dataset_of_texts_is_refused(documents, tokenizer):
    with pytest.raises(ValueError, match=r"documents must have the column 'text'; it has \['body'\]"):
        pack_documents(documents.rename_column("text", "body"), tokenizer, 16)
    with pytest.raises(ValueError, match=r"got a DatasetDict with the splits \['train'\]; take one"):
        pack_documents(DatasetDict(train=documents), tokenizer, 16)
    with pytest.raises(ValueError, match="must be a datasets.Dataset or IterableDataset, but got a list"):
        pack_documents(TEXTS, tokenizer, 16)
    with pytest.raises(ValueError, match="a stream without rows"):
        pack_documents(stream([]), tokenizer, 16)


# Sources


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo ü\n", encoding="utf-8")
    assert load_documents(str(tmp_path / "a.txt"))["text"][:] == ["one\n\ntwo ü\n"]


def test_a_folder_is_a_document_per_text_file_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in {"b.txt": "B", "a.md": "A", "sub/c.py": "C"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    assert load_documents(str(tmp_path))["text"][:] == ["A", "B", "C"]


def test_a_table_is_a_document_per_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": text, "id": 1}) + "\n" for text in ("x", "y")), encoding="utf-8")
    assert load_documents(str(path), text_column="body")["text"][:] == ["x", "y"]
    with pytest.raises(ValueError, match="text_column='text' is not a column of .*it has .*body"):
        load_documents(str(path))


def test_a_hub_dataset_is_asked_for_with_its_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return Dataset.from_dict({"content": ["x", None, "y"]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    documents = load_documents("org/name", split="test", text_column="content", dataset_config="v1")
    assert asked == [(("org/name", "v1"), {"split": "test", "streaming": False})]
    assert documents["text"][:] == ["x", None, "y"]


def test_a_hub_dataset_that_cannot_be_loaded_says_what_was_asked_for(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("no such dataset")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ValueError, match="data='org/name' is no file or folder .*split='train'.*no such dataset"):
        load_documents("org/name")


def test_the_builtin_corpus_is_the_standard_library_in_a_fixed_order():
    first, second = (load_documents("builtin") for _ in range(2))
    assert first["text"][:] == second["text"][:]
    assert any(text.startswith('r"""HTTP/1.1 client library') for text in first["text"])
    assert num_bytes(first) > 5_000_000


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "missing.jsonl"])
def test_a_missing_path_is_not_taken_for_a_hub_dataset(name):
    with pytest.raises(ValueError, match=f"data='{name}' does not exist; it takes a file, a folder"):
        load_documents(name)


def test_text_that_is_not_utf8_is_refused_with_its_file(tmp_path):
    (tmp_path / "good.txt").write_text("fine", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text: .* in position 2"):
        load_documents(str(tmp_path))


def test_a_corpus_without_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no text \(0 documents\)"):
        load_documents(str(tmp_path))
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match=r"holds no text \(1 documents\)"):
        load_documents(str(tmp_path))


def test_sizes_that_make_no_sequence_are_refused(documents, tokenizer):
    with pytest.raises(ValueError, match="length=1 must be at least 2"):
        pack_documents(documents, tokenizer, 1)
    with pytest.raises(ValueError, match="length=4096: the corpus has only .* tokens"):
        pack_documents(documents, tokenizer, 4096)
    with pytest.raises(ValueError, match="the corpus holds no text"):
        pack_documents(Dataset.from_dict({"text": ["", None]}), tokenizer, 8)
    with pytest.raises(ValueError, match="max_bytes=0 must be at least 1"):
        limit_bytes(documents, 0)
    for fraction in (0, 1, -0.1):
        with pytest.raises(ValueError, match=f"held_out_fraction={fraction} must lie between 0 and 1"):
            split_documents(documents, fraction)


# Splits


def test_held_out_documents_are_not_trained_on_and_none_is_lost():
    texts = [f"document {index}" for index in range(50)]
    splits = split_documents(Dataset.from_dict({"text": texts}), 0.2, seed=1)
    assert len(splits["held_out"]) == 10
    assert sorted([*splits["train"]["text"], *splits["held_out"]["text"]]) == sorted(texts)
    again = split_documents(Dataset.from_dict({"text": texts}), 0.2, seed=1)
    assert again["held_out"]["text"][:] == splits["held_out"]["text"][:]


def test_a_single_document_is_cut_at_the_end_of_a_line():
    text = "".join(f"line {index}\n" for index in range(100))
    splits = split_documents(Dataset.from_dict({"text": [text]}), 0.1)
    (train,), (held_out,) = (splits[name]["text"][:] for name in ("train", "held_out"))
    assert train + held_out == text
    assert held_out.startswith("line 9")
    assert train.endswith("\n")


def test_a_single_document_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="held_out_fraction=0.1: the split 'train' holds no text"):
        split_documents(Dataset.from_dict({"text": ["one line"]}), 0.1)


def test_the_byte_limit_cuts_the_document_that_crosses_it():
    documents = Dataset.from_dict({"text": ["abc", "dé", "fgh"]})
    assert limit_bytes(documents, 5)["text"][:] == ["abc", "d"]  # "é" has two bytes, and one is left for it
    assert limit_bytes(documents, 6)["text"][:] == ["abc", "dé"]
    assert limit_bytes(documents, 100)["text"][:] == ["abc", "dé", "fgh"]
