"""
How likely a block diffusion model finds words that were removed, with and without the text behind them.

Let G be the removed tokens of one block and C what is given: all earlier blocks as they were, and the other tokens of
the block, or only those before G. For a uniformly random order of revealing G, the chain rule and Jensen's inequality
give

    -log p(G | C) <= E_order[-log p(G in this order | C)]
                   = sum_{k = 1..n} 1/k E_{|M| = k}[sum_{i in M} -log x_theta(x_i | G without M, C)],

with n the tokens of G and M a uniform subset of them: the NELBO of the block restricted to G. `first_hitting` reveals
in such an order, and under it p(G | C) itself, the mean over orders, follows from the same 2^n predictions by

    p(M) = 1/|M| sum_{i in M} x_theta(x_i | G without M, C) p(M without i),    p(nothing) = 1,

so neither is estimated. A gap through several blocks is the sum over them, each behind the removed words before it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from bd3lm_hf import BD3LMForMaskedLM, CommitCache
from bd3lm_hf.evaluation.estimate import Estimate


MOST_WORDS, MOST_TOKENS = 3, 8
# What a byte-level tokenizer writes for the space and the newline that words begin with.
WORD_STARTS = ("Ġ", "Ċ")


@dataclass(frozen=True)
class Gap:
    """The tokens [start, stop) of a sequence."""

    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    def in_blocks(self, block_size: int) -> list["Gap"]:
        """Its parts, one for each block."""
        borders = range((self.start // block_size + 1) * block_size, self.stop, block_size)
        edges = [self.start, *borders, self.stop]
        return [Gap(start, stop) for start, stop in zip(edges, edges[1:])]


def draw_gap(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, generator: np.random.Generator) -> Gap | None:
    """
    Up to `MOST_WORDS` consecutive words of a text, of at most `MOST_TOKENS` tokens together, drawn uniformly; the
    first has a letter or a digit. None if the text has no such words. A word is what stands between blanks, with the
    blank before it.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    special = set(tokenizer.all_special_ids)
    starts = [index for index, token in enumerate(tokens) if ids[index] in special or token.startswith(WORD_STARTS)]
    num_words = int(generator.integers(1, MOST_WORDS + 1))
    gaps = [
        Gap(start, stop)
        for start, end_of_first, stop in zip(starts, starts[1:], starts[num_words:])
        if stop - start <= MOST_TOKENS
        and special.isdisjoint(ids[start:stop])
        and any(character.isalnum() for character in tokenizer.decode(ids[start:end_of_first]))
    ]
    return gaps[generator.integers(len(gaps))] if gaps else None


