"""Batches hold what the examples hold: nothing is predicted, seen or packed that was not meant to be."""

import numpy as np
import pytest
import torch

from bd3lm_hf import BD3LMDataCollator


def test_padding_is_neither_seen_nor_predicted_but_an_eos_of_the_text_is():
    collate = BD3LMDataCollator(pad_token_id=9)
    batch = collate([{"input_ids": [1, 5, 9]}, {"input_ids": [1, 9]}])
    assert batch["input_ids"].tolist() == [[1, 5, 9], [1, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 5, 9], [-100, 9, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_full_sequences_need_no_attention_mask():
    batch = BD3LMDataCollator(pad_token_id=0)([{"input_ids": torch.tensor([1, 0]), "num_bytes": 3}] * 2)
    assert set(batch) == {"input_ids", "labels"}
    assert batch["labels"].tolist() == [[-100, 0], [-100, 0]]


def test_the_first_token_is_a_label_only_for_a_model_that_predicts_it():
    batch = BD3LMDataCollator(pad_token_id=0, ignore_bos=False)([{"input_ids": torch.tensor([1, 0])}] * 2)
    assert batch["labels"].tolist() == [[1, 0], [1, 0]]


def test_labels_are_those_of_the_example():
    features = [{"input_ids": [1, 5, 6, 7], "labels": [-100, -100, 6, 7]}, {"input_ids": [1, 8], "labels": [1, 3]}]
    batch = BD3LMDataCollator(pad_token_id=0)(features)
    assert batch["labels"].tolist() == [[-100, -100, 6, 7], [-100, 3, -100, -100]]
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7], [1, 8, 0, 0]]


@pytest.mark.parametrize("ignore_bos", [True, False])
def test_the_first_token_of_each_packed_document_is_a_label_only_for_a_model_that_predicts_it(ignore_bos):
    features = [{"input_ids": [1, 5, 1, 6, 1], "document_ids": [1, 1, 2, 2, 3]}, {"input_ids": [1, 7, 8]}]
    batch = BD3LMDataCollator(pad_token_id=0, ignore_bos=ignore_bos)(features)
    assert batch["document_ids"].tolist() == [[1, 1, 2, 2, 3], [1, 1, 1, 0, 0]]
    first = -100 if ignore_bos else 1
    assert batch["labels"].tolist() == [[first, 5, first, 6, first], [first, 7, 8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


def test_padding_that_is_there_already_stays_padding():
    features = [{"input_ids": [1, 5, 9, 9], "attention_mask": [1, 1, 0, 0]}, {"input_ids": [1, 5, 6]}]
    batch = BD3LMDataCollator(pad_token_id=9)(features)
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 5, -100, -100], [-100, 5, 6, -100]]


def test_an_attention_mask_of_ones_says_nothing():
    batch = BD3LMDataCollator(pad_token_id=9)([{"input_ids": [1, 5], "attention_mask": [1, 1]}])
    assert set(batch) == {"input_ids", "labels"}


@pytest.mark.parametrize(("multiple", "length"), [(4, 8), (5, 5), (64, 64)])
def test_padding_goes_up_to_a_multiple(multiple, length):
    features = [{"input_ids": [1, 5, 6, 7, 8], "document_ids": [1, 1, 1, 2, 2]}, {"input_ids": [1]}]
    batch = BD3LMDataCollator(pad_token_id=3, pad_to_multiple_of=multiple)(features)
    assert {column.shape for column in batch.values()} == {(2, length)}
    assert batch["attention_mask"].sum(1).tolist() == [5, 1]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 3).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_lists_arrays_and_tensors_are_the_same():
    ids, labels = [1, 5, 6], [-100, -100, 6]
    batches = [
        BD3LMDataCollator(pad_token_id=0)([{"input_ids": kind(ids), "labels": kind(labels)}])
        for kind in (list, np.array, torch.tensor, lambda values: np.array(values, dtype=np.int32))
    ]
    for batch in batches:
        assert {name: (column.dtype, column.tolist()) for name, column in batch.items()} == {
            "input_ids": (torch.int64, [ids]),
            "labels": (torch.int64, [labels]),
        }


def test_the_example_is_left_as_it_was():
    example = {"input_ids": torch.tensor([1, 5]), "labels": torch.tensor([1, 5])}
    BD3LMDataCollator(pad_token_id=0)([example])
    assert example["labels"].tolist() == [1, 5]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"text": "a", "ids": [1]}, r"example 1 of the batch has no `input_ids`; it has \['ids', 'text'\]"),
        ({"input_ids": []}, "`input_ids` of example 1 of the batch hold no token"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "`input_ids` of example 1 of the batch hold no token"),
        ({"input_ids": [1, 2], "labels": [1]}, "`labels` of example 1 .* `input_ids`, 2, but has length 1"),
        ({"input_ids": [1, 2], "document_ids": [1] * 3}, "`document_ids` of example 1 .*, 2, but has length 3"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "`attention_mask` of example 1 .*, 2, but has length 1"),
        ({"input_ids": [1, 2], "attention_mask": [0, 1]}, r"`attention_mask` of example 1 .* but is \[0, 1\]"),
        ({"input_ids": [1, 2, 3], "document_ids": [1, 2, 1]}, r"`document_ids` of example 1 .* but go \[1, 2, 1\]"),
        ({"input_ids": [1, 2], "document_ids": [-1, 0]}, r"`document_ids` of example 1 .* but go \[-1, 0\]"),
    ],
)
def test_what_cannot_be_batched_is_refused(example, message):
    with pytest.raises(ValueError, match=message):
        BD3LMDataCollator(pad_token_id=0)([{"input_ids": [1, 2]}, example])
