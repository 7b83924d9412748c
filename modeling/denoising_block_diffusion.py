"""Denoising the blocks of a text one after the other: the passes over the network, and a record of what they gave."""

import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig

from .attention_block_diffusion import PADDING_BLOCK, MaskKind, Tokens, block_diffusion_mask, token_block_ids
from .cache_block_diffusion import CommitCache
from .diffusion_block_diffusion import sigma_from_mask_probability
from .guidance_block_diffusion import Guidance
from .prediction_block_diffusion import Prediction, TokenPredictor
from .prefix_reuse_block_diffusion import CleanText, match_cache, sliding_cache
from .progress_block_diffusion import Canvas, RowProgress, drop_after_eos
from .samplers_block_diffusion import BlockNoise, Sampler
from .two_stream_block_diffusion import flagged_first


# Tokens that a forward reads, in whole blocks: enough for fast matrix products, and few enough for small masks.
PIECE_SIZE = 512


class GenerationRecord:
    """What [`BD3LMGenerateOutput`] says of each token, as far as `generate` was asked for it."""

    def __init__(self, canvas: Canvas, generation_config: GenerationConfig, vocab_size: int):
        self.prompt_width, device = canvas.prompt_width, canvas.tokens.device
        self.num_forward_passes = torch.zeros_like(canvas.num_clean)
        self.scores = self.logits = self.reveal_steps = self.token_probabilities = None
        if not generation_config.return_dict_in_generate:
            return
        shape = (canvas.num_new, len(canvas.tokens), vocab_size)
        if generation_config.output_scores:
            self.scores = torch.full(shape, -torch.inf, device=device)
        if generation_config.output_logits:
            self.logits = torch.zeros(shape, device=device)
        if generation_config.output_reveal:
            self.reveal_steps = torch.zeros_like(canvas.tokens)
            self.token_probabilities = torch.full(canvas.tokens.shape, torch.nan, device=device)

    @property
    def keeps_vocabularies(self) -> bool:
        """Whether it keeps scores or logits, of which there is a number for each token of the vocabulary."""
        return self.scores is not None or self.logits is not None

    def note(self, prediction: Prediction, revealed: Tensor, columns: Tensor) -> None:
        """Counts a forward, and keeps what it gave at `columns`, of the `revealed` tokens too [batch, block_size]."""
        self.num_forward_passes = self.num_forward_passes + prediction.is_candidate.any(-1)
        if self.keeps_vocabularies:
            index = columns.gather(1, prediction.kept) - self.prompt_width
            row, place = (prediction.is_candidate & (index >= 0)).nonzero(as_tuple=True)
            for kept, values in ((self.scores, prediction.scores), (self.logits, prediction.logits)):
                if kept is not None:
                    kept[index[row, place], row] = values.view(*index.shape, -1)[row, place]
        if self.reveal_steps is not None:
            noted = (self.num_forward_passes[:, None], prediction.confidence("probability"))
            for record, values in zip((self.reveal_steps, self.token_probabilities), noted):
                record.scatter_(1, columns, torch.where(revealed, values, record.gather(1, columns)))

    def of_sequences(self, progress: RowProgress, length: int) -> dict[str, Any]:
        """The fields of the output, cut to the `length` of the sequences that are returned."""
        fields = {"num_forward_passes": self.num_forward_passes}
        fields["tokens_per_forward"] = progress.num_generated / self.num_forward_passes.clamp(min=1)
        for name in ("scores", "logits"):
            if (record := getattr(self, name)) is not None:
                fields[name] = record[: length - self.prompt_width].unbind(0)
        for name, empty in (("reveal_steps", 0), ("token_probabilities", torch.nan)):
            if (record := getattr(self, name)) is not None:
                fields[name] = record.masked_fill(progress.after_end(), empty)[:, :length]
        return fields


class NetworkPass(NamedTuple):
    """
    What passes over one block against the same cache of `num_cached` columns share: finished tokens to commit [rows,
    num_clean], arguments of the network, and `seen` of [`CommitCache`].
    """

    clean: Tensor
    inputs: dict[str, Any]
    seen: slice | None
    num_cached: int


