"""
Matrix products on a CPU by the faster of torch's two kernels, and maps of a layer that keep less for their gradients.

torch multiplies float32 matrices on a CPU by MKL, and oneDNN is the other kernel that it is built with. On processors
of AMD oneDNN ran at twice the speed of MKL; on those of Intel they are alike, and MKL is quicker at transposed
matrices (`docs/benchmarks.md`).

What surrounds a matrix product costs little to compute and much to keep. [`NormedLinear`], [`GatedLinear`] and [`MLP`]
keep what goes into the products, and compute norms, GELU and gates again in the backward pass. All of them take
whatever needs no gradient, and compute no gradient that is not needed.
"""

import functools
import platform
from pathlib import Path

import torch
from torch import nn


HAS_ONEDNN = torch.backends.mkldnn.is_available()
# Rows of a sum of products that are added at once, where the product can't be written into the sum.
SLICE_SIZE = 2**13


@functools.lru_cache(maxsize=1)
def is_intel() -> bool:
    """Whether the processor is one of Intel's, for which MKL is made."""
    cpuinfo = Path("/proc/cpuinfo")
    return "GenuineIntel" in (cpuinfo.read_text() if cpuinfo.exists() else platform.processor())


@functools.lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this processor."""
    return HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def uses_onednn(dtype: torch.dtype) -> bool:
    """Whether matrices of this precision are multiplied by oneDNN; torch's own switch for it is obeyed."""
    if not HAS_ONEDNN or not torch.backends.mkldnn.enabled:
        return False
    return multiplies_bfloat16() if dtype == torch.bfloat16 else dtype == torch.float32 and not is_intel()


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[..., in] x [out, in] -> [..., out], as `torch.nn.functional.linear`; without a gradient of its own."""
    if not uses_onednn(rows.dtype) or rows.numel() == 0:
        return nn.functional.linear(rows, weight, bias)
    flat = dense(rows if rows.dim() == 2 else rows.reshape(-1, rows.shape[-1]))
    output = torch.ops.mkldnn._linear_pointwise(flat, dense(weight), bias, "none", [], "")
    return output.view(*rows.shape[:-1], -1)


def dense(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, copied where it is a part of a wider one: such strides take oneDNN hundreds of times as long."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def add_product(total: torch.Tensor | None, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """total + rows x weight, [rows, in] x [out, in] -> [rows, out]; written into `total`, where there is one."""
    if total is None:
        return product(rows, weight)
    if total.dtype == rows.dtype and not uses_onednn(rows.dtype):
        return total.addmm_(rows, weight.t())
    for part, part_rows in zip(total.split(SLICE_SIZE), rows.split(SLICE_SIZE), strict=True):
        part.add_(product(part_rows, weight))
    return total


def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` by way of [`product`], with gradients; under autocast in its precision."""
    states, weight, bias = cast(compute_dtype(states), states, weight, bias)
    return Linear.apply(states, weight, bias) if torch.is_grad_enabled() else product(states, weight, bias)


def compute_dtype(states: torch.Tensor) -> torch.dtype:
    """The precision that a matrix product of these states runs in: their own, or autocast's."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else states.dtype


def cast(dtype: torch.dtype, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors in another precision."""
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def rows_of(states: torch.Tensor) -> torch.Tensor:
    """[..., size] -> [rows, size]."""
    return states.reshape(-1, states.shape[-1])


