"""Block-wise generation: `generate` of Transformers, with a denoising loop in place of one token after the other."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import ModelOutput

from .denoising_bd3lm import Canvas, DenoisingRun, GeneratedRows
from .samplers_bd3lm import SAMPLERS, ConfidenceSampler, Sampler


class BD3LMGenerationConfig(GenerationConfig):
    """
    `GenerationConfig` with the arguments of block-wise generation.

    Unlike there, `do_sample` is True and `top_k` is off by default, so that samples follow the model's own
    distribution.

    Args:
        sampler: "first_hitting" (default) or "confidence"; see `samplers_bd3lm.py`.
        denoising_steps: steps per block of the "confidence" sampler; by default as many as a block has tokens.
        confidence_threshold: for the "confidence" sampler: reveal every token above this probability, in (0, 1].
        entropy_stop_threshold: end a row when its last `entropy_stop_window` tokens, as a distribution over ids, have
            less entropy than this, in nats (arXiv 2503.09573 takes 4.0 and 256).
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
        generation_config = cls.from_generation_config(GenerationConfig.from_model_config(model_config))
        # Under this flag Transformers drops the fields that it does not know when it loads the config again.
        generation_config._from_model_config = False
        return generation_config

    @classmethod
    def from_generation_config(cls, generation_config: GenerationConfig) -> "BD3LMGenerationConfig":
        """Raises a plain config, which is what loading yields, to this class."""
        if isinstance(generation_config, cls):
            return generation_config
        raised = cls()
        # What is None here was dropped on saving, and is no value to take over.
        raised.__dict__.update({key: value for key, value in vars(generation_config).items() if value is not None})
        raised.validate(user_set_attributes=set())
        return raised

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        if self.top_k == 0:
            # Off, and so no sampling argument that `do_sample=False` would contradict.
            user_set_attributes = set(user_set_attributes or vars(self)) - {"top_k"}
        super().validate(strict=strict, user_set_attributes=user_set_attributes)

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
                "`denoising_steps` and `confidence_threshold` are two rules of the 'confidence' sampler of which one "
                f"must be chosen, but got {self.denoising_steps} and {threshold}."
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
                    f"`{field}` is an argument of the sampler 'confidence', but got {getattr(self, field)!r} with "
                    f"`sampler` {self.sampler!r}."
                )
        return SAMPLERS[self.sampler]()


@dataclass
class BD3LMGenerateOutput(ModelOutput):
    """
    Output of `generate(..., return_dict_in_generate=True)`.

    Args:
        sequences: prompts and generated tokens [batch, prompt length + generated length].
        scores: with `output_scores`, for each generated column the processed scores its token was drawn from [batch,
            vocab].
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


class BlockDiffusionGenerationMixin(GenerationMixin):
    """
    `generate` for block diffusion models.

    Everything around the loop is Transformers' own: arguments, caches, processors, stopping criteria, streamers.

    1. Lay the rows out by blocks, each row's counted in its own positions.
    2. For every block, until nothing in it is masked:
       a. run the network on the block against the cache; the first such pass also commits the finished blocks,
       b. predict tokens at the positions that the sampler asks for,
       c. reveal those that the sampler chooses.
    3. Show the finished block to the stopping criteria token by token, as an autoregressive model would have, and to
       the streamer.
    4. Cut the rows where they ended.
    """

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
                f"`num_beams` must be 1, but got {generation_config.num_beams}: a block is denoised in parallel, so "
                "there are no prefixes to keep a beam of."
            )
        if generation_mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
            raise ValueError(
                "`generate` denoises blocks by sampling or greedily, but its arguments ask for "
                f"{generation_mode.value!r}."
            )
        if generation_config.guidance_scale not in (None, 1.0):
            raise ValueError(
                f"`guidance_scale` must be 1 or None, but got {generation_config.guidance_scale}: Transformers' "
                "processor reads the prediction of a next token, which this model does not make."
            )
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(generation_config, name):
                raise ValueError(f"`{name}` must be False in `generate`, but got True; call the model for them.")
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs(model_kwargs)
        known = {"input_ids", "inputs_embeds", "attention_mask", "past_key_values", "use_cache"}
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

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                # The window slides: text longer than the context is nothing to warn of.
                criterion.max_position_embeddings = None
        return criteria

    def _check_prompts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        vocab_size, mask_token_id = self.config.vocab_size, self.config.mask_token_id
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                "`input_ids` must be of shape [batch, length] with at least one token, but got "
                f"{list(input_ids.shape)}; an empty prompt is the BOS token alone."
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
                    "`attention_mask` must be left-padded (zeros, then ones, in each row), but got a 0 behind a 1; "
                    "set `tokenizer.padding_side = 'left'`."
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
            run.append_block(stage)
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
