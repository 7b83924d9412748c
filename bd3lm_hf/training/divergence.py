"""What a loss reads off predictions beside -log p, without ever holding the logits of all tokens."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..modeling.loss_block_diffusion import CHUNK_NUMEL, CHUNK_NUMEL_ON_CPU


DIVERGENCES = ("forward", "reverse")
# The logit of a token without probability: finite, so that 0 log 0 is 0, and so are its gradients.
NO_PROBABILITY = -1e30
# A model's hidden states [tokens, hidden] -> its logits [tokens, vocab].
Head = Callable[[Tensor], Tensor]


def token_divergences(
    student: tuple[Tensor, Head],
    teacher: tuple[Tensor, Head],
    mask_token_id: int,
    kind: str = "forward",
    top_k: int | None = None,
    chunk_numel: int | None = None,
) -> Tensor:
    """
    KL of each token in nats [tokens], float32, differentiable with respect to the student.

    "forward" is KL(teacher || student) = sum p_T (log p_T - log p_S), "reverse" is KL(student || teacher). The mask
    token has no probability in either; ids that one of both lacks, as vocabularies are filled up to round sizes, count
    for neither. With `top_k` the teacher's likeliest tokens count one by one and all others as one token, which never
    gives more than the divergence of the whole vocabulary.

    Args:
        student, teacher: final hidden states [tokens, hidden], and the head that they go to; the teacher's gets no
            gradient.
        mask_token_id: the id without probability.
        kind: one of DIVERGENCES.
        top_k: how many of the teacher's tokens count one by one; None for all.
        chunk_numel: logits that are held at a time, made again in the backward pass; by default those of the loss.
    """
    (states, head), (teacher_states, teacher_head) = student, teacher

    def of_chunk(states: Tensor, teacher_states: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher_head(teacher_states).float()
        logits = head(states).float()
        common = min(logits.shape[-1], target.shape[-1])
        is_mask_token = torch.arange(common, device=logits.device) == mask_token_id
        log_probs, target = (
            part[:, :common].masked_fill(is_mask_token, NO_PROBABILITY).log_softmax(-1) for part in (logits, target)
        )
        if top_k is not None and top_k < common:
            chosen = target.topk(top_k, dim=-1).indices
            log_probs, target = (_with_the_rest(part, chosen) for part in (log_probs, target))
        if kind == "reverse":
            log_probs, target = target, log_probs
        return (target.exp() * (target - log_probs)).sum(-1)

    return in_chunks(of_chunk, head, states, teacher_states, chunk_numel=chunk_numel)


def right_entropies(
    states: Tensor, head: Head, targets: Tensor, mask_token_id: int, chunk_numel: int | None = None
) -> Tensor:
    """
    The entropy in nats of each prediction whose likeliest token is the right one, 0 of the others [tokens], float32,
    differentiable: what confidence-aware training minimises (CAP; LLaDA2.0, arXiv 2512.15745).

    Args:
        states, head: final hidden states [tokens, hidden], and the head that they go to.
        targets: the right ids [tokens].
        mask_token_id: the id without probability.
        chunk_numel: as in [`token_divergences`].
    """

    def of_chunk(states: Tensor, targets: Tensor) -> Tensor:
        logits = head(states).float()
        is_mask_token = torch.arange(logits.shape[-1], device=logits.device) == mask_token_id
        log_probs = logits.masked_fill(is_mask_token, NO_PROBABILITY).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return entropy.where(log_probs.argmax(-1) == targets, 0.0)

    return in_chunks(of_chunk, head, states, targets, chunk_numel=chunk_numel)


@contextlib.contextmanager
def token_nats_by(model: nn.Module, function: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Within it the loss of a block diffusion model has `function` in the place of the model's `token_nats`."""
    before = vars(model).get("token_nats")
    model.token_nats = function
    try:
        yield
    finally:
        del model.token_nats
        if before is not None:
            model.token_nats = before


@contextlib.contextmanager
def confident(model: nn.Module, weight: float) -> Iterator[None]:
    """Within it `weight` times their [`right_entropies`] come on top of the nats of the masked tokens."""
    if not weight:
        yield
        return
    plain, calls = model.token_nats, itertools.count()

    def token_nats(hidden_states: Tensor, targets: Tensor) -> Tensor:
        nats = plain(hidden_states, targets)
        # What is scored after the masked tokens is the clean stream, which reveals nothing.
        if next(calls):
            return nats
        return nats + weight * right_entropies(hidden_states, model._logits, targets, model.config.mask_token_id)

    with token_nats_by(model, token_nats):
        yield


def in_chunks(
    of_chunk: Callable, head: Head, states: Tensor, *others: Tensor, chunk_numel: int | None = None
) -> Tensor:
    """
    What `of_chunk` makes of the rows of `states` [tokens, hidden] and `others` [tokens, ...], float32 [tokens], so few
    at a time that two sets of logits of `head` have `chunk_numel` elements. They are made again in the backward pass.
    """
    if not len(states):
        # A zero that knows the student's weights, as a batch without a masked token asks for gradients, too.
        return states.float().sum(-1)
    chunk_size = chunk_size_of(head, states, chunk_numel)
    compute = partial(checkpoint, of_chunk, use_reentrant=False) if torch.is_grad_enabled() else of_chunk
    chunks = zip(*(part.split(chunk_size) for part in (states, *others)), strict=True)
    return torch.cat([compute(*chunk) for chunk in chunks])


def chunk_size_of(head: Head, states: Tensor, chunk_numel: int | None = None) -> int:
    """Rows of `states` [tokens, hidden] of which two sets of logits of `head` have `chunk_numel` elements."""
    if chunk_numel is None:
        chunk_numel = CHUNK_NUMEL_ON_CPU if states.device.type == "cpu" else CHUNK_NUMEL
    return max(1, chunk_numel // (2 * head(states[:1].detach()).shape[-1])) if len(states) else 1


def _with_the_rest(log_probs: Tensor, chosen: Tensor) -> Tensor:
    """Log-probabilities [tokens, vocab] -> of the `chosen` ids [tokens, k], then of all others together."""
    rest = log_probs.scatter(-1, chosen, NO_PROBABILITY).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, chosen), rest], dim=-1)