@dataclass
class BlockTask:
    """
    One block of every row: its columns in the text, which of them to fill, their ids, which of these are masked, and
    where an EOS would end the row, all [batch, block_size]; and the text around it, if a processor reads that. A step
    changes `block` and `masked`.
    """

    columns: Tensor
    to_fill: Tensor
    block: Tensor
    masked: Tensor
    context: Tensor | None
    may_end: Tensor | None
    sampler: Sampler
    noise: BlockNoise
    network_pass: NetworkPass | None = None


class Denoiser:
    """
    Denoises the blocks of a canvas: calls the model, of which it knows `forward` alone, and asks the sampler.

    A step is a function of tensors of fixed shapes, and does not wait for the device. It changes tensors among
    the attributes of the [`BlockTask`], its sampler, the denoiser, its predictor and its record.
    """

    # Where the device is the host itself, looking costs nothing.
    waits_for = ("cpu",)

    def __init__(
        self, model, canvas: Canvas, generation_config, processors, cache: Cache | None, guidance: Guidance | None
    ):
        self.model, self.canvas, self.cache, self.guidance = model, canvas, cache, guidance
        self.generation_config = generation_config
        self.config = config = model.config
        prompts = canvas.context()[:, : canvas.prompt_width]
        self.predictor = TokenPredictor(processors, generation_config.do_sample, config.mask_token_id, prompts)
        self.seeds = generation_config.row_seeds(canvas.tokens.shape[0])
        self.piece_size = max(PIECE_SIZE // config.block_size, 1) * config.block_size
        self.window = config.window_in_blocks * config.block_size
        self.record = GenerationRecord(canvas, generation_config, config.vocab_size)
        prefix, length = canvas.clean_prefix(), canvas.num_clean
        if guidance is not None:
            prefix, length = guidance.with_unconditional_rows(prefix, length, canvas.prompt_length, canvas.block_size)
        if cache is None:
            self.text = CleanText.of_prompts(prefix, length)
        else:
            sizes = (config.block_size, self.window, canvas.num_stages)
            # With shifted logits the last clean token predicts the next one, and so is read again.
            self.text = match_cache(cache, prefix, length, *sizes, reread=bool(config.shift_logits))
            # Blocks that are counted from the prompt's end are of no use to another prompt.
            cache.clean_text = replace(self.text) if generation_config.new_block else self.text
        self.eos_token_id: Tensor | None = None
        self.first_logits: Tensor | None = None
        self._may_wait = canvas.tokens.device.type in self.waits_for
        self._most_to_fill = [] if self._may_wait else canvas.most_to_fill()
        self._first_blocks = (canvas.num_clean // canvas.block_size).tolist()

    def denoise_block(self, stage: int, progress: RowProgress) -> None:
        """Reveals the tokens to fill in one block of every unfinished row."""
        task, canvas = self.start_block(stage, progress), self.canvas
        sampler = task.sampler
        num_steps = None if self._may_wait else sampler.num_steps(self._most_to_fill[stage])
        sampler.start(task.masked, task.noise)
        for index in itertools.count():
            if index >= (num_steps or 0) and sampler.is_finished(task.masked):
                break
            self.take_step(task)
            if hasattr(progress.streamer, "put_draft") or hasattr(progress.streamer, "put_reveal"):
                canvas.tokens.scatter_(1, task.columns, task.block)
                self._show(task.block, task.columns, progress.streamer)
        canvas.tokens.scatter_(1, task.columns, task.block)
        self.predictor.check()

    def start_block(self, stage: int, progress: RowProgress) -> BlockTask:
        """The task of the next block of each row, before its first step."""
        canvas, columns = self.canvas, self.canvas.columns(stage)
        block, to_fill = canvas.tokens.gather(1, columns), canvas.to_fill.gather(1, columns)
        masked = to_fill & progress.unfinished[:, None]
        sampler = self.generation_config.make_sampler(canvas.block_size, self.config.noise_schedule)
        numbers = [first + stage for first in self._first_blocks]
        noise = BlockNoise(self.seeds, numbers, block.shape, block.device)
        context = canvas.context() if self.predictor.reads_context else None
        # An EOS that stays ends its row.
        may_end = None if sampler.may_remask else progress.may_end(columns)
        self.eos_token_id = progress.eos_token_id
        return BlockTask(columns, to_fill, block, masked, context, may_end, sampler, noise)

    def take_step(self, task: BlockTask) -> None:
        """One denoising step: what the host does for it, then [`step`]."""
        task.network_pass = self._network_pass(task)
        self.step(task)

    def step(self, task: BlockTask) -> None:
        """One denoising step of at most one forward."""
        sampler, block, masked = task.sampler, task.block, task.masked
        revealed = candidates = sampler.candidates(masked)
        known = task.to_fill & ~masked
        # Drawn at every step: another row may be the reason that there is a forward.
        uniform = task.noise.uniform()
        if not sampler.may_pause or candidates.any():
            kept, is_candidate = self._candidates_first(candidates, sampler.num_candidates)
            logits = self._logits(task, kept)
            context = None if task.context is None else task.context.scatter(1, task.columns, block)
            place = (task.columns, context, uniform)
            prediction = self.predictor.predict(logits, kept, is_candidate, *place)
            confidence = None if sampler.confidence is None else prediction.confidence(sampler.confidence)
            revealed = sampler.reveal(candidates, confidence)
            self.predictor.settle(prediction, revealed, *place)
            block = torch.where(revealed, prediction.tokens, block)
            self.record.note(prediction, revealed, task.columns)
        masked = masked & ~revealed
        remasked = sampler.remask(known)
        if sampler.may_remask:
            masked = masked | remasked
            block = block.masked_fill(remasked, self.config.mask_token_id)
        elif task.may_end is not None:
            masked = drop_after_eos(block, masked, task.may_end, self.eos_token_id)
        task.block, task.masked = block, masked

    def release(self) -> Cache | None:
        """The cache, of which the denoiser makes no use any more."""
        return self.cache

    def append_block(self, stage: int) -> None:
        """Hands the finished block, as it is in the text, to the next forward, which commits it."""
        columns = self.canvas.columns(stage)
        self.text.append(*self._as_read(self.canvas.tokens.gather(1, columns), columns))

    def _as_read(self, block: Tensor, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """The block in each of the network's rows: ids [rows, block_size], and which are real, None if all are."""
        if self.guidance is None:
            return block, None
        return self.guidance.with_unconditional_blocks(block, columns - self.canvas.prompt_width)

    def _candidates_first(self, candidates: Tensor, num_candidates: int | None) -> tuple[Tensor, Tensor]:
        """Places of the block that hold all `candidates` [batch, block_size], and which do, both [batch, kept]."""
        if self._may_wait:
            return flagged_first(candidates)
        if num_candidates == 1:
            kept = candidates.int().argmax(-1, keepdim=True)
            return kept, candidates.gather(1, kept)
        return torch.arange(candidates.shape[1], device=candidates.device).expand_as(candidates), candidates

    def _network_pass(self, task: BlockTask) -> NetworkPass:
        """The next pass over a block, which commits the clean tokens that are not cached."""
        text, cache, last = self.text, self._read_all_but_last_piece(), task.network_pass
        clean = text.pending
        if last is not None and last.num_cached == text.num_cached:
            inputs, seen = last.inputs, last.seen
        else:
            _, is_real = self._as_read(task.block, task.columns)
            positions = torch.cat([text.positions, text.block_positions(is_real, task.block.shape[1])], dim=1)
            is_plain = text.is_plain and is_real is None
            inputs, seen = self._positions_and_mask(positions, cache, is_plain, task.block.shape[1])
        inputs = inputs | {"cache": None if cache is None else CommitCache(cache, clean.shape[1], seen)}
        return NetworkPass(clean, inputs, seen, text.num_cached)

    def _logits(self, task: BlockTask, kept: Tensor) -> Tensor:
        """Logits of the tokens at `kept` [batch, kept] of the block [batch * kept, vocab], float32."""
        clean, inputs = task.network_pass.clean, dict(task.network_pass.inputs)
        block, _ = self._as_read(task.block, task.columns)
        num_clean, num_copies = clean.shape[1], len(block) // len(task.block)
        if self.config.time_conditioning:
            sigma = sigma_from_mask_probability(task.sampler.mask_probability(task.masked))
            sigma = sigma.repeat(num_copies)[:, None].expand(block.shape)
            inputs["timesteps"] = torch.cat([sigma.new_zeros(clean.shape), sigma], dim=1)
        # The last clean token predicts the first of the block, and is read once.
        first_is_read = bool(self.config.shift_logits) and num_clean > 0
        read = torch.nn.functional.pad(kept, (1, 0)) if first_is_read else kept
        inputs["logits_to_keep"] = num_clean + read.repeat(num_copies, 1)
        logits = self.model(input_ids=torch.cat([clean, block], dim=1), **inputs).logits
        # Without a cache the text before a block is computed anew at each forward.
        self.text.num_cached = 0 if self.cache is None else self.text.num_columns
        task.sampler.tolerance = torch.finfo(logits.dtype).eps ** 0.5
        if first_is_read:
            self.first_logits, logits = logits[:, :1], logits[:, 1:]
        elif self.first_logits is not None:
            is_first = (kept == 0).repeat(num_copies, 1)[..., None]
            logits = torch.where(is_first, self.first_logits, logits)
        logits = logits.flatten(0, 1).to(torch.float32, copy=True)
        return logits if self.guidance is None else self.guidance.combine(logits)

    def _read_all_but_last_piece(self) -> Cache | None:
        """Commits a long text but for its last piece; to the cache, which it returns, or to one for this forward."""
        text, cache = self.text, self.cache
        if cache is None and text.num_columns > self.piece_size:
            cache = sliding_cache(self.config.num_hidden_layers, self.window)
        while (num_left := text.num_columns - text.num_cached) > self.piece_size:
            # Whole blocks, as they are counted from the end of the text.
            size = self.piece_size - -num_left % self.config.block_size
            end = text.num_cached + size
            inputs, seen = self._positions_and_mask(text.positions[:, :end], cache, text.is_plain)
            inputs["cache"] = CommitCache(cache, size, seen)
            self.model(input_ids=text.ids[:, text.num_cached : end], logits_to_keep=1, **inputs)
            text.num_cached = end
        return cache

    def _positions_and_mask(
        self, positions: Tensor, cache: Cache | None, is_plain: bool, num_noisy: int = 0
    ) -> tuple[dict, slice | None]:
        """
        Positions and mask of `positions` [rows, columns] after the cached ones, of which the last `num_noisy` are a
        block, and `seen` of [`CommitCache`].
        """
        config, num_cached, seen = self.config, self.text.num_cached, None
        positions = positions[:1] if is_plain else positions
        counted = positions + self.canvas.block_offset[: len(positions), None]
        key = Tokens(token_block_ids(counted, config.block_size, positions < 0), positions)
        query = key.each(lambda ids: ids[:, num_cached:])
        num_queries = query.block_ids.shape[1]
        if config.clean_attention == "causal":
            is_clean = torch.arange(num_queries, device=positions.device) < num_queries - num_noisy
            query = query._replace(is_causal=is_clean[None])
        if cache is not None:
            num_keys, first_key = cache.get_mask_sizes(num_queries, 0)
            # A static cache has more columns than there are tokens.
            empty = (0, first_key + num_keys - positions.shape[1])
            key = key.each(lambda ids: torch.nn.functional.pad(ids[:, first_key:], empty, value=PADDING_BLOCK))
            if num_queries > 2 * config.block_size:
                # A long text is read without the columns that none of it sees.
                earliest = query.block_ids.where(query.block_ids >= 0, -PADDING_BLOCK).amin(-1, keepdim=True)
                columns = (key.block_ids >= earliest - config.window_in_blocks).any(0).nonzero()
                seen = slice(int(columns[0]), int(columns[-1]) + 1)
                key = key.each(lambda ids: ids[:, seen])
        mask = block_diffusion_mask(query, key, MaskKind.of(config, self.model.dtype))
        return {"position_ids": query.position_ids.clamp(min=0), "attention_mask": mask}, seen

    def _show(self, block: Tensor, columns: Tensor, streamer: Any) -> None:
        """Gives a streamer that takes them the tokens of an unfinished block."""
        canvas, record = self.canvas, self.record
        if hasattr(streamer, "put_draft"):
            is_shown = (columns >= canvas.first_gap) & (columns < canvas.prompt_width + canvas.num_new)
            streamer.put_draft(block[is_shown].cpu())
        if hasattr(streamer, "put_reveal") and record.reveal_steps is not None:
            shown = (canvas.tokens, record.reveal_steps, record.token_probabilities)
            streamer.put_reveal(*(part[:, : canvas.prompt_width + canvas.num_new].cpu() for part in shown))
