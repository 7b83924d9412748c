"""Classifier-free guidance: away from what the model would write after a negative prompt."""

import torch
from torch import Tensor
from transformers import LogitsProcessor


class Guidance(LogitsProcessor):
    """
    Scores of the prompt against those of a negative prompt, both followed by the same new tokens (arXiv 2306.17806; up
    to a constant this is the same of log-probabilities): `scale * conditional + (1 - scale) * unconditional`.

    Both are rows of one forward. New tokens have the same place within their blocks after either prompt, so the
    blocks of a negative prompt are counted from its end, and its first block may be short.

    `negative_ids` are left-padded negative prompts [batch, width], -1 at padding; by default the last token of each
    prompt. A `scale` of 1 is no guidance.
    """

    def __init__(self, scale: float, negative_ids: Tensor | None = None):
        self.scale, self.negative_ids = scale, negative_ids

    def of_batch(self, input_ids: Tensor, num_return_sequences: int = 1) -> "Guidance":
        """With a negative prompt for each of `input_ids` [batch, length]; raises a ValueError for another number."""
        if self.negative_ids is None:
            return Guidance(self.scale, input_ids[:, -1:])
        num_rows, num_negative = len(input_ids), len(self.negative_ids)
        num_prompts = num_rows // num_return_sequences
        if num_negative not in (1, num_prompts):
            rule = f"one row, or one for each of the {num_prompts} prompts"
            raise ValueError(f"`negative_prompt_ids` must have {rule}, but got {num_negative}.")
        negative_ids = self.negative_ids.to(input_ids.device).repeat_interleave(num_rows // num_negative, dim=0)
        return Guidance(self.scale, negative_ids)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """What is left to do when the processors run: nothing, [`combine`] comes before them."""
        return scores

    def with_unconditional_rows(
        self, prefix: Tensor, num_clean: Tensor, prompt_length: Tensor, block_size: int
    ) -> tuple[Tensor, Tensor]:
        """
        The id at each position of the prompts [batch, width], and how many of these their whole blocks hold [batch],
        followed by the same of the negative prompts: [2 batch, width], -1 where there is no token, and [2 batch].
        """
        num_in_last, num_negative = prompt_length - num_clean, (self.negative_ids >= 0).sum(-1)
        first = (num_in_last - num_negative) % block_size
        length = first + num_negative - num_in_last
        width = max(prefix.shape[1], int(length.max()))
        negative = self._negative_at(torch.arange(width, device=prefix.device) - (first + num_negative)[:, None])
        prefix = torch.nn.functional.pad(prefix, (0, width - prefix.shape[1]), value=-1)
        return torch.cat([prefix, negative]), torch.cat([num_clean, length])

    def _negative_at(self, index: Tensor) -> Tensor:
        """The ids of the negative prompts, of which -1 is the last, at an `index` [batch, any]; -1 outside of them."""
        padded = torch.nn.functional.pad(self.negative_ids, (1, 1), value=-1)
        return padded.gather(1, (index + padded.shape[1] - 1).clamp(0, padded.shape[1] - 1))

    def with_unconditional_blocks(self, block: Tensor, new_index: Tensor) -> tuple[Tensor, Tensor | None]:
        """
        The ids of the blocks after the prompts [batch, block_size], then of those after the negative prompts, and
        which of them there are, None if all are, both [2 batch, block_size]. `new_index` counts each token among the
        new ones and is negative in the prompt.
        """
        is_prompt = new_index < 0
        if not is_prompt.any():
            return block.repeat(2, 1), None
        unconditional = torch.where(is_prompt, self._negative_at(new_index), block)
        both = torch.cat([block, unconditional])
        return both.clamp(min=0), torch.cat([torch.ones_like(is_prompt), unconditional >= 0])

    def combine(self, logits: Tensor) -> Tensor:
        """Logits of all candidates after the prompts, then after the negative prompts [2 n, vocab] -> [n, vocab]."""
        conditional, unconditional = logits.chunk(2)
        return torch.lerp(unconditional, conditional, self.scale)
