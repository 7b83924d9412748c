"""Denoising the blocks of a text one after the other: the passes over the network, and a record of what they gave."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, StoppingCriteria
from transformers.generation import StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from .attention_block_diffusion import PADDING_BLOCK, MaskKind, Tokens, block_diffusion_mask, token_block_ids
from .cache_block_diffusion import CommitCache
from .diffusion_block_diffusion import sigma_from_mask_probability
from .prediction_block_diffusion import Prediction, TokenPredictor
from .prefix_reuse_block_diffusion import CleanText, match_cache, sliding_cache
from .samplers_block_diffusion import BlockNoise, FirstHittingSampler, Sampler
from .two_stream_block_diffusion import flagged_first


# Tokens that a forward reads, in whole blocks: enough for fast matrix products, and few enough for small masks.
PIECE_SIZE = 512


class EntropyStoppingCriteria(StoppingCriteria):
    """
    Ends a row whose last `window` tokens repeat themselves: as a distribution over ids they have less entropy than
    `threshold`, in nats (arXiv 2503.09573, Sec. 6.2). `first_column` is that of each row's first real token [batch];
    rows with fewer than `window` real tokens go on.
    """

    def __init__(self, threshold: float, window: int, first_column: Tensor | None = None):
        self.threshold, self.window, self.first_column = threshold, window, first_column

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: Any) -> Tensor:
        length = input_ids.shape[1]
        if length < self.window:
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        tokens = input_ids[:, -self.window :]
        # Each token contributes its share of the entropy: - log(count / window) / window.
        counts = (tokens[:, :, None] == tokens[:, None, :]).sum(-1)
        entropy = -(counts / self.window).log().mean(-1)
        long_enough = True if self.first_column is None else length - self.first_column >= self.window
        return (entropy < self.threshold) & long_enough


class Canvas:
    """
    The text under generation, and where each row's blocks lie in it: counted in the row's own positions, and so in a
    left-padded batch in different columns. Stage k works on the k-th block from the first with a token to fill.

    Attributes:
        tokens: prompts, then one column per new token, masked until revealed, then a margin of masked columns.
        to_fill: the gaps of the prompts and the new columns, bool, of the shape of `tokens`.
        num_clean: tokens in the whole blocks of each prompt before its first gap [batch].
        block_offset: what is added to positions before blocks are counted [batch or 1].
        first_column: column of each row's position 0 [batch].
        prompt_width: columns of the prompts, padding included.
        num_new: columns to generate.
        first_gap: the first column that is to be filled in any row.
    """

    def __init__(self, config, input_ids: Tensor, attention_mask: Tensor | None, gaps: Tensor, num_new: int):
        self.block_size, self.mask_token_id, self.num_new = config.block_size, config.mask_token_id, num_new
        batch_size, self.prompt_width = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.first_column = (mask == 0).sum(-1)
        blank = input_ids.new_full((batch_size, num_new + self.block_size), self.mask_token_id)
        self.tokens = torch.cat([input_ids, blank], dim=1)
        self.all_columns = torch.arange(self.tokens.shape[1], device=input_ids.device)
        self.to_fill = torch.cat([gaps, torch.ones_like(blank, dtype=torch.bool)], dim=1)
        self.to_fill[:, self.prompt_width + num_new :] = False
        # Where nothing is to be filled, all of the prompt comes before it.
        first_gap = torch.cat([gaps, torch.ones_like(gaps[:, :1])], dim=1).int().argmax(-1)
        self.num_clean = (first_gap - self.first_column) // self.block_size * self.block_size
        self.first_gap = int(first_gap.min())
        self.block_offset = self.num_clean.new_zeros(1)

    def start_new_block(self) -> None:
        """Begins a block right after each prompt, whose own blocks are counted from its end."""
        self.num_clean, self.block_offset = self.prompt_length, -self.prompt_length % self.block_size

    @property
    def prompt_length(self) -> Tensor:
        """Real tokens of each prompt [batch]."""
        return self.prompt_width - self.first_column

    @property
    def num_stages(self) -> int:
        """Blocks from the first that has a token to fill to the last of the text, in the row that has the most."""
        num_unclean = int((self.prompt_length - self.num_clean).max()) + self.num_new
        return -(-num_unclean // self.block_size)

    def columns(self, stage: int) -> Tensor:
        """Columns of each row's block [batch, block_size]."""
        start = self.first_column + self.num_clean + stage * self.block_size
        # Where other rows have a block more, a row that is complete reads the margin.
        return (start[:, None] + self.all_columns[: self.block_size]).clamp(max=len(self.all_columns) - 1)

    def context(self) -> Tensor:
        """The tokens as processors read them: padding as the mask token, which has no probability to be changed."""
        return self.tokens.masked_fill(self.all_columns < self.first_column[:, None], self.mask_token_id)

    def clean_prefix(self) -> Tensor:
        """The id at each position of the rows, of which the first `num_clean` are clean [batch, width]."""
        columns = self.first_column[:, None] + self.all_columns[: int(self.num_clean.max())]
        return self.tokens.gather(1, columns.clamp(max=len(self.all_columns) - 1))


