"""The parts of the denoising loop: the text under generation, the network's side of it, and where its rows end."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteria
from transformers.generation import StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from .attention_bd3lm import flagged_first
from .cache_bd3lm import CleanText, CommitCache, match_cache
from .diffusion_bd3lm import sigma_from_mask_probability
from .guidance_bd3lm import Guidance
from .prediction_bd3lm import Prediction, TokenPredictor
from .samplers_bd3lm import BlockNoise, Sampler


class EntropyStoppingCriteria(StoppingCriteria):
    """
    Ends a row whose last `window` tokens repeat themselves (arXiv 2503.09573, Sec. 6.2).

    Args:
        threshold: least entropy of the window's tokens as a distribution over ids, in nats.
        window: number of tokens.
        first_column: column of each row's first real token [batch]; rows with fewer than `window` real tokens go on.
    """

    def __init__(self, threshold: float, window: int, first_column: torch.Tensor | None = None):
        self.threshold = threshold
        self.window = window
        self.first_column = first_column

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor | None, **kwargs: Any
    ) -> torch.BoolTensor:
        length = input_ids.shape[1]
        if length < self.window:
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        tokens = input_ids[:, -self.window :]
        # Each token contributes its share of the entropy: - log(count / window) / window.
        counts = (tokens[:, :, None] == tokens[:, None, :]).sum(-1)
        entropy = -(counts / self.window).log().mean(-1)
        long_enough = True if self.first_column is None else length - self.first_column >= self.window
        return (entropy < self.threshold) & long_enough


@dataclass
class Canvas:
    """
    The text under generation, and where each row's blocks lie in it.

    Blocks are counted in each row's own positions, so rows of a left-padded batch have their blocks in different
    columns. Stage k works on block `first_block + k` of every row.

    Attributes:
        tokens: prompts, then one column per new token, masked until revealed, then a margin of masked columns.
        to_fill: the gaps of the prompts and the new columns, bool, of the shape of `tokens`.
        num_clean: tokens in the whole blocks of each prompt before its first gap [batch].
        first_column: column of each row's position 0 [batch].
        prompt_width: columns of the prompts, padding included.
        num_new: columns to generate.
    """

    tokens: torch.Tensor
    to_fill: torch.Tensor
    num_clean: torch.Tensor
    first_column: torch.Tensor
    prompt_width: int
    num_new: int
    block_size: int
    mask_token_id: int

    @classmethod
    def of_prompts(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        gaps: torch.Tensor,
        num_new: int,
        block_size: int,
        mask_token_id: int,
    ) -> "Canvas":
        batch_size, prompt_width = input_ids.shape
        if attention_mask is None:
            first_column = torch.zeros(batch_size, dtype=torch.long, device=input_ids.device)
        else:
            first_column = (attention_mask == 0).sum(-1)
        blank = input_ids.new_full((batch_size, num_new + block_size), mask_token_id)
        to_fill = torch.cat([gaps, torch.ones_like(blank, dtype=torch.bool)], dim=1)
        to_fill[:, prompt_width + num_new :] = False
        # Where nothing is to be filled, all of the prompt comes before it.
        first_gap = torch.cat([gaps, torch.ones_like(gaps[:, :1])], dim=1).int().argmax(-1)
        num_clean = (first_gap - first_column) // block_size * block_size
        return cls(
            torch.cat([input_ids, blank], dim=1),
            to_fill,
            num_clean,
            first_column,
            prompt_width,
            num_new,
            block_size,
            mask_token_id,
        )

    @property
    def prompt_length(self) -> torch.Tensor:
        """Real tokens of each prompt [batch]."""
        return self.prompt_width - self.first_column

    def block_numbers(self, stage: int) -> list[int]:
        """The number of each row's block, counted in the row's own positions."""
        return (self.num_clean // self.block_size + stage).tolist()

    @property
    def num_stages(self) -> int:
        """Blocks from the first that has a token to fill to the last of the text, in the row that has the most."""
        behind_clean = (self.prompt_length - self.num_clean).max()
        return -(-(int(behind_clean) + self.num_new) // self.block_size)

    def columns(self, stage: int) -> torch.Tensor:
        """Columns of each row's block [batch, block_size]."""
        start = self.first_column + self.num_clean + stage * self.block_size
        columns = start[:, None] + torch.arange(self.block_size, device=start.device)
        # Where other rows have a block more, a row that is complete reads the margin.
        return columns.clamp(max=self.tokens.shape[1] - 1)

    def is_new(self, columns: torch.Tensor) -> torch.Tensor:
        """Which columns are to be generated, bool of the shape of `columns`."""
        return (columns >= self.prompt_width) & (columns < self.prompt_width + self.num_new)

    def clean_prefix(self) -> torch.Tensor:
        """The id at each position of the rows, of which the first `num_clean` are clean [batch, width]."""
        columns = self.first_column[:, None] + torch.arange(int(self.num_clean.max()), device=self.tokens.device)
        return self.tokens.gather(1, columns.clamp(max=self.tokens.shape[1] - 1))


