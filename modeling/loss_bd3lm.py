"""The loss of the masked positions and its gradients, without ever holding the logits of all of them."""

import torch
import torch.utils.checkpoint

from .linear_bd3lm import BD3LMLinear, linear


class SubsCrossEntropy(torch.autograd.Function):
    """
    sum of loss_weights * -log x_theta(targets), whose gradients are made chunk by chunk in the forward pass.

    Neither all the logits nor their gradient ever exist at once, and nothing is projected twice. torch's own
    `linear_cross_entropy` does the same, but takes no weight per position.
    """

    # Elements of one chunk of logits: 128 MiB in float32.
    CHUNK_NUMEL = 2**25

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, targets, loss_weights, mask_token_id):
        needs_grad = any(ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden_states) if ctx.needs_input_grad[0] else None
        grad_weight = None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        cross_entropy = torch.empty(len(targets), dtype=torch.float32, device=hidden_states.device)

        chunk_size = max(1, SubsCrossEntropy.CHUNK_NUMEL // weight.shape[0])
        for start in range(0, len(targets), chunk_size):
            rows = slice(start, start + chunk_size)
            hidden, target = hidden_states[rows], targets[rows, None]
            logits = linear(hidden, weight, bias).float()
            logits[:, mask_token_id] = -torch.inf
            log_normalizer = logits.logsumexp(-1, keepdim=True)
            cross_entropy[rows] = (log_normalizer - logits.gather(-1, target)).squeeze(-1)
            if not needs_grad:
                continue
            grad_logits = logits.sub_(log_normalizer).exp_()
            grad_logits.scatter_add_(-1, target, grad_logits.new_full(target.shape, -1.0))
            grad_logits = grad_logits.mul_(loss_weights[rows, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = linear(grad_logits, weight.t().to(hidden.dtype)).to(grad_hidden.dtype)
            if ctx.needs_input_grad[1]:
                product = linear(grad_logits.t(), hidden.t()).float()
                grad_weight = product if grad_weight is None else grad_weight.add_(product)
            if grad_bias is not None:
                grad_bias.add_(grad_logits.sum(0))

        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(cross_entropy)
        return (cross_entropy * loss_weights).sum(), cross_entropy

    @staticmethod
    def backward(ctx, grad_loss, _):
        grads = [None if grad is None else grad * grad_loss for grad in ctx.saved_tensors]
        return *grads, None, None, None


def subs_loss(
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    loss_weights: torch.Tensor,
    output_projection: torch.nn.Module,
    mask_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The weighted loss of the masked positions, without ever holding the logits of all of them.

    Args:
        hidden_states: final hidden states of the masked positions [num_masked, hidden].
        targets: their clean ids [num_masked].
        loss_weights: weight of each position in the loss [num_masked], float32.
        output_projection: from hidden states to logits over the vocabulary.
        mask_token_id: the token of probability 0.

    Returns:
        (sum of loss_weights * -log x_theta, a scalar; -log x_theta in nats [num_masked], without gradient), in
        float32.
    """
    is_plain = type(output_projection) in (torch.nn.Linear, BD3LMLinear) and not hasattr(output_projection, "_hf_hook")
    if is_plain:
        return SubsCrossEntropy.apply(
            hidden_states, output_projection.weight, output_projection.bias, targets, loss_weights, mask_token_id
        )

    # A wrapped projection (an adapter, a quantized or an offloaded layer) has a forward of its own.
    def cross_entropy(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = output_projection(hidden).float()
        is_mask_token = torch.arange(logits.shape[-1], device=logits.device) == mask_token_id
        return torch.nn.functional.cross_entropy(
            logits.masked_fill(is_mask_token, -torch.inf), target, reduction="none"
        )

    nats = torch.cat(
        [
            torch.utils.checkpoint.checkpoint(cross_entropy, hidden, target, use_reentrant=False)
            for hidden, target in zip(hidden_states.split(1024), targets.split(1024), strict=True)
        ]
    )
    return (nats * loss_weights).sum(), nats.detach()
