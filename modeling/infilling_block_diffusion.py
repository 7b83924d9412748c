"""The pipeline "text-infilling": fills the gaps of texts, and says how sure the model was of each token."""

import copy
import itertools
import os.path
from typing import Any

import torch
from torch import Tensor
from transformers import Pipeline


TEXT_INFILLING = "text-infilling"
# What Transformers reads in config.json, for `pipeline(TEXT_INFILLING, model=..., trust_remote_code=True)`.
IMPLEMENTATION = f"{__name__.split('.')[-1]}.TextInfillingPipeline"
CUSTOM_PIPELINES = {TEXT_INFILLING: {"impl": IMPLEMENTATION, "pt": ["AutoModelForMaskedLM"], "type": "text"}}
# What infilling has `generate` do, and other arguments of it that infilling decides on by itself.
FIXED_ARGUMENTS = {"infill": True, "output_reveal": True, "return_dict_in_generate": True}
LENGTH_ARGUMENTS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")


class TextInfillingPipeline(Pipeline):
    """
    Fills the gaps of texts with a block diffusion model; every given token stays.

    A gap is one marker or several next to each other. A marker is the tokenizer's mask token, or `placeholder`, in the
    place of `gap_length` tokens: one number, by default 1, or a list of one for each marker of a text. A gap is filled
    from both sides within its block and from the left across blocks. Special tokens are not written into a gap, unless
    `suppress_tokens` says otherwise.

    ```python
    fill = pipeline("text-infilling", model="user/model", trust_remote_code=True)
    fill("def main(...):\\n    return ...", placeholder="...", gap_length=[2, 5], sampler="confidence")
    ```

    A call takes a text, or a list, generator or dataset of texts, of which `batch_size` are filled at once, and
    arguments of `generate`, but for those that say how long the text becomes. A text may come as a mapping {"text",
    "gap_length"}, with lengths of its own. For each text a call gives a dictionary, or with `num_return_sequences`
    above 1 a list of so many:

    - `text`: the filled text; with a tokenizer that gives back what it encodes, the given text between gaps.
    - `spans`: for each gap `start` and `end` (characters of `text`, the end excluded), `text`, `token_ids`,
      `token_scores` (the model's probability of each token when it was revealed, before temperature, nucleus and the
      like) and `score`, their geometric mean.

    `args` and `kwargs` are those of `Pipeline`, and as defaults those of the calls.

    Raises:
        ValueError: another kind of model; a tokenizer without the model's mask token; a text without a gap, or with
            marks of two kinds; lengths that don't fit the markers; an argument that says how long the text becomes.
    """

    _load_tokenizer = True
    _load_processor = _load_image_processor = _load_feature_extractor = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Remote code is imported once for the model and once for its pipeline, so that their classes differ.
        if not hasattr(self.model, "token_nats"):
            kind = type(self.model).__name__
            raise ValueError(f"`model` must be a block diffusion language model, but got a {kind}.")
        wanted = self.model.config.mask_token_id
        mask_token_id = None if self.tokenizer is None else self.tokenizer.mask_token_id
        if mask_token_id != wanted:
            raise ValueError(
                f"`tokenizer` must have the model's mask token, of id {wanted}, but its own is {mask_token_id}; "
                "`tokenizer.add_special_tokens({'mask_token': '[MASK]'})` adds one after the others."
            )
        # As `generate` has it.
        self.tokenizer.padding_side = "left"

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        names = ("placeholder", "gap_length")
        marks = {name: value for name in names if (value := kwargs.pop(name, None)) is not None}
        # Transformers keeps them in ways that change. Here they are those of `__init__`, which calls this first.
        if not hasattr(self, "generate_defaults"):
            self.generate_defaults, kwargs = kwargs, {}
        return marks, kwargs, {}

    def preprocess(self, inputs: Any, placeholder: str | None = None, gap_length: int | list[int] = 1) -> dict:
        """
        `input_ids` and `attention_mask` [1, length] of one text, its gaps masked and BOS in front as in training, and
        `num_added` [1], 1 if BOS was not there. `inputs`, `placeholder` and `gap_length`, and the ValueError, are
        those of the class.
        """
        tokenizer, text = self.tokenizer, inputs
        if isinstance(inputs, dict):
            if not {"text"} <= set(inputs) <= {"text", "gap_length"}:
                raise ValueError(f"`inputs` must have the keys 'text' and 'gap_length', but got {sorted(inputs)}.")
            text, gap_length = inputs["text"], inputs.get("gap_length", gap_length)
        if not isinstance(text, str):
            raise ValueError(f"`inputs` must be texts, but got a {type(text).__name__}.")
        text, num_masked = self._mask_gaps(text, placeholder, gap_length)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if (num_read := ids.count(tokenizer.mask_token_id)) != num_masked:
            fault = f"it reads {num_masked} of them as {num_read}; add it as a special token"
            raise ValueError(f"`tokenizer` must read {tokenizer.mask_token!r} as one token, but {fault}.")
        num_added = int(tokenizer.bos_token_id is not None and ids[0] != tokenizer.bos_token_id)
        ids = torch.tensor([[tokenizer.bos_token_id] * num_added + ids])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "num_added": torch.tensor([num_added])}

    def _mask_gaps(self, text: str, placeholder: str | None, gap_length: int | list[int]) -> tuple[str, int]:
        """The text with one mask token for each token to be written, and how many these are."""
        mask_token = self.tokenizer.mask_token
        marker = mask_token if placeholder is None else placeholder
        if not isinstance(marker, str) or not marker:
            raise ValueError(f"`placeholder` must be a string of at least one character, but got {marker!r}.")
        parts = text.split(marker)
        if len(parts) == 1:
            raise ValueError(f"`inputs` must mark gaps by {marker!r}, but got a text without one: {text[:80]!r}")
        if marker != mask_token and mask_token in text:
            got = f"a text that holds {mask_token!r} as well: {text[:80]!r}"
            raise ValueError(f"`inputs` must mark gaps by the `placeholder` {marker!r} alone, but got {got}")
        num_gaps = len(parts) - 1
        lengths = gap_length if isinstance(gap_length, (list, tuple)) else [gap_length] * num_gaps
        if len(lengths) != num_gaps or not all(type(length) is int and length >= 1 for length in lengths):
            rule = f"an integer >= 1, or a list of one for each of the {num_gaps} marks in the text"
            raise ValueError(f"`gap_length` must be {rule}, but got {gap_length!r}.")
        gaps = [mask_token * length for length in lengths]
        return "".join(itertools.chain.from_iterable(zip(parts, [*gaps, ""]))), sum(lengths)

    def _forward(self, model_inputs: dict[str, Tensor], **generate_kwargs: Any) -> dict[str, Tensor]:
        # As in the pipelines of Transformers, a configuration that a call is given takes the place of the defaults.
        if generate_kwargs.get("generation_config") is None:
            generate_kwargs = {**self.generate_defaults, **generate_kwargs}
        decided = sorted((*FIXED_ARGUMENTS, *LENGTH_ARGUMENTS))
        if refused := [name for name in decided if generate_kwargs.get(name) is not None]:
            reason = "gaps are filled and nothing is written after the text; 'text-generation' continues texts"
            raise ValueError(f"`{refused[0]}` must not be given: {reason}.")
        config = generate_kwargs.pop("generation_config", None)
        special_ids, pad_token_id = sorted(set(self.tokenizer.all_special_ids)), self.tokenizer.pad_token_id
        defaults = {"suppress_tokens": special_ids, "pad_token_id": pad_token_id}
        places = [generate_kwargs, vars(self.model.generation_config), {} if config is None else vars(config)]
        fixed = {name: value for name, value in defaults.items() if all(place.get(name) is None for place in places)}
        fixed |= FIXED_ARGUMENTS
        if config is None:
            generate_kwargs.update(fixed)
        else:
            config = copy.deepcopy(self.model.generation_config_class.from_generation_config(config))
            config.update(**fixed)
            generate_kwargs["generation_config"] = config
        input_ids, attention_mask = model_inputs["input_ids"], model_inputs["attention_mask"]
        output = self.model.generate(input_ids, attention_mask=attention_mask, **generate_kwargs)
        # The model's own configuration may ask for a continuation.
        parts = {name: output[name][:, : input_ids.shape[1]] for name in ("sequences", "token_probabilities")}
        return {**model_inputs, **{name: part.unflatten(0, (len(input_ids), -1)) for name, part in parts.items()}}

    def postprocess(self, model_outputs: dict[str, Tensor]) -> dict[str, Any] | list[dict[str, Any]]:
        """The filled text and its spans, of one input or each of its `num_return_sequences`."""
        start = int((model_outputs["attention_mask"] == 0).sum() + model_outputs["num_added"])
        is_gap = (model_outputs["input_ids"][0, start:] == self.tokenizer.mask_token_id).tolist()
        filled = zip(model_outputs["sequences"][0, :, start:], model_outputs["token_probabilities"][0, :, start:])
        results = [self._describe(ids.tolist(), is_gap, scores.double()) for ids, scores in filled]
        return results[0] if len(results) == 1 else results

    def _describe(self, ids: list[int], is_gap: list[bool], probabilities: Tensor) -> dict[str, Any]:
        text = self._decode(ids)
        spans, end = [], 0
        for in_gap, run in itertools.groupby(is_gap):
            first, end = end, end + len(list(run))
            if in_gap:
                # A decoded beginning may end in a character of which bytes are missing.
                beginnings = (self._decode(ids[:index]) for index in (first, end))
                start_char, end_char = (len(os.path.commonprefix([text, beginning])) for beginning in beginnings)
                scores = probabilities[first:end]
                span = {"start": start_char, "end": end_char, "text": text[start_char:end_char]}
                span |= {"score": scores.log().mean().exp().item(), "token_ids": ids[first:end]}
                spans.append(span | {"token_scores": scores.tolist()})
        return {"text": text, "spans": spans}

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
