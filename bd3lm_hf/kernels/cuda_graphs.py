"""
Denoising steps as CUDA graphs: what `generate` does with `cache_implementation="static"` on a GPU.

A step of [`Denoiser`] is a function of tensors of fixed shapes. Here these tensors are buffers that stay in place,
so that the whole step (network, nucleus, drawing, what is revealed) is recorded once and replayed with one call: one
graph for the pass that commits the finished block and begins the next, one for the other passes over a block. The
network is compiled before it is recorded where a `compile_config` asks for it, which takes a minute or more.

Buffers and graphs belong to a model, and are freed with it; nothing of them is stored on it.
"""

import copy
import functools
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer
from transformers.utils import logging

from ..modeling.attention_block_diffusion import MaskKind
from ..modeling.cache_block_diffusion import CommitCache, read_whole_text
from .cuda_capture import capture, casting_anew, new_pool, warm_up
from .cuda_layers import FastNetwork, fast_network
from .cuda_passes import additive, is_plain, mask_dtype, seen_columns, share_passes


logger = logging.get_logger(__name__)

# Graphs of so many shapes are kept for a model.
MAX_STEPS = 8
# Caches are of a whole number of so many positions, so that prompts of similar lengths share one.
LENGTH_MULTIPLE = 128
DEVICES = ("cuda",)
# What a sampler or a processor may have among its attributes to be told from others.
PLAIN_TYPES = (int, float, str, bool, type(None), tuple, list)

_LOCK = threading.RLock()
_STEPS: "WeakKeyDictionary[nn.Module, OrderedDict[tuple, CapturedSteps]]" = WeakKeyDictionary()


def replacements(classes: dict[str, type]) -> Iterator[tuple[type, str, Callable]]:
    """
    The methods to be replaced.

    Args:
        classes: by name, those of a model: its own, its modules', and what they inherit from.

    Yields:
        (class, name of the method, function from the method to what takes its place).
    """
    if "BlockDiffusionGenerationMixin" in classes:
        yield classes["BlockDiffusionGenerationMixin"], "_denoiser", denoiser


def denoiser(original: Callable) -> Callable:
    """`BlockDiffusionGenerationMixin._denoiser`, whose steps are captured where they can be."""

    @functools.wraps(original)
    def _denoiser(self, canvas, generation_config, processors, cache, guidance):
        given = (canvas, generation_config, processors)
        plain = original(self, *given, cache, guidance)
        if canvas.tokens.device.type not in DEVICES:
            return plain
        fast = fast_network(self, is_plain_module)
        plain.model = self if fast is None else fast
        if generation_config.cache_implementation != "static":
            share_passes(plain)
            return plain
        reason = why_not_captured(self, plain, cache)
        if reason is not None:
            logger.warning_once(f"`cache_implementation='static'` runs without CUDA graphs, because {reason}.")
            return plain
        with _LOCK:
            steps = steps_of(self, plain, cache)
            if steps is None:
                return plain
            captured = original(self, *given, steps.cache, guidance)
            steps.begin(captured, self, fast)
        return captured

    return _denoiser


