"""Block-wise generation: `generate` of Transformers, with a denoising loop in place of one token after the other."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteria
from transformers.cache_utils import DynamicLayer, StaticLayer, StaticSlidingWindowLayer
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria
from transformers.utils import ModelOutput

from .diffusion_bd3lm import sigma_from_mask_probability
from .samplers_bd3lm import SAMPLERS, ConfidenceSampler, Sampler


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


class BD3LMGenerationConfig(GenerationConfig):
    """
    `GenerationConfig` with the arguments of block-wise generation.

    Unlike there, `do_sample` is True and `top_k` is off by default, so that samples follow the model's own distribution.

    Args:
        sampler: "first_hitting" (default) or "confidence"; see `samplers_bd3lm.py`.
        denoising_steps: steps per block of the "confidence" sampler; by default as many as a block has tokens.
        confidence_threshold: for the "confidence" sampler: reveal every token above this probability, in (0, 1].
        entropy_stop_threshold: end a row when its last `entropy_stop_window` tokens, as a distribution over ids, have less
            entropy than this, in nats (arXiv 2503.09573 takes 4.0 and 256).
        entropy_stop_window: tokens that the entropy is computed over; 256 by default.

    Raises:
        ValueError: a value breaks its rule; the message names the argument, the value and the rule.
    """

    def __init__(self, **kwargs: Any):
        self.sampler: str | None = kwargs.pop("sampler", None)
        self.denoising_steps: int | None = kwargs.pop("denoising_steps", None)
        self.confidence_threshold: float | None = kwargs.pop("confidence_threshold", None)
        self.entropy_stop_threshold: float | None = kwargs.pop("entropy_stop_threshold", None)
        self.entropy_stop_window: int | None = kwargs.pop("entropy_stop_window", None)
        super().__init__(**kwargs)

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        return GenerationConfig._get_default_generation_params() | {
            "do_sample": True,
            "top_k": 0,
            "sampler": "first_hitting",
            "entropy_stop_window": 256,
        }

    @classmethod
    def from_model_config(cls, model_config: Any) -> "BD3LMGenerationConfig":
        return cls.from_generation_config(GenerationConfig.from_model_config(model_config))

    @classmethod
    def from_generation_config(cls, generation_config: GenerationConfig) -> "BD3LMGenerationConfig":
        """Raises a plain config, which is what loading yields, to this class."""
        if isinstance(generation_config, cls):
            return generation_config
        # Entries that are None were dropped on saving, and private ones are bookkeeping of the instance.
        raised = cls(**{key: value for key, value in generation_config.to_dict().items() if value is not None})
        raised.__dict__.update({key: value for key, value in vars(generation_config).items() if key.startswith("_")})
        return raised

    def validate(self, *args: Any, **kwargs: Any) -> None:
        super().validate(*args, **kwargs)

        def require(holds: bool, field: str, rule: str) -> None:
            value = getattr(self, field)
            if value is not None and not holds:
                raise ValueError(f"`{field}` must be {rule}, but got {value!r}.")

        def is_count(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= 1

        require(self.sampler in SAMPLERS, "sampler", f"one of {', '.join(SAMPLERS)}")
        require(is_count(self.denoising_steps), "denoising_steps", "an integer >= 1")
        threshold = self.confidence_threshold
        require(threshold is None or 0 < threshold <= 1, "confidence_threshold", "in (0, 1]")
        entropy = self.entropy_stop_threshold
        require(entropy is None or entropy > 0, "entropy_stop_threshold", "a number of nats > 0")
        require(is_count(self.entropy_stop_window), "entropy_stop_window", "an integer >= 1")
        if self.denoising_steps is not None and threshold is not None:
            raise ValueError(
                "`denoising_steps` and `confidence_threshold` are two rules of the 'confidence' sampler of which one must be "
                f"chosen, but got {self.denoising_steps} and {threshold}."
            )

    def make_sampler(self, block_size: int) -> Sampler:
        """
        The sampler of one block.

        Raises:
            ValueError: an argument was set that the chosen sampler does not take.
        """
        if self.sampler == "confidence":
            steps = block_size if self.denoising_steps is None else self.denoising_steps
            return ConfidenceSampler(steps, self.confidence_threshold)
        for field in ("denoising_steps", "confidence_threshold"):
            if getattr(self, field) is not None:
                raise ValueError(
                    f"`{field}` is an argument of the sampler 'confidence', but got {getattr(self, field)!r} with `sampler` "
                    f"{self.sampler!r}."
                )
        return SAMPLERS[self.sampler]()


@dataclass
class BD3LMGenerateOutput(ModelOutput):
    """
    Output of `generate(..., return_dict_in_generate=True)`.

    Args:
        sequences: prompts and generated tokens [batch, prompt length + generated length].
        scores: with `output_scores`, for each generated column the processed scores its token was drawn from [batch, vocab].
        logits: with `output_logits`, the same before the processors.
        num_forward_passes: forwards in which the row had masked tokens [batch].
        tokens_per_forward: generated tokens, up to the end of the row / `num_forward_passes` [batch].
        past_key_values: the cache, which holds every block but the last.
    """

    sequences: torch.LongTensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    num_forward_passes: torch.LongTensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    past_key_values: Cache | None = None


class CommitCache(Cache):
    """
    A view of a cache whose `update` writes only the first `num_commit` incoming positions and returns all of them.

    With 0 a denoising pass reads the cache and leaves it as it is. With n, the pass over [n clean tokens ; noisy block]
    commits the clean tokens and denoises the block in one forward; the attention code is unaware of it.

    Args:
        cache: any cache but one of static sliding layers.
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
        if isinstance(layer, StaticSlidingWindowLayer):
            raise ValueError("`past_key_values` must not have static sliding layers; take `StaticCache` or `DynamicCache`.")
        if isinstance(layer, StaticLayer):
            # The transient positions lie behind the committed ones, and the next write goes over them.
            states = self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)
            layer.cumulative_length.sub_(num_transient)
            return states
        if self.num_commit == 0 and type(layer) is DynamicLayer and layer.is_initialized and not self.cache.offloading:
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

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor | None, **kwargs: Any) -> torch.BoolTensor:
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

    Blocks are counted in each row's own positions, so rows of a left-padded batch have their blocks in different columns.
    Stage k works on block `first_block + k` of every row.

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
        cls, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, num_new: int, block_size: int, mask_token_id: int
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


