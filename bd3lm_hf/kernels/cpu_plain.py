"""
What the functions of this room take, and what they leave alone.

Whatever is not exactly a layer of torch on a CPU, called in the plain way, is left to the code of the model: modules
that are quantized, offloaded, wrapped, sharded, parametrized or hooked, and calls that are compiled or traced.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode


# What may come to a layer beside its arguments without changing what it computes.
HARMLESS_ARGUMENTS = {"output_attentions", "output_hidden_states", "return_dict", "use_cache"}
# Transformers puts this hook on attention modules once anybody asks for their weights, which SDPA does not give.
CAPTURING_HOOK = "output_capturing_hook"
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("up_proj", "down_proj")
PLAIN_TENSORS = (nn.Parameter, torch.Tensor)


def is_plain(states: torch.Tensor) -> bool:
    """Whether these are states that the functions of this room take, and nothing rewrites what is computed."""
    return (
        type(states) in PLAIN_TENSORS
        and states.is_cpu
        and states.dtype in (torch.float32, torch.bfloat16)
        and states.numel() > 0
        and is_called_plainly()
    )


def is_called_plainly() -> bool:
    """Whether nothing compiles, traces, transforms, intercepts or watches what is computed."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and _get_current_dispatch_mode() is None
        and not _has_any_global_hook()
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module runs more than the `forward` of its class."""
    attributes = module.__dict__
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
        or "_hf_hook" in attributes
    )


def is_leaf(module: nn.Module, kind: type, dtype: torch.dtype, bias: bool | None = None) -> bool:
    """
    Whether a module is exactly of a kind, and no more than its weights, which are on a CPU and of this precision.

    Args:
        module: to be looked at.
        kind: `nn.Linear` or `nn.LayerNorm`.
        dtype: of the states that come to it.
        bias: whether it must have a bias; None leaves it open.
    """
    if type(module) is not kind or has_hooks(module):
        return False
    # Past `Module.__getattr__`: this runs for every layer of every forward.
    parameters = module.__dict__["_parameters"]
    weight, own_bias = parameters.get("weight"), parameters.get("bias")
    return (
        type(weight) in PLAIN_TENSORS
        and weight.dtype is dtype
        and weight.is_cpu
        and (bias is None or (own_bias is not None) is bias)
        and (own_bias is None or type(own_bias) in PLAIN_TENSORS and own_bias.dtype is dtype)
    )


def is_container(module: nn.Module, kind: type | None) -> bool:
    """Whether a module is exactly of a kind, and calling it runs the `forward` of its class alone."""
    if type(module) is not kind:
        return False
    hooks = module._forward_hooks
    if hooks and all(getattr(hook, "__name__", "") == CAPTURING_HOOK for hook in hooks.values()):
        others = (module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        return not any(others) and module.__dict__.keys().isdisjoint({"forward", "_hf_hook"})
    return not has_hooks(module)


def is_plain_layer(layer: nn.Module, classes: dict[str, type], dtype: torch.dtype) -> bool:
    """
    Whether a decoder layer is made of the plain parts of its class.

    Args:
        layer: to be looked at.
        classes: those of its model, by name.
        dtype: of the states that come to it.
    """
    if type(layer) is not classes["BD3LMDecoderLayer"]:
        return False
    parts = layer.__dict__["_modules"]
    attention, mlp = parts["self_attn"], parts["mlp"]
    if not is_container(attention, classes.get("BD3LMAttention")) or not is_container(mlp, classes.get("BD3LMMLP")):
        return False
    norms = (parts["input_layernorm"], parts["post_attention_layernorm"])
    of_attention, of_mlp = attention.__dict__["_modules"], mlp.__dict__["_modules"]
    return (
        all(is_leaf(norm, nn.LayerNorm, dtype, bias=False) for norm in norms)
        and all(is_leaf(of_attention[name], nn.Linear, dtype, bias=False) for name in ATTENTION_PROJECTIONS)
        and all(is_leaf(of_mlp[name], nn.Linear, dtype, bias=True) for name in MLP_PROJECTIONS)
    )


def is_sdpa(layer: nn.Module) -> bool:
    """Whether the attention of a decoder layer is SDPA."""
    return layer.self_attn.config._attn_implementation == "sdpa"


def is_mask(mask: Any) -> bool:
    """Whether this is a mask as SDPA takes it, or None."""
    return mask is None or type(mask) is torch.Tensor and mask.dtype is torch.bool and mask.dim() == 4
