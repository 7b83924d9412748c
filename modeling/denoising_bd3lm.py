"""The parts of the denoising loop: the text under generation, the network's side of it, and where its rows end."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteria
from transformers.cache_utils import DynamicLayer, StaticLayer, StaticSlidingWindowLayer
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from .attention_bd3lm import flagged_first
from .diffusion_bd3lm import sigma_from_mask_probability


# Processors whose result does not depend on the tokens so far: any rows may share a call.
CONTEXT_FREE_PROCESSORS = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


class CommitCache(Cache):
    """
    A view of a cache whose `update` writes only the first `num_commit` incoming positions and returns all of them.

    With 0 a denoising pass reads the cache and leaves it as is. With n, the pass over [n clean tokens ; noisy block]
    commits the clean tokens and denoises the block in one forward; the attention code is unaware of it.

    Args:
        cache: a dynamic, static or dynamic sliding cache; others of Transformers' are called the same way. Static
            sliding layers are refused.
        num_commit: positions to write at each forward.
    """

    def __init__(self, cache: Cache, num_commit: int):
        self.__dict__.update(vars(cache))
        self.cache = cache
        self.num_commit = num_commit

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cache.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.cache.get_mask_sizes(query_length, layer_idx)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_transient = key_states.shape[-2] - self.num_commit
        if num_transient <= 0:
            return self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.cache.layers[layer_idx] if layer_idx < len(self.cache.layers) else None
        is_empty = layer is None or not layer.is_initialized
        if self.num_commit == 0 and is_empty and not isinstance(layer, StaticLayer):
            return key_states, value_states
        if isinstance(layer, StaticSlidingWindowLayer):
            raise ValueError(
                "`past_key_values` must not have static sliding layers; take `StaticCache` or `DynamicCache`."
            )
        if isinstance(layer, StaticLayer):
            # The transient positions lie behind the committed ones, and the next write goes over them.
            states = self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)
            layer.cumulative_length.sub_(num_transient)
            return states
        if self.num_commit == 0 and type(layer) is DynamicLayer and not self.cache.offloading:
            cached_keys, cached_values = layer.keys, layer.values
        else:
            cached_keys, cached_values = self.cache.update(
                key_states[:, :, : self.num_commit], value_states[:, :, : self.num_commit], layer_idx, *args, **kwargs
            )
        return (
            torch.cat([cached_keys, key_states[:, :, self.num_commit :]], dim=-2),
            torch.cat([cached_values, value_states[:, :, self.num_commit :]], dim=-2),
        )


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
        first_column: column of each row's position 0 [batch].
        prompt_width: columns of the prompts, padding included.
        num_new: columns to generate.
    """

    tokens: torch.Tensor
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
        return cls(
            torch.cat([input_ids, blank], dim=1), first_column, prompt_width, num_new, block_size, mask_token_id
        )

    @property
    def prompt_length(self) -> torch.Tensor:
        """Real tokens of each prompt [batch]."""
        return self.prompt_width - self.first_column

    @property
    def num_clean(self) -> torch.Tensor:
        """Tokens in the whole blocks of each prompt [batch]."""
        return self.prompt_length // self.block_size * self.block_size

    @property
    def num_stages(self) -> int:
        """Blocks that hold a new token, in the row that has the most."""
        partly_filled = (self.prompt_length - self.num_clean).max()
        return -(-(int(partly_filled) + self.num_new) // self.block_size)

    def columns(self, stage: int) -> torch.Tensor:
        """Columns of each row's block [batch, block_size]."""
        start = self.first_column + self.num_clean + stage * self.block_size
        columns = start[:, None] + torch.arange(self.block_size, device=start.device)
        # Where other rows have a block more, a row that is complete reads the margin.
        return columns.clamp(max=self.tokens.shape[1] - 1)

    def is_new(self, columns: torch.Tensor) -> torch.Tensor:
        """Which columns are to be generated, bool of the shape of `columns`."""
        return (columns >= self.prompt_width) & (columns < self.prompt_width + self.num_new)

    def clean_prefix(self, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The whole blocks of the prompts, left-padded so that all rows end at a block border.

        Returns:
            (ids [batch, width], attention mask [batch, width], or None if no row is padded).
        """
        width = int(self.num_clean.max())
        padding = width - self.num_clean
        columns = torch.arange(width, device=self.tokens.device) + (self.first_column - padding)[:, None]
        is_real = columns >= self.first_column[:, None]
        ids = self.tokens.gather(1, columns.clamp(min=0)).masked_fill(~is_real, pad_token_id)
        return ids, None if bool(is_real.all()) else is_real.long()


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
        block_end = (canvas.columns(stage)[:, -1] + 1 - canvas.prompt_width).clamp(max=canvas.num_new)
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

    def _pad(self) -> None:
        canvas = self.canvas
        columns = torch.arange(canvas.tokens.shape[1], device=canvas.tokens.device)
        behind = ~self.unfinished[:, None] & (columns >= canvas.prompt_width + self.num_generated[:, None])
        if self.pad_token_id is not None:
            canvas.tokens.masked_fill_(behind, self.pad_token_id)

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
    ):
        self.model = model
        self.canvas = canvas
        self.generation_config = generation_config
        self.logits_processor = logits_processor
        self.shares_processor_calls = all(isinstance(part, CONTEXT_FREE_PROCESSORS) for part in logits_processor)
        self.cache = cache
        self.modulations = model.model.constant_modulations(canvas.tokens.device)
        batch_size, device = canvas.tokens.shape[0], canvas.tokens.device
        self.num_forward_passes = torch.zeros(batch_size, dtype=torch.long, device=device)
        # Clean tokens that the cache does not hold yet (all of them, without one), and which of all so far are real.
        self.clean, self.clean_mask = canvas.clean_prefix(0)
        if cache is not None:
            self._check_cache(cache)
            self.clean = self.clean[:, int(cache.get_seq_length()) :]
        output = generation_config
        keeps = output.return_dict_in_generate, (canvas.num_new, batch_size, model.config.vocab_size)
        self.scores = torch.full(keeps[1], -torch.inf, device=device) if keeps[0] and output.output_scores else None
        self.logits = torch.zeros(keeps[1], device=device) if keeps[0] and output.output_logits else None

    def _check_cache(self, cache: Cache) -> None:
        canvas, num_cached = self.canvas, int(cache.get_seq_length())
        if num_cached and (
            self.clean_mask is not None or num_cached > self.clean.shape[1] or num_cached % canvas.block_size
        ):
            raise ValueError(
                "`past_key_values` must hold whole blocks of the prompts in `input_ids`, whose rows must be equally "
                f"long, but got {num_cached} positions for prompts of {canvas.prompt_length.tolist()} tokens with "
                f"`block_size` {canvas.block_size}."
            )
        # The block under denoising lies behind the committed ones.
        num_positions = self.clean.shape[1] + canvas.num_stages * canvas.block_size
        for layer in cache.layers:
            if isinstance(layer, StaticLayer) and layer.max_cache_len < num_positions:
                raise ValueError(
                    f"`past_key_values` must have room for {num_positions} positions, whole blocks of prompt and new "
                    f"tokens, but got a static cache of {layer.max_cache_len}."
                )
            if num_cached and layer.is_initialized and layer.keys.shape[0] != canvas.tokens.shape[0]:
                raise ValueError(
                    f"`past_key_values` must be of the batch size of the rows to generate, {canvas.tokens.shape[0]}, "
                    f"but got {layer.keys.shape[0]}."
                )

    def denoise_block(self, stage: int, rows: GeneratedRows) -> None:
        """Reveals the new tokens of one block of every unfinished row."""
        canvas, sampler = self.canvas, self.generation_config.make_sampler(self.canvas.block_size)
        columns = canvas.columns(stage)
        block = canvas.tokens.gather(1, columns)
        masked = (block == canvas.mask_token_id) & canvas.is_new(columns) & rows.unfinished[:, None]
        while masked.any():
            candidates = sampler.candidates(masked)
            sigma = None
            if self.model.config.time_conditioning:
                sigma = sigma_from_mask_probability(sampler.mask_probability(masked))
            hidden_states = self._forward(block, sigma, candidates)
            self.num_forward_passes += masked.any(-1)
            tokens, confidence = self._predict(hidden_states, candidates, columns, sampler.needs_confidence)
            revealed = sampler.reveal(candidates, confidence)
            block = torch.where(revealed, tokens, block)
            canvas.tokens.scatter_(1, columns, block)
            masked = rows.drop_behind_eos(block, columns, masked & ~revealed)
            if hasattr(rows.streamer, "put_draft"):
                rows.streamer.put_draft(block[canvas.is_new(columns)].cpu())

    def append_block(self, stage: int) -> None:
        """Hands the finished block, as it stands in the text, to the next forward for committing."""
        block = self.canvas.tokens.gather(1, self.canvas.columns(stage))
        self.clean = torch.cat([self.clean, block], dim=1)
        if self.clean_mask is not None:
            self.clean_mask = torch.cat([self.clean_mask, self.clean_mask.new_ones(block.shape)], dim=1)

    def _forward(self, block: torch.Tensor, sigma: torch.Tensor | None, candidates: torch.Tensor) -> torch.Tensor:
        """Final states of the candidates [num_candidates, hidden]; commits the clean tokens that are not cached."""
        num_clean = self.clean.shape[1]
        attention_mask = self.clean_mask
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(block.shape)], dim=1)
        if sigma is not None:
            sigma = torch.cat([sigma.new_zeros(self.clean.shape), sigma[:, None].expand(block.shape)], dim=1)
        kept, is_candidate = flagged_first(candidates)
        outputs = self.model.model(
            input_ids=torch.cat([self.clean, block], dim=1),
            attention_mask=attention_mask,
            past_key_values=None if self.cache is None else CommitCache(self.cache, num_clean),
            timesteps=sigma,
            kept_positions=num_clean + kept,
            modulations=self.modulations,
        )
        if self.cache is not None:
            self.clean = self.clean[:, :0]
        return outputs.last_hidden_state[is_candidate]

    def _predict(
        self, hidden_states: torch.Tensor, candidates: torch.Tensor, columns: torch.Tensor, needs_confidence: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Draws a token for each candidate.

        Returns:
            (tokens [batch, block_size], the model's probability of each [batch, block_size]); arbitrary and 0
            elsewhere.
        """
        logits = self.model.lm_head(hidden_states).float()
        logits[:, self.canvas.mask_token_id] = -torch.inf
        scores = self._process(logits, candidates, columns)
        if self.generation_config.do_sample:
            chosen = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(-1)
        else:
            chosen = scores.argmax(-1)
        tokens = torch.zeros_like(columns)
        tokens[candidates] = chosen
        confidence = torch.zeros(columns.shape, device=columns.device)
        if needs_confidence:
            confidence[candidates] = logits.softmax(-1).gather(-1, chosen[:, None]).squeeze(-1)
        row = candidates.nonzero()[:, 0]
        index = columns[candidates] - self.canvas.prompt_width
        for kept, values in ((self.scores, scores), (self.logits, logits)):
            if kept is not None:
                kept[index, row] = values
        return tokens, confidence

    def _process(self, logits: torch.Tensor, candidates: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Runs the logits processors on the candidates' scores [num_candidates, vocab]."""
        tokens = self.canvas.tokens
        if self.shares_processor_calls:
            return self.logits_processor(tokens[candidates.nonzero()[:, 0]], logits.clone())
        # A processor may read the tokens left of the predicted one, their number, and the index of the row: each
        # column is processed for the whole batch. Padding reads as the mask token, which has no probability to be
        # changed.
        column_of = columns[candidates]
        row_of = candidates.nonzero()[:, 0]
        is_padding = torch.arange(tokens.shape[1], device=tokens.device) < self.canvas.first_column[:, None]
        context = tokens.masked_fill(is_padding, self.canvas.mask_token_id)
        scores = logits.clone()
        for column in column_of.unique().tolist():
            chosen = column_of == column
            batch_scores = logits.new_zeros(tokens.shape[0], logits.shape[1])
            batch_scores[row_of[chosen]] = logits[chosen]
            processed = self._process_column(context[:, :column], batch_scores)
            scores[chosen] = processed[row_of[chosen]]
        return scores

    def _process_column(self, context: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Runs the processors on the scores of one column [batch, vocab]; `context` [batch, columns before it]."""
        for processor in self.logits_processor:
            processed = processor(context, scores)
            if isinstance(processor, NoRepeatNGramLogitsProcessor):
                # An n-gram begun by tokens that are not known yet repeats nothing.
                start = max(context.shape[1] - processor.ngram_size + 1, 0)
                is_known = (context[:, start:] != self.canvas.mask_token_id).all(-1, keepdim=True)
                processed = torch.where(is_known, processed, scores)
            scores = processed
        return scores
