"""What clients send, as OpenAI's API has it, and what it means for the engine."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..modeling.configuration_bd3lm import NOISE_SCHEDULE_NAMES
from ..modeling.generation_block_diffusion import BD3LMGenerationConfig
from ..modeling.prediction_block_diffusion import CONFIDENCES
from ..modeling.samplers_block_diffusion import SAMPLERS


# OpenAI's own for completions.
DEFAULT_MAX_TOKENS = 16
LARGEST_N, MOST_STOPS, LONGEST_STOP, MOST_BIASES = 16, 16, 200, 300
# A step that reveals nothing costs no forward, but time.
MOST_STEPS = 1024

Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[Finite, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
# What OpenAI's API has and this one does not may be given at the value that changes nothing.
Zero = Annotated[Finite, Field(ge=0, le=0)]
# The first fault of a list is told, and a large one shall not be looked through for all of them.
A_LIST = Field(min_length=1, fail_fast=True)
Ids = Annotated[list[TokenId], A_LIST]


class Strict(BaseModel):
    """An unknown field is a mistake, which is told."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Gaps(Strict):
    """How the gaps of a text are marked: see `TextInfillingPipeline`."""

    placeholder: Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)] | None = None
    gap_length: PositiveInt | Annotated[list[PositiveInt], Field(max_length=1000), A_LIST] = 1


class BlockDiffusionOptions(Strict):
    """What OpenAI's API has no words for: arguments of `generate`, by their names there."""

    sampler: str | None = None
    denoising_steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    confidence_threshold: Annotated[Finite, Field(gt=0, le=1)] | None = None
    confidence: Literal[CONFIDENCES] | None = None
    tokens_per_step: PositiveInt | None = None
    sub_block_size: PositiveInt | None = None
    entropy_bound: Annotated[Finite, Field(ge=0)] | None = None
    noise_schedule: Literal[NOISE_SCHEDULE_NAMES] | None = None
    remask_cap: Share | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0, le=100)] | None = None
    min_new_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    infill: bool | Gaps = False
    stream_drafts: bool = False

    @model_validator(mode="after")
    def _check(self) -> "BlockDiffusionOptions":
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise ValueError(f"`sampler` must be one of {', '.join(SAMPLERS)}, but got {self.sampler!r}.")
        return self

    def of_generate(self) -> dict[str, Any]:
        """The arguments of `generate` that were given."""
        own = {"infill", "stream_drafts"}
        return {name: value for name, value in self.model_dump(exclude=own).items() if value is not None}


