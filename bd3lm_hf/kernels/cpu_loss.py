"""-log x_theta of masked tokens on a CPU: chunks of logits, of which as many are kept as fit a budget."""

import torch

from .cpu_linear import add_product, cast, compute_dtype, product


# Elements of one chunk of logits: 32 MiB in float32.
CHUNK_NUMEL = 2**23
# Elements of all the logits that are kept for the backward pass, in place of computing them again: 128 MiB in float32.
KEPT_NUMEL = 2**25


def token_nats(
    hidden_states: torch.Tensor, targets: torch.Tensor, head: torch.nn.Linear, mask_token_id: int
) -> torch.Tensor:
    """As `token_nats` of `loss_block_diffusion.py`: [num_masked, hidden] and [num_masked] -> nats [num_masked]."""
    hidden_states, weight, bias = cast(compute_dtype(hidden_states), hidden_states, head.weight, head.bias)
    return TokenNats.apply(hidden_states, weight, bias, targets, mask_token_id)


class TokenNats(torch.autograd.Function):
    """Cross-entropy of rows [rows, hidden] with targets [rows], without the mask token: nats [rows], float32."""

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, targets, mask_token_id):
        nats = torch.empty(len(targets), dtype=torch.float32)
        normalizers, kept = torch.empty_like(nats), []
        ctx.chunk_size = max(1, CHUNK_NUMEL // weight.shape[0])
        num_kept = KEPT_NUMEL // weight.shape[0] if any(ctx.needs_input_grad) else 0
        for start in range(0, len(targets), ctx.chunk_size):
            rows = slice(start, start + ctx.chunk_size)
            logits = masked_logits(hidden_states[rows], weight, bias, mask_token_id)
            # Summed up in float32, whatever the logits are.
            normalizers[rows] = logits.float().logsumexp(-1)
            nats[rows] = normalizers[rows] - logits.gather(-1, targets[rows, None]).squeeze(-1).float()
            if start + len(logits) <= num_kept:
                kept.append(logits)
        ctx.save_for_backward(hidden_states, weight, bias, targets, normalizers, *kept)
        ctx.mask_token_id = mask_token_id
        return nats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_nats):
        hidden_states, weight, bias, targets, normalizers, *kept = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_states) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for index, start in enumerate(range(0, len(targets), ctx.chunk_size)):
            rows = slice(start, start + ctx.chunk_size)
            hidden, scale = hidden_states[rows], grad_nats[rows, None]
            if index < len(kept):
                logits = kept[index].float()
            else:
                logits = masked_logits(hidden, weight, bias, ctx.mask_token_id).float()
            grad = (logits - normalizers[rows, None]).exp_().mul_(scale)
            del logits
            grad.scatter_add_(-1, targets[rows, None], -scale)
            grad = grad.to(weight.dtype)
            if needs_hidden:
                grad_hidden[rows] = product(grad, weight.t())
            if needs_weight:
                add_product(grad_weight, grad.t(), hidden.t())
            if needs_bias:
                grad_bias += grad.sum(0, dtype=torch.float32)
        grad_weight, grad_bias = cast(weight.dtype, grad_weight, grad_bias)
        return grad_hidden, grad_weight, grad_bias, None, None


def masked_logits(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, mask_token_id: int
) -> torch.Tensor:
    """Logits [rows, vocab] with that of the mask token at -inf, in the precision of the weight."""
    logits = product(hidden_states, weight, bias)
    logits[:, mask_token_id] = -torch.inf
    return logits
