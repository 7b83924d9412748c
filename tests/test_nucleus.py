"""The nucleus that is found without sorting the vocabulary is the nucleus."""

import pytest
import torch
from transformers import TopPLogitsWarper

from bd3lm_hf.modeling.prediction_block_diffusion import SelectingTopPLogitsWarper


VOCAB_SIZE = 10_000
TEXT = torch.zeros(6, 3, dtype=torch.long)
# What float32 cannot tell: a token may be in or out whose nucleus would be full so close to p.
TOLERANCE = 1e-5


def scores_of_widths(*temperatures, vocab_size=VOCAB_SIZE):
    """A row for each: the higher its temperature, the wider its nucleus."""
    scores = 3 * torch.randn(len(temperatures), vocab_size, generator=torch.Generator().manual_seed(0))
    scores = scores / torch.tensor(temperatures)[:, None]
    scores[:, 7] = -torch.inf
    return scores


def mass_before(scores):
    """The probability of all likelier tokens, at each token."""
    probabilities, ids = scores.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(probabilities).scatter_(1, ids, probabilities.cumsum(-1) - probabilities)


@pytest.mark.parametrize("warper_class", [TopPLogitsWarper, SelectingTopPLogitsWarper])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 3000])
@pytest.mark.parametrize("temperatures", [(0.1, 0.2, 0.3, 0.5), (0.2, 0.5, 30.0, 1.0, 2.0, 0.1), (300.0,)])
def test_rows_keep_their_nucleus(warper_class, top_p, temperatures, vocab_size):
    scores = scores_of_widths(*temperatures, vocab_size=vocab_size)
    warped = warper_class(top_p)(TEXT[: len(scores)], scores)
    is_kept, before = warped > -torch.inf, mass_before(scores)
    assert torch.equal(warped[is_kept], scores[is_kept])
    assert is_kept[before < top_p - TOLERANCE].all()
    assert not is_kept[before > top_p + TOLERANCE].any()
    assert is_kept.gather(1, scores.argmax(-1, keepdim=True)).all()


def test_so_many_tokens_are_kept_at_least():
    scores = scores_of_widths(0.1, 0.2, 30.0)
    kept = SelectingTopPLogitsWarper(0.5, min_tokens_to_keep=40)(TEXT[:3], scores) > -torch.inf
    assert kept.sum(-1).tolist()[:2] == [40, 40] and kept[2].sum() > 512
    kept = SelectingTopPLogitsWarper(0.5, min_tokens_to_keep=600)(TEXT[:3], scores) > -torch.inf
    assert kept.sum(-1).min() == 600


def test_a_vocabulary_is_not_sorted(monkeypatch):
    monkeypatch.setattr(torch, "sort", lambda *args, **kwargs: pytest.fail("sorted"))
    SelectingTopPLogitsWarper(0.9)(TEXT, scores_of_widths(0.2, 0.5, 30.0, 0.4, 0.3, 0.1))
    with pytest.raises(pytest.fail.Exception, match="sorted"):
        TopPLogitsWarper(0.9)(TEXT, scores_of_widths(0.2, 0.5, 30.0, 0.4, 0.3, 0.1))


def test_equal_scores_have_a_nucleus_of_their_share():
    warped = SelectingTopPLogitsWarper(0.9)(TEXT[:1], torch.zeros(1, VOCAB_SIZE))
    assert abs(int((warped > -torch.inf).sum()) - 0.9 * VOCAB_SIZE) <= 1


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 3000])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_no_distribution_reach_the_check_behind(bad, vocab_size):
    scores = scores_of_widths(30.0, 30.0, vocab_size=vocab_size)
    scores[1, 3] = bad
    warped = SelectingTopPLogitsWarper(0.9)(TEXT[:2], scores)
    assert warped[0].amax().isfinite() and not warped[1].amax().isfinite()