@torch.no_grad()
def reveal_log_probs(model: BD3LMForMaskedLM, ids: torch.Tensor, gap: Gap, sees_right: bool) -> torch.Tensor:
    """
    log x_theta of the removed tokens of one block, for each subset M of them that is masked.

    Args:
        ids: the text [length].
        gap: within one block.
        sees_right: whether the tokens of the block behind the gap are known, or masked in all subsets.

    Returns:
        [2^n, n], float64: row M, whose bit i says whether the i-th removed token is masked; -inf where it is not.
    """
    config = model.config
    block_start = gap.start // config.block_size * config.block_size
    block = ids[block_start : block_start + config.block_size]
    subsets = torch.arange(2**gap.num_tokens, device=ids.device)[:, None]
    masked = subsets >> torch.arange(gap.num_tokens, device=ids.device) & 1 == 1
    inside = slice(gap.start - block_start, gap.stop - block_start)
    x_t = block.repeat(len(subsets), 1)
    x_t[:, inside] = x_t[:, inside].masked_fill(masked, config.mask_token_id)
    if not sees_right:
        x_t[:, inside.stop :] = config.mask_token_id
    cache = None
    if block_start > 0:
        cache = DynamicCache()
        model(ids[None, :block_start], cache=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(len(subsets))
        cache = CommitCache(cache, 0)
    logits = model(x_t, cache=cache).logits[:, inside][masked].float()
    logits[:, config.mask_token_id] = -torch.inf
    targets = block[inside].expand(len(subsets), -1)[masked]
    log_probs = torch.full(masked.shape, -torch.inf, dtype=torch.float64, device=ids.device)
    log_probs[masked] = -torch.nn.functional.cross_entropy(logits, targets, reduction="none").double()
    return log_probs


def any_order_bound(log_probs: torch.Tensor) -> float:
    """E_order[-log p] in nats, from `reveal_log_probs` [2^n, n]."""
    num_tokens = log_probs.shape[1]
    total = 0.0
    for subset in range(1, 2**num_tokens):
        size = subset.bit_count()
        nll = -log_probs[subset][log_probs[subset] > -torch.inf].sum().item()
        total += nll / (size * math.comb(num_tokens, size))
    return total


def any_order_nll(log_probs: torch.Tensor) -> float:
    """-log E_order[p] in nats, from `reveal_log_probs` [2^n, n]."""
    rows = log_probs.tolist()
    log_likelihood = [0.0]
    for subset in range(1, len(rows)):
        terms = [
            value + log_likelihood[subset ^ (1 << token)]
            for token, value in enumerate(rows[subset])
            if subset >> token & 1
        ]
        log_likelihood.append(float(np.logaddexp.reduce(terms)) - math.log(len(terms)))
    return -log_likelihood[-1]


def left_to_right_nll(log_probs: torch.Tensor) -> float:
    """-log p in nats of revealing the gap from left to right, from `reveal_log_probs` [2^n, n]."""
    num_tokens = log_probs.shape[1]
    return -sum(log_probs[2**num_tokens - 2**token, token].item() for token in range(num_tokens))


def score_gap(model: BD3LMForMaskedLM, ids: torch.Tensor, gap: Gap) -> dict[str, float]:
    """Nats of a gap in all, by name: with what stands behind it known or not, and in which order it is revealed."""
    scores = dict.fromkeys(("infill_bound", "infill", "continue_bound", "continue", "continue_left_to_right"), 0.0)
    block_size = model.config.block_size
    for part in gap.in_blocks(block_size):
        known = unknown = reveal_log_probs(model, ids, part, sees_right=True)
        if part.stop % block_size and part.stop < len(ids):
            unknown = reveal_log_probs(model, ids, part, sees_right=False)
        scores["infill_bound"] += any_order_bound(known)
        scores["infill"] += any_order_nll(known)
        scores["continue_bound"] += any_order_bound(unknown)
        scores["continue"] += any_order_nll(unknown)
        scores["continue_left_to_right"] += left_to_right_nll(unknown)
    return scores


@torch.no_grad()
def autoregressive_nll(model: PreTrainedModel, ids: torch.Tensor, gap: Gap) -> float:
    """-log p in nats of a gap under an autoregressive model, behind what stands before it."""
    logits = model(ids[None, : gap.stop - 1], use_cache=False).logits[0, gap.start - 1 :].double()
    return -logits.log_softmax(-1).gather(-1, ids[gap.start : gap.stop, None]).sum().item()


def fill(model: BD3LMForMaskedLM, sequences: torch.Tensor, gaps: Sequence[Gap], sees_right: bool) -> np.ndarray:
    """
    How many removed tokens of each gap come back, the surest first and greedily, from `generate(..., infill=True)`.

    Args:
        sequences: [batch, length].
        gaps: one for each row.
        sees_right: whether what stands behind the gap is given, or removed, too.

    Raises:
        AssertionError: a given token is not kept, or a gap is not filled.
    """
    positions = torch.arange(sequences.shape[1])
    removed = torch.stack([(gap.start <= positions) & (positions < gap.stop) for gap in gaps])
    hidden = removed if sees_right else torch.stack([gap.start <= positions for gap in gaps])
    mask_token_id = model.config.mask_token_id
    filled = model.generate(
        sequences.masked_fill(hidden, mask_token_id),
        attention_mask=torch.ones_like(sequences),
        infill=True,
        do_sample=False,
        sampler="confidence",
        denoising_steps=model.config.block_size,
    )
    assert filled.shape == sequences.shape, "the text has changed its length"
    assert (filled == sequences)[~hidden].all(), "a given token was not kept"
    assert (filled != mask_token_id).all(), "a gap was not filled"
    return ((filled == sequences) & removed).sum(-1).numpy()


def per_token(totals: Sequence[float], num_tokens: Sequence[int]) -> Estimate:
    """Sum of the totals over that of the tokens; the standard error, over gaps, is that of a ratio estimator."""
    totals, num_tokens = np.asarray(totals, dtype=np.float64), np.asarray(num_tokens)
    mean = totals.sum() / num_tokens.sum()
    return Estimate(float(mean), (totals - mean * num_tokens) / num_tokens.sum())