class BlockDiffusionGenerationMixin(GenerationMixin):
    """
    `generate` for block diffusion models.

    Everything around the loop is Transformers' own: arguments, caches, processors, stopping criteria, streamers. The loop:

    1. Lay the rows out by blocks, each row's counted in its own positions.
    2. For every block, until nothing in it is masked:
       a. run the network on the block against the cache; the first such pass also commits the finished blocks before it,
       b. predict tokens at the positions that the sampler asks for,
       c. reveal those that the sampler chooses.
    3. Show the finished block to the stopping criteria token by token, as an autoregressive model would have, and to the
       streamer.
    4. Cut the rows where they ended.
    """

    generation_config_class = BD3LMGenerationConfig

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any):
        self.generation_config = BD3LMGenerationConfig.from_generation_config(self.generation_config)
        if generation_config is not None:
            generation_config = BD3LMGenerationConfig.from_generation_config(generation_config)
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        return BD3LMGenerationConfig.from_generation_config(generation_config), model_kwargs

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        super().adjust_generation_fn(*args, **kwargs)
        self.generation_config = BD3LMGenerationConfig.from_generation_config(self.generation_config)

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs) -> None:
        if generation_config.num_beams > 1:
            raise ValueError(
                f"`num_beams` must be 1, but got {generation_config.num_beams}: a block is denoised in parallel, so there "
                "are no prefixes to keep a beam of."
            )
        if generation_mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
            raise ValueError(
                f"`generate` denoises blocks by sampling or greedily, but its arguments ask for {generation_mode.value!r}."
            )
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        inputs, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        if name != "input_ids":
            raise ValueError(f"`generate` needs the prompts in `input_ids`, but got `{name}`.")
        self._check_prompts(inputs, model_kwargs.get("attention_mask"))
        return inputs, name, model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        # Rows are aligned at block borders, and a block under denoising lies behind the committed ones.
        max_cache_length += 1 + 2 * self.config.block_size
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _check_prompts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        vocab_size, mask_token_id = self.config.vocab_size, self.config.mask_token_id
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"`input_ids` must be of shape [batch, length] with at least one token, but got {list(input_ids.shape)}; an "
                "empty prompt is the BOS token alone."
            )
        outside = (input_ids < 0) | (input_ids >= vocab_size)
        if outside.any():
            raise ValueError(f"`input_ids` must be ids in [0, {vocab_size}), but got {int(input_ids[outside][0])}.")
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"`attention_mask` must be of the shape of `input_ids`, {list(input_ids.shape)}, but got "
                    f"{list(attention_mask.shape)}."
                )
            real = attention_mask != 0
            if not real.any(-1).all():
                raise ValueError(
                    "`attention_mask` must have a real token in every row, but row "
                    f"{int((~real.any(-1)).nonzero()[0])} is all padding; an empty prompt is the BOS token alone."
                )
            if (real[:, :-1] & ~real[:, 1:]).any():
                raise ValueError(
                    "`attention_mask` must be left-padded (zeros, then ones, in each row), but got a 0 behind a 1; set "
                    "`tokenizer.padding_side = 'left'`."
                )
            input_ids = input_ids.masked_fill(~real, -1)
        if (input_ids == mask_token_id).any():
            raise ValueError(
                f"`input_ids` must not hold the mask token ({mask_token_id}): a prompt is given, not filled in."
            )

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: BD3LMGenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> BD3LMGenerateOutput | torch.LongTensor:
        """The denoising loop; see the class. Arguments as in `GenerationMixin._sample`."""
        if synced_gpus:
            raise ValueError("`synced_gpus` must be False: rows finish blocks after different numbers of forwards.")
        generation_config.make_sampler(self.config.block_size)
        attention_mask = model_kwargs.get("attention_mask")
        self._check_prompts(input_ids, attention_mask)

        # 1. Lay the rows out by blocks.
        num_new = generation_config.max_length - input_ids.shape[1]
        canvas = Canvas.of_prompts(
            input_ids, attention_mask, num_new, self.config.block_size, self.config.mask_token_id
        )
        run = DenoisingRun(self, canvas, generation_config, logits_processor, model_kwargs.get("past_key_values"))
        rows = GeneratedRows(canvas, generation_config, stopping_criteria, streamer)
        for stage in range(canvas.num_stages):
            # 2. Denoise one block of every row, 3. see where rows end.
            run.denoise_block(stage, rows)
            rows.finish_block(stage)
            if not rows.unfinished.any():
                break
        # 4. Cut the rows where they ended.
        sequences = rows.finish()

        if not generation_config.return_dict_in_generate:
            return sequences
        num_generated = sequences.shape[1] - canvas.prompt_width
        return BD3LMGenerateOutput(
            sequences=sequences,
            scores=None if run.scores is None else run.scores[:num_generated].unbind(0),
            logits=None if run.logits is None else run.logits[:num_generated].unbind(0),
            num_forward_passes=run.num_forward_passes,
            tokens_per_forward=rows.num_generated / run.num_forward_passes,
            past_key_values=run.cache,
        )


