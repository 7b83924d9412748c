"""Block-wise generation: `generate` of Transformers, with a denoising loop in place of one token after the other."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, LogitsProcessorList, StaticCache, generation
from transformers.generation import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from .cache_block_diffusion import read_whole_text
from .denoising_block_diffusion import Denoiser
from .generation_config_block_diffusion import BD3LMGenerationConfig
from .guidance_block_diffusion import Guidance
from .network_block_diffusion import as_int64
from .outputs_block_diffusion import BD3LMGenerateOutput, accepts_past_key_values
from .prefix_reuse_block_diffusion import sliding_cache
from .progress_block_diffusion import Canvas, RowProgress
from .two_stream_block_diffusion import check_shape


# What Transformers calls the cache among the arguments of a model; `generate` takes both names.
INPUTS_OF_GENERATION = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAME = "cache" if "cache" in INPUTS_OF_GENERATION else "past_key_values"


class BlockDiffusionGenerationMixin(GenerationMixin):
    """
    `generate` for block diffusion models. Everything around the loop is Transformers' own: arguments, caches,
    processors, stopping criteria, streamers.

    1. Lay the rows out by blocks, each row's counted in its own positions.
    2. For every block, until nothing in it is masked:
        * run the network on the block against the cache; the first such pass also commits the finished blocks,
        * predict tokens at the positions that the sampler asks for, and reveal those that it chooses.
    3. Show the block to the streamer, and to the stopping criteria token by token, as an autoregressive model would.
    4. Cut the rows where they ended.
    """

    @accepts_past_key_values
    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, streamer: Any = None, **kwargs: Any):
        # Transformers would show a streamer the prompts with their gaps.
        return super().generate(*args, shown_to=streamer, **kwargs)

    def _extract_generation_mode_kwargs(self, custom_generate: Any, kwargs: dict[str, Any], *args: Any):
        streamer = kwargs.pop("shown_to", None)
        return super()._extract_generation_mode_kwargs(custom_generate, kwargs, *args) | {"streamer": streamer}

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any):
        self.generation_config = BD3LMGenerationConfig.from_generation_config(self.generation_config)
        if generation_config is not None:
            generation_config = BD3LMGenerationConfig.from_generation_config(generation_config)
        if "cache" in kwargs:
            kwargs[CACHE_NAME] = kwargs.pop("cache")
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        # Early: for modes that Transformers has moved to the Hub it would ask for trust in remote code first.
        self._check_mode(generation_config.get_generation_mode(), generation_config)
        return BD3LMGenerationConfig.from_generation_config(generation_config), model_kwargs

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """As `GenerationMixin` adjusts a model that was loaded, with a [`BD3LMGenerationConfig`] in the end."""
        super().adjust_generation_fn(*args, **kwargs)
        self.generation_config = BD3LMGenerationConfig.from_generation_config(self.generation_config)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        """Raises a ValueError, and with it `generate_batch`: that engine writes one token after the other."""
        raise ValueError(
            "`generate` must be called in place of `generate_batch` and continuous batching, which write one token "
            f"after the other, but got a {type(self).__name__}, whose blocks are denoised; it takes prompts of any "
            "lengths in one batch."
        )

    @staticmethod
    def _check_mode(generation_mode: GenerationMode, generation_config: GenerationConfig) -> None:
        if generation_config.cache_implementation == "paged":
            raise ValueError("`cache_implementation` must not be 'paged', which is continuous batching; leave it out.")
        mode = generation_mode.value
        if mode in ("sample", "greedy_search") and generation_config.penalty_alpha:
            # Transformers ignores it when it samples, which here is the default.
            mode = "contrastive_search"
        if mode not in ("sample", "greedy_search"):
            raise ValueError(
                "`generate` must be asked to sample or to be greedy, since blocks are denoised and no prefix grows by "
                f"one token, but got arguments of {mode.replace('_', ' ')}; `sampler` says how blocks are denoised."
            )

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs) -> None:
        self._check_mode(generation_mode, generation_config)
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(generation_config, name):
                raise ValueError(f"`{name}` must be False in `generate`, but got True; call the model for them.")
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs(model_kwargs)
        # What the generation config asks for, the outputs, is checked with it.
        outputs = ("output_hidden_states", "output_attentions")
        known = {"input_ids", "inputs_embeds", "attention_mask", "use_cache", "cache", "past_key_values", *outputs}
        if surplus := sorted(name for name, value in model_kwargs.items() if value is not None and name not in known):
            raise ValueError(
                f"`generate` counts positions and draws noise itself and takes no {surplus}, which `forward` does."
            )

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        inputs, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        if name != "input_ids":
            raise ValueError(f"`generate` needs the prompts in `input_ids`, but got `{name}`.")
        inputs = as_int64(name, inputs)
        self._check_prompts(inputs, model_kwargs.get("attention_mask"))
        return inputs, name, model_kwargs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, max_cache_length):
        # Rows are aligned at block borders, and a block under denoising comes after the committed ones.
        max_cache_length += 1 + 2 * self.config.block_size
        is_given = model_kwargs.get(CACHE_NAME) is not None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, max_cache_length)
        cache = model_kwargs.get(CACHE_NAME)
        if cache is not None:
            read_whole_text(cache, 0 if is_given else max_cache_length)
        is_plain = type(cache) is DynamicCache and not cache.offloading and not is_given
        if is_plain:
            # Rows are complete a block apart, and the next call may go on with all of them.
            window = (self.config.window_in_blocks + (batch_size > 1)) * self.config.block_size
            model_kwargs[CACHE_NAME] = sliding_cache(self.config.num_hidden_layers, window)

    def _prepare_generated_length(self, generation_config, has_default_max_length, *args: Any, **kwargs: Any):
        fills_only = generation_config.infill and generation_config.max_new_tokens is None and has_default_max_length
        config = super()._prepare_generated_length(generation_config, has_default_max_length, *args, **kwargs)
        if fills_only:
            config.max_length = kwargs["input_ids_length"]
        return config

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length) -> None:
        if not generation_config.infill or generation_config.max_length != input_ids_length:
            super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)

    def _get_logits_processor(self, generation_config, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        negative_ids = as_int64("negative_prompt_ids", kwargs.pop("negative_prompt_ids", None))
        negative_mask = kwargs.pop("negative_prompt_attention_mask", None)
        all_processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        # Transformers' own runs the model on a next token, which this one does not predict.
        foreign = generation.UnbatchedClassifierFreeGuidanceLogitsProcessor
        processors = LogitsProcessorList(part for part in all_processors if type(part) is not foreign)
        scale = generation_config.guidance_scale
        if len(processors) == len(all_processors):
            if negative_ids is None:
                return processors
            rule = "guide only with a `guidance_scale` other than 1"
            raise ValueError(f"`negative_prompt_ids` {rule}, but got {scale}.")
        if generation_config.infill:
            reason = "a negative prompt has nothing to stand in for the text around a gap"
            raise ValueError(f"`guidance_scale` must be 1 or None with `infill`, but got {scale}: {reason}.")
        if negative_ids is not None:
            if self._check_prompts(negative_ids, negative_mask, "negative_prompt_").any():
                raise ValueError(f"`negative_prompt_ids` must not hold the mask token ({self.config.mask_token_id}).")
            if negative_mask is not None:
                negative_ids = negative_ids.masked_fill(negative_mask == 0, -1)
        processors.append(Guidance(scale, negative_ids))
        return processors

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                # The window slides: text longer than the context is nothing to warn of.
                criterion.max_position_embeddings = None
        return criteria

    def _check_prompts(self, input_ids: Tensor, attention_mask: Tensor | None, prefix: str = "") -> Tensor:
        """The mask tokens of the prompts, bool [batch, length]; raises a ValueError where the prompts are wrong."""
        ids_name, mask_name, vocab_size = f"{prefix or 'input_'}ids", f"{prefix}attention_mask", self.config.vocab_size
        hint = "an empty prompt is the BOS token alone"
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            rule = "of shape [batch, length] with at least one token"
            raise ValueError(f"`{ids_name}` must be {rule}, but got {list(input_ids.shape)}; {hint}.")
        outside = (input_ids < 0) | (input_ids >= vocab_size)
        if outside.any():
            raise ValueError(f"`{ids_name}` must be ids in [0, {vocab_size}), but got {int(input_ids[outside][0])}.")
        gaps = input_ids == self.config.mask_token_id
        if attention_mask is None:
            return gaps
        check_shape(mask_name, attention_mask, ids_name, input_ids.shape)
        real = attention_mask != 0
        is_empty = ~real.any(-1)
        if is_empty.any():
            got = f"row {int(is_empty.nonzero()[0])} is all padding"
            raise ValueError(f"`{mask_name}` must have a real token in every row, but {got}; {hint}.")
        if (real[:, :-1] & ~real[:, 1:]).any():
            rule = "left-padded (zeros, then ones, in each row), but got a 0 after a 1"
            raise ValueError(f"`{mask_name}` must be {rule}; set `tokenizer.padding_side = 'left'`.")
        return gaps & real

    def _denoiser(self, canvas: Canvas, generation_config, processors, cache, guidance) -> Denoiser:
        return Denoiser(self, canvas, generation_config, processors, cache, guidance)

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
        config = self.config
        # An argument that the sampler does not take is refused before anything is computed.
        generation_config.make_sampler(config.block_size, config.noise_schedule)
        attention_mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get(CACHE_NAME)
        gaps = self._check_prompts(input_ids, attention_mask)
        if gaps.any() and not generation_config.infill:
            fault = f"the mask token ({config.mask_token_id}), which only `infill=True` fills in"
            raise ValueError(f"`input_ids` must not hold {fault}.")
        # 1. Lay the rows out by blocks.
        num_new = generation_config.max_length - input_ids.shape[1]
        canvas = Canvas(config, input_ids, attention_mask, gaps, num_new)
        if config.shift_logits and gaps.gather(1, canvas.first_column[:, None]).any():
            raise ValueError("`input_ids` must begin with a known token, since `shift_logits` predicts no first one.")
        guidance = next((part for part in logits_processor if isinstance(part, Guidance)), None)
        if generation_config.new_block:
            if generation_config.infill or guidance is not None or (cache is not None and cache.get_seq_length()):
                rule = "False with `infill`, a `guidance_scale` or a `cache` that is not empty"
                raise ValueError(f"`new_block` must be {rule}, but got True.")
            canvas.start_new_block()
        if guidance is not None:
            logits_processor = LogitsProcessorList(part for part in logits_processor if part is not guidance)
            guidance = guidance.of_batch(input_ids, generation_config.num_return_sequences or 1)
            if generation_config.cache_implementation == "static":
                # Transformers has made it for the prompt alone.
                prompt_width = max(input_ids.shape[1], guidance.negative_ids.shape[1])
                num_columns = prompt_width + num_new + 2 * config.block_size
                cache = StaticCache(config=config.get_text_config(decoder=True), max_cache_len=num_columns)
                read_whole_text(cache, num_columns)
        denoiser = self._denoiser(canvas, generation_config, logits_processor, cache, guidance)
        progress = RowProgress(canvas, generation_config, stopping_criteria, streamer)
        for stage in range(canvas.num_stages):
            # 2. Denoise one block of every row, 3. see where rows end.
            denoiser.denoise_block(stage, progress)
            goes_on = progress.finish_block(stage)
            denoiser.append_block(stage)
            if not goes_on:
                break
        # 4. Cut the rows where they ended.
        sequences, cache = progress.finish(), denoiser.release()
        if not generation_config.return_dict_in_generate:
            return sequences
        noted = denoiser.record.of_sequences(progress, sequences.shape[1])
        return BD3LMGenerateOutput(sequences=sequences, cache=cache, **noted)
