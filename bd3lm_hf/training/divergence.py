"""How far a student's predictions are from a teacher's, without ever holding the logits of all tokens of either."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
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
    if chunk_numel is None:
        chunk_numel = CHUNK_NUMEL_ON_CPU if states.device.type == "cpu" else CHUNK_NUMEL
    if not len(states):
        # A zero that knows the student's weights, as a batch without a masked token asks for gradients, too.
        return states.float().sum(-1)
    vocab_size = teacher_head(teacher_states[:1].detach()).shape[-1]
    chunk_size = max(1, chunk_numel // (2 * vocab_size))

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

    divergence = partial(checkpoint, of_chunk, use_reentrant=False) if torch.is_grad_enabled() else of_chunk
    chunks = zip(states.split(chunk_size), teacher_states.split(chunk_size), strict=True)
    return torch.cat([divergence(*chunk) for chunk in chunks])


def _with_the_rest(log_probs: Tensor, chosen: Tensor) -> Tensor:
    """Log-probabilities [tokens, vocab] -> of the `chosen` ids [tokens, k], then of all others together."""
    rest = log_probs.scatter(-1, chosen, NO_PROBABILITY).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, chosen), rest], dim=-1)
