"""The arguments of block-wise generation: what they are, what each must be, and the sampler that they ask for."""

import copy
from collections.abc import Callable
from typing import Any

from transformers import GenerationConfig

from .configuration_bd3lm import NOISE_SCHEDULE_NAMES
from .prediction_block_diffusion import CONFIDENCES
from .samplers_block_diffusion import SAMPLER_ARGUMENTS, SAMPLERS, Sampler


def is_integer(value: object, least: int) -> bool:
    """Whether this is an integer >= `least`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def argument_rules() -> dict[str, tuple[Callable[[Any], bool], str]]:
    """For each argument that [`BD3LMGenerationConfig`] adds or checks, a test of all values but None, and the rule."""
    share = (lambda value: isinstance(value, (int, float)) and 0 <= value <= 1, "a number in [0, 1]")
    count = (lambda value: is_integer(value, 1), "an integer >= 1")
    flag = (lambda value: isinstance(value, bool), "True or False")
    names = ", ".join(SAMPLERS)
    return {
        **dict.fromkeys(("top_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "remask_cap"), share),
        **dict.fromkeys(("denoising_steps", "tokens_per_step", "sub_block_size", "entropy_stop_window"), count),
        **dict.fromkeys(("new_block", "infill", "output_reveal"), flag),
        "no_repeat_ngram_size": (lambda value: is_integer(value, 0), "an integer >= 0"),
        "sampler": (lambda value: isinstance(value, Sampler) or value in [*SAMPLERS], f"one of {names}, or a Sampler"),
        "noise_schedule": (lambda value: value in NOISE_SCHEDULE_NAMES, f"one of {', '.join(NOISE_SCHEDULE_NAMES)}"),
        "confidence_threshold": (lambda value: 0 < value <= 1, "in (0, 1]"),
        "confidence": (lambda value: value in CONFIDENCES, f"one of {', '.join(CONFIDENCES)}"),
        "entropy_bound": (lambda value: value >= 0, "a number of nats >= 0"),
        "entropy_stop_threshold": (lambda value: value > 0, "a number of nats > 0"),
        "seed": (
            lambda value: all(is_integer(seed, 0) for seed in (value if isinstance(value, list) else [value])),
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
        threshold = self.confidence_threshold
        if self.denoising_steps is not None and threshold is not None:
            raise ValueError(
                "`denoising_steps` and `confidence_threshold` are two rules of the 'confidence' sampler of which one "
                f"must be chosen, but got {self.denoising_steps} and {threshold}."
            )
        if self.denoising_steps is not None and self.tokens_per_step is not None:
            raise ValueError(
                "`denoising_steps` must be None with `tokens_per_step`, which is another rule of how many tokens a "
                f"step reveals, but got {self.denoising_steps} and {self.tokens_per_step}."
            )
        if self.sub_block_size is not None and threshold is None and self.tokens_per_step is None:
            raise ValueError(
                "`sub_block_size` must go with `confidence_threshold` or `tokens_per_step`, which hold within a part "
                f"of a block, but got {self.sub_block_size} with neither."
            )
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
