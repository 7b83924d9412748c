"""Block-wise generation: `generate` of Transformers, whose loop denoises blocks, and the arguments that it takes."""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, LogitsProcessorList, StaticCache, generation
from transformers.generation import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from .cache_block_diffusion import read_whole_text
from .configuration_bd3lm import NOISE_SCHEDULE_NAMES
from .denoising_block_diffusion import Canvas, Denoiser, RowProgress
from .guidance_block_diffusion import Guidance
from .network_block_diffusion import BD3LMGenerateOutput, accepts_past_key_values, as_int64
from .prediction_block_diffusion import CONFIDENCES
from .prefix_reuse_block_diffusion import sliding_cache
from .samplers_block_diffusion import SAMPLER_ARGUMENTS, SAMPLERS, Sampler
from .two_stream_block_diffusion import check_shape


# What Transformers calls the cache among the arguments of a model; `generate` takes both names.
INPUTS_OF_GENERATION = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAME = "cache" if "cache" in INPUTS_OF_GENERATION else "past_key_values"
STATES = ("output_hidden_states", "output_attentions")


def argument_rules() -> dict[str, tuple[Callable[[Any], bool], str]]:
    """For each argument that [`BD3LMGenerationConfig`] adds or checks, a test of all values but None, and the rule."""
    share = (lambda value: isinstance(value, (int, float)) and 0 <= value <= 1, "a number in [0, 1]")
    count = (lambda value: type(value) is int and value >= 1, "an integer >= 1")
    flag = (lambda value: isinstance(value, bool), "True or False")
    names = ", ".join(SAMPLERS)
    return {
        **dict.fromkeys(("top_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "remask_cap"), share),
        **dict.fromkeys(("denoising_steps", "tokens_per_step", "sub_block_size", "entropy_stop_window"), count),
        **dict.fromkeys(("new_block", "infill", "output_reveal"), flag),
        "no_repeat_ngram_size": (lambda value: type(value) is int and value >= 0, "an integer >= 0"),
        "sampler": (lambda value: isinstance(value, Sampler) or value in [*SAMPLERS], f"one of {names}, or a Sampler"),
        "noise_schedule": (lambda value: value in NOISE_SCHEDULE_NAMES, f"one of {', '.join(NOISE_SCHEDULE_NAMES)}"),
        "confidence_threshold": (lambda value: 0 < value <= 1, "in (0, 1]"),
        "confidence": (lambda value: value in CONFIDENCES, f"one of {', '.join(CONFIDENCES)}"),
        "entropy_bound": (lambda value: value >= 0, "a number of nats >= 0"),
        "entropy_stop_threshold": (lambda value: value > 0, "a number of nats > 0"),
        "seed": (
            lambda value: all(type(seed) is int and seed >= 0 for seed in (value if type(value) is list else [value])),
            "an integer >= 0, or a list of them",
        ),
    }


class BD3LMGenerationConfig(GenerationConfig):
    """
    `GenerationConfig` with the arguments of block-wise generation. Unlike there, `do_sample` is True and `top_k` is
    off by default, so that samples follow the model's own distribution.

    Args:
        sampler: "first_hitting" (default), "ancestral", "confidence", "sequential", "entropy_bound", a name that was
            added to `SAMPLERS`, or a `Sampler`.
        denoising_steps: of "ancestral", "confidence" and "sequential", per block; by default its number of tokens.
        noise_schedule: of "ancestral"; by default the model's.
        remask_cap: of "ancestral": the largest probability that a revealed token is masked again (ReMDM); default 0.
        confidence_threshold: of "confidence": reveal every token above this confidence, in (0, 1].
        confidence: of "confidence": "probability" (default), "margin", "negative_entropy" or "processed_probability",
            which is what temperature, nucleus and the like make of the first.
        tokens_per_step: of "confidence" and "sequential": reveal so many, with a `confidence_threshold` at least.
        sub_block_size: of "confidence": denoise parts of so many tokens in turn, a block's first token before them.
        new_block: begin a block right after each prompt, whose own last block ends there; False by default.
        entropy_bound: of "entropy_bound": the most that the entropies of tokens which are revealed together may sum up
            to, less the largest of them, in nats; 0 by default.
        seed: row i of the batch, `num_return_sequences` included, draws from a generator of its own with this seed +
            i, or with the i-th of a list. So it gets the tokens that it would get alone, and no other generator is
            touched. By default all rows draw from torch's global generator.
        guidance_scale: Transformers' argument: with `negative_prompt_ids` (by default the last token of each prompt),
            scores are `guidance_scale * prompt + (1 - guidance_scale) * negative prompt`; see `Guidance`.
        infill: fill the mask tokens in the prompts, from both sides within their block and from the left across
            blocks; every other token stays. Nothing is written after the prompts unless `max_new_tokens` is given.
        output_reveal: return which forward revealed each token, and the token's probability then.
        entropy_stop_threshold: end a row when its last `entropy_stop_window` tokens, as a distribution over ids, have
            less entropy than this, in nats (arXiv 2503.09573 takes 4.0 and 256).
        entropy_stop_window: tokens that the entropy is computed over; 256 by default.
        kwargs: arguments of `GenerationConfig`.

    Raises:
        ValueError: a value breaks its rule; the message names the argument, the value and the rule.
    """

    def __init__(self, **kwargs: Any):
        for name in argument_rules():
            setattr(self, name, kwargs.get(name))
        super().__init__(**kwargs)

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        return GenerationConfig._get_default_generation_params() | {
            "do_sample": True,
            "top_k": 0,
            "sampler": "first_hitting",
            "infill": False,
            "new_block": False,
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
        """As `GenerationConfig.validate`, the arguments of this class included; raises the ValueError of the class."""
        checked = copy.copy(self)
        # Sampling is what happens unless it is turned off, and a `top_k` of 0 is none that this would contradict.
        checked.do_sample, checked.top_k = self.do_sample is not False, self.top_k or None
        super(BD3LMGenerationConfig, checked).validate(strict=strict, user_set_attributes=user_set_attributes)
        for name, (holds, rule) in argument_rules().items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"`{name}` must be {rule}, but got {value!r}.")
        threshold, steps, per_step = self.confidence_threshold, self.denoising_steps, self.tokens_per_step
        if steps is not None and threshold is not None:
            rule = "are two rules of the 'confidence' sampler of which one must be chosen"
            raise ValueError(f"`denoising_steps` and `confidence_threshold` {rule}, but got {steps} and {threshold}.")
        if steps is not None and per_step is not None:
            rule = "None with `tokens_per_step`, which is another rule of how many tokens a step reveals"
            raise ValueError(f"`denoising_steps` must be {rule}, but got {steps} and {per_step}.")
        if self.sub_block_size is not None and threshold is None and per_step is None:
            rule = "`confidence_threshold` or `tokens_per_step`, which hold within a part of a block"
            raise ValueError(f"`sub_block_size` must go with {rule}, but got {self.sub_block_size} with neither.")
        if threshold is not None and self.confidence == "negative_entropy":
            got = f"{threshold} with `confidence` 'negative_entropy'"
            raise ValueError(f"`confidence_threshold` is a probability or a margin, but got {got}.")

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if isinstance(self.sampler, Sampler):
            output["sampler"] = type(self.sampler).__name__
        return output

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Raises a ValueError where `sampler` is an object, of which no more than a name could be saved."""
        if isinstance(self.sampler, Sampler):
            got = f"a {type(self.sampler).__name__}; add its class to SAMPLERS and give the name"
            raise ValueError(f"`sampler` must be a name in SAMPLERS to be saved, but got {got}.")
        saved = copy.deepcopy(self)
        # Who reads the file without this class would take its sampling arguments for a mistake.
        saved.do_sample = self.do_sample is not False
        super(BD3LMGenerationConfig, saved).save_pretrained(*args, **kwargs)

    def make_sampler(self, block_size: int, noise_schedule: str) -> Sampler:
        """
        The sampler of one block, by default of `block_size` steps, and of the model's `noise_schedule`; raises a
        ValueError where an argument was set that the chosen sampler does not take.
        """
        takes = () if isinstance(self.sampler, Sampler) else SAMPLER_ARGUMENTS.get(self.sampler, ())
        arguments = sorted({name for names in SAMPLER_ARGUMENTS.values() for name in names})
        given = {name: value for name in arguments if (value := getattr(self, name)) is not None}
        for name, value in given.items():
            if name not in takes:
                owners = " or ".join(repr(sampler) for sampler, names in SAMPLER_ARGUMENTS.items() if name in names)
                got = f"{value!r} with `sampler` {self.sampler!r}"
                raise ValueError(f"`{name}` is an argument of the sampler {owners}, but got {got}.")
        if isinstance(self.sampler, Sampler):
            return copy.deepcopy(self.sampler)
        defaults = {"noise_schedule": noise_schedule, "entropy_bound": 0.0}
        if self.confidence_threshold is None and self.tokens_per_step is None:
            defaults["denoising_steps"] = block_size
        values = {name: value for name, value in (defaults | given).items() if name in takes}
        return SAMPLERS[self.sampler](**values)

    def row_seeds(self, batch_size: int) -> list[int] | None:
        """The seed of each of `batch_size` rows, None without; raises a ValueError for a list of another length."""
        if self.seed is None:
            # Greedy tokens too may be revealed in an order that is drawn.
            return None if self.do_sample else [0] * batch_size
        if not isinstance(self.seed, list):
            return [self.seed + row for row in range(batch_size)]
        if len(self.seed) != batch_size:
            rule = f"one integer or one for each of the {batch_size} rows"
            raise ValueError(f"`seed` must be {rule}, but got {len(self.seed)}.")
        return self.seed


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
        rule = "called in place of `generate_batch` and continuous batching, which write one token after the other"
        got = f"a {type(self).__name__}, whose blocks are denoised; it takes prompts of any lengths in one batch"
        raise ValueError(f"`generate` must be {rule}, but got {got}.")

    @staticmethod
    def _check_mode(generation_mode: GenerationMode, generation_config: GenerationConfig) -> None:
        if generation_config.cache_implementation == "paged":
            raise ValueError("`cache_implementation` must not be 'paged', which is continuous batching; leave it out.")
        mode = generation_mode.value
        if mode in ("sample", "greedy_search") and generation_config.penalty_alpha:
            # Transformers ignores it when it samples, which here is the default.
            mode = "contrastive_search"
        if mode not in ("sample", "greedy_search"):
            rule = "asked to sample or to be greedy, since blocks are denoised and no prefix grows by one token"
            got = f"arguments of {mode.replace('_', ' ')}; `sampler` says how blocks are denoised"
            raise ValueError(f"`generate` must be {rule}, but got {got}.")

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs) -> None:
        self._check_mode(generation_mode, generation_config)
        for name in STATES:
            if getattr(generation_config, name):
                raise ValueError(f"`{name}` must be False in `generate`, but got True; call the model for them.")
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs(model_kwargs)
        # What the generation config asks for, the outputs, is checked with it.
        known = {"input_ids", "inputs_embeds", "attention_mask", "use_cache", "cache", "past_key_values", *STATES}
        if surplus := sorted(name for name, value in model_kwargs.items() if value is not None and name not in known):
            takes = f"counts positions and draws noise itself and takes no {surplus}, which `forward` does"
            raise ValueError(f"`generate` {takes}.")

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
        if type(cache) is DynamicCache and not cache.offloading and not is_given:
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
        is_guided, scale = len(processors) < len(all_processors), generation_config.guidance_scale
        if negative_ids is not None and not is_guided:
            rule = "guide only with a `guidance_scale` other than 1"
            raise ValueError(f"`negative_prompt_ids` {rule}, but got {scale}.")
        if not is_guided:
            return processors
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
                longest = max(input_ids.shape[1], guidance.negative_ids.shape[1])
                num_columns = longest + num_new + 2 * config.block_size
                cache = StaticCache(config=config.get_text_config(decoder=True), max_cache_len=num_columns)
                read_whole_text(cache, num_columns)
        denoiser = self._denoiser(canvas, generation_config, logits_processor, cache, guidance)
        progress = RowProgress(canvas, generation_config, stopping_criteria, streamer)
        for stage in range(canvas.num_stages):
            # 2. Denoise one block of every row, 3. see where rows end.
            columns = canvas.columns(stage)
            denoiser.denoise_block(stage, columns, progress)
            goes_on = progress.finish_block(columns, denoiser.predictor)
            denoiser.append_block(columns)
            if not goes_on:
                break
        # 4. Cut the rows where they ended.
        sequences, cache = progress.finish(), denoiser.release()
        if not generation_config.return_dict_in_generate:
            return sequences
        noted = denoiser.record.of_sequences(progress, sequences.shape[1])
        return BD3LMGenerateOutput(sequences=sequences, cache=cache, **noted)
