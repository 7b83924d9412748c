"""The nucleus that is found without sorting the vocabulary is the nucleus of Transformers."""

import pytest
import torch
from transformers import TopPLogitsWarper

from bd3lm_hf.modeling.prediction_bd3lm import PartialSortTopPLogitsWarper


VOCAB_SIZE = 5000
TEXT = torch.zeros(6, 3, dtype=torch.long)


def scores_of_widths(*temperatures):
    """A row for each: the higher its temperature, the wider its nucleus."""
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(len(temperatures), VOCAB_SIZE, generator=generator, dtype=torch.float64)
    # Less than float32 could tell apart would make ties of them.
    return (scores / torch.tensor(temperatures)[:, None]).float()


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("min_tokens_to_keep", [1, 40])
def test_narrow_and_wide_rows_get_the_nucleus_of_transformers(top_p, min_tokens_to_keep):
    warper = TopPLogitsWarper(top_p, min_tokens_to_keep=min_tokens_to_keep)
    partial = PartialSortTopPLogitsWarper.of(warper)
    scores = scores_of_widths(0.2, 0.5, 30.0, 1.0, 0.3, 0.1)
    for _ in range(3):
        assert torch.equal(partial(TEXT, scores), warper(TEXT, scores))


def test_rows_are_wide_and_narrow_where_the_test_means_them_to_be(monkeypatch):
    sorted_rows = []
    whole = TopPLogitsWarper.__call__
    monkeypatch.setattr(
        TopPLogitsWarper,
        "__call__",
        lambda self, ids, scores: sorted_rows.append(len(scores)) or whole(self, ids, scores),
    )
    partial = PartialSortTopPLogitsWarper(0.9)
    # One wide row of six is no reason to sort more of the others.
    for _ in range(3):
        partial(TEXT, scores_of_widths(0.2, 0.5, 30.0, 0.4, 0.3, 0.1))
    assert sorted_rows == [1, 1, 1] and partial.num_sorted == 512
    # Where most are wide, it is: from the next call on, of 5000 tokens all are sorted.
    for _ in range(8):
        partial(TEXT, scores_of_widths(*[30.0] * 6))
    assert partial.num_sorted == 4096 and sorted_rows[-1] == 6
