"""-log x_theta of the masked tokens, without ever holding the logits of all of them."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


# Elements of one chunk of logits: 64 MiB in float32 on a CPU, 512 MiB on an accelerator, which wants large products.
CHUNK_NUMEL_ON_CPU, CHUNK_NUMEL = 2**24, 2**27


def token_nats(hidden_states: Tensor, targets: Tensor, head: nn.Module, mask_token_id: int) -> Tensor:
    """
    -log x_theta(target) under the SUBS rules (arXiv 2406.07524, Sec. 3.2.3), in nats [num_masked], float32,
    differentiable.

    Args:
        hidden_states: final hidden states of masked tokens [num_masked, hidden].
        targets: their clean ids [num_masked].
        head: from hidden states to logits over the vocabulary.
        mask_token_id: the token of probability 0; -1 for none.
    """
    numel = CHUNK_NUMEL_ON_CPU if hidden_states.device.type == "cpu" else CHUNK_NUMEL
    chunk_size = max(1, numel // getattr(head, "out_features", 2**16))
    # A wrapped head (adapted, quantized, offloaded or sharded) has a forward, hooks or a kind of weight of its own.
    is_plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter and "forward" not in vars(head)
    is_plain = is_plain and not head._forward_pre_hooks and not head._forward_hooks
    # Under `torch.func`, and on tensors without data, neither torch's own nor a checkpoint has a gradient.
    is_abstract = hidden_states.is_meta or torch._C._are_functorch_transforms_active()
    # A compiler would make torch's own anew for each number of tokens, and in lower precision its nats are rounded.
    is_traced = is_abstract or torch.compiler.is_compiling()
    can_fuse = is_plain and not is_traced and hasattr(nn, "LinearCrossEntropyOptions")
    if can_fuse and hidden_states.dtype == torch.float32 and not torch.is_autocast_enabled(hidden_states.device.type):
        return fused_nats(hidden_states, targets, head, mask_token_id, chunk_size)
    # Whoever lends a plain head its weights for the forward pass may have taken them back in the backward pass.
    weights = (head.weight, head.bias) if is_plain else ()
    return chunked_nats(hidden_states, targets, head, mask_token_id, chunk_size, *weights, keep=is_abstract)


def fused_nats(hidden_states: Tensor, targets: Tensor, head: nn.Linear, mask_token_id: int, chunk_size: int) -> Tensor:
    """[`token_nats`] by torch's `linear_cross_entropy`; the mask token's bias at -inf makes its probability 0."""
    bias = head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias
    bias = bias.masked_fill(torch.arange(len(bias), device=bias.device) == mask_token_id, -torch.inf)
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_size, chunking_method=None)
    arguments = {"linear_bias": bias, "reduction": "none", "options": options}
    return nn.functional.linear_cross_entropy(hidden_states, head.weight, targets, **arguments)


def chunked_nats(
    hidden_states: Tensor, targets: Tensor, head: nn.Module, mask_token_id: int, chunk_size: int, *weights, keep=False
) -> Tensor:
    """[`token_nats`] in chunks of tokens, whose logits are kept or made again; `weights` are those of a plain head."""

    def nats_of_chunk(hidden: Tensor, target: Tensor, *weights: Tensor | None) -> Tensor:
        # Of a head that is called twice, FSDP2 of torch 2.11 shards the weights before logits are made again.
        if hasattr(head, "unshard"):
            head.unshard()
        logits = (nn.functional.linear(hidden, *weights) if weights else head(hidden)).float()
        is_mask_token = torch.arange(logits.shape[-1], device=logits.device) == mask_token_id
        return nn.functional.cross_entropy(logits.masked_fill(is_mask_token, -torch.inf), target, reduction="none")

    chunks = zip(hidden_states.split(chunk_size), targets.split(chunk_size), strict=True)
    nats = nats_of_chunk if keep else partial(checkpoint, nats_of_chunk, use_reentrant=False)
    return torch.cat([nats(*chunk, *weights) for chunk in chunks])