def weight_gradient(needed: bool, grad: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """The gradient of a weight [out, in] from those of its rows [rows, out] and what went in [rows, in]."""
    return product(grad.t(), rows.t()).to(weight.dtype) if needed else None


def bias_gradient(needed: bool, grad: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The gradient of a bias [out] from those of its rows [rows, out]."""
    return grad.sum(0, dtype=torch.promote_types(bias.dtype, torch.float32)).to(bias.dtype) if needed else None


class Linear(torch.autograd.Function):
    """The linear map of states [..., in]."""

    @staticmethod
    def forward(ctx, states, weight, bias):
        ctx.save_for_backward(states, weight, bias)
        return product(states, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        states, weight, bias = ctx.saved_tensors
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad
        grad, rows = rows_of(grad_output), rows_of(states)
        grad_states = product(grad, weight.t()).view_as(states) if needs_states else None
        return grad_states, weight_gradient(needs_weight, grad, rows, weight), bias_gradient(needs_bias, grad, bias)


class NormedLinear(torch.autograd.Function):
    """Several linear maps of one layer norm of the states. Keeps the states, and norms them again."""

    @staticmethod
    def forward(ctx, states, norm_weight, norm_bias, eps, *weights):
        """
        Args:
            states: [..., in].
            norm_weight, norm_bias: the affine map of the layer norm [in], the latter or None.
            weights: of the maps, each [out, in].

        Returns:
            [..., out] for each map.
        """
        # The norm's deviations are not kept either: such small blocks between large ones fragment the memory.
        ctx.save_for_backward(states, norm_weight, norm_bias, *weights)
        ctx.eps, ctx.dtype = eps, compute_dtype(states)
        normed = nn.functional.layer_norm(states, norm_weight.shape, norm_weight, norm_bias, eps).to(ctx.dtype)
        return tuple(product(normed, weight.to(ctx.dtype)) for weight in weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        states, norm_weight, norm_bias, *weights = ctx.saved_tensors
        normed, *statistics = torch.native_layer_norm(states, norm_weight.shape, norm_weight, norm_bias, ctx.eps)
        rows, grad_rows, grad_weights = rows_of(normed.to(ctx.dtype)), None, []
        for grad, weight, needed in zip(grads, weights, ctx.needs_input_grad[4:], strict=True):
            grad = rows_of(grad)
            grad_weights.append(weight_gradient(needed, grad, rows, weight))
            grad_rows = add_product(grad_rows, grad, weight.to(ctx.dtype).t())
        norm = (states, norm_weight, norm_bias, statistics)
        return *norm_gradients(ctx.needs_input_grad[:3], grad_rows, *norm), None, *grad_weights


def norm_gradients(needed, grad_rows, states, norm_weight, norm_bias, statistics) -> tuple[torch.Tensor | None, ...]:
    """The gradients of states, weight and bias of a layer norm from that of its rows; those that are needed."""
    if not any(needed):
        return None, None, None
    grad_normed = grad_rows.to(states.dtype).view_as(states)
    return torch.ops.aten.native_layer_norm_backward(
        grad_normed, states, norm_weight.shape, *statistics, norm_weight, norm_bias, list(needed)
    )


def add_gated(residual: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """residual + gate * branch, written into the branch where that has the precision of the result."""
    if gate is None:
        return residual + branch
    out = branch if branch.dtype == residual.dtype == gate.dtype and not torch.is_grad_enabled() else None
    return torch.addcmul(residual, branch, gate, out=out)


def gated_gradients(needed, gated_grad, grad, rows, weight, bias, gate) -> tuple[torch.Tensor | None, ...]:
    """
    The gradients of weight, bias and gate in `gate * linear(rows, weight, bias)`.

    The gate's is the gradient times the linear map, summed over the rows: it follows from what the gradients of weight
    and bias would be without the gate, so that nobody has to keep the map.

    Args:
        needed: which of the three are needed.
        gated_grad, grad: the gradients of the map's rows, with and without the gate [rows, out].
        rows: what went in [rows, in].
        weight, bias, gate: [out, in], [out] or None, and [out] or None.
    """
    needs_weight, needs_bias, needs_gate = needed
    if not needs_gate:
        return (
            weight_gradient(needs_weight, gated_grad, rows, weight),
            bias_gradient(needs_bias, gated_grad, bias),
            None,
        )
    grad_weight = product(grad.t(), rows.t()).to(weight.dtype)
    grad_gate = (grad_weight * weight).sum(-1)
    grad_bias = bias_gradient(bias is not None, grad, bias)
    if bias is not None:
        grad_gate.addcmul_(grad_bias, bias)
        grad_bias.mul_(gate)
    grad_weight = grad_weight.mul_(gate[:, None]) if needs_weight else None
    return grad_weight, grad_bias if needs_bias else None, grad_gate.to(gate.dtype)


class GatedLinear(torch.autograd.Function):
    """residual + gate * linear(states, weight). Keeps the states alone."""

    @staticmethod
    def forward(ctx, residual, states, weight, gate):
        """residual [..., out], states [..., in], weight [out, in], gate [out] or None -> [..., out]."""
        ctx.save_for_backward(states, weight, gate)
        ctx.dtype = compute_dtype(states)
        return add_gated(residual, product(*cast(ctx.dtype, states, weight)), gate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_residual):
        states, weight, gate = ctx.saved_tensors
        _, needs_states, needs_weight, needs_gate = ctx.needs_input_grad
        grad, rows = (rows_of(tensor) for tensor in cast(ctx.dtype, grad_residual, states))
        gated_grad = grad if gate is None else grad * gate.to(ctx.dtype)
        grad_states = None
        if needs_states:
            grad_states = product(gated_grad, weight.to(ctx.dtype).t()).to(states.dtype).view_as(states)
        needed = (needs_weight, False, needs_gate)
        grad_weight, _, grad_gate = gated_gradients(needed, gated_grad, grad, rows, weight, None, gate)
        return grad_residual, grad_states, grad_weight, grad_gate


class MLP(torch.autograd.Function):
    """
    down(gelu(up(layer_norm(states)))), two linear maps with tanh-approximated GELU between; or as a branch of a
    residual, states + gate * that. Keeps the states and what GELU is computed of.
    """

    @staticmethod
    def forward(ctx, states, norm_weight, norm_bias, eps, up_weight, up_bias, down_weight, down_bias, gate, is_branch):
        """states [..., hidden], gate [hidden] or None, biases [out], `is_branch` bool -> [..., hidden]."""
        ctx.eps, ctx.dtype, ctx.is_branch = eps, compute_dtype(states), is_branch
        normed = nn.functional.layer_norm(states, norm_weight.shape, norm_weight, norm_bias, eps)
        middle = product(*cast(ctx.dtype, normed, up_weight, up_bias))
        del normed
        parameters = (norm_weight, norm_bias, up_weight, up_bias, down_weight, down_bias, gate)
        ctx.save_for_backward(states, middle, *parameters)
        branch = product(*cast(ctx.dtype, nn.functional.gelu(middle, approximate="tanh"), down_weight, down_bias))
        return add_gated(states, branch, gate) if is_branch else branch

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        states, middle, *parameters = ctx.saved_tensors
        norm_weight, norm_bias, up_weight, up_bias, down_weight, down_bias, gate = parameters
        needs_norm, (needs_up, needs_up_bias, *needs_down) = ctx.needs_input_grad[:3], ctx.needs_input_grad[4:9]
        middle, grad = rows_of(middle), rows_of(grad_output.to(ctx.dtype))
        gated_grad = grad if gate is None else grad * gate.to(ctx.dtype)
        gelu = nn.functional.gelu(middle, approximate="tanh")
        grads_of_down = gated_gradients(needs_down, gated_grad, grad, gelu, down_weight, down_bias, gate)
        del gelu
        grad_middle = product(gated_grad, down_weight.to(ctx.dtype).t())
        torch.ops.aten.gelu_backward.grad_input(grad_middle, middle, approximate="tanh", grad_input=grad_middle)
        normed, *statistics = torch.native_layer_norm(states, norm_weight.shape, norm_weight, norm_bias, ctx.eps)
        grad_up = weight_gradient(needs_up, grad_middle, rows_of(normed.to(ctx.dtype)), up_weight)
        del normed
        grad_up_bias = bias_gradient(needs_up_bias, grad_middle, up_bias)
        grad_rows = product(grad_middle, up_weight.to(ctx.dtype).t())
        norm = (states, norm_weight, norm_bias, statistics)
        grad_states, *grads_of_norm = norm_gradients(needs_norm, grad_rows, *norm)
        if ctx.is_branch and grad_states is not None:
            grad_states.add_(grad_output)
        return grad_states, *grads_of_norm, None, grad_up, grad_up_bias, *grads_of_down, None
