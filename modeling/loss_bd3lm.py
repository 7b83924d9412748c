"""The loss of the masked positions and its gradients, without ever holding the logits of all of them."""

import torch
import torch.utils.checkpoint

from .linear_bd3lm import BD3LMLinear, compute_dtype, linear


# Elements of one chunk of logits: 32 MiB in float32.
CHUNK_NUMEL = 2**23
# Rows of the projection whose gradients are added at once.
VOCABULARY_SLICE = 2**13


class SubsCrossEntropy(torch.autograd.Function):
    """
    sum of loss_weights * -log x_theta(targets), whose gradients are made chunk by chunk in the forward pass.

    Neither all the logits nor their gradient ever exist at once, and nothing is projected twice. torch's own
    `linear_cross_entropy` does the same, but takes no weight per position.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, targets, loss_weights, mask_token_id):
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = compute_dtype(hidden_states)
        projection, projection_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        grad_hidden = torch.empty_like(hidden_states) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight and len(targets) == 0 else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        nats = torch.empty(len(targets), dtype=torch.float32, device=hidden_states.device)

        chunk_size = max(1, CHUNK_NUMEL // weight.shape[0])
        for start in range(0, len(targets), chunk_size):
            rows = slice(start, start + chunk_size)
            hidden, target = hidden_states[rows].to(dtype), targets[rows, None]
            logits = linear(hidden, projection, projection_bias).float()
            logits[:, mask_token_id] = -torch.inf
            log_probs = logits.log_softmax(-1)
            del logits
            nats[rows] = -log_probs.gather(-1, target).squeeze(-1)
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            grad_logits = log_probs.exp_()
            grad_logits.scatter_add_(-1, target, grad_logits.new_full(target.shape, -1.0))
            grad_logits = grad_logits.mul_(loss_weights[rows, None]).to(dtype)
            if needs_hidden:
                grad_hidden[rows] = linear(grad_logits, projection.t())
            if needs_weight:
                grad_weight = add_products(grad_weight, grad_logits, hidden)
            if needs_bias:
                grad_bias += grad_logits.sum(0)

        ctx.gradients = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(nats)
        return (nats * loss_weights).sum(), nats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        if ctx.gradients is None:
            raise RuntimeError(
                "The block diffusion loss gives its gradients away in the backward pass, so that there is no second "
                "one: call the model again instead of `backward(retain_graph=True)`."
            )
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if grad is None else grad.mul_(grad_loss) for grad in gradients), None, None, None


def add_products(
    grad_weight: torch.Tensor | None, grad_logits: torch.Tensor, hidden_states: torch.Tensor
) -> torch.Tensor:
    """
    grad_weight + grad_logits^T hidden_states [vocab, hidden] in float32, in place and with no second such matrix.

    Args:
        grad_weight: the sum so far, or None.
        grad_logits: [rows, vocab].
        hidden_states: [rows, hidden].
    """
    if grad_weight is None:
        return linear(grad_logits.t(), hidden_states.t()).float()
    for total, grad in zip(grad_weight.split(VOCABULARY_SLICE), grad_logits.split(VOCABULARY_SLICE, dim=1)):
        total += linear(grad.t(), hidden_states.t())
    return grad_weight


# The number of masked tokens follows the noise: torch.compile would start anew at every step.
@torch.compiler.disable
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

    def plain_loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
        # Rows of no weight round their number up to four binary digits, by an eighth at most: of kernels that are made
        # per shape, and kept, there are few then.
        padding = -len(targets) % (1 << max(len(targets).bit_length() - 4, 0))
        padded = (torch.nn.functional.pad(part, (0, padding)) for part in (targets, loss_weights))
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, padding))
        loss, nats = SubsCrossEntropy.apply(hidden, weight, bias, *padded, mask_token_id)
        return loss, nats[: len(targets)]

    if not hasattr(output_projection, "_hf_hook"):
        # Called once: under FSDP2 all processes must call it as often, however many tokens each predicts.
        if type(output_projection).forward is BD3LMLinear.forward:
            return output_projection(hidden_states, plain_loss)
        if type(output_projection) is torch.nn.Linear:
            return plain_loss(hidden_states, output_projection.weight, output_projection.bias)

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
