"""From texts to the ids that a model reads, and from the ids that it writes to texts."""

import threading
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ..modeling.infilling_block_diffusion import TextInfillingPipeline
from .protocol import Gaps, Message


# Tokens of the prompt that a text is decoded with, since a tokenizer may drop the space before the first.
CONTEXT = 8


class Texts:
    """
    A model's tokenizer, which several threads may use.

    Args:
        model: a block diffusion language model.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any):
        self.tokenizer, self.vocab_size = tokenizer, model.config.vocab_size
        self.mask_token_id = model.config.mask_token_id
        self._pipeline = TextInfillingPipeline(model=model, tokenizer=tokenizer)
        # A tokenizer that encodes changes what is its own.
        self._lock = threading.Lock()

    def encode(self, prompt: str | list[int]) -> list[int]:
        """
        The ids of a prompt, BOS in front as in training; ids are taken as they are.

        Raises:
            ValueError: ids that the model does not have.
        """
        if isinstance(prompt, str):
            with self._lock:
                ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
            bos = self.tokenizer.bos_token_id
            ids = ids if bos is None or ids[:1] == [bos] else [bos, *ids]
        else:
            ids = list(prompt)
            if outside := [token for token in ids if token >= self.vocab_size]:
                raise ValueError(f"`prompt` must be of ids in [0, {self.vocab_size}), but got {outside[0]}.")
        if self.mask_token_id in ids:
            raise ValueError("`prompt` must not hold the mask token, but got it; `infill` fills gaps.")
        return ids

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """
        The ids of a chat by the model's template, up to where the answer begins.

        Raises:
            ValueError: the tokenizer has no template, or the template refuses the chat.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError("`messages` need a chat template, but got a model without one; completions work.")
        chat = [message.as_template_takes_it() for message in messages]
        try:
            with self._lock:
                encoded = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        except Exception as error:
            # Templates raise errors of their own for roles that they do not know, and the like.
            raise ValueError(f"`messages` must be as the chat template takes them, but got: {error}") from error
        ids = list(encoded["input_ids"])
        if self.mask_token_id in ids:
            raise ValueError("`messages` must not hold the mask token, but got it.")
        return ids

    def encode_gaps(self, text: str, gaps: Gaps | bool, max_length: int) -> dict[str, Any]:
        """
        What `TextInfillingPipeline.preprocess` gives for a text.

        Raises:
            ValueError: its own, or the gaps alone are longer than `max_length` tokens.
        """
        gaps = Gaps() if isinstance(gaps, bool) else gaps
        # Before anything is made of that length.
        length = gaps.gap_length
        num_gaps = text.count(gaps.placeholder or self.tokenizer.mask_token)
        total = sum(length) if isinstance(length, list) else num_gaps * length
        if total > max_length:
            raise ValueError(f"`gap_length` must be of at most {max_length} tokens together, but got {total}.")
        with self._lock:
            return self._pipeline.preprocess(text, gaps.placeholder, gaps.gap_length)

    def filled(self, inputs: dict[str, Any], token_ids: list[int], log_probabilities: list[float]) -> dict[str, Any]:
        """The filled text and its spans, as `TextInfillingPipeline` gives them."""
        sequences = torch.tensor(token_ids)[None, None]
        probabilities = torch.tensor(log_probabilities, dtype=torch.float64).exp()[None, None]
        outputs = {**inputs, "sequences": sequences, "token_probabilities": probabilities}
        return self._pipeline.postprocess(outputs)

    @property
    def special_ids(self) -> list[int]:
        """Tokens that are not written into a gap."""
        return sorted(set(self.tokenizer.all_special_ids))

    def stopping_criteria(self, stops: list[str]) -> StoppingCriteriaList | None:
        """What ends a text at the first of some strings."""
        return StoppingCriteriaList([StopTexts(self.tokenizer, stops)]) if stops else None

    def decode(self, prompt_ids: list[int], ids: list[int], special: bool = False) -> str:
        """The text of new `ids` after a prompt; without special tokens, unless they are asked for."""
        options = {"skip_special_tokens": not special, "clean_up_tokenization_spaces": False}
        context = prompt_ids[-CONTEXT:]
        before = self.tokenizer.decode(context, **options)
        text = self.tokenizer.decode([*context, *ids], **options)
        # A character of which the prompt has a part is whole now.
        return text[len(before) :] if text.startswith(before) else self.tokenizer.decode(ids, **options)

    def writer(self, prompt_ids: list[int], stops: list[str]) -> "TextWriter":
        """For a text that comes bit by bit."""
        return TextWriter(self, prompt_ids, stops)


class StopTexts(StoppingCriteria):
    """
    Ends a text with the token that completes one of some strings, as `StopStringCriteria` of Transformers does. That
    one prepares the whole vocabulary for its strings: here each request may have others, and a few bytes would ask
    for gigabytes.

    Args:
        tokenizer: what decodes the texts.
        stops: the strings.
    """

    def __init__(self, tokenizer: Any, stops: list[str]):
        self.tokenizer, self.stops = tokenizer, stops
        # A token has a byte at least.
        self.num_read = max(len(stop.encode()) for stop in stops) + CONTEXT

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: Any) -> Tensor:
        """Whether each text `input_ids` [batch, length] ends [batch]."""
        ends = [self._ends(ids) for ids in input_ids[:, -self.num_read :].tolist()]
        return torch.tensor(ends, device=input_ids.device)

    def _ends(self, ids: list[int]) -> bool:
        # A character that lacks bytes is none yet.
        before, text = (self._decode(part).rstrip("\ufffd") for part in (ids[:-1], ids))
        return any(text.find(stop, max(len(before) - len(stop) + 1, 0)) >= 0 for stop in self.stops)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class TextWriter:
    """
    A text that comes in ids bit by bit, and goes out in characters that stay: nothing is given away of a character
    that lacks bytes, or of what may become a stop string.

    Attributes:
        text: what is given away so far.
        is_stopped: whether a stop string was met, where the text ends.
    """

    def __init__(self, texts: Texts, prompt_ids: list[int], stops: list[str]):
        self.texts, self.prompt_ids, self.stops = texts, prompt_ids, stops
        self.ids: list[int] = []
        self.text, self.is_stopped = "", False

    def add(self, ids: list[int], is_last: bool = False) -> str:
        """What the next `ids` add to the text; all that is left with `is_last`."""
        self.ids += ids
        if self.is_stopped:
            return ""
        text = self.texts.decode(self.prompt_ids, self.ids)
        ends = [index for stop in self.stops if (index := text.find(stop)) >= 0]
        if ends:
            text, self.is_stopped = text[: min(ends)], True
        elif not is_last:
            text = self._that_stays(text)
        new, self.text = text[len(self.text) :], text if len(text) > len(self.text) else self.text
        return new

    def _that_stays(self, text: str) -> str:
        text = text.rstrip("\ufffd")
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        for start in range(max(len(text) - longest, 0), len(text)):
            if any(stop.startswith(text[start:]) for stop in self.stops):
                return text[:start]
        return text

    def tokens(self) -> list[str]:
        """The text of each id, by itself."""
        return [self.texts.tokenizer.decode([token]) for token in self.ids]
