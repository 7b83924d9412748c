"""Block-wise generation: `generate` of Transformers, with a denoising loop in place of one token after the other."""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, LogitsProcessorList, StaticCache
from transformers.generation import (
    MaxLengthCriteria,
    StoppingCriteriaList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.configuration_utils import GenerationMode

from .configuration_bd3lm import NOISE_SCHEDULE_NAMES
from .denoising_block_diffusion import Denoiser
from .guidance_block_diffusion import Guidance
from .network_block_diffusion import CacheOutput, accepts_past_key_values, as_int64
from .prediction_block_diffusion import CONFIDENCES
from .prefix_reuse_block_diffusion import sliding_cache
from .progress_block_diffusion import Canvas, RowProgress
from .samplers_block_diffusion import SAMPLER_ARGUMENTS, SAMPLERS, Sampler


# What Transformers calls the cache among the arguments of a model; `generate` takes both names.
CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else ("past_key_values")
)


class BD3LMGenerationConfig(GenerationConfig):
    """
    `GenerationConfig` with the arguments of block-wise generation.

    Unlike there, `do_sample` is True and `top_k` is off by default, so that samples follow the model's own
    distribution.

    Args:
        sampler: "first_hitting" (default), "ancestral", "confidence", "entropy_bound", another name in `SAMPLERS`, or
            a `Sampler`; see `samplers_block_diffusion.py`.
        denoising_steps: steps per block of the samplers "ancestral" and "confidence"; by default as many as a block
            has tokens.
        noise_schedule: of the sampler "ancestral"; by default the model's.
        remask_cap: of the sampler "ancestral": the largest probability, in [0, 1], that a revealed token is masked
            again at a step (ReMDM); 0 by default.
        confidence_threshold: of the sampler "confidence": reveal every token above this confidence, in (0, 1].
        confidence: of the sampler "confidence": "probability" (default), "margin" or "negative_entropy".
        entropy_bound: of the sampler "entropy_bound": the most that the entropies of tokens which are revealed
            together may sum up to, less the largest of them, in nats; 0 by default.
        seed: row i of the batch, `num_return_sequences` included, draws from a generator of its own with this seed +
            i, or with the i-th of a list. So it gets the tokens that it would get alone, and no other generator is
            touched. By default all rows draw from torch's global generator.
        guidance_scale: Transformers' argument: with `negative_prompt_ids` (by default the last token of each prompt),
            scores are `guidance_scale * prompt + (1 - guidance_scale) * negative prompt`; see `Guidance`.
        infill: fill the mask tokens in the prompts, from both sides within their block and from the left across
            blocks; every other token stays. Nothing is written behind the prompts unless `max_new_tokens` is given.
        output_reveal: return which forward revealed each token, and the token's probability then.
        entropy_stop_threshold: end a row when its last `entropy_stop_window` tokens, as a distribution over ids, have
            less entropy than this, in nats (arXiv 2503.09573 takes 4.0 and 256).
        entropy_stop_window: tokens that the entropy is computed over; 256 by default.
        kwargs: arguments of `GenerationConfig`.

    Raises:
        ValueError: a value breaks its rule; the message names the argument, the value and the rule.
    """

    def __init__(self, **kwargs: Any):
        self.sampler: str | Sampler | None = kwargs.pop("sampler", None)
        self.denoising_steps: int | None = kwargs.pop("denoising_steps", None)
        self.noise_schedule: str | None = kwargs.pop("noise_schedule", None)
        self.remask_cap: float | None = kwargs.pop("remask_cap", None)
        self.confidence_threshold: float | None = kwargs.pop("confidence_threshold", None)
        self.confidence: str | None = kwargs.pop("confidence", None)
        self.entropy_bound: float | None = kwargs.pop("entropy_bound", None)
        self.seed: int | list[int] | None = kwargs.pop("seed", None)
        self.infill: bool | None = kwargs.pop("infill", None)
        self.output_reveal: bool | None = kwargs.pop("output_reveal", None)
        self.entropy_stop_threshold: float | None = kwargs.pop("entropy_stop_threshold", None)
        self.entropy_stop_window: int | None = kwargs.pop("entropy_stop_window", None)
        super().__init__(**kwargs)

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        return GenerationConfig._get_default_generation_params() | {
            "do_sample": True,
            "top_k": 0,
            "sampler": "first_hitting",
            "infill": False,
            "output_reveal": False,
            "entropy_stop_window": 256,
        }

    @classmethod
    def from_model_config(cls, model_config: Any) -> "BD3LMGenerationConfig":
        generation_config = cls.from_generation_config(GenerationConfig.from_model_config(model_config))
        # Under this flag Transformers drops the fields that it does not know when it loads the config again.
        generation_config._from_model_config = False
        return generation_config

    @classmethod
    def from_generation_config(cls, generation_config: GenerationConfig) -> "BD3LMGenerationConfig":
        """The plain `generation_config`, which is what loading yields, as one of this class."""
        if isinstance(generation_config, cls):
            return generation_config
        raised = cls()
        # What is None here was dropped on saving, and is no value to take over.
        raised.__dict__.update({key: value for key, value in vars(generation_config).items() if value is not None})
        raised.validate(user_set_attributes=set())
        return raised

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """
        As `GenerationConfig.validate`, and the arguments of this class.

        Raises:
            ValueError: a value breaks its rule; the message names the argument, the value and the rule.
        """
        if self.top_k == 0:
            # Off, and so no sampling argument that `do_sample=False` would contradict.
            user_set_attributes = set(user_set_attributes or vars(self)) - {"top_k"}
        # Sampling is what happens unless it is turned off.
        samples_by_default = self.do_sample is None
        self.do_sample = True if samples_by_default else self.do_sample
        try:
            super().validate(strict=strict, user_set_attributes=user_set_attributes)
        finally:
            self.do_sample = None if samples_by_default else self.do_sample

        def require(holds: bool, field: str, rule: str) -> None:
            value = getattr(self, field)
            if value is not None and not holds:
                raise ValueError(f"`{field}` must be {rule}, but got {value!r}.")

        def is_count(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= 1

        def is_integer(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        require(
            isinstance(self.sampler, Sampler) or isinstance(self.sampler, str) and self.sampler in SAMPLERS,
            "sampler",
            f"one of {', '.join(SAMPLERS)}, or a Sampler",
        )
        require(is_count(self.denoising_steps), "denoising_steps", "an integer >= 1")
        require(
            self.noise_schedule in NOISE_SCHEDULE_NAMES, "noise_schedule", f"one of {', '.join(NOISE_SCHEDULE_NAMES)}"
        )
        cap = self.remask_cap
        require(isinstance(cap, (int, float)) and 0 <= cap <= 1, "remask_cap", "a number in [0, 1]")
        threshold = self.confidence_threshold
        require(threshold is None or 0 < threshold <= 1, "confidence_threshold", "in (0, 1]")
        require(self.confidence in CONFIDENCES, "confidence", f"one of {', '.join(CONFIDENCES)}")
        require(self.entropy_bound is None or self.entropy_bound >= 0, "entropy_bound", "a number of nats >= 0")
        seeds = self.seed if isinstance(self.seed, list) else [self.seed]
        require(all(is_integer(seed) and 0 <= seed for seed in seeds), "seed", "an integer >= 0, or a list of them")
        for field in ("infill", "output_reveal"):
            require(isinstance(getattr(self, field), bool), field, "True or False")
        entropy = self.entropy_stop_threshold
        require(entropy is None or entropy > 0, "entropy_stop_threshold", "a number of nats > 0")
        require(is_count(self.entropy_stop_window), "entropy_stop_window", "an integer >= 1")
        if self.denoising_steps is not None and threshold is not None:
            raise ValueError(
                "`denoising_steps` and `confidence_threshold` are two rules of the 'confidence' sampler of which one "
                f"must be chosen, but got {self.denoising_steps} and {threshold}."
            )
        if threshold is not None and self.confidence == "negative_entropy":
            raise ValueError(
                f"`confidence_threshold` is a probability or a margin, but got {threshold} with `confidence` "
                "'negative_entropy'."
            )

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if isinstance(self.sampler, Sampler):
            output["sampler"] = type(self.sampler).__name__
        return output

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            ValueError: `sampler` is an object, of which no more than a name could be saved.
        """
        if isinstance(self.sampler, Sampler):
            raise ValueError(
                f"`sampler` must be a name in SAMPLERS to be saved, but got a {type(self.sampler).__name__}; add its "
                "class to SAMPLERS and give the name."
            )
        if self.do_sample is None:
            # Who reads the file without this class would take its sampling arguments for a mistake.
            saved = copy.deepcopy(self)
            saved.do_sample = True
            return saved.save_pretrained(*args, **kwargs)
        super().save_pretrained(*args, **kwargs)

    def make_sampler(self, block_size: int, noise_schedule: str) -> Sampler:
        """
        The sampler of one block.

        Args:
            block_size: tokens of the block, and so the steps of a sampler that is given no number of them.
            noise_schedule: the model's.

        Raises:
            ValueError: an argument was set that the chosen sampler does not take.
        """
        takes = SAMPLER_ARGUMENTS.get(self.sampler, ()) if isinstance(self.sampler, str) else ()
        for field in sorted({field for fields in SAMPLER_ARGUMENTS.values() for field in fields} - set(takes)):
            if getattr(self, field) is not None:
                owners = [repr(name) for name, fields in SAMPLER_ARGUMENTS.items() if field in fields]
                raise ValueError(
                    f"`{field}` is an argument of the sampler {' or '.join(owners)}, but got "
                    f"{getattr(self, field)!r} with `sampler` {self.sampler!r}."
                )
        if isinstance(self.sampler, Sampler):
            return copy.deepcopy(self.sampler)
        defaults = {
            "denoising_steps": None if self.confidence_threshold is not None else block_size,
            "noise_schedule": noise_schedule,
            "entropy_bound": 0.0,
        }
        values = {field: getattr(self, field) for field in takes}
        values = {field: defaults.get(field) if value is None else value for field, value in values.items()}
        return SAMPLERS[self.sampler](**{field: value for field, value in values.items() if value is not None})

    def row_seeds(self, batch_size: int) -> list[int] | None:
        """
        The seed of each of the `batch_size` rows, `num_return_sequences` included; None where they share a generator.

        Raises:
            ValueError: `seed` is a list of another length than the batch.
        """
        if self.seed is None and not self.do_sample:
            # Which token is revealed when may be drawn as well.
            return [0] * batch_size
        if self.seed is None or isinstance(self.seed, list) and len(self.seed) == batch_size:
            return self.seed
        if isinstance(self.seed, list):
            raise ValueError(
                f"`seed` must be one integer or one for each of the {batch_size} rows, but got {len(self.seed)}."
            )
        return [self.seed + row for row in range(batch_size)]


@dataclass
class BD3LMGenerateOutput(CacheOutput):
    """
    Output of `generate(..., return_dict_in_generate=True)`.

    Args:
        sequences: prompts and generated tokens [batch, prompt length + generated length].
        scores: with `output_scores`, for each generated column the processed scores its token was drawn from [batch,
            vocab].
        logits: with `output_logits`, the same before the processors.
        num_forward_passes: forwards in which the row had masked tokens [batch].
        tokens_per_forward: generated tokens, up to the end of the row / `num_forward_passes` [batch].
        reveal_steps: with `output_reveal`, which of the row's forwards revealed each token, from 1; 0 for given tokens
            and padding, of the shape of `sequences`.
        token_probabilities: with `output_reveal`, the model's probability of each token when it was revealed, before
            the processors; NaN for given tokens and padding, of the shape of `sequences`.
        cache: holds every block but the last; also readable as `past_key_values`. Given to `generate` again it spares
            computing the blocks that the new prompts begin with, of any lengths in the rows of the batch.
    """

    sequences: torch.LongTensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    num_forward_passes: torch.LongTensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    reveal_steps: torch.LongTensor | None = None
    token_probabilities: torch.FloatTensor | None = None
    cache: Cache | None = None


class BlockDiffusionGenerationMixin(GenerationMixin):
    """
    `generate` for block diffusion models.

    Everything around the loop is Transformers' own: arguments, caches, processors, stopping criteria, streamers.

    1. Lay the rows out by blocks, each row's counted in its own positions.
    2. For every block, until nothing in it is masked:
        * run the network on the block against the cache; the first such pass also commits the finished blocks,
        * predict tokens at the positions that the sampler asks for,
        * reveal those that the sampler chooses.
    3. Show the finished block to the stopping criteria token by token, as an autoregressive model would have, and to
       the streamer.
    4. Cut the rows where they ended.
    """

    generate = accepts_past_key_values(GenerationMixin.generate)

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
        """
        Refused, and with it `generate_batch`.

        Raises:
            ValueError: always; the engine of continuous batching writes one token after the other.
        """
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
        known = {"input_ids", "inputs_embeds", "attention_mask", "use_cache", *CACHE_NAMES}
        # What the generation config asks for is checked with it.
        known |= {"output_hidden_states", "output_attentions"}
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

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        # Rows are aligned at block borders, and a block under denoising comes after the committed ones.
        max_cache_length += 1 + 2 * self.config.block_size
        is_given = model_kwargs.get(CACHE_NAME) is not None
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        window = self.config.window_in_blocks * self.config.block_size
        if batch_size > 1 and window > 0:
            # Rows are complete a block apart; the next call may go on with all of them.
            window += self.config.block_size
        cache = model_kwargs.get(CACHE_NAME)
        if type(cache) is DynamicCache and not cache.offloading and not is_given and window > 0:
            model_kwargs[CACHE_NAME] = sliding_cache(self.config.num_hidden_layers, window)

    def _prepare_generated_length(self, generation_config, has_default_max_length, *args: Any, **kwargs: Any):
        fills_only = generation_config.infill and generation_config.max_new_tokens is None and has_default_max_length
        generation_config = super()._prepare_generated_length(
            generation_config, has_default_max_length, *args, **kwargs
        )
        if fills_only:
            generation_config.max_length = kwargs["input_ids_length"]
        return generation_config

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length) -> None:
        if not generation_config.infill or generation_config.max_length != input_ids_length:
            super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)

    def _get_logits_processor(
        self,
        generation_config: BD3LMGenerationConfig,
        *args: Any,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        if negative_prompt_ids is not None:
            negative_prompt_ids = as_int64("negative_prompt_ids", negative_prompt_ids)
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        # Transformers' own runs the model on a next token, which this one does not predict.
        is_guided = any(type(part) is UnbatchedClassifierFreeGuidanceLogitsProcessor for part in processors)
        processors = LogitsProcessorList(
            part for part in processors if type(part) is not UnbatchedClassifierFreeGuidanceLogitsProcessor
        )
        if is_guided:
            self._check_guidance(generation_config, negative_prompt_ids, negative_prompt_attention_mask)
            if negative_prompt_ids is not None and negative_prompt_attention_mask is not None:
                negative_prompt_ids = negative_prompt_ids.masked_fill(negative_prompt_attention_mask == 0, -1)
            processors.append(Guidance(generation_config.guidance_scale, negative_prompt_ids))
        elif negative_prompt_ids is not None:
            raise ValueError(
                "`negative_prompt_ids` guide only with a `guidance_scale` other than 1, but got "
                f"{generation_config.guidance_scale}."
            )
        return processors

    def _check_guidance(
        self,
        generation_config: BD3LMGenerationConfig,
        negative_prompt_ids: torch.Tensor | None,
        negative_prompt_attention_mask: torch.Tensor | None,
    ) -> None:
        if generation_config.infill:
            raise ValueError(
                f"`guidance_scale` must be 1 or None with `infill`, but got {generation_config.guidance_scale}: a "
                "negative prompt has nothing to stand in for the text around a gap."
            )
        if negative_prompt_ids is None:
            return
        names = ("negative_prompt_ids", "negative_prompt_attention_mask")
        if self._check_prompts(negative_prompt_ids, negative_prompt_attention_mask, names).any():
            raise ValueError(f"`negative_prompt_ids` must not hold the mask token ({self.config.mask_token_id}).")

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                # The window slides: text longer than the context is nothing to warn of.
                criterion.max_position_embeddings = None
        return criteria

    def _check_prompts(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        names: tuple[str, str] = ("input_ids", "attention_mask"),
    ) -> torch.Tensor:
        """The mask tokens of the prompts, bool [batch, length], unless there is something wrong with them."""
        ids_name, mask_name = names
        vocab_size, mask_token_id = self.config.vocab_size, self.config.mask_token_id
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"`{ids_name}` must be of shape [batch, length] with at least one token, but got "
                f"{list(input_ids.shape)}; an empty prompt is the BOS token alone."
            )
        outside = (input_ids < 0) | (input_ids >= vocab_size)
        if outside.any():
            raise ValueError(f"`{ids_name}` must be ids in [0, {vocab_size}), but got {int(input_ids[outside][0])}.")
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"`{mask_name}` must be of the shape of `{ids_name}`, {list(input_ids.shape)}, but got "
                    f"{list(attention_mask.shape)}."
                )
            real = attention_mask != 0
            if not real.any(-1).all():
                raise ValueError(
                    f"`{mask_name}` must have a real token in every row, but row "
                    f"{int((~real.any(-1)).nonzero()[0])} is all padding; an empty prompt is the BOS token alone."
                )
            if (real[:, :-1] & ~real[:, 1:]).any():
                raise ValueError(
                    f"`{mask_name}` must be left-padded (zeros, then ones, in each row), but got a 0 behind a 1; "
                    "set `tokenizer.padding_side = 'left'`."
                )
            input_ids = input_ids.masked_fill(~real, -1)
        return input_ids == mask_token_id

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
        generation_config.make_sampler(self.config.block_size, self.config.noise_schedule)
        attention_mask = model_kwargs.get("attention_mask")
        gaps = self._check_prompts(input_ids, attention_mask)
        if gaps.any() and not generation_config.infill:
            raise ValueError(
                f"`input_ids` must not hold the mask token ({self.config.mask_token_id}), which only `infill=True` "
                "fills in."
            )

        # 1. Lay the rows out by blocks.
        num_new = generation_config.max_length - input_ids.shape[1]
        canvas = Canvas.of_prompts(
            input_ids, attention_mask, gaps, num_new, self.config.block_size, self.config.mask_token_id
        )
        guidance = next((part for part in logits_processor if isinstance(part, Guidance)), None)
        if guidance is not None:
            logits_processor = LogitsProcessorList(part for part in logits_processor if part is not guidance)
            guidance = guidance.of_batch(input_ids, generation_config.num_return_sequences or 1)
        cache = model_kwargs.get(CACHE_NAME)
        if guidance is not None and generation_config.cache_implementation == "static":
            # Transformers has made it for the prompt alone.
            num_behind = max(0, guidance.negative_ids.shape[1] - input_ids.shape[1])
            max_cache_len = generation_config.max_length + num_behind + 2 * self.config.block_size
            cache = StaticCache(config=self.config, max_cache_len=max_cache_len)
        denoiser = Denoiser(self, canvas, generation_config, logits_processor, cache, guidance)
        progress = RowProgress(canvas, generation_config, stopping_criteria, streamer)
        for stage in range(canvas.num_stages):
            # 2. Denoise one block of every row, 3. see where rows end.
            denoiser.denoise_block(stage, progress)
            progress.finish_block(stage)
            denoiser.append_block(stage)
            if not progress.unfinished.any():
                break
        # 4. Cut the rows where they ended.
        sequences = progress.finish()

        if not generation_config.return_dict_in_generate:
            return sequences
        record, num_generated = denoiser.record, sequences.shape[1] - canvas.prompt_width
        reveal_steps, token_probabilities = (
            None if values is None else progress.without_padding(values, empty)[:, : sequences.shape[1]]
            for values, empty in ((record.reveal_steps, 0), (record.token_probabilities, torch.nan))
        )
        return BD3LMGenerateOutput(
            sequences=sequences,
            scores=None if record.scores is None else record.scores[:num_generated].unbind(0),
            logits=None if record.logits is None else record.logits[:num_generated].unbind(0),
            num_forward_passes=record.num_forward_passes,
            tokens_per_forward=progress.num_generated / record.num_forward_passes.clamp(min=1),
            reveal_steps=reveal_steps,
            token_probabilities=token_probabilities,
            cache=cache,
        )
