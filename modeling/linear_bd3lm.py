"""
Linear maps: the layer, the faster of torch's two matrix kernels on a CPU, and maps that keep less for their gradients.

torch multiplies float32 matrices on a CPU by MKL. Its oneDNN kernel, which `torch.compile` calls as well, ran at twice
the speed on an AMD EPYC with AVX-512 (`docs/benchmarks.md`).

What surrounds a matrix product costs little to compute and much to keep. [`NormedLinear`], [`GatedLinear`] and
[`GatedMLP`] keep what went in, and make the rest again in the backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


HAS_ONEDNN = torch.backends.mkldnn.is_available()
# Columns of an MLP's middle that are held at once: wide enough for full-speed matrix products.
SLICE_WIDTH = 1536


def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`: [..., in] x [out, in] -> [..., out], whichever kernel computes it."""
    if not takes_onednn(states, weight):
        return nn.functional.linear(states, weight, bias)
    if not torch.is_grad_enabled() and states.is_contiguous():
        return onednn_linear(states, weight, bias)
    product = OneDNNLinear.apply if torch.is_grad_enabled() else onednn_linear
    return product(states.reshape(-1, states.shape[-1]), weight, bias).view(*states.shape[:-1], -1)


def takes_onednn(states: torch.Tensor, weight: torch.Tensor) -> bool:
    """
    Plain float32 matrices on a CPU, outside of what rewrites the operation: a compiler, autocast, a tensor subclass.

    `torch.backends.mkldnn.flags(enabled=False)` leaves all products to MKL.
    """
    return (
        states.dtype is torch.float32
        and weight.dtype is torch.float32
        and states.device.type == "cpu"
        and type(states) is torch.Tensor
        and type(weight) in (nn.Parameter, torch.Tensor)
        and states.numel() > 0
        and HAS_ONEDNN
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def onednn_linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The kernel itself, of contiguous states [..., in] or matrices, whole or transposed; it knows no gradient."""
    return torch.ops.mkldnn._linear_pointwise(dense(states), dense(weight), bias, "none", [], "")


def dense(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, copied where it is a part of a wider one: such strides take the kernel hundreds of times as long."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


class OneDNNLinear(torch.autograd.Function):
    """The linear map of rows [rows, in] and its three gradients."""

    @staticmethod
    def forward(ctx, rows, weight, bias):
        ctx.save_for_backward(rows, weight)
        return onednn_linear(rows, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        grad_rows = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_rows = onednn_linear(grad, weight.t(), None)
        if ctx.needs_input_grad[1]:
            grad_weight = onednn_linear(grad.t(), rows.t(), None)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_rows, grad_weight, grad_bias


class Lent:
    """What a module has for a while and its copies do not: a copy or a pickle holds None in its place."""

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()


@dataclass
class PackedWeight(Lent):
    """A copy of a weight [out, in] in oneDNN's own layout."""

    tensor: torch.Tensor


class BD3LMLinear(nn.Linear):
    """`nn.Linear` by way of [`linear`]."""

    # While `packed_bd3lm.py` lends it.
    packed_weight: PackedWeight | None = None

    def forward(self, input: torch.Tensor, function: Callable = linear):
        """
        `function(input, weight, bias)`, by default their product.

        What shards the weights (FSDP2) has them whole within this call, so that is where they are to be used.
        """
        if function is linear and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            packed = self.packed_weight
            if packed is not None and takes_onednn(input, self.weight):
                return torch.ops.mkldnn._linear_pointwise(input.contiguous(), packed.tensor, self.bias, "none", [], "")
        return function(input, self.weight, self.bias)


def compute_dtype(states: torch.Tensor) -> torch.dtype:
    """The precision that a matrix product of these states runs in: their own, or autocast's."""
    device_type = states.device.type
    is_autocast = torch.is_autocast_enabled(device_type) and states.dtype != torch.float64
    return torch.get_autocast_dtype(device_type) if is_autocast else states.dtype


def cast(dtype: torch.dtype, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors in another precision."""
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def add_gated(residual: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """residual + gate * branch, written into the branch where that has the precision of the result."""
    out = branch if branch.dtype == residual.dtype == gate.dtype else None
    return torch.addcmul(residual, branch, gate, out=out)


def gate_gradients(
    grad_weight: torch.Tensor,
    grad_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """
    The gradients of weight, bias and gate in `gate * linear(rows, weight, bias)`.

    The gate's is the gradient times the linear map, summed over the rows: it follows from what the gradients of weight
    and bias would be without the gate, so that nobody has to keep the map.

    Args:
        grad_weight, grad_bias: the gradients without the gate [out, in] and [out]; written over.
    """
    grad_gate = (grad_weight * weight).sum(-1)
    if bias is not None:
        grad_gate.addcmul_(grad_bias, bias)
        grad_bias.mul_(gate)
    return grad_weight.mul_(gate[:, None]), grad_bias, grad_gate.to(gate.dtype)


class NormedLinear(torch.autograd.Function):
    """Several linear maps of one layer norm of the states. Keeps the states, and norms them again."""

    @staticmethod
    def forward(ctx, states, norm_weight, norm_bias, eps, *weights_and_biases):
        """
        Args:
            states: [..., in].
            norm_weight, norm_bias: the affine map of the layer norm [in], the latter or None.
            weights_and_biases: for each map its weight [out, in], then its bias [out] or None.

        Returns:
            [..., out] for each map.
        """
        # The norm's deviations are not kept either: such small blocks between large ones fragment the memory.
        ctx.save_for_backward(states, norm_weight, norm_bias, *weights_and_biases)
        ctx.eps, ctx.dtype = eps, compute_dtype(states)
        normed = nn.functional.layer_norm(states, norm_weight.shape, norm_weight, norm_bias, eps)
        normed, *parameters = cast(ctx.dtype, normed, *weights_and_biases)
        return tuple(linear(normed, weight, bias) for weight, bias in zip(parameters[::2], parameters[1::2]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        states, norm_weight, norm_bias, *weights_and_biases = ctx.saved_tensors
        size = norm_weight.shape
        normed, mean, rstd = torch.native_layer_norm(states, size, norm_weight, norm_bias, ctx.eps)
        rows = normed.to(ctx.dtype).flatten(end_dim=-2)
        grad_rows, grad_parameters = 0, []
        for grad, weight, bias in zip(grads, weights_and_biases[::2], weights_and_biases[1::2]):
            grad = grad.flatten(end_dim=-2)
            grad_parameters.append(linear(grad.t(), rows.t()).to(weight.dtype))
            grad_parameters.append(None if bias is None else grad.sum(0, dtype=bias.dtype))
            grad_rows += linear(grad, weight.to(ctx.dtype).t()).to(states.dtype)
        grads_of_norm = torch.ops.aten.native_layer_norm_backward(
            grad_rows.view_as(states), states, size, mean, rstd, norm_weight, norm_bias, ctx.needs_input_grad[:3]
        )
        return *grads_of_norm, None, *grad_parameters


class GatedLinear(torch.autograd.Function):
    """residual + gate * linear(states, weight, bias). Keeps the states alone."""

    @staticmethod
    def forward(ctx, residual, states, weight, bias, gate):
        """residual [..., out], states [..., in], weight [out, in], bias [out] or None, gate [out] -> [..., out]."""
        ctx.save_for_backward(states, weight, bias, gate)
        ctx.dtype = compute_dtype(states)
        return add_gated(residual, linear(*cast(ctx.dtype, states, weight, bias)), gate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_residual):
        states, weight, bias, gate = ctx.saved_tensors
        grad, rows = (tensor.flatten(end_dim=-2) for tensor in cast(ctx.dtype, grad_residual, states))
        grad_weight = linear(grad.t(), rows.t()).to(weight.dtype)
        grad_bias = None if bias is None else grad.sum(0, dtype=bias.dtype)
        grad_states = linear(grad * gate.to(ctx.dtype), weight.to(ctx.dtype).t()).view_as(states)
        return grad_residual, grad_states, *gate_gradients(grad_weight, grad_bias, weight, bias, gate)


class GatedMLP(torch.autograd.Function):
    """
    states + gate * down(gelu(up(layer_norm(states)))), two linear maps with tanh-approximated GELU between.

    Keeps the states alone and goes up again: four tenths of what a layer would keep, for a ninth of its products. The
    wide middle is walked in slices, so that it never exists as a whole, and the memory of one slice serves the next.
    """

    @staticmethod
    def forward(ctx, states, norm_weight, norm_bias, eps, up_weight, up_bias, down_weight, down_bias, gate):
        """states [..., hidden], gate [hidden] and all biases [out] -> [..., hidden]."""
        ctx.save_for_backward(states, norm_weight, norm_bias, up_weight, up_bias, down_weight, down_bias, gate)
        ctx.eps, ctx.dtype = eps, compute_dtype(states)
        normed = nn.functional.layer_norm(states, norm_weight.shape, norm_weight, norm_bias, eps).to(ctx.dtype)
        branch = down_bias
        for part in GatedMLP.slices(up_weight):
            middle = linear(normed, *cast(ctx.dtype, up_weight[part], up_bias[part]))
            torch.ops.aten.gelu_(middle, approximate="tanh")
            branch = linear(middle, down_weight[:, part].to(ctx.dtype)).to(states.dtype).add_(branch)
        return add_gated(states, branch, gate)

    @staticmethod
    def slices(up_weight):
        middle_size = up_weight.shape[0]
        return [slice(start, start + SLICE_WIDTH) for start in range(0, middle_size, SLICE_WIDTH)]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_residual):
        states, norm_weight, norm_bias, up_weight, up_bias, down_weight, down_bias, gate = ctx.saved_tensors
        size = norm_weight.shape
        normed, mean, rstd = torch.native_layer_norm(states, size, norm_weight, norm_bias, ctx.eps)
        grad, rows = (tensor.flatten(end_dim=-2) for tensor in cast(ctx.dtype, grad_residual, normed))
        gated_grad = grad * gate.to(ctx.dtype)
        grad_up, grad_down = torch.empty_like(up_weight), torch.empty_like(down_weight)
        grad_up_bias, grad_down_bias = torch.empty_like(up_bias), grad.sum(0, dtype=down_bias.dtype)
        grad_rows = 0
        for part in GatedMLP.slices(up_weight):
            up, bias, down = cast(ctx.dtype, up_weight[part], up_bias[part], down_weight[:, part])
            middle = linear(rows, up, bias)
            grad_down[:, part] = linear(grad.t(), nn.functional.gelu(middle, approximate="tanh").t())
            grad_middle = linear(gated_grad, down.t())
            torch.ops.aten.gelu_backward.grad_input(grad_middle, middle, approximate="tanh", grad_input=grad_middle)
            grad_up[part] = linear(grad_middle.t(), rows.t())
            grad_up_bias[part] = grad_middle.sum(0)
            grad_rows += linear(grad_middle, up.t()).to(states.dtype)
        grad_states, *grads_of_norm = torch.ops.aten.native_layer_norm_backward(
            grad_rows.view_as(states), states, size, mean, rstd, norm_weight, norm_bias, [True] * 3
        )
        grads_of_down = gate_gradients(grad_down, grad_down_bias, down_weight, down_bias, gate)
        return grad_states.add_(grad_residual), *grads_of_norm, None, grad_up, grad_up_bias, *grads_of_down