class GeneratedRows:
    """How far each row of a canvas has come: what the stopping criteria and the streamer are shown, and where rows end."""

    def __init__(
        self,
        canvas: Canvas,
        generation_config: BD3LMGenerationConfig,
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
                    generation_config.entropy_stop_threshold, generation_config.entropy_stop_window, canvas.first_column
                )
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
        self._stream()

    def _stream(self) -> None:
        if self.streamer is None:
            return
        self._pad()
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
        """The sequences [batch, prompt width + generated], padded behind the end of each row."""
        if self.pad_token_id is None and len(set(self.num_generated.tolist())) > 1:
            raise ValueError(
                "`pad_token_id` must be set where rows of a batch may end at different lengths, but got None."
            )
        self._pad()
        if self.streamer is not None:
            self.streamer.end()
        return self.canvas.tokens[:, : self.canvas.prompt_width + int(self.num_generated.max())]


class DenoisingRun:
    """The network's side of the loop: forwards, the cache, processed predictions, and what they cost."""

    def __init__(
        self,
        model: Any,
        canvas: Canvas,
        generation_config: BD3LMGenerationConfig,
        logits_processor: LogitsProcessorList,
        cache: Cache | None,
    ):
        self.model = model
        self.canvas = canvas
        self.generation_config = generation_config
        self.logits_processor = logits_processor
        self.shares_processor_calls = all(isinstance(part, CONTEXT_FREE_PROCESSORS) for part in logits_processor)
        self.cache = cache
        batch_size, device = canvas.tokens.shape[0], canvas.tokens.device
        self.num_forward_passes = torch.zeros(batch_size, dtype=torch.long, device=device)
        # Clean tokens that the cache does not hold yet (all of them, without one), and which of all so far are real.
        self.clean, self.clean_mask = canvas.clean_prefix(0)
        if cache is not None and (num_cached := int(cache.get_seq_length())) > 0:
            if self.clean_mask is not None or num_cached > self.clean.shape[1] or num_cached % canvas.block_size:
                raise ValueError(
                    "`past_key_values` must hold whole blocks of the prompts in `input_ids`, whose rows must be equally long, "
                    f"but got {num_cached} positions for prompts of {canvas.prompt_length.tolist()} tokens with `block_size` "
                    f"{canvas.block_size}."
                )
            self.clean = self.clean[:, num_cached:]
        output = generation_config
        keeps = output.return_dict_in_generate, (canvas.num_new, batch_size, model.config.vocab_size)
        self.scores = torch.full(keeps[1], -torch.inf, device=device) if keeps[0] and output.output_scores else None
        self.logits = torch.zeros(keeps[1], device=device) if keeps[0] and output.output_logits else None

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
            hidden_states = self._forward(block, sigma)
            self.num_forward_passes += masked.any(-1)
            tokens, confidence = self._predict(hidden_states, candidates, columns, sampler.needs_confidence)
            revealed = sampler.reveal(candidates, confidence)
            block = torch.where(revealed, tokens, block)
            canvas.tokens.scatter_(1, columns, block)
            masked = rows.drop_behind_eos(block, columns, masked & ~revealed)
            if hasattr(rows.streamer, "put_draft"):
                rows.streamer.put_draft(block[canvas.is_new(columns)].cpu())
        self._append_clean(block)

    def _append_clean(self, block: torch.Tensor) -> None:
        self.clean = torch.cat([self.clean, block], dim=1)
        if self.clean_mask is not None:
            self.clean_mask = torch.cat([self.clean_mask, self.clean_mask.new_ones(block.shape)], dim=1)

    def _forward(self, block: torch.Tensor, sigma: torch.Tensor | None) -> torch.Tensor:
        """Final hidden states of the block [batch, block_size, hidden]; commits the clean tokens that are not cached."""
        num_clean = self.clean.shape[1]
        attention_mask = self.clean_mask
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(block.shape)], dim=1)
        if sigma is not None:
            sigma = torch.cat([sigma.new_zeros(self.clean.shape), sigma[:, None].expand(block.shape)], dim=1)
        outputs = self.model.model(
            input_ids=torch.cat([self.clean, block], dim=1),
            attention_mask=attention_mask,
            past_key_values=None if self.cache is None else CommitCache(self.cache, num_clean),
            timesteps=sigma,
        )
        if self.cache is not None:
            self.clean = self.clean[:, :0]
        return outputs.last_hidden_state[:, num_clean:]

    def _predict(
        self, hidden_states: torch.Tensor, candidates: torch.Tensor, columns: torch.Tensor, needs_confidence: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Draws a token for each candidate.

        Returns:
            (tokens [batch, block_size], the model's probability of each [batch, block_size]); arbitrary and 0 elsewhere.
        """
        logits = self.model.lm_head(hidden_states[candidates]).float()
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
        # A processor may read the tokens left of the predicted one, their number, and the index of the row: each column is
        # processed for the whole batch. Padding reads as the mask token, which has no probability to be changed.
        column_of = columns[candidates]
        row_of = candidates.nonzero()[:, 0]
        is_padding = torch.arange(tokens.shape[1], device=tokens.device) < self.canvas.first_column[:, None]
        context = tokens.masked_fill(is_padding, self.canvas.mask_token_id)
        scores = logits.clone()
        for column in column_of.unique().tolist():
            chosen = column_of == column
            batch_scores = logits.new_zeros(tokens.shape[0], logits.shape[1])
            batch_scores[row_of[chosen]] = logits[chosen]
            processed = self.logits_processor(context[:, :column], batch_scores)
            scores[chosen] = processed[row_of[chosen]]
        return scores
