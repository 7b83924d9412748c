"""From what a visitor types and chooses to arguments of `generate`, and from its frames to what is shown."""

import functools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .drawing import draw_error, draw_figures, draw_legend, draw_text
from .frames import watch
from .likelihood import likelihood_of_new_tokens


# What marks a gap, beside the tokenizer's own mask token.
GAP = "___"
SAMPLERS = {
    "first_hitting": "One token per forward, in random order: the model's own distribution.",
    "ancestral": "What the reverse process reveals in so many steps.",
    "confidence": "The surest tokens first, in so many steps or wherever the model is sure enough.",
    "sequential": "From left to right, in so many steps or one token at a time.",
    "entropy_bound": "The surest tokens, as long as their summed entropy stays within a bound.",
}
# Which samplers take an argument.
TAKEN_BY = {
    "denoising_steps": ("ancestral", "confidence", "sequential"),
    "remask_cap": ("ancestral",),
    "confidence_threshold": ("confidence",),
    "entropy_bound": ("entropy_bound",),
}
LARGEST_SEED = 2**31 - 1
# More of them would let one visitor hold the model, and its memory, for as long as they like.
MOST_STEPS = 1000
# Of a text that is sent, before anything is done with it.
MOST_CHARACTERS = 20_000
# Given and new ones together: the perplexity compares all pairs of them, and each step draws all of them.
MOST_TOKENS = 2048
MOST_GAPS = 100
LIMITS = (
    f"Takes up to {MOST_CHARACTERS:,} characters and {MOST_GAPS} gaps, and {MOST_TOKENS:,} tokens, the new ones among "
    "them."
)

# The text, its legend and its figures.
Shown = tuple[str, str, str]


def shows_errors(function: Callable[..., Iterator[Shown]]) -> Callable[..., Iterator[Shown]]:
    """Shows what is refused as a message in place of the text."""

    @functools.wraps(function)
    def shown(*args: Any) -> Iterator[Shown]:
        try:
            yield from function(*args)
        except ValueError as error:
            yield draw_error(str(error)), "", ""

    return shown


class Writer:
    """
    A model that writes for visitors, one after the other.

    What it is asked for ends in `choices`: the sampler, its arguments in the order of `TAKEN_BY` (those that the
    sampler does not take count for nothing), temperature, top_p, seed and the seconds that a step is shown at least. A
    number may come as a text, empty where there is none.

    Args:
        pipeline: a "text-infilling" pipeline, with the model and its tokenizer.
    """

    def __init__(self, pipeline: Any):
        self.pipeline, self.model, self.tokenizer = pipeline, pipeline.model, pipeline.tokenizer

    @shows_errors
    def write(self, prompt: str, max_new_tokens: int, *choices: Any) -> Iterator[Shown]:
        """Continues a prompt; yields what to show after each step."""
        check_at_most(MOST_CHARACTERS, "characters", prompt=len(prompt or ""))
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        bos_token_id = self.tokenizer.bos_token_id
        if bos_token_id is not None and ids[:1] != [bos_token_id]:
            ids = [bos_token_id, *ids]
        check_at_most(MOST_TOKENS, "tokens", prompt=len(ids), max_new_tokens=int(max_new_tokens))
        input_ids = torch.tensor([ids], dtype=torch.long)
        yield from self._show(input_ids, {"max_new_tokens": int(max_new_tokens)}, *choices)

    @shows_errors
    def fill(self, text: str, gap_length: int, *choices: Any) -> Iterator[Shown]:
        """Fills the gaps of a text, each with so many tokens; yields what to show after each step."""
        check_at_most(MOST_CHARACTERS, "characters", text=len(text or ""))
        by_token = self.tokenizer.mask_token in text
        marks = {} if by_token else {"placeholder": GAP, "gap_length": int(gap_length)}
        if not by_token:
            check_at_most(MOST_GAPS, "gaps", text=text.count(GAP))
            check_at_most(MOST_TOKENS, "tokens", gap_length=text.count(GAP) * int(gap_length))
        input_ids = self.pipeline.preprocess(text, **marks)["input_ids"]
        check_at_most(MOST_TOKENS, "tokens", text=input_ids.shape[1])
        is_gap = input_ids[0] == self.tokenizer.mask_token_id
        check_at_most(MOST_GAPS, "gaps", text=int(is_gap[0]) + int((is_gap[1:] & ~is_gap[:-1]).sum()))
        special_ids = sorted(set(self.tokenizer.all_special_ids))
        yield from self._show(input_ids, {"infill": True, "suppress_tokens": special_ids}, *choices)

    def _show(self, input_ids: torch.Tensor, options: dict[str, Any], *choices: Any) -> Iterator[Shown]:
        *chosen, pause = choices
        config, options = self.model.config, options | options_of(*chosen)
        forwards_per_block = most_forwards(config.block_size, options)
        legend = draw_legend(forwards_per_block)
        begins_with_bos = input_ids[0, :1].tolist() == [self.tokenizer.bos_token_id]
        draw = functools.partial(
            draw_text,
            tokenizer=self.tokenizer,
            mask_token_id=config.mask_token_id,
            block_size=config.block_size,
            forwards_per_block=forwards_per_block,
            num_hidden=int(begins_with_bos),
        )
        figures = functools.partial(draw_figures, mask_token_id=config.mask_token_id, seed=options["seed"])
        due = time.monotonic()
        for frame in watch(self.model, input_ids.to(self.model.device), **options):
            time.sleep(max(due - time.monotonic(), 0))
            due = time.monotonic() + pause
            yield draw(frame), legend, figures(frame)
        likelihood = likelihood_of_new_tokens(self.model, frame.tokens, ~frame.is_given)
        yield draw(frame), legend, figures(frame, likelihood)