class RowProgress:
    """How far each row of a canvas has come: what criteria and streamer are shown, and where rows end."""

    def __init__(self, canvas: Canvas, generation_config, criteria: StoppingCriteriaList, streamer: Any):
        self.canvas, self.streamer, self.num_streamed = canvas, streamer, canvas.first_gap
        self.pad_token_id, self.num_generated = generation_config._pad_token_tensor, torch.zeros_like(canvas.num_clean)
        self.unfinished, self.stopping_criteria = torch.ones_like(canvas.num_clean).bool(), copy.copy(criteria)
        if streamer is not None:
            streamer.put(canvas.tokens[:, : canvas.first_gap].cpu())
        if generation_config.entropy_stop_threshold is not None:
            rule = (generation_config.entropy_stop_threshold, generation_config.entropy_stop_window)
            self.stopping_criteria.append(EntropyStoppingCriteria(*rule, canvas.first_column))
        may_end_apart = any(not isinstance(criterion, MaxLengthCriteria) for criterion in self.stopping_criteria)
        if self.pad_token_id is None and len(canvas.tokens) > 1 and may_end_apart:
            raise ValueError("`pad_token_id` must be set for rows that may end at different lengths, but got None.")
        self.knows_all = all(type(part) in (MaxLengthCriteria, EosTokenCriteria) for part in self.stopping_criteria)
        lengths = [criterion.max_length for criterion in criteria if isinstance(criterion, MaxLengthCriteria)]
        self.num_allowed = min([canvas.num_new, *(length - canvas.prompt_width for length in lengths)])
        eos = [criterion.eos_token_id for criterion in criteria if isinstance(criterion, EosTokenCriteria)]
        self.eos_token_id = torch.cat([ids.flatten() for ids in eos]).to(canvas.tokens.device) if eos else None

    def finish_block(self, columns: Tensor, predictor: TokenPredictor) -> bool:
        """Shows the finished block at `columns` [batch, block_size]; whether a row goes on. Raises as `complain`."""
        canvas, index = self.canvas, columns - self.canvas.prompt_width
        is_new = self.unfinished[:, None] & (index >= self.num_generated[:, None]) & (index < canvas.num_new)
        ends = is_new & self._stops(columns, index)
        # Later tokens of a row that ends are not part of it.
        self.num_generated = self.num_generated + (is_new & (ends.long().cumsum(-1) - ends.long() == 0)).sum(-1)
        self.unfinished = self.unfinished & ~ends.any(-1)
        num_unfinished = int(torch.where(predictor.sum_of_scores.isfinite(), self.unfinished.sum(), -1))
        if num_unfinished < 0:
            predictor.complain()
        if self.pad_token_id is not None and num_unfinished < len(self.unfinished):
            canvas.tokens.masked_fill_(self.after_end(), self.pad_token_id)
        if self.streamer is not None:
            self._stream(columns[:, -1] + 1)
        return num_unfinished > 0

    def _stops(self, columns: Tensor, index: Tensor) -> Tensor:
        """Where a row ends, bool, by the criteria; `columns` hold the new tokens `index`, all [batch, block_size]."""
        canvas, stops = self.canvas, index + 1 >= self.num_allowed
        if self.knows_all:
            block = canvas.tokens.gather(1, columns)
            return stops if self.eos_token_id is None else stops | (block[..., None] == self.eos_token_id).any(-1)
        # Others are shown one token after the other.
        end = min(int(index[:, -1].max()) + 1, canvas.num_new)
        for new in range(int(self.num_generated[self.unfinished].min()), end):
            shown = canvas.tokens[:, : canvas.prompt_width + new + 1]
            stops = stops | (index == new) & self.stopping_criteria(shown, None).to(stops.device)[:, None]
        return stops

    def _stream(self, block_end: Tensor) -> None:
        """Shows the columns that are known in every row; `block_end` [batch] comes after each row's finished block."""
        width = self.canvas.prompt_width
        known = torch.where(self.unfinished, block_end, width + self.canvas.num_new)
        ready = min(int(known.min()), width + int(self.num_generated.max()))
        columns = self.canvas.tokens[:, self.num_streamed : ready].cpu()
        self.num_streamed = ready
        # One row at once, several column by column.
        for tokens in columns if len(columns) == 1 else columns.unbind(1):
            self.streamer.put(tokens)

    def after_end(self) -> Tensor:
        """The columns after the ends of rows, bool [batch, columns]."""
        ends = self.canvas.prompt_width + self.num_generated[:, None]
        return ~self.unfinished[:, None] & (self.canvas.all_columns >= ends)

    def finish(self) -> Tensor:
        """The sequences [batch, prompt width + generated], padded after the end of each row."""
        if self.streamer is not None:
            self.streamer.end()
        return self.canvas.tokens[:, : self.canvas.prompt_width + int(self.num_generated.max())]


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

    def note(self, prediction: Prediction, revealed: Tensor, columns: Tensor) -> None:
        """Counts a forward, and keeps what it gave at `columns`, of the `revealed` tokens too [batch, block_size]."""
        self.num_forward_passes = self.num_forward_passes + prediction.is_candidate.any(-1)
        for record, values in ((self.scores, prediction.scores), (self.logits, prediction.logits)):
            if record is not None:
                index = columns.gather(1, prediction.kept) - self.prompt_width
                row, place = (prediction.is_candidate & (index >= 0)).nonzero(as_tuple=True)
                record[index[row, place], row] = values.view(*index.shape, -1)[row, place]
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


