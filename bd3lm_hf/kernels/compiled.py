"""
The training step of an accelerator: one graph whose shapes depend on the shape of the batch alone.

    step = compile_training(model)           # from here on `model(..., labels=...)` trains by it
    step.num_overflows                       # steps that had more masked tokens than usual

The noise is drawn on the host, which so knows how many tokens are masked without waiting for the device. Their number
keeps close to its mean: the head is given room for it and six standard deviations more, and the room is widened for
good, with another compilation, by a batch that has more. So every masked token is always in the loss.

The last layer of the published network computes what the loss reads: queries of the noisy stream, and after attention
the predicted tokens alone.
"""

import functools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from ..modeling.attention_block_diffusion import MaskKind, Tokens, is_visible
from ..modeling.diffusion_block_diffusion import NOISE_SCHEDULES, sample_timesteps, sigma_from_mask_probability
from ..modeling.modeling_bd3lm import apply_rotary_pos_emb, eager_attention_forward, modulate, rotary_embedding
from ..modeling.network_block_diffusion import BlockDiffusionOutput
from ..modeling.two_stream_block_diffusion import TextBlocks, check_shape
from .cpu_plain import HARMLESS_ARGUMENTS, has_hooks


logger = logging.get_logger(__name__)

# Of the number of masked tokens, above its mean: beyond six, a step in a thousand million has more.
NUM_STANDARD_DEVIATIONS = 6
# The room is a whole number of these, as matrix products like it.
ROOM_MULTIPLE = 128
# After the first room of a shape, those that follow have one of so many widths: each is compiled.
NUM_WIDTHS = 8
# So many shapes of a batch are compiled; those of other batches run uncompiled.
MOST_SHAPES = 8
# The vocabulary is filled up to a whole number of these.
HEAD_MULTIPLE = 8
# Elements of the logits that are held at once, about: 256 MiB in bfloat16.
CHUNK_NUMEL = 2**27
# Models that train by a step of this file. Nothing is stored on a model, so copies and checkpoints are plain.
_STEPS: "weakref.WeakKeyDictionary[nn.Module, TrainingStep]" = weakref.WeakKeyDictionary()


class CountedNoise(tuple):
    """Noise as `_denoising_loss` takes it, (x_t, sigma or None, weights in the loss), and at most how many tokens it
    masks (`num_masked`)."""

    num_masked: int


class UnreadTextBlocks(TextBlocks):
    """Those of a batch whose values the host does not read: not checked, and as many as a row may have."""

    reads_values = False