def options_of(
    sampler: str,
    denoising_steps: str,
    remask_cap: float,
    confidence_threshold: str,
    entropy_bound: float,
    temperature: float,
    top_p: float,
    seed: str,
) -> dict[str, Any]:
    """
    The arguments of `generate` that the page's choices mean, with a seed.

    Raises:
        ValueError: a choice is no number, or too large for a page.
    """
    steps = number_of("denoising_steps", denoising_steps, int)
    if sampler in TAKEN_BY["denoising_steps"] and steps is not None and steps > MOST_STEPS:
        raise ValueError(f"`denoising_steps` must be at most {MOST_STEPS} here, but got {steps}.")
    arguments = {
        "denoising_steps": steps,
        "remask_cap": remask_cap or None,
        "confidence_threshold": number_of("confidence_threshold", confidence_threshold, float),
        "entropy_bound": entropy_bound,
    }
    options = {"sampler": sampler, "seed": number_of("seed", seed, int)}
    options |= {name: value for name, value in arguments.items() if sampler in TAKEN_BY[name]}
    options |= {"temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    if options["seed"] is None:
        options["seed"] = random.randint(0, LARGEST_SEED)
    return options


def check_at_most(limit: int, unit: str, **sizes: int) -> None:
    """
    Raises a ValueError where the sizes of what was sent, by name, are together beyond the page's limit, or negative.
    """
    names = " and ".join(f"`{name}`" for name in sizes)
    if sum(sizes.values()) > limit or min(sizes.values()) < 0:
        parts = " and ".join(f"{size:,}" for size in sizes.values())
        together = " together" if len(sizes) > 1 else ""
        raise ValueError(f"{names} must have at most {limit:,} {unit}{together} on this page, but got {parts}.")


def number_of(name: str, value: str | float | None, kind: type) -> Any:
    """
    The number that a text says, None where it is empty.

    Raises:
        ValueError: it says none of this kind.
    """
    text = "" if value is None else str(value).strip()
    try:
        return kind(text) if text else None
    except ValueError:
        noun = "an integer" if kind is int else "a number"
        raise ValueError(f"`{name}` must be {noun} or empty, but got {value!r}.") from None


def most_forwards(block_size: int, options: dict[str, Any]) -> int:
    """How many forwards a block takes at most, where `generate` is called with these options."""
    steps = options.get("denoising_steps") or block_size
    # What is masked again is revealed again; without that, each forward reveals a token.
    return max(1, steps if options.get("remask_cap") else min(steps, block_size))
