"""
The linear layer, which on a CPU takes the faster of torch's two matrix kernels.

torch multiplies float32 matrices on a CPU by MKL. Its oneDNN kernel, which `torch.compile` calls as well, ran at twice
the speed on an AMD EPYC with AVX-512 (`docs/benchmarks.md`).
"""

import torch
from torch import nn


def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`: [..., in] x [out, in] -> [..., out], whichever kernel computes it."""
    if not takes_onednn(states, weight):
        return nn.functional.linear(states, weight, bias)
    if torch.is_grad_enabled():
        return OneDNNLinear.apply(states, weight, bias)
    return onednn_linear(states, weight, bias)


def takes_onednn(states: torch.Tensor, weight: torch.Tensor) -> bool:
    """
    Plain float32 matrices on a CPU, outside of what rewrites the operation: a compiler, autocast, a tensor subclass.

    `torch.backends.mkldnn.flags(enabled=False)` leaves all products to MKL.
    """
    return (
        states.device.type == "cpu"
        and states.dtype == weight.dtype == torch.float32
        and type(states) is torch.Tensor
        and type(weight) in (torch.Tensor, nn.Parameter)
        and states.numel() > 0
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def onednn_linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The kernel itself; it knows no gradient, and takes matrices in any layout."""
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """The linear map and its three gradients."""

    @staticmethod
    def forward(ctx, states, weight, bias):
        ctx.save_for_backward(states, weight)
        ctx.has_bias = bias is not None
        return onednn_linear(states, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        states, weight = ctx.saved_tensors
        grad_states = grad_weight = grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_states = onednn_linear(rows, weight.t(), None).view(states.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = onednn_linear(rows.t(), states.reshape(-1, states.shape[-1]).t(), None)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_states, grad_weight, grad_bias


class BD3LMLinear(nn.Linear):
    """`nn.Linear` by way of [`linear`]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)