class GeneratedRows:
    """
    How far each row of a canvas has come: what the stopping criteria and the streamer are shown, and where rows end.
    """

    def __init__(
        self,
        canvas: Canvas,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList,
        streamer: Any,
    ):
        self.canvas = canvas
        self.streamer = streamer
        self.pad_token_id = generation_config._pad_token_tensor
        batch_size, device = canvas.tokens.shape[0], canvas.tokens.device
        self.unfinished = torch.ones(batch_size, dtype=torch.bool, device=device)
        self.num_generated = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.num_streamed = 0
        self.stopping_criteria = copy.copy(stopping_criteria)
        if generation_config.entropy_stop_threshold is not None:
            self.stopping_criteria.append(
                EntropyStoppingCriteria(
                    generation_config.entropy_stop_threshold,
                    generation_config.entropy_stop_window,
                    canvas.first_column,
                )
            )
        may_end_apart = any(not isinstance(criterion, MaxLengthCriteria) for criterion in self.stopping_criteria)
        if self.pad_token_id is None and batch_size > 1 and may_end_apart:
            raise ValueError(
                "`pad_token_id` must be set where rows of a batch may end at different lengths, but got None."
            )
        eos = [criterion.eos_token_id for criterion in stopping_criteria if isinstance(criterion, EosTokenCriteria)]
        self.eos_token_id = torch.cat([ids.flatten() for ids in eos]).to(device) if eos else None

    def drop_behind_eos(self, block: torch.Tensor, columns: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Masked positions that still matter: none of a row once every token up to its first EOS is known."""
        if self.eos_token_id is None:
            return masked
        is_eos = torch.isin(block, self.eos_token_id) & self.canvas.is_new(columns)
        ends_here = (is_eos & (masked.long().cumsum(-1) == 0)).any(-1, keepdim=True)
        return masked & ~ends_here

    def finish_block(self, stage: int) -> None:
        """Shows a finished block to the stopping criteria, one token after the other, and to the streamer."""
        canvas = self.canvas
        block_end = (canvas.columns(stage)[:, -1] + 1 - canvas.prompt_width).clamp(min=0, max=canvas.num_new)
        generated_before = self.num_generated.clone()
        for index in range(int(generated_before[self.unfinished].min()), int(block_end.max())):
            stops = self.stopping_criteria(canvas.tokens[:, : canvas.prompt_width + index + 1], None)
            # Later tokens of a row that ends are not part of it.
            reached = self.unfinished & (generated_before <= index) & (index < block_end)
            self.num_generated += reached
            self.unfinished &= ~(reached & (stops.to(reached.device) | (index + 1 == canvas.num_new)))
        self._pad()
        if self.streamer is not None:
            self._stream()

    def _stream(self) -> None:
        ended = torch.where(self.unfinished, self.num_generated, self.canvas.num_new)
        ready = min(int(ended.min()), int(self.num_generated.max()))
        start = self.canvas.prompt_width
        new_tokens = self.canvas.tokens[:, start + self.num_streamed : start + ready].cpu()
        self.num_streamed = ready
        if new_tokens.shape[0] == 1:
            self.streamer.put(new_tokens[0])
        else:
            for column in new_tokens.unbind(1):
                self.streamer.put(column)

    def _behind_end(self) -> torch.Tensor:
        """The columns behind the ends of rows, bool [batch, columns]."""
        columns = torch.arange(self.canvas.tokens.shape[1], device=self.canvas.tokens.device)
        ends = self.canvas.prompt_width + self.num_generated[:, None]
        return ~self.unfinished[:, None] & (columns >= ends)

    def _pad(self) -> None:
        if self.pad_token_id is not None:
            self.canvas.tokens.masked_fill_(self._behind_end(), self.pad_token_id)

    def without_padding(self, record: torch.Tensor, empty: float) -> torch.Tensor:
        """What was noted of each token [batch, columns], `empty` behind the ends of rows."""
        return record.masked_fill(self._behind_end(), empty)

    def finish(self) -> torch.Tensor:
        """The sequences [batch, prompt width + generated], padded behind the end of each row since that was found."""
        if self.streamer is not None:
            self.streamer.end()
        return self.canvas.tokens[:, : self.canvas.prompt_width + int(self.num_generated.max())]


class DenoisingRun:
    """The network's side of the loop: forwards, the cache, processed predictions, and what they cost."""

    def __init__(
        self,
        model: Any,
        canvas: Canvas,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList,
        cache: Cache | None,
        guidance: Guidance | None = None,
    ):
        self.model = model
        self.canvas = canvas
        self.generation_config = generation_config
        self.predictor = TokenPredictor(logits_processor, generation_config.do_sample, model.config.mask_token_id)
        self.cache = cache
        self.modulations = model.model.constant_modulations(canvas.tokens.device)
        batch_size, device = canvas.tokens.shape[0], canvas.tokens.device
        self.seeds = generation_config.row_seeds(batch_size)
        self.num_forward_passes = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.guidance = guidance
        prefix, length = canvas.clean_prefix(), canvas.num_clean
        if guidance is not None:
            prefix, length = guidance.with_unconditional_rows(prefix, length, canvas.prompt_length, canvas.block_size)
        if cache is None:
            self.text = CleanText.of_prompts(prefix, length)
        else:
            config = model.config
            window = config.window_in_blocks * config.block_size
            self.text = match_cache(cache, prefix, length, config.block_size, window, canvas.num_stages)
            cache.clean_text = self.text
        output = generation_config
        keeps = output.return_dict_in_generate, (canvas.num_new, batch_size, model.config.vocab_size)
        self.scores = torch.full(keeps[1], -torch.inf, device=device) if keeps[0] and output.output_scores else None
        self.logits = torch.zeros(keeps[1], device=device) if keeps[0] and output.output_logits else None
        self.reveal_steps = self.token_probabilities = None
        if keeps[0] and output.output_reveal:
            self.reveal_steps = torch.zeros_like(canvas.tokens)
            self.token_probabilities = torch.full(canvas.tokens.shape, torch.nan, device=device)

    def denoise_block(self, stage: int, rows: GeneratedRows) -> None:
        """Reveals the new tokens of one block of every unfinished row."""
        canvas = self.canvas
        sampler = self.generation_config.make_sampler(canvas.block_size, self.model.config.noise_schedule)
        columns = canvas.columns(stage)
        block = canvas.tokens.gather(1, columns)
        generated = canvas.to_fill.gather(1, columns) & rows.unfinished[:, None]
        noise = BlockNoise(self.seeds, canvas.block_numbers(stage), block.shape, block.device)
        masked = generated
        sampler.start(masked, noise)
        while not sampler.is_finished(masked):
            candidates, known = sampler.candidates(masked), generated & ~masked
            revealed = candidates
            # Drawn at every step: whether there is a forward may be another row's doing.
            uniform = noise.uniform()
            if not sampler.may_pause or candidates.any():
                prediction = self._denoise(block, masked, candidates, columns, sampler, uniform)
                revealed = sampler.reveal(candidates, prediction.certainty)
                block = torch.where(revealed, prediction.tokens, block)
                if self.reveal_steps is not None:
                    self._record_reveal(columns, revealed, prediction)
            masked = masked & ~revealed
            remasked = sampler.remask(known)
            if sampler.may_remask:
                masked = masked | remasked
                block = block.masked_fill(remasked, canvas.mask_token_id)
            else:
                # An EOS that stays ends its row.
                masked = rows.drop_behind_eos(block, columns, masked)
            canvas.tokens.scatter_(1, columns, block)
            if hasattr(rows.streamer, "put_draft"):
                rows.streamer.put_draft(block[canvas.is_new(columns)].cpu())
            if hasattr(rows.streamer, "put_reveal") and self.reveal_steps is not None:
                shown = (canvas.tokens, self.reveal_steps, self.token_probabilities)
                rows.streamer.put_reveal(*(part[:, : canvas.prompt_width + canvas.num_new].cpu() for part in shown))
        self.predictor.check()

    def _denoise(
        self,
        block: torch.Tensor,
        masked: torch.Tensor,
        candidates: torch.Tensor,
        columns: torch.Tensor,
        sampler: Sampler,
        uniform: torch.Tensor,
    ) -> Prediction:
        """One forward and what it predicts; see [`TokenPredictor.predict`]."""
        sigma = None
        if self.model.config.time_conditioning:
            sigma = sigma_from_mask_probability(sampler.mask_probability(masked))
        canvas = self.canvas
        read, is_real = self._as_read(block, columns)
        if self.guidance is None:
            logits = self.model.lm_head(self._forward(read, is_real, sigma, candidates)).float()
        else:
            sigma = None if sigma is None else sigma.repeat(2)
            hidden_states = self._forward(read, is_real, sigma, candidates.repeat(2, 1))
            logits = self.guidance.combine(self.model.lm_head(hidden_states).float())
        self.num_forward_passes += candidates.any(-1)
        padding = torch.arange(canvas.tokens.shape[1], device=block.device) < canvas.first_column[:, None]
        prediction = self.predictor.predict(
            logits,
            candidates,
            columns,
            canvas.tokens,
            padding,
            sampler.certainty,
            self.reveal_steps is not None,
            uniform,
        )
        row, index = candidates.nonzero()[:, 0], columns[candidates] - canvas.prompt_width
        is_new = index >= 0
        for kept, values in ((self.scores, prediction.scores), (self.logits, prediction.logits)):
            if kept is not None:
                kept[index[is_new], row[is_new]] = values[is_new]
        return prediction

    def _record_reveal(self, columns: torch.Tensor, revealed: torch.Tensor, prediction: Prediction) -> None:
        """Notes for each revealed token the row's forward that revealed it, and its probability then."""
        for record, values in (
            (self.reveal_steps, self.num_forward_passes[:, None].expand(columns.shape)),
            (self.token_probabilities, prediction.probability),
        ):
            record.scatter_(1, columns, torch.where(revealed, values, record.gather(1, columns)))

    def _as_read(self, block: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The block in each of the network's rows: ids [rows, block_size], and which of them are real, None if all are.
        """
        if self.guidance is None:
            return block, None
        return self.guidance.with_unconditional_blocks(block, columns - self.canvas.prompt_width)

    def append_block(self, stage: int) -> None:
        """Hands the finished block, as it stands in the text, to the next forward for committing."""
        columns = self.canvas.columns(stage)
        self.text.append(*self._as_read(self.canvas.tokens.gather(1, columns), columns))

    def _forward(
        self,
        block: torch.Tensor,
        is_real: torch.Tensor | None,
        sigma: torch.Tensor | None,
        candidates: torch.Tensor,
    ) -> torch.Tensor:
        """Final states of the candidates [num_candidates, hidden]; commits the clean tokens that are not cached."""
        text = self.text
        clean = text.pending
        num_clean = clean.shape[1]
        attention_mask = position_ids = None
        if not text.is_plain or is_real is not None:
            position_ids = torch.cat([text.positions, text.block_positions(is_real, block.shape[1])], dim=1)
            attention_mask = (position_ids >= 0).long()
        if sigma is not None:
            sigma = torch.cat([sigma.new_zeros(clean.shape), sigma[:, None].expand(block.shape)], dim=1)
        kept, is_candidate = flagged_first(candidates)
        outputs = self.model.model(
            input_ids=torch.cat([clean, block], dim=1),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=None if self.cache is None else CommitCache(self.cache, num_clean),
            timesteps=sigma,
            kept_positions=num_clean + kept,
            modulations=self.modulations,
        )
        if self.cache is not None:
            text.num_cached = text.num_columns
        return outputs.last_hidden_state[is_candidate]
