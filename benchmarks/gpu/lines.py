"""The lines of the table: what is measured, and beside what."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace


ATTENTIONS = ("sdpa", "flex_attention")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Line:
    """
    One measurement.

    Attributes:
        part: "training" or "generation".
        network: "published" (that of the paper, beside GPT-2) or "adapted" (SmolLM2's, beside itself as it was).
        model: "autoregressive", "block diffusion", or "paper": the paper's formulation of the training step.
        is_fast: compiled training, or generation with `cache_implementation="static"`.
        attention: of training.
        num_texts: at once, in generation.
        block_size, arguments: of block diffusion; the arguments are those of `generate`, or of `compile_training`.
        note: what its name says of these.
    """

    part: str
    network: str
    model: str
    is_fast: bool = True
    attention: str = "sdpa"
    num_texts: int = 1
    block_size: int = 4
    arguments: dict = field(default_factory=dict)
    note: str = ""

    @property
    def name(self) -> str:
        how = {("training", True): "compiled", ("generation", True): "static", ("generation", False): "dynamic"}
        words = [self.model, how.get((self.part, self.is_fast), "uncompiled")]
        if self.part == "training" and self.model == "block diffusion":
            words.append(self.attention)
        if self.part == "generation":
            words.append(f"{self.num_texts} text{'s' * (self.num_texts > 1)}")
        return ", ".join([*words, *([self.note] if self.note else [])])

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from the others."""
        return self.part, self.network, self.name

    def compared_with(self, lines: Sequence["Line"], model: str = "autoregressive") -> "Line | None":
        """The line of another model that is alike in all else, if it has one."""
        alike = (self.part, self.network, self.is_fast, self.num_texts)
        return next(
            (
                line
                for line in lines
                if line.model == model and (line.part, line.network, line.is_fast, line.num_texts) == alike
            ),
            None,
        )


def compiled_way(text: str) -> Line:
    """
    A line of training from "ATTENTION:MODE[:BUDGET]": the attention, the mode of `torch.compile` and the memory budget
    of `compile_training`. Raises a ValueError for other texts.
    """
    try:
        attention, mode, *budget = text.split(":")
        arguments = {"memory_budget": float(budget[0])} if budget else {}
        if attention not in ATTENTIONS or mode not in MODES or len(budget) > 1:
            raise ValueError(text)
    except ValueError:
        rule = f"ATTENTION:MODE[:BUDGET] with {', '.join(ATTENTIONS)} and {', '.join(MODES)}"
        raise ValueError(f"`ways` must be of the form {rule}, but got {text!r}.") from None
    arguments |= {} if mode == "default" else {"mode": mode}
    note = ", ".join([mode, *(f"memory budget {number}" for number in budget)])
    return Line("training", "published", "block diffusion", attention=attention, arguments=arguments, note=note)


def training_lines(network: str) -> list[Line]:
    return [
        Line("training", network, "autoregressive"),
        Line("training", network, "block diffusion", attention="flex_attention"),
        Line("training", network, "paper"),
        Line("training", network, "block diffusion"),
        Line("training", network, "autoregressive", is_fast=False),
        Line("training", network, "block diffusion", is_fast=False),
    ]


def generation_lines(network: str, many: int) -> list[Line]:
    parallel = {
        "block_size": 16,
        "arguments": {"sampler": "confidence", "denoising_steps": 4},
        "note": "4 tokens a forward",
    }
    lines = []
    for num_texts, is_fast in ((1, True), (1, False), (many, True), (many, False)):
        how = {"is_fast": is_fast, "num_texts": num_texts}
        lines += [Line("generation", network, model, **how) for model in ("autoregressive", "block diffusion")]
        lines += [Line("generation", network, "block diffusion", **how, **parallel)] if is_fast else []
    return lines


def all_lines(networks: Sequence[str], parts: Sequence[str], many: int = 32, ways: Sequence[Line] = ()) -> list[Line]:
    """
    All lines of some networks and parts, those that matter most first.

    Args:
        networks: of "published" and "adapted".
        parts: of "training" and "generation".
        many: texts at once in the lines of generation that have several.
        ways: further ones to compile the training of the published network, as [`compiled_way`] makes them.
    """
    lines = []
    for network in networks:
        further = [replace(way, network=network) for way in ways]
        training, generation = training_lines(network) + further, generation_lines(network, many)
        # Training takes the memory of the device: what prepares beside it shall not be training too.
        for number, line in enumerate(training):
            lines += [line, *generation[2 * number : 2 * number + 2]]
        lines += generation[2 * len(training) :]
    # What runs as it is needs no other line, and is what is left out first.
    lines.sort(key=lambda line: line.part == "training" and not line.is_fast)
    return [line for line in lines if line.part in parts]
