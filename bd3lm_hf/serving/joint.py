"""
One denoising step of many requests. What they predict, draw and reveal is computed in common where they are sampled
alike; whatever a request is sampled by, it shares the forward.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from ..kernels.cpu_nucleus import SelectingTopPLogitsWarper
from ..modeling.attention_block_diffusion import MaskKind, Tokens, block_diffusion_mask, token_block_ids
from ..modeling.denoising_block_diffusion import BlockTask, Denoiser
from ..modeling.diffusion_block_diffusion import sigma_from_mask_probability
from ..modeling.prediction_block_diffusion import CONTEXT_FREE_PROCESSORS, Prediction, TokenPredictor
from ..modeling.samplers_block_diffusion import SAMPLERS, Sampler
from .slots import Call, Scores


SHARED_PROCESSORS = (*CONTEXT_FREE_PROCESSORS, SelectingTopPLogitsWarper)
# The package's own, of which it is known what they keep.
SHARED_SAMPLERS = tuple(SAMPLERS.values())


class WaitingModel:
    """A model for `generate`, whose forwards are run by whoever resumes the greenlet that calls it."""

    def __init__(self, model: Any):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _denoiser(self, *arguments: Any) -> "WaitingDenoiser":
        """What calls this in place of the model."""
        return WaitingDenoiser(self, *arguments)

    def __call__(self, input_ids: Tensor, cache: Any, logits_to_keep: Tensor | int, **inputs: Any) -> Any:
        if isinstance(logits_to_keep, int):
            length = input_ids.shape[1]
            logits_to_keep = torch.arange(length - logits_to_keep, length, device=input_ids.device)[None]
        inputs["logits_to_keep"] = logits_to_keep
        return getcurrent().parent.switch(Call(input_ids, inputs, [cache.cache], [cache.num_commit], cache.seen))


@dataclass(eq=False)
class Step:
    """A denoising step that a request waits for, of its `denoiser` on a block, the `task`."""

    denoiser: "WaitingDenoiser"
    task: BlockTask
    seen = None

    @property
    def num_commit(self) -> int:
        """Tokens of a finished block that the step's forward commits."""
        return self.denoiser.text.num_columns - self.denoiser.text.num_cached

    @property
    def length(self) -> int:
        """Tokens that its forward reads."""
        return self.num_commit + self.task.block.shape[1]

    @property
    def slot(self) -> int:
        """The slot that the request is written in."""
        return self.denoiser.cache.slot