def steps_of(model: nn.Module, plain: Any, cache: StaticCache) -> "CapturedSteps | None":
    """The captured steps for what a call of `generate` asks for; None where another call is using them."""
    num_columns = max(layer.max_cache_len for layer in cache.layers)
    num_columns = -(-num_columns // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    key = (num_columns, *signature(model, plain))
    kept = _STEPS.setdefault(model, OrderedDict())
    if key not in kept:
        kept[key] = CapturedSteps(model.config, num_columns, plain.generation_config.compile_config is not None)
        while len(kept) > MAX_STEPS:
            kept.popitem(last=False)
    kept.move_to_end(key)
    if kept[key].is_in_use():
        return None
    kept[key].forget_call()
    return kept[key]


def why_not_captured(model: nn.Module, plain: Any, cache: Any) -> str | None:
    """What keeps the steps of a denoiser from being captured, in words; None if nothing does."""
    record, predictor = plain.record, plain.predictor
    sampler = plain.generation_config.make_sampler(plain.canvas.block_size, model.config.noise_schedule)
    prediction, denoising = (sys.modules[type(part).__module__] for part in (predictor, plain))
    others = [
        type(part).__name__
        for part in predictor.logits_processor
        if type(part) not in prediction.CONTEXT_FREE_PROCESSORS and not prediction.reads_whole_context(part)
    ]
    foreign = [type(part) for part in model.modules() if not is_plain_module(part)]
    if others:
        return f"a {others[0]} is among the processors"
    if not type(sampler).__module__.endswith("samplers_block_diffusion") or sampler.may_pause:
        return f"the steps of a {type(sampler).__name__} depend on what it drew"
    if predictor.reads_context and type(sampler).candidates is not denoising.FirstHittingSampler.candidates:
        return "a processor that reads the text reads that of several tokens at once"
    if any(kept is not None for kept in (record.scores, record.logits, record.reveal_steps)):
        return "scores, logits or the order of tokens are asked for"
    if plain.guidance is not None:
        return "of the guidance"
    if type(cache) is not StaticCache or cache.offloading:
        return f"the cache is a {type(cache).__name__}, or offloaded"
    if model.config.get_text_config(decoder=True)._attn_implementation not in ("sdpa", "eager"):
        return "the attention is neither 'sdpa' nor 'eager'"
    if foreign:
        return f"the model has a {foreign[0].__name__}, or hooks"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model lies on several devices"
    return None


def is_plain_module(module: nn.Module) -> bool:
    """Whether a module is one of torch, Transformers or this package, and nobody has attached a hook to it."""
    is_known = type(module).__module__.split(".")[0] in ("torch", "transformers", "transformers_modules", "bd3lm_hf")
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return is_known and not any(hooks) and "forward" not in vars(module)


def signature(model: nn.Module, plain: Any) -> tuple:
    """What must be equal for graphs to be of use to a call of `generate`."""
    config, settings = plain.config, plain.generation_config
    sampler = settings.make_sampler(plain.canvas.block_size, config.noise_schedule)
    tensors = (*model.parameters(), *model.buffers())
    device_type = plain.canvas.tokens.device.type
    context = plain.canvas.tokens.shape[1] if plain.predictor.reads_context else None
    return (
        plain.canvas.tokens.shape[0],
        context,
        type(sampler).__name__,
        attributes(sampler),
        tuple((type(part).__name__, attributes(part)) for part in plain.predictor.logits_processor),
        (settings.do_sample, settings.compile_config is None, type(plain.model), model.training),
        (config.block_size, config.window_in_blocks, config.shift_logits, config.clean_attention),
        (config.mask_token_id, config.time_conditioning, config.get_text_config(decoder=True)._attn_implementation),
        (torch.is_inference_mode_enabled(), torch.is_autocast_enabled(device_type)),
        torch.get_autocast_dtype(device_type),
        # Other weights in the same places are read by the same graphs; in other places they are not.
        tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors),
    )


def attributes(part: Any) -> tuple:
    """The attributes of a sampler or of a processor, in a form that can be compared."""
    values = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(part).items()}
    return tuple((name, str(value)) for name, value in sorted(values.items()) if isinstance(value, PLAIN_TYPES))


class StaticNoise:
    """Random numbers for the one draw of a step, in a buffer."""

    def __init__(self, numbers: Tensor):
        self.numbers = numbers

    def uniform(self) -> Tensor:
        """Uniform on [0, 1), [batch, block_size]."""
        return self.numbers