class StreamOptions(Strict):
    """`include_usage` puts a last chunk with the usage at the end of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class SamplingRequest(Strict):
    """What all requests share."""

    model: str
    n: Annotated[int, Field(ge=1, le=LARGEST_N)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1 - LARGEST_N)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    logit_bias: dict[str, Annotated[Finite, Field(ge=-100, le=100)]] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    user: str | None = None
    block_diffusion: BlockDiffusionOptions = Field(default_factory=BlockDiffusionOptions)

    @model_validator(mode="after")
    def _check(self) -> "SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` must go with `stream`, but got it without.")
        if self.block_diffusion.stream_drafts and not self.stream:
            raise ValueError("`stream_drafts` must go with `stream`, but got it without.")
        if len(self.logit_bias or ()) > MOST_BIASES:
            raise ValueError(f"`logit_bias` must have at most {MOST_BIASES} tokens, but got {len(self.logit_bias)}.")
        for token in self.logit_bias or ():
            if not token.isascii() or not token.isdecimal() or len(token) > 10:
                raise ValueError(f"`logit_bias` must have ids of tokens as keys, but got {token[:20]!r}.")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def of_generate(self, vocab_size: int) -> dict[str, Any]:
        """
        The arguments of `generate` for a model of so many tokens, checked as it checks them.

        Raises:
            ValueError: arguments that it would refuse.
        """
        options = self.block_diffusion.of_generate()
        if self.temperature == 0:
            options["do_sample"] = False
        elif self.temperature is not None:
            options |= {"do_sample": True, "temperature": self.temperature}
        if self.top_p is not None and self.temperature != 0:
            options["top_p"] = self.top_p
        if self.logit_bias:
            options["sequence_bias"] = {(int(token),): float(bias) for token, bias in self.logit_bias.items()}
            if outside := [token for token in self.logit_bias if int(token) >= vocab_size]:
                raise ValueError(f"`logit_bias` must be of tokens in [0, {vocab_size}), but got {outside[0]}.")
        if self.seed is not None:
            options["seed"] = self.seed
        if options.get("do_sample") is False:
            # They change nothing where the likeliest token is taken, and Transformers tells of that.
            options = {name: value for name, value in options.items() if name not in ("top_k", "min_p")}
        BD3LMGenerationConfig(**options)
        return options


class Message(BaseModel):
    """One turn of a chat; what else it has is for the model's template."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list["TextPart"], Field(fail_fast=True)] | None = None

    def as_template_takes_it(self) -> dict[str, Any]:
        """The turn with its content as one text."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return self.model_dump() | {"content": content or ""}


class TextPart(Strict):
    """A part of a message; images and sounds are none that this model reads."""

    type: Literal["text"]
    text: str


class ChatRequest(SamplingRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(max_length=10_000), A_LIST]
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None

    @model_validator(mode="after")
    def _check_infill(self) -> "ChatRequest":
        if self.block_diffusion.infill:
            raise ValueError("`infill` must be False in a chat, but got it; completions and /v1/infill take it.")
        return self

    @property
    def limit(self) -> int | None:
        """At most so many new tokens; None is what fits."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(SamplingRequest):
    """`POST /v1/completions`."""

    prompt: str | Annotated[list[str], A_LIST] | Ids | Annotated[list[Ids], A_LIST] = ""
    max_tokens: PositiveInt = DEFAULT_MAX_TOKENS
    logprobs: Annotated[int, Field(ge=0, le=1)] | bool | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None

    @model_validator(mode="after")
    def _check_infill(self) -> "CompletionRequest":
        is_text = isinstance(self.prompt, str) or isinstance(self.prompt[0], str)
        if self.block_diffusion.infill and (self.stream or self.stops or self.echo or not is_text):
            raise ValueError("`infill` must go with a text, without `stream`, `stop` and `echo`, but got one of them.")
        if self.echo and self.logprobs:
            # Whoever asks for both means the likelihood of the prompt: lm-evaluation-harness, say.
            rule = "0 with `echo`, since the likelihood of a prompt is bounded by several forwards (`bd3lm evaluate`, "
            harness = "`python -m bd3lm_hf.evaluation.harness --model bd3lm`)"
            raise ValueError(f"`logprobs` must be {rule}{harness}, but got {self.logprobs}.")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, of which there may be one or several."""
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else self.prompt


class InfillRequest(SamplingRequest):
    """`POST /v1/infill`: fills the gaps of a text, or of several, in both directions."""

    text: str | Annotated[list[str], A_LIST]
    placeholder: Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)] | None = None
    gap_length: PositiveInt | Annotated[list[PositiveInt], Field(max_length=1000), A_LIST] = 1
    stream: Literal[False] = False
    stop: None = None

    def as_completion(self) -> CompletionRequest:
        """The same as a completion with the extension `infill`."""
        gaps = Gaps(placeholder=self.placeholder, gap_length=self.gap_length)
        options = self.block_diffusion.model_copy(update={"infill": gaps})
        fields = self.model_dump(exclude={"text", "placeholder", "gap_length", "block_diffusion"}, exclude_unset=True)
        return CompletionRequest(**fields, prompt=self.text, block_diffusion=options)


def fault_of(error: ValidationError) -> tuple[str, str]:
    """The first fault of what was sent: where it is, "" for the whole, and what is wrong."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return ".".join(str(part) for part in fault["loc"]), fault["msg"].removeprefix("Value error, ")