@dataclass
class TrainingStep:
    """
    How a model trains, and what came of it.

    Attributes:
        compile: from the function of a step to what runs it; None runs it as it is.
        num_overflows: steps with more masked tokens than there was room for before them.
        rooms: predicted tokens that there is room for, by shape of the batch and mean of the mask's probability.
        shapes: those that were compiled.
    """

    compile: Callable[[Callable], Callable] | None
    num_overflows: int = 0
    rooms: dict[tuple, int] = field(default_factory=dict)
    shapes: set[tuple] = field(default_factory=set)

    def __post_init__(self):
        self.run = loss_of_step if self.compile is None else self.compile(loss_of_step)

    def room(self, config, shape: torch.Size, num_masked: int | None) -> int:
        """For how many predicted tokens of x_t, of a `shape` [batch, copies * length], there is to be room."""
        total = shape.numel()
        if num_masked is None:
            return total
        law, width = (shape, config.block_size, config.noise_schedule, *config.noise_interval), -(-total // NUM_WIDTHS)
        if law not in self.rooms:
            usual = usual_room(config, total)
            others = [room for other, room in self.rooms.items() if other[0] == shape]
            # An interval that is chosen in training is not compiled anew where a room that is there is not much wider.
            fitting = [room for room in others if usual <= room <= usual + width]
            self.rooms[law] = min(fitting, default=rounded_up(usual, width, total) if others else usual)
        if num_masked > self.rooms[law]:
            self.num_overflows += 1
            self.rooms[law] = rounded_up(num_masked, width, total)
            logger.warning(
                f"A batch has {num_masked} masked tokens of {total}, more than there was room for: room is made for "
                f"{self.rooms[law]} from here on ({self.num_overflows} such batches so far)."
            )
        return self.rooms[law]

    def runner(self, key: tuple) -> Callable:
        """What runs a step of this shape: compiled, as long as there are not too many shapes."""
        if self.compile is None or key in self.shapes:
            return self.run
        if len(self.shapes) == MOST_SHAPES:
            logger.warning_once(
                f"The batches have more than {MOST_SHAPES} shapes: those of other shapes run uncompiled. Pack the "
                "texts, or pad them to one length."
            )
            return loss_of_step
        self.shapes.add(key)
        return self.run


def compile_training(
    model: nn.Module,
    backend: str | Callable | None = "inductor",
    mode: str | None = None,
    memory_budget: float = 0.9,
    **options: Any,
) -> TrainingStep:
    """
    Makes a model train by one static graph, `torch.compile(fullgraph=True)`, from here on.

    Args:
        model: a block diffusion language model.
        backend: of `torch.compile`; None compiles nothing, but keeps the shapes static all the same.
        mode: of `torch.compile`; "reduce-overhead" replays CUDA graphs.
        memory_budget: how much of the memory that the fastest backward pass would keep activations in may be used, 1
            for all of it. Below 1 whatever is cheap is computed again (norms, activation functions), and much below
            also matrix products.
        options: further ones of `torch.compile`.

    Returns:
        The step, which counts.

    Raises:
        ValueError: `model` is no block diffusion language model, or its classes have no kernels attached.
    """
    own = unwrapped(model)
    if not can_compile(own):
        is_other = not hasattr(type(own), "_denoising_loss")
        kind = "block diffusion language model" if is_other else "model with the kernels of bd3lm_hf attached"
        raise ValueError(f"`model` must be a {kind}, but got {type(model).__name__}.")
    compile = None
    if backend is not None:
        options.update(fullgraph=True, dynamic=False, backend=backend, mode=mode)
        compile = functools.partial(compiled_within, memory_budget, options)
    step = _STEPS[own] = TrainingStep(compile)
    return step


def can_compile(model: nn.Module) -> bool:
    """Whether this is a block diffusion language model whose classes have the kernels attached."""
    own = unwrapped(model)
    return any(hasattr(vars(cls).get("_denoising_loss"), "__wrapped__") for cls in type(own).__mro__)


def compiled_within(memory_budget: float, options: dict[str, Any], function: Callable) -> Callable:
    """A function compiled by `torch.compile(**options)`, whose activations are kept within a budget."""
    run = torch.compile(function, **options)

    @functools.wraps(function)
    def run_within_budget(*args: Any) -> Any:
        # Under DDP dynamo would cut the graph, or refuse one with a checkpoint in it.
        with functorch_config.patch(activation_memory_budget=memory_budget), dynamo_config.patch(optimize_ddp=False):
            return run(*args)

    return run_within_budget


def uncompile_training(model: nn.Module) -> None:
    """Makes a model train as it did before; where it was not compiled, nothing changes."""
    _STEPS.pop(unwrapped(model), None)


def step_of(model: nn.Module) -> TrainingStep | None:
    """The step that a model trains by, or None."""
    return _STEPS.get(unwrapped(model))


def unwrapped(model: nn.Module) -> nn.Module:
    """The block diffusion language model within what adapts, parallelizes or compiles it."""
    while not hasattr(type(model), "_denoising_loss"):
        parts = (getattr(model, name, None) for name in ("_orig_mod", "module", "model", "base_model"))
        inner = next((part for part in parts if isinstance(part, nn.Module) and part is not model), None)
        if inner is None:
            return model
        model = inner
    return model


def replacements(classes: dict[str, type]):
    """As [`bd3lm_hf.kernels.cpu.replacements`]: the methods that look for a step."""
    cls = classes.get("BlockDiffusionLMMixin")
    if cls is not None:
        yield cls, "_denoising_loss", denoising_loss
        yield cls, "_draw_noise", draw_noise
        yield cls, "_text_blocks", text_blocks


def text_blocks(original: Callable) -> Callable:
    """`BlockDiffusionLMMixin._text_blocks`, which looks at the ids on a device in the first batches alone."""

    @functools.wraps(original)
    def _text_blocks(self, x_0, labels, *text):
        is_taken = x_0.device.type not in ("cpu", "meta") and not torch.compiler.is_compiling()
        if not is_taken or _STEPS.get(self) is None or self._num_checks_left:
            self._num_checks_left -= is_taken and self._num_checks_left > 0
            return original(self, x_0, labels, *text)
        return UnreadTextBlocks.of_batch(self.config, x_0, labels, *text)

    return _text_blocks


def denoising_loss(original: Callable) -> Callable:
    """`BlockDiffusionLMMixin._denoising_loss`, by the step of the model, if it has one."""

    @functools.wraps(original)
    def _denoising_loss(self, x_0, labels, blocks, noise, num_items_in_batch, num_masked=None, **kwargs):
        if torch.compiler.is_compiling() or (step := _STEPS.get(self)) is None or not takes(self, x_0, kwargs):
            return original(self, x_0, labels, blocks, noise, num_items_in_batch, **kwargs)
        num_masked = getattr(noise, "num_masked", num_masked)
        return static_loss(self, step, x_0, labels, blocks, noise, num_items_in_batch, num_masked)

    return _denoising_loss


def draw_noise(original: Callable) -> Callable:
    """`BlockDiffusionLMMixin._draw_noise`, in training by the numbers of the host, which counts the masked tokens."""

    @functools.wraps(original)
    def _draw_noise(self, x_0, blocks, noise_interval, noise_seed):
        is_taken = self.training and blocks.is_plain and noise_interval is None and not torch.compiler.is_compiling()
        if not is_taken or _STEPS.get(self) is None or not takes(self, x_0, {}):
            return original(self, x_0, blocks, noise_interval, noise_seed)
        config, schedule = self.config, NOISE_SCHEDULES[self.config.noise_schedule]
        t = sample_timesteps(*blocks.shape, config.noise_interval)
        t = t.repeat_interleave(config.block_size, dim=1)[:, : x_0.shape[1]]
        mask_probability = schedule.mask_probability(t)
        masked = torch.rand(x_0.shape) < mask_probability
        if config.ignore_bos:
            masked[:, 0] = False
        timesteps = sigma_from_mask_probability(mask_probability) if config.time_conditioning else None
        numbers = (masked, timesteps, schedule.loss_weight(t))
        on_device, timesteps, loss_weights = (None if part is None else sent(part, x_0.device) for part in numbers)
        x_t = torch.where(on_device & blocks.predicted, config.mask_token_id, x_0)
        noise = CountedNoise((x_t, timesteps, loss_weights))
        noise.num_masked = int(masked.sum())
        return noise

    return _draw_noise


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The values of the host on a device, which the host does not wait for."""
    if device.type == "cuda" and torch.cuda.is_available():
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def takes(model: nn.Module, x_0: Tensor, arguments: dict[str, Any]) -> bool:
    """Whether a batch is trained on in the plain way, whose states nobody looks at."""
    return (
        model.training
        and torch.is_grad_enabled()
        and x_0.numel() > 0
        and not x_0.is_meta
        and not torch._C._are_functorch_transforms_active()
        and all(name in HARMLESS_ARGUMENTS and not value for name, value in arguments.items())
        and not getattr(model.config, "output_hidden_states", False)
        and not getattr(model.config, "output_attentions", False)
    )


def static_loss(
    model: nn.Module, step: TrainingStep, x_0, labels, blocks, noise, num_items_in_batch, num_masked: int | None
) -> BlockDiffusionOutput:
    """The loss of `_denoising_loss` by a `step`; masked are at most `num_masked` tokens, where that is known."""
    x_t, timesteps, loss_weights = noise
    check_shape("loss_weights", loss_weights, "input_ids", x_t.shape)
    streams = model._two_streams(x_t, x_0, blocks, timesteps)
    if blocks.is_plain and model.config.get_text_config(decoder=True)._attn_implementation == "flex_attention":
        num_copies, kind = x_t.shape[1] // x_0.shape[1], MaskKind.of(model.config, model.dtype)
        streams.attention_mask = plain_flex_mask(x_0.shape[1], num_copies, kind, x_0.device)
    if num_items_in_batch is None:
        num_items_in_batch = blocks.predicted.sum().clamp(min=1)
    elif not isinstance(num_items_in_batch, Tensor):
        # A number would be a part of the graph.
        num_items_in_batch = torch.full((), num_items_in_batch, dtype=torch.float32, device=x_0.device)
    noisy_mask, rotary = None, None
    if cuts_last_layer(model) and streams.read_at is None and not isinstance(streams.attention_mask, dict):
        noisy_mask = mask_of_noisy(streams.attention_mask, streams.num_noisy)
        # Within the graph every layer would compute them again.
        rotary = rotary_embedding(model.config, streams.position_ids, model.base_model.embed_tokens.weight.dtype)
    room = step.room(model.config, x_t.shape, num_masked)
    key = (tuple(x_t.shape), room, blocks.is_plain)
    inputs = (streams.input_ids, streams.position_ids, streams.attention_mask, streams.timesteps)
    noisy = (streams.num_noisy, streams.read_at, noisy_mask, rotary)
    targets = (labels, blocks.predicted, loss_weights)
    loss, nelbo = step.runner(key)(model, room, inputs, noisy, targets, num_items_in_batch)
    return BlockDiffusionOutput(loss, None, None, None, None, nelbo)


def loss_of_step(
    model: nn.Module, room: int, inputs: tuple, noisy: tuple, targets: tuple, num_items_in_batch: Tensor
) -> tuple[Tensor, Tensor]:
    """
    The network and the loss, in nats per token, with the weighted nats of each token [batch, length].

    Args:
        model: whose network and head are taken.
        room: for how many masked tokens there is room.
        inputs: (ids, positions, mask, sigma or None) of both streams, as the network takes them.
        noisy: (tokens of the noisy stream, where they are read or None, the mask of the noisy queries alone, cosines
            and sines of the positions); the last two are None where all queries of the last layer are computed.
        targets: (labels [batch, length], whether a token is predicted, of that shape, and its weight, of that of x_t).
        num_items_in_batch: denominator of the loss.
    """
    num_noisy, read_at, noisy_mask, rotary = noisy
    labels, predicted, loss_weights = targets
    num_copies = num_noisy // labels.shape[1]
    masked = (inputs[0][:, :num_noisy] == model.config.mask_token_id) & predicted.repeat(1, num_copies)
    masked = masked.flatten()
    # The masked ones come first, in order; the rest of the room is filled up with others, which count for nothing.
    chosen = masked.int().argsort(descending=True, stable=True)[:room]
    is_masked = masked[chosen]
    if noisy_mask is not None:
        states = states_of_chosen(model.base_model, inputs, rotary, num_noisy, noisy_mask, chosen)
    else:
        input_ids, position_ids, attention_mask, timesteps = inputs
        arguments = {"position_ids": position_ids, "attention_mask": attention_mask, "timesteps": timesteps}
        states = model._network(input_ids=input_ids, **arguments).last_hidden_state
        if read_at is None:
            states = states[:, :num_noisy]
        else:
            states = states.gather(1, read_at[..., None].expand(-1, -1, states.shape[-1]))
        states = states.flatten(0, 1)[chosen]
    # Any id but the mask token's, which has probability 0.
    other = int(model.config.mask_token_id == 0)
    token_labels = torch.where(is_masked, labels.repeat(1, num_copies).flatten()[chosen], other)
    nats = nats_of_rows(model, states, token_labels)
    weighted = torch.where(is_masked, loss_weights.flatten()[chosen].float() * nats, 0.0)
    nelbo = torch.zeros(masked.shape, dtype=torch.float32, device=masked.device).scatter(0, chosen, weighted)
    nelbo = nelbo.view(len(labels), num_copies, -1).sum(1)
    return nelbo.sum() / num_items_in_batch, nelbo


def nats_of_rows(model: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    """`model.token_nats` of [rows, hidden] and [rows], by large products where the head is but its weights."""
    config, head = model.config, model.get_output_embeddings()
    # Logits of some stock models are scaled or bounded.
    is_changed = hasattr(model, "_logit_changes") and bool(model._logit_changes())
    is_plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter and not has_hooks(head)
    if not is_plain or is_changed or getattr(config, "predicts_mask_token", False):
        return model.token_nats(states, targets)
    weight, bias = head.weight, head.bias
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    # The mask token has probability 0, and so have the rows that fill up the matrix, as its products like it.
    bias = bias.masked_fill(torch.arange(len(bias), device=bias.device) == config.mask_token_id, -torch.inf)
    padding = -len(weight) % HEAD_MULTIPLE
    weight, bias = (
        nn.functional.pad(weight, (0, 0, 0, padding)),
        nn.functional.pad(bias, (0, padding), value=-torch.inf),
    )

    def nats_of_chunk(states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # A compiler adds the bias where the logits are read, without a pass over them.
        logits = nn.functional.linear(states, weight).float() + bias
        return nn.functional.cross_entropy(logits, targets, reduction="none")

    num_chunks = max(1, round(len(states) * len(weight) / CHUNK_NUMEL))
    size = rounded_up(-(-len(states) // num_chunks), ROOM_MULTIPLE, len(states))
    chunks = zip(states.split(size), targets.split(size), strict=True)
    return torch.cat([checkpoint(nats_of_chunk, *chunk, weight, bias, use_reentrant=False) for chunk in chunks])


def cuts_last_layer(model: nn.Module) -> bool:
    """Whether the network is the published one, and calling its last layer runs no more than what it says."""
    network = model.base_model
    if type(network).__name__ != "BD3LMModel" or has_hooks(network):
        return False
    last = network.layers[-1]
    parts = (last, last.self_attn, last.mlp, network.norm, network.embed_tokens)
    return type(last).__name__ == "BD3LMDecoderLayer" and not any(has_hooks(part) for part in parts)


def mask_of_noisy(mask: Tensor | BlockMask, num_noisy: int) -> Tensor | BlockMask:
    """The mask [batch or 1, 1, noisy queries, keys] of what stands first in both streams."""
    if isinstance(mask, Tensor):
        return mask[:, :, :num_noisy]
    rows = -(-num_noisy // mask.BLOCK_SIZE[0])
    parts = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    parts = (None if part is None else part[:, :, :rows].contiguous() for part in parts)
    lengths = (num_noisy, mask.seq_lengths[1])
    return BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=mask.mask_mod, seq_lengths=lengths)


@functools.lru_cache(maxsize=16)
def plain_flex_mask(length: int, num_copies: int, kind: MaskKind, device: torch.device) -> Any:
    """`plain_two_stream_mask` whose ids are reckoned, which is faster in a kernel than to look them up."""
    num_tokens = length * (num_copies + 1)

    def tokens_at(index: Tensor) -> Tokens:
        """The tokens of these columns of both streams."""
        position, streams = index % length, torch.where(index < num_copies * length, index // length + 1, 0)
        return Tokens(position // kind.block_size, position, streams, kind.clean_is_causal and streams == 0)

    def mask_within(sliding_window: int | None) -> BlockMask:
        def mask_mod(batch, head, query_index, key_index):
            return is_visible(tokens_at(query_index), tokens_at(key_index), kind.window, sliding_window)

        arguments = {"device": device, "_compile": device.type == "cuda"}
        return create_block_mask(mask_mod, 1, None, num_tokens, num_tokens, **arguments)

    # Never made of tensors that are good for inference alone, since a later step may train with it.
    with torch.inference_mode(False):
        masks = {name: mask_within(width) for name, width in kind.sliding_windows}
    return masks if len(masks) > 1 else masks.popitem()[1]


def states_of_chosen(network: nn.Module, inputs: tuple, rotary, num_noisy: int, noisy_mask, chosen: Tensor) -> Tensor:
    """The last hidden states of the `chosen` noisy tokens, numbered over all rows [chosen] -> [chosen, hidden]."""
    input_ids, _, attention_mask, timesteps = inputs
    states = network.embed_tokens(input_ids)
    condition = network.condition(timesteps, states.device)
    for layer in network.layers[:-1]:
        states = layer(states, attention_mask, rotary, condition)

    def of_chosen(values: Tensor | None) -> Tensor | None:
        """Values of both streams [batch, tokens, ...] -> [chosen, ...]; what holds for all tokens as it is."""
        if values is None or values.shape[:2] == (1, 1):
            return None if values is None else values[0]
        values = values.expand(len(states), -1, -1)
        return values[:, :num_noisy].flatten(0, 1)[chosen] if values.shape[1] > 1 else values[chosen // num_noisy, 0]

    layer, last = network.layers[-1], (None,) * 6
    if condition is not None:
        last = layer.adaln_modulation(condition).to(states.dtype).chunk(6, dim=-1)
    branch = modulate(layer.input_layernorm(states), *last[:2])
    rows = noisy_attention(layer.self_attn, branch, num_noisy, rotary, noisy_mask)
    gate, shift, scale, mlp_gate = (of_chosen(part) for part in last[2:])
    branch = layer.self_attn.o_proj(rows.flatten(0, 1)[chosen])
    states_of = layer.add(of_chosen(states), branch, gate)
    branch = layer.mlp(modulate(layer.post_attention_layernorm(states_of), shift, scale))
    states_of = network.norm(layer.add(states_of, branch, mlp_gate))
    if condition is None:
        return states_of
    shift, scale = network.adaln_modulation(of_chosen(condition)).to(states_of.dtype).chunk(2, dim=-1)
    return modulate(states_of, shift, scale)


def noisy_attention(attention: nn.Module, states: Tensor, num_noisy: int, rotary: tuple, mask) -> Tensor:
    """What `BD3LMAttention` gives its last projection, for the noisy queries alone [batch, noisy, hidden]."""
    shape = (len(states), -1, attention.config.num_attention_heads, attention.head_dim)
    query = attention.q_proj(states[:, :num_noisy]).view(shape).transpose(1, 2)
    key, value = (part(states).view(shape).transpose(1, 2) for part in (attention.k_proj, attention.v_proj))
    query = apply_rotary_pos_emb(query, *(part[:, :, :num_noisy] for part in rotary))
    key = apply_rotary_pos_emb(key, *rotary)
    implementation = attention.config._attn_implementation
    implementation = "sdpa" if "flash" in implementation else implementation
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    output, _ = attend(attention, query, key, value, mask, dropout=0.0, scaling=attention.scaling)
    return output.flatten(2)


@functools.lru_cache(maxsize=64)
def usual_probability(schedule: str, noise_interval: tuple[float, float]) -> tuple[float, float, float]:
    """Mean of p, of p (1 - p), and variance of p, for t from an interval."""
    t = torch.linspace(*noise_interval, 4097, dtype=torch.float64)
    p = NOISE_SCHEDULES[schedule].mask_probability(t)
    return p.mean().item(), (p * (1 - p)).mean().item(), p.var(correction=0).item()


def usual_room(config, total: int) -> int:
    """
    Room for the mean number of masked tokens of so many (`total`) and six standard deviations more.

    Stratified times spread the probabilities of blocks evenly: what is left is the variance of the masks, and that of
    the time within each stratum.
    """
    mean, of_mask, of_time = usual_probability(config.noise_schedule, tuple(config.noise_interval))
    num_blocks = max(1, total // config.block_size)
    variance = total * of_mask + config.block_size**2 * of_time / num_blocks
    return rounded_up(math.ceil(total * mean + NUM_STANDARD_DEVIATIONS * variance**0.5), ROOM_MULTIPLE, total)


def rounded_up(number: int, multiple: int, most: int) -> int:
    """A multiple that is no less than a number, as far as `most` allows."""
    return min(-(-number // multiple) * multiple, most)
