"""The parts of the denoising loop: the text under generation, the network's side of it, and where its rows end."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteria
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer
from transformers.generation import StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from .attention_bd3lm import flagged_first
from .diffusion_bd3lm import sigma_from_mask_probability
from .prediction_bd3lm import Prediction, TokenPredictor
from .samplers_bd3lm import BlockNoise, Sampler


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
        is_read_as_it_is = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and not self.cache.offloading
        if self.num_commit == 0 and is_read_as_it_is:
            cached_keys, cached_values = layer.keys, layer.values
        else:
            cached_keys, cached_values = self.cache.update(
                key_states[:, :, : self.num_commit], value_states[:, :, : self.num_commit], layer_idx, *args, **kwargs
            )
        return (
            torch.cat([cached_keys, key_states[:, :, self.num_commit :]], dim=-2),
            torch.cat([cached_values, value_states[:, :, self.num_commit :]], dim=-2),
        )


def sliding_cache(num_layers: int, window: int) -> DynamicCache:
    """A cache that grows up to the last `window` tokens, all that a block can see, and then keeps its size."""
    cache = DynamicCache()
    # Transformers counts the token that is being predicted as part of the window.
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=window + 1) for _ in range(num_layers)]
    return cache


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

    def clean_prefix(self, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The whole blocks of the prompts before their first gaps, left-padded so that all rows end at a block border.

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
        # Clean tokens that the cache does not hold yet (all of them, without one), and which of all so far are real.
        self.clean, self.clean_mask = canvas.clean_prefix(0)
        if cache is not None:
            self._check_cache(cache)
            self.clean = self.clean[:, int(cache.get_seq_length()) :]
        output = generation_config
        keeps = output.return_dict_in_generate, (canvas.num_new, batch_size, model.config.vocab_size)
        self.scores = torch.full(keeps[1], -torch.inf, device=device) if keeps[0] and output.output_scores else None
        self.logits = torch.zeros(keeps[1], device=device) if keeps[0] and output.output_logits else None
        self.reveal_steps = self.token_probabilities = None
        if keeps[0] and output.output_reveal:
            self.reveal_steps = torch.zeros_like(canvas.tokens)
            self.token_probabilities = torch.full(canvas.tokens.shape, torch.nan, device=device)

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
        hidden_states = self._forward(block, sigma, candidates)
        self.num_forward_passes += candidates.any(-1)
        logits = self.model.lm_head(hidden_states).float()
        canvas = self.canvas
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