class CommitInPlace(CommitCache):
    """A [`CommitCache`] of a static cache that has begun, which is written at places computed once for all layers."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple:
        """As `CommitCache.update`."""
        layer = self.cache.layers[layer_idx]
        if type(layer) is not StaticLayer:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == 0:
            self.places = torch.arange(key_states.shape[-2], device=key_states.device) + layer.cumulative_length
        layer.keys.index_copy_(2, self.places, key_states)
        layer.values.index_copy_(2, self.places, value_states.to(layer.values.dtype))
        if self.num_commit:
            layer.cumulative_length.add_(self.num_commit)
        return layer.keys, layer.values


class Step:
    """
    One kind of step.

    Attributes:
        clean, inputs: those of its pass over the network, which are buffers.
        loaded: the positions that are in them, as they were given.
        replay: the graph; None as long as the step ran once at most.
    """

    def __init__(self, clean: Tensor, inputs: dict[str, Any]):
        self.clean, self.inputs = clean, inputs
        self.loaded: Tensor | None = None
        self.is_warm = False
        self.replay: Callable[[], None] | None = None


class CapturedSteps:
    """
    The buffers, the cache and the graphs of one shape.

    A step of a call of `generate` is taken by a denoiser and a task of this object, whose tensors are the buffers; the
    call's own denoiser and task are given these in place of theirs.
    """

    def __init__(self, config: Any, num_columns: int, compiles: bool):
        self.cache = StaticCache(config=config.get_text_config(decoder=True), max_cache_len=num_columns)
        read_whole_text(self.cache, num_columns)
        self.compiles = compiles
        self.steps: dict[tuple, Step] = {}
        self.layout: tuple | None = None
        # The attributes of a call's objects, and of those that have the buffers: the call itself is its caller's.
        self.pairs: list[tuple[dict, dict]] = []
        self.user: ref | None = None
        self.fast: FastNetwork | None = None
        self.denoiser = self.task = self.pool = self.last_plain = self.first_logits = self.current_task = None
        # The task that the last step was taken for, and the step, if it committed nothing.
        self.last: tuple[Any, Step] | None = None

    def is_in_use(self) -> bool:
        """Whether a call of `generate` has begun and not ended."""
        return self.user is not None and self.user() is not None

    def begin(self, call: Any, model: nn.Module, fast: FastNetwork | None) -> None:
        """Takes the steps of a call of `generate` from now on, by the network in few launches where there is one."""
        if fast is None:
            call.model = model
        elif self.fast is None:
            call.model = self.fast = fast
        else:
            self.fast.refresh(fast)
            call.model = self.fast
        self.user = ref(call)
        call.take_step, call.release = self.take_step, self.release

    def release(self) -> StaticCache:
        """Ends a call; returns a cache of its own."""
        call = self.user()
        del call.take_step, call.release
        call.record.num_forward_passes = call.record.num_forward_passes.clone()
        cache = copy.copy(self.cache)
        if call.generation_config.return_dict_in_generate:
            cache.layers = [copied_layer(layer) for layer in self.cache.layers]
        self.forget_call()
        return cache

    def forget_call(self) -> None:
        """Takes back what the last call left, be it that it ended, or that it failed."""
        if self.user is None:
            return
        self.cache.reset()
        self.user = self.current_task = self.last_plain = self.last = None
        self.pairs = []
        for step in self.steps.values():
            step.loaded = None

    def take_step(self, task: Any) -> None:
        """As `Denoiser.take_step`."""
        call = self.user()
        text, device = call.text, task.block.device
        if self.last is not None and self.last[0] is task and self.last[1].replay is not None:
            # Another one against the same text: all but the numbers is where it was.
            self.task.noise.numbers.copy_(task.noise.uniform())
            self.last[1].replay()
            return
        num_clean = text.num_columns - text.num_cached
        if num_clean not in (0, call.canvas.block_size) or not self.cache.layers[0].is_initialized:
            call.prepare_pass(task)
            call.step(task)
            return
        if is_plain(call):
            self._prepare_plain(call, task)
        else:
            call.prepare_pass(task)
        uniform = task.noise.uniform()
        self._share(call, task)
        self.task.noise.numbers.copy_(uniform)
        step = self._step(call, task)
        self.task.clean, self.task.inputs = step.clean, step.inputs
        if step.replay is None:
            if step.is_warm:
                step.replay = self._captured(device)
            else:
                warm_up(self._run_first, device)
                step.is_warm = True
        if step.replay is not None:
            step.replay()
        if num_clean and call.config.shift_logits:
            call.first_logits = self.first_logits
        text.num_cached = text.num_columns
        self.last = None if num_clean else (task, step)

    def _prepare_plain(self, call: Any, task: Any) -> None:
        """As `Denoiser.prepare_pass`, of rows without padding that see all of their text, in fewer launches."""
        text, block_size, device = call.text, call.canvas.block_size, call.canvas.tokens.device
        start, stop = text.num_cached, text.num_columns + block_size
        if self.last_plain is None or self.last_plain[0] != (start, stop):
            positions = torch.arange(start, stop, device=device)
            seen = seen_columns(call, positions, self.cache.layers[0].max_cache_len)
            kind = MaskKind.of(call.config, call.model.dtype)
            if kind.implementation == "eager":
                mask = additive(seen, kind.dtype, torch.finfo(kind.dtype).min)
            else:
                mask = additive(seen, mask_dtype(call))
            inputs = {"position_ids": positions[None], "attention_mask": mask[None, None]}
            self.last_plain = (start, stop), inputs
        task.clean, task.inputs, task.num_cached = text.pending, self.last_plain[1], start

    def _share(self, call: Any, task: Any) -> None:
        """Copies the tensors of a call into the buffers, and puts the buffers in their place."""
        if self.current_task is not task:
            self.current_task = task
            given = [task, task.sampler, call, call.predictor, call.record]
            layout = tuple(
                (index, name, value.shape)
                for index, part in enumerate(given)
                for name, value in tensors_in(vars(part))
            )
            if layout != self.layout:
                self._make_buffers(call, task)
                self.layout = layout
            self.pairs = [(vars(part), vars(own)) for part, own in zip(given, self._owners(), strict=True)]
        for given, own in self.pairs:
            for name, value in tensors_in(given):
                if value is not own[name]:
                    own[name].copy_(value)
                    given[name] = own[name]
        if call.first_logits is not None and call.first_logits is not self.first_logits:
            if self.first_logits is None:
                self.first_logits = call.first_logits.clone()
            self.first_logits.copy_(call.first_logits)
        self.denoiser.first_logits = None if call.first_logits is None else self.first_logits

    def _make_buffers(self, call: Any, task: Any) -> None:
        """Buffers for the tensors of a call and a task; graphs of others are of no use any more."""
        self.steps.clear()
        self.pool = new_pool()
        self.denoiser, self.task = copy.copy(call), copy.copy(task)
        for name in ("model", "canvas", "seeds", "take_step", "release"):
            vars(self.denoiser).pop(name, None)
        self.denoiser.text, self.denoiser.cache = SimpleNamespace(num_cached=0, num_columns=0), self.cache
        self.denoiser.predictor, self.denoiser.record = copy.copy(call.predictor), copy.copy(call.record)
        self.denoiser.predictor.prompts = None
        self.task.sampler = copy.copy(task.sampler)
        self.task.sampler.noise = self.task.noise = StaticNoise(torch.zeros_like(task.block, dtype=torch.float32))
        for own in self._owners():
            for name, value in tensors_in(vars(own)):
                setattr(own, name, value.clone())

    def _owners(self) -> list[Any]:
        """The objects whose tensors a step reads or changes."""
        return [self.task, self.task.sampler, self.denoiser, self.denoiser.predictor, self.denoiser.record]

    def _step(self, call: Any, task: Any) -> Step:
        """The step for the pass of a task, whose inputs are copied into its buffers."""
        masks, positions = task.inputs["attention_mask"], task.inputs["position_ids"]
        is_one = isinstance(masks, Tensor)
        given = {"clean": task.clean, "position_ids": positions} | ({"": masks} if is_one else masks)
        key = (call.first_logits is None, *((name, tensor.shape) for name, tensor in given.items()))
        dtype = mask_dtype(call)
        if key not in self.steps:
            own = {name: additive(tensor, dtype).clone() for name, tensor in given.items()}
            own_masks = own[""] if is_one else {name: own[name] for name in masks}
            cache = CommitInPlace(self.cache, task.clean.shape[1])
            inputs = {"position_ids": own["position_ids"], "attention_mask": own_masks, "cache": cache}
            self.steps[key] = Step(own["clean"], inputs)
            self.steps[key].buffers = own
        step = self.steps[key]
        # The tensors of a pass are those of the pass before it, for as long as nothing is committed.
        if step.loaded is not positions:
            for name, tensor in given.items():
                step.buffers[name].copy_(additive(tensor, dtype))
            step.loaded = positions
        return step

    def _captured(self, device: torch.device) -> Callable[[], None]:
        """What takes a step again: its graph, or where it can't be recorded the step itself."""
        try:
            return capture(self._run, self.pool, device)
        except RuntimeError as error:
            logger.warning_once(f"Steps run without CUDA graphs, because they can't be recorded: {error}")
            return self._run

    def _run_first(self) -> None:
        """Runs a step before it is captured, which compiles the network; without, where that fails."""
        try:
            self._run()
        except Exception as error:
            if not self.compiles:
                raise
            logger.warning_once(f"The network is captured as it is, since it can't be compiled: {error}")
            self.compiles = False
            self._run()

    def _run(self) -> None:
        """One step on the buffers; what it puts in their place is copied into them."""
        model = self.user().model
        before = [(own, name, value) for own in self._owners() for name, value in tensors_in(vars(own))]
        had_first = self.denoiser.first_logits
        self.denoiser.model = functools.partial(compiled_network, model) if self.compiles else model
        try:
            with casting_anew():
                self.denoiser.step(self.task)
            first_logits = self.denoiser.first_logits
        finally:
            made = [(own, name, vars(own)[name], buffer) for own, name, buffer in before]
            for own, name, buffer in before:
                setattr(own, name, buffer)
            del self.denoiser.model
            self.denoiser.first_logits = had_first
        for _, _, value, buffer in made:
            if value is not buffer:
                buffer.copy_(value)
        if first_logits is not None and first_logits is not self.first_logits:
            if self.first_logits is None:
                self.first_logits = first_logits.clone()
            self.first_logits.copy_(first_logits)


def tensors_in(values: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Of the attributes of an object those that are tensors which a step reads or changes."""
    # The prompts are read by processors that are not captured; logits and what is read have buffers of their own.
    others = ("prompts", "first_logits", "clean")
    return [(name, value) for name, value in values.items() if isinstance(value, Tensor) and name not in others]


def copied_layer(layer: Any) -> Any:
    """A layer of a static cache with tensors of its own."""
    copied = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            setattr(copied, name, value.clone())
    return copied


def compiled_network(model: nn.Module, **inputs: Any) -> Any:
    """What a model gives, compiled for the shapes of its inputs."""
    # Each shape is compiled once, and of each model.
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        return SimpleNamespace(logits=logits_compiler()(model, inputs))


@functools.cache
def logits_compiler() -> Callable:
    return torch.compile(logits_of, fullgraph=True, dynamic=False)


def logits_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The logits of a pass."""
    return model(**inputs).logits
