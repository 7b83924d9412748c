"""The rejection rule of speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318)."""

import torch
from torch import Tensor


def token_distributions(scores: Tensor, do_sample: bool) -> Tensor:
    """Probabilities [..., vocab] of processed scores [..., vocab]; a greedy choice is a distribution of one token."""
    if do_sample:
        return scores.softmax(-1)
    best = scores.argmax(-1, keepdim=True)
    return torch.zeros_like(scores).scatter_(-1, best, 1.0)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """
    Ids [batch] by inversion, from `probabilities` [batch, vocab], whose sum may be any positive number, and numbers
    in [0, 1) [batch].
    """
    # In float32 a vocabulary of fifty thousand would round small probabilities away.
    cumulative = probabilities.double().cumsum(-1)
    target = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=probabilities.shape[-1] - 1)


def accept_draft(draft: Tensor, drafted_from: Tensor, target: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """
    How many of the drafted tokens stay, from the left, and what the token after them is to be drawn from, so that all
    of them are distributed as `target`, whatever they were drafted from. A token x, drafted from q where the target is
    p, stays with probability min(1, p(x) / q(x)); in place of the first that does not comes one from max(0, p - q).

    Args:
        draft: ids [batch, drafted].
        drafted_from: q of each, given the tokens before it [batch, drafted + 1, vocab]; zeros where nothing was
            drafted, in each row at least the last.
        target: p of each, given the tokens before it [batch, drafted + 1, vocab].
        uniform: numbers in [0, 1) [batch, drafted].

    Returns:
        How many tokens stay [batch], and probabilities of the token after them, up to a factor [batch, vocab].
    """
    q, p = (part[:, :-1].gather(-1, draft[..., None]).squeeze(-1) for part in (drafted_from, target))
    stays = (q > 0) & (uniform * q < p)
    num_accepted = stays.long().cumprod(-1).sum(-1)
    rows = torch.arange(len(draft), device=draft.device)
    p, q = target[rows, num_accepted], drafted_from[rows, num_accepted]
    rest = (p - q).clamp(min=0)
    # Where p equals q nothing is rejected, except by rounding.
    return num_accepted, torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