@dataclass
class BlockTask:
    """
    One block of every row: its columns in the text, which of them to fill, their ids, which of these are masked, and
    where an EOS would end the row, all [batch, block_size]; and the text around it, if a processor reads that. A step
    changes `block` and `masked`. Passes against the same `num_cached` columns share `inputs` of the network and the
    `clean` tokens before the block that they commit [rows, num_clean].
    """

    columns: Tensor
    to_fill: Tensor
    block: Tensor
    masked: Tensor
    context: Tensor | None
    may_end: Tensor | None
    sampler: Sampler
    noise: BlockNoise
    clean: Tensor | None = None
    inputs: dict[str, Any] | None = None
    num_cached: int | None = None


class Denoiser:
    """
    Denoises the blocks of a canvas: calls the model, of which it knows `forward` alone, and asks the sampler.

    A step is a function of tensors of fixed shapes, and does not wait for the device. It changes tensors among
    the attributes of the [`BlockTask`], its sampler, the denoiser, its predictor and its record.
    """

    # Where the device is the host itself, looking costs nothing.
    waits_for = ("cpu",)

    def __init__(self, model, canvas: Canvas, generation_config, processors, cache: Cache | None, guidance):
        self.model, self.canvas, self.cache, self.guidance = model, canvas, cache, guidance
        self.generation_config, self.config, config = generation_config, model.config, model.config
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
        self._first_blocks = (canvas.num_clean // canvas.block_size).tolist()

    def denoise_block(self, stage: int, columns: Tensor, progress: RowProgress) -> None:
        """Reveals the tokens to fill in one block of every unfinished row, at its `columns` [batch, block_size]."""
        task = self._start_block(stage, columns, progress)
        task.sampler.start(task.masked, task.noise)
        num_steps = -1 if self._may_wait else task.sampler.num_steps(task.masked) or -1
        while num_steps > 0 or (num_steps < 0 and not task.sampler.is_finished(task.masked)):
            num_steps -= 1
            self.take_step(task)
            self._show(task, progress.streamer)
        self.canvas.tokens.scatter_(1, columns, task.block)

    def _start_block(self, stage: int, columns: Tensor, progress: RowProgress) -> BlockTask:
        """The task of the next block of each row, before its first step."""
        canvas = self.canvas
        block, to_fill = canvas.tokens.gather(1, columns), canvas.to_fill.gather(1, columns)
        sampler = self.generation_config.make_sampler(canvas.block_size, self.config.noise_schedule)
        noise = BlockNoise(self.seeds, [first + stage for first in self._first_blocks], block.shape, block.device)
        context = canvas.context() if self.predictor.reads_context else None
        self.eos_token_id, index, may_end = progress.eos_token_id, columns - canvas.prompt_width, None
        if self.eos_token_id is not None and not sampler.may_remask:
            # A new EOS that stays ends its row.
            may_end = (index >= 0) & (index < canvas.num_new)
        masked = to_fill & progress.unfinished[:, None]
        return BlockTask(columns, to_fill, block, masked, context, may_end, sampler, noise)

    def take_step(self, task: BlockTask) -> None:
        """One denoising step: what the host does for it, then [`step`]."""
        self.prepare_pass(task)
        self.step(task)

    def step(self, task: BlockTask) -> None:
        """One denoising step of at most one forward."""
        sampler, masked = task.sampler, task.masked
        revealed = candidates = sampler.candidates(masked)
        # Drawn at every step: another row may be the reason that there is a forward.
        uniform = task.noise.uniform()
        if not sampler.may_pause or candidates.any():
            kept, is_candidate = self._candidates_first(candidates, sampler)
            logits = self._logits(task, kept)
            context = None if task.context is None else task.context.scatter(1, task.columns, task.block)
            place = (task.columns, context, uniform)
            prediction = self.predictor.predict(logits, kept, is_candidate, *place)
            confidence = None if sampler.confidence is None else prediction.confidence(sampler.confidence)
            revealed = sampler.reveal(candidates, confidence)
            self.predictor.settle(prediction, revealed, *place)
            task.block = torch.where(revealed, prediction.tokens, task.block)
            self.record.note(prediction, revealed, task.columns)
        task.masked = masked & ~revealed
        if sampler.may_remask:
            remasked = sampler.remask(task.to_fill & ~masked)
            task.masked = task.masked | remasked
            task.block = task.block.masked_fill(remasked, self.config.mask_token_id)
        elif task.may_end is not None:
            # Once all tokens up to an EOS are known, the others of the row do not matter.
            is_end = (task.block[..., None] == self.eos_token_id).any(-1) & task.may_end
            is_end = is_end & (task.masked.long().cumsum(-1) == 0)
            task.masked = task.masked & ~is_end.any(-1, keepdim=True)

    def release(self) -> Cache | None:
        """The cache, of which the denoiser makes no use any more."""
        return self.cache

    def append_block(self, columns: Tensor) -> None:
        """Hands the finished block, at its `columns` of the text, to the next forward, which commits it."""
        self.text.append(*self._as_read(self.canvas.tokens.gather(1, columns), columns))

    def _as_read(self, block: Tensor, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """The block in each of the network's rows: ids [rows, block_size], and which are real, None if all are."""
        if self.guidance is None:
            return block, None
        return self.guidance.with_unconditional_blocks(block, columns - self.canvas.prompt_width)

    def _candidates_first(self, candidates: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor]:
        """Places of the block that hold all `candidates` [batch, block_size], and which do, both [batch, kept]."""
        if type(sampler).candidates is FirstHittingSampler.candidates:
            # One at most.
            kept = candidates.view(torch.uint8).argmax(-1, keepdim=True)
            return kept, candidates.gather(1, kept)
        if self._may_wait:
            return flagged_first(candidates)
        return torch.arange(candidates.shape[1], device=candidates.device).expand_as(candidates), candidates

    def prepare_pass(self, task: BlockTask) -> None:
        """Prepares the next pass over a block, which commits the clean tokens that are not cached."""
        text, cache = self.text, self._read_all_but_last_piece()
        if task.num_cached == text.num_cached and cache is self.cache:
            return
        _, is_real = self._as_read(task.block, task.columns)
        positions = torch.cat([text.positions, text.block_positions(is_real, task.block.shape[1])], dim=1)
        task.inputs = self._inputs(positions, cache, text.is_plain and is_real is None, task.block.shape[1])
        task.clean, task.num_cached = text.pending, text.num_cached

    def _logits(self, task: BlockTask, kept: Tensor) -> Tensor:
        """Logits of the tokens at `kept` [batch, kept] of the block [batch * kept, vocab], float32."""
        clean, inputs = task.clean, dict(task.inputs)
        block, _ = self._as_read(task.block, task.columns)
        num_clean, num_copies = clean.shape[1], len(block) // len(task.block)
        if self.config.time_conditioning:
            sigma = sigma_from_mask_probability(task.sampler.mask_probability(task.masked))
            sigma = sigma.repeat(num_copies)[:, None].expand(block.shape)
            inputs["timesteps"] = torch.cat([sigma.new_zeros(clean.shape), sigma], dim=1)
        # The last clean token predicts the first of the block, and is read once.
        first_is_read = bool(self.config.shift_logits) and num_clean > 0
        kept = kept if num_copies == 1 else kept.repeat(num_copies, 1)
        inputs["logits_to_keep"] = num_clean + (torch.nn.functional.pad(kept, (1, 0)) if first_is_read else kept)
        logits = self.model(input_ids=torch.cat([clean, block], dim=1) if num_clean else block, **inputs).logits
        # Without a cache the text before a block is computed anew at each forward.
        self.text.num_cached = 0 if self.cache is None else self.text.num_columns
        task.sampler.tolerance = torch.finfo(logits.dtype).eps ** 0.5
        if first_is_read:
            self.first_logits, logits = logits[:, :1], logits[:, 1:]
        elif self.first_logits is not None:
            logits = torch.where((kept == 0)[..., None], self.first_logits, logits)
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
            inputs = self._inputs(text.positions[:, :end], cache, text.is_plain)
            self.model(input_ids=text.ids[:, text.num_cached : end], logits_to_keep=1, **inputs)
            text.num_cached = end
        return cache

    def _inputs(self, positions: Tensor, cache: Cache | None, is_plain: bool, num_noisy: int = 0) -> dict[str, Any]:
        """What a pass over `positions` [rows, columns] after the cached takes; all but `num_noisy` are committed."""
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
        view = None if cache is None else CommitCache(cache, num_queries - num_noisy, seen)
        return {"position_ids": query.position_ids.clamp(min=0), "attention_mask": mask, "cache": view}

    def _show(self, task: BlockTask, streamer: Any) -> None:
        """Gives a streamer that takes them the tokens of an unfinished block."""
        canvas, record, width = self.canvas, self.record, self.canvas.prompt_width + self.canvas.num_new
        if hasattr(streamer, "put_draft"):
            is_shown = (task.columns >= canvas.first_gap) & (task.columns < width)
            streamer.put_draft(task.block[is_shown].cpu())
        if hasattr(streamer, "put_reveal") and record.reveal_steps is not None:
            canvas.tokens.scatter_(1, task.columns, task.block)
            shown = (canvas.tokens, record.reveal_steps, record.token_probabilities)
            streamer.put_reveal(*(part[:, :width].cpu() for part in shown))
