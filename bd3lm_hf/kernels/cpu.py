"""
What makes a CPU fast, in place of methods of the models' classes; see [`replacements`].

Each replacement looks at what it is called with. Where that is no more than plain float32 or bfloat16 tensors on a CPU
and the exact layers of torch, it computes the same in another way; anything else runs the method whose place it took.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from . import cpu_loss
from .cpu_attention import notes_of
from .cpu_generation import (
    PackedLayer,
    PackedWeights,
    expected_forwards,
    pack,
    packed_product,
    packed_weights,
    pays,
    using,
)
from .cpu_layers import layer_forward, modulation_of
from .cpu_nucleus import with_selecting_nucleus
from .cpu_plain import has_hooks, is_called_plainly, is_leaf, is_mask, is_plain, is_plain_layer, is_sdpa


def replacements(classes: dict[str, type]) -> Iterator[tuple[type, str, Callable]]:
    """
    The methods to be replaced.

    Args:
        classes: by name, those of a model: its own, its modules', and what they inherit from.

    Yields:
        (class, name of the method, function from the method to what takes its place).
    """
    makers = {
        ("BD3LMDecoderLayer", "forward"): functools.partial(layer_forward, classes),
        ("BD3LMModel", "condition"): condition,
        ("BlockDiffusionLMMixin", "_two_streams"): two_streams,
        ("BlockDiffusionLMMixin", "token_nats"): token_nats,
        ("BlockDiffusionLMMixin", "_logits"): logits,
        ("BlockDiffusionGenerationMixin", "_sample"): functools.partial(sample, classes),
    }
    for (class_name, method), maker in makers.items():
        if class_name in classes:
            yield classes[class_name], method, maker


def two_streams(original: Callable) -> Callable:
    """`BlockDiffusionLMMixin._two_streams`, which notes the tokens that the loss will read."""

    @functools.wraps(original)
    def _two_streams(self, x_t, x_0, blocks, timesteps, masked=None):
        streams = original(self, x_t, x_0, blocks, timesteps, masked)
        mask, columns = streams.attention_mask, streams.noisy_columns
        # Where anybody looks at the states of the network, they are to be whole.
        network = self.base_model
        is_watched = has_hooks(network) or has_hooks(getattr(network, "norm", network))
        if columns is not None and is_mask(mask) and not is_watched and is_called_plainly():
            wanted = masked.gather(1, columns)
            notes_of(mask).wanted = nn.functional.pad(wanted, (0, mask.shape[-1] - wanted.shape[1]))
        return streams

    return _two_streams


def token_nats(original: Callable) -> Callable:
    """`BlockDiffusionLMMixin.token_nats`."""

    @functools.wraps(original)
    def _token_nats(self, hidden_states, targets):
        head = self.get_output_embeddings()
        is_taken = is_plain(hidden_states) and is_leaf(head, nn.Linear, hidden_states.dtype)
        if not is_taken or self.config._attn_implementation != "sdpa":
            return original(self, hidden_states, targets)
        return cpu_loss.token_nats(hidden_states, targets, head, self.config.mask_token_id)

    return _token_nats


def logits(original: Callable) -> Callable:
    """`BlockDiffusionLMMixin._logits`, by a packed weight in `generate`."""

    @functools.wraps(original)
    def _logits(self, hidden_states):
        weights, head = packed_weights(), self.get_output_embeddings()
        is_inference = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        if weights is None or head not in weights.linears or not is_inference:
            return original(self, hidden_states)
        if not is_plain(hidden_states) or not is_leaf(head, nn.Linear, hidden_states.dtype):
            return original(self, hidden_states)
        return packed_product(hidden_states, weights.linears[head], head.bias)

    return _logits


def condition(original: Callable) -> Callable:
    """`BD3LMModel.condition`, computed once for a call of `generate`."""

    @functools.wraps(original)
    def _condition(self, sigma, device):
        weights = packed_weights()
        if weights is None or weights.condition is None or weights.model is not self or torch.is_grad_enabled():
            return original(self, sigma, device)
        return weights.condition

    return _condition


def sample(classes: dict[str, type], original: Callable) -> Callable:
    """`BlockDiffusionGenerationMixin._sample` with packed weights and a nucleus that sorts nothing."""

    @functools.wraps(original)
    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs):
        if input_ids.device.type != "cpu":
            return original(self, input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs)
        logits_processor = with_selecting_nucleus(logits_processor)
        block_size = self.config.block_size
        num_new = generation_config.max_length - input_ids.shape[1]
        size = (input_ids.shape[0] * block_size, expected_forwards(generation_config, num_new, block_size))
        with using(pack_weights(self, classes, *size)):
            return original(self, input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs)

    return _sample


@torch.no_grad()
def pack_weights(model: nn.Module, classes: dict[str, type], num_rows: int, num_forwards: int) -> PackedWeights | None:
    """
    Packed weights of all plain layers of a model and its head; None where that does not pay.

    Args:
        model: a block diffusion language model.
        classes: those of the model, by name.
        num_rows: rows of a usual forward.
        num_forwards: forwards to come.
    """
    network, head, dtype = model.base_model, model.get_output_embeddings(), model.dtype
    if (
        type(network) is not classes.get("BD3LMModel")
        or has_hooks(network)
        or not is_plain(torch.zeros(1, dtype=dtype))
    ):
        return None
    layers = [layer for layer in network.layers if is_plain_layer(layer, classes, dtype) and is_sdpa(layer)]
    heads = [head] if is_leaf(head, nn.Linear, dtype) else []
    linears = [module for layer in layers for module in layer.modules() if type(module) is nn.Linear]
    if not pays([module.weight for module in (*linears, *heads)], num_rows, num_forwards):
        return None
    weights = PackedWeights(network, None, {}, {module: pack(module.weight, num_rows) for module in heads})
    if network.config.adaln and network.config.time_conditioning:
        linears = [module for module in linears if is_leaf(module, nn.Linear, dtype)]
        weights.linears.update({module: pack(module.weight, num_rows) for module in linears})
        return weights
    weights.condition = network.condition(None, torch.device("cpu"))
    for layer in layers:
        modulation = modulation_of(layer, weights.condition, dtype)
        weights.layers[layer] = PackedLayer(layer, modulation, num_rows)
    return weights