class WaitingDenoiser(Denoiser):
    """
    The denoiser of one request, each of whose steps waits for others.

    Attributes:
        settings: is equal for requests that are sampled alike; None where a step can't be shared, but its forward.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.settings = self._settings()

    def _settings(self) -> tuple | None:
        sampler = self.generation_config.make_sampler(self.config.block_size, self.config.noise_schedule)
        processors, predictor = self.predictor.logits_processor, self.predictor
        is_known = type(sampler) in SHARED_SAMPLERS and all(type(part) in SHARED_PROCESSORS for part in processors)
        # Whether the steps of a sampler that pauses need a forward depends on what each request drew.
        if not is_known or sampler.may_pause or self.guidance is not None or self.generation_config.new_block:
            return None
        if self.record.scores is not None or self.record.logits is not None or self.seeds is None:
            return None
        return (predictor.do_sample, signature(sampler), *map(signature, processors))

    def _start_block(self, *arguments: Any) -> BlockTask:
        """See `Denoiser`; where texts end is a part of the settings."""
        is_first, task = self.eos_token_id is None, super()._start_block(*arguments)
        if is_first and self.settings is not None and self.eos_token_id is not None:
            self.settings = (*self.settings, tuple(self.eos_token_id.tolist()))
        return task

    def take_step(self, task: BlockTask) -> None:
        """See `Denoiser`: alone where a prompt is read as well, which comes in any length."""
        step = Step(self, task)
        if self.settings is None or not self.text.is_plain or step.num_commit > self.config.block_size:
            super().take_step(task)
        else:
            getcurrent().parent.switch(step)


def signature(part: Any) -> tuple:
    """The class of a sampler or processor, and what it was made with."""
    values = {
        name: tuple(value.flatten().tolist()) if isinstance(value, Tensor) else value
        for name, value in vars(part).items()
    }
    return type(part), *((name, tuple(value) if isinstance(value, list) else value) for name, value in values.items())


class JointDenoiser(Denoiser):
    """The denoiser of one step of several requests of equal settings, of a row each."""

    def __init__(self, steps: list[Step]):
        first = steps[0].denoiser
        self.steps, self.rows = steps, [step.denoiser for step in steps]
        self.model, self.config, self.guidance = first.model, first.config, None
        self.eos_token_id, self._may_wait = first.eos_token_id, first._may_wait
        own = first.predictor
        self.predictor = TokenPredictor(own.logits_processor, own.do_sample, own.mask_token_id, own.prompts)
        self.record = JointRecord([row.record for row in self.rows])

    def take_steps(self) -> None:
        """The step of all requests, but for the forward, for which it rests like a request of its own."""
        tasks = [step.task for step in self.steps]
        sampler = joined_sampler([task.sampler for task in tasks])
        noise = JointNoise([task.noise for task in tasks])
        columns, to_fill, block, masked = (
            torch.cat([getattr(task, name) for task in tasks]) for name in ("columns", "to_fill", "block", "masked")
        )
        may_end = None if tasks[0].may_end is None else torch.cat([task.may_end for task in tasks])
        sampler.noise = noise
        joint = BlockTask(columns, to_fill, block, masked, None, may_end, sampler, noise)
        self.step(joint)
        for task, block, masked in zip(tasks, joint.block.split(1), joint.masked.split(1), strict=True):
            task.block, task.masked = block, masked
        split_sampler(sampler, [task.sampler for task in tasks])
        self._tell_validity()

    def _logits(self, task: BlockTask, kept: Tensor) -> Tensor:
        """See `Denoiser`. Rows that commit nothing are filled up with a block that nobody sees, where others do."""
        block, commits = task.block, [step.num_commit for step in self.steps]
        starts, device = [row.text.num_cached for row in self.rows], block.device
        commit = torch.tensor(commits, device=device)[:, None]
        input_ids = block
        if any(commits):
            pairs = zip(self.steps, commits, strict=True)
            first = [step.denoiser.text.pending if number else step.task.block for step, number in pairs]
            input_ids = torch.cat([torch.cat(first), block], dim=1)
        place = torch.arange(input_ids.shape[1], device=device)
        positions = torch.tensor(starts, device=device)[:, None] + place
        inputs = {"position_ids": positions, "attention_mask": self._mask(positions, place < commit, max(starts))}
        if self.config.time_conditioning:
            sigma = sigma_from_mask_probability(task.sampler.mask_probability(task.masked))
            inputs["timesteps"] = sigma[:, None] * (place >= commit)
        # The last clean token predicts the first of the block, and is read once.
        first_is_read = bool(self.config.shift_logits) and any(commits)
        inputs["logits_to_keep"] = commit + (torch.nn.functional.pad(kept, (1, 0)) if first_is_read else kept)
        call = Call(input_ids, inputs, [row.cache for row in self.rows], commits)
        logits = getcurrent().parent.switch(call).logits
        for row in self.rows:
            row.text.num_cached = row.text.num_columns
        task.sampler.tolerance = torch.finfo(logits.dtype).eps ** 0.5
        if self.config.shift_logits:
            logits = self._with_first_logits(logits, kept, commits if first_is_read else None)
        return logits.flatten(0, 1).float()

    def _mask(self, positions: Tensor, is_clean: Tensor, last_start: int) -> Any:
        """Who sees whom, where columns are positions, for queries at `positions` [rows, length]."""
        config, key_positions = self.config, torch.arange(last_start + positions.shape[1], device=positions.device)
        query, key = (Tokens(token_block_ids(ids, config.block_size), ids) for ids in (positions, key_positions[None]))
        if config.clean_attention == "causal":
            query = query._replace(is_causal=is_clean)
        return block_diffusion_mask(query, key, MaskKind.of(config, self.model.dtype))

    def _with_first_logits(self, logits: Tensor, kept: Tensor, commits: list[int] | None) -> Tensor:
        """
        Logits of the tokens at `kept` [rows, kept, vocab]: that of a block's first token came with the pass that
        committed the one before. Where any has `commits`, the first of each row are those.
        """
        if commits is not None:
            for row, first, number in zip(self.rows, logits[:, :1].split(1), commits, strict=True):
                # Of its own, for what is kept of one row must not keep all rows.
                row.first_logits = first.clone() if number else row.first_logits
            logits = logits[:, 1:]
        firsts = [row.first_logits for row in self.rows]
        is_known = torch.tensor([first is not None for first in firsts], device=kept.device)[:, None]
        is_first = (kept == 0) & is_known
        if self._may_wait and not is_first.any():
            return logits
        blank = logits.new_zeros(1, 1, logits.shape[-1])
        first_logits = torch.cat([blank if first is None else first for first in firsts])
        return torch.where(is_first[..., None], first_logits, logits)

    def _tell_validity(self) -> None:
        """Lets each request know whether its own logits and scores were numbers; it looks at the end of its block."""
        joint, prediction = self.predictor, self.record.prediction
        if self._may_wait and joint.sum_of_scores.isfinite():
            return
        for name, values in (("_sum_of_logits", prediction.logits), ("sum_of_scores", prediction.scores)):
            largest = torch.where(prediction.is_candidate, values.amax(-1).view(prediction.kept.shape), 0.0)
            for row, total in zip(self.rows, largest.sum(-1).unbind(), strict=True):
                setattr(row.predictor, name, getattr(row.predictor, name) + total)


class JointRecord:
    """The records of several requests, of a row each."""

    prediction: Prediction | None = None

    def __init__(self, records: list[Any]):
        self.records = records

    def note(self, prediction: Prediction, revealed: Tensor, columns: Tensor) -> None:
        """See `GenerationRecord.note`."""
        self.prediction = prediction
        number = torch.cat([record.num_forward_passes for record in self.records]) + prediction.is_candidate.any(-1)
        for row, (record, passes) in enumerate(zip(self.records, number.split(1), strict=True)):
            if record.reveal_steps is None:
                record.num_forward_passes = passes
                continue
            one, num_kept = slice(row, row + 1), prediction.kept.shape[1]
            scores = slice(row * num_kept, (row + 1) * num_kept)
            own = (prediction.kept[one], prediction.is_candidate[one], prediction.tokens[one])
            own = Prediction(*own, prediction.logits[scores], prediction.scores[scores])
            record.note(own, revealed[one], columns[one])


class JointNoise:
    """The random numbers of several blocks, each from its own generator."""

    def __init__(self, noises: list[Any]):
        self.noises = noises

    def uniform(self) -> Tensor:
        """See `BlockNoise`."""
        return torch.cat([noise.uniform() for noise in self.noises])


def joined_sampler(samplers: list[Sampler]) -> Sampler:
    """A sampler of several rows from those of one row each, of equal settings."""
    joint = copy.copy(samplers[0])
    for name, value in vars(joint).items():
        if isinstance(value, Tensor):
            # What is one number for a row is [rows, 1].
            parts = [getattr(sampler, name) for sampler in samplers]
            setattr(joint, name, torch.cat(parts) if value.dim() else torch.stack(parts)[:, None])
    return joint


def split_sampler(joint: Sampler, samplers: list[Sampler]) -> None:
    """Gives each of `samplers` its row of what the joint one knows after a step."""
    for name, value in vars(joint).items():
        if isinstance(value, Tensor):
            is_number = getattr(samplers[0], name).dim() == 0
            for sampler, part in zip(samplers, value.unbind() if is_number else value.split(1), strict=True):
                setattr(sampler, name, part[0] if is_number else part)


class JointStep:
    """
    Steps that are taken together: those of requests of equal settings. It rests where it needs a forward, its `call`,
    and goes on to the end of the steps with what came of that.
    """

    def __init__(self, steps: list[Step]):
        self.steps = steps
        self._greenlet = greenlet(JointDenoiser(steps).take_steps)
        self.call: Call = self._greenlet.switch()

    def resume(self, output: Any) -> list[Exception | None]:
        """
        Goes on with the `output` of the forward, or a list of outputs and exceptions, one for each step. Returns what
        kept each step from being taken, None where nothing did.
        """
        errors: list[Exception | None] = [None] * len(self.steps)
        if isinstance(output, list):
            errors = [part if isinstance(part, Exception) else None for part in output]
            logits = [None if error else part.logits for part, error in zip(output, errors, strict=True)]
            output = next((part for part in logits if part is not None), None)
            if output is not None:
                # What is made of nothing is made for nobody.
                output = Scores(torch.cat([torch.zeros_like(output) if part is None else part for part in logits]))
        if isinstance(output, Exception) or output is None:
            self._greenlet.throw()
            return [error or output for error in errors]
        try:
            self._greenlet.switch(output)
        except Exception as error:
            return [error] * len(self.steps)
        return errors


def joint_steps(steps: list[Step]) -> list[JointStep]:
    """The steps, those of equal settings together."""
    by_settings: dict[tuple, list[Step]] = {}
    for step in steps:
        by_settings.setdefault(step.denoiser.settings, []).append(step)
    return [JointStep(alike) for alike in by_settings.values()]
