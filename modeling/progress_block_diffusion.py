"""The text under generation: where the blocks of each row lie in it, how far each row has come, where rows end."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation import StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria


class EntropyStoppingCriteria(StoppingCriteria):
    """
    Ends a row whose last `window` tokens repeat themselves: as a distribution over ids they have less entropy than
    `threshold`, in nats (arXiv 2503.09573, Sec. 6.2). `first_column` is that of each row's first real token [batch];
    rows with fewer than `window` real tokens go on.
    """

    def __init__(self, threshold: float, window: int, first_column: Tensor | None = None):
        self.threshold, self.window, self.first_column = threshold, window, first_column

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: Any) -> Tensor:
        length = input_ids.shape[1]
        if length < self.window:
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        tokens = input_ids[:, -self.window :]
        # Each token contributes its share of the entropy: - log(count / window) / window.
        counts = (tokens[:, :, None] == tokens[:, None, :]).sum(-1)
        entropy = -(counts / self.window).log().mean(-1)
        long_enough = True if self.first_column is None else length - self.first_column >= self.window
        return (entropy < self.threshold) & long_enough


class Canvas:
    """
    The text under generation, and where each row's blocks lie in it: counted in the row's own positions, and so in a
    left-padded batch in different columns. Stage k works on the k-th block from the first with a token to fill.

    Attributes:
        tokens: prompts, then one column per new token, masked until revealed, then a margin of masked columns.
        to_fill: the gaps of the prompts and the new columns, bool, of the shape of `tokens`.
        num_clean: tokens in the whole blocks of each prompt before its first gap [batch].
        block_offset: what is added to positions before blocks are counted [batch or 1].
        first_column: column of each row's position 0 [batch].
        prompt_width: columns of the prompts, padding included.
        num_new: columns to generate.
        first_gap: the first column that is to be filled in any row.
    """

    def __init__(self, config, input_ids: Tensor, attention_mask: Tensor | None, gaps: Tensor, num_new: int):
        self.block_size, self.mask_token_id = config.block_size, config.mask_token_id
        self.num_new = num_new
        batch_size, self.prompt_width = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.first_column = (mask == 0).sum(-1)
        blank = input_ids.new_full((batch_size, num_new + self.block_size), self.mask_token_id)
        self.tokens = torch.cat([input_ids, blank], dim=1)
        self.all_columns = torch.arange(self.tokens.shape[1], device=input_ids.device)
        self.to_fill = torch.cat([gaps, torch.ones_like(blank, dtype=torch.bool)], dim=1)
        self.to_fill[:, self.prompt_width + num_new :] = False
        # Where nothing is to be filled, all of the prompt comes before it.
        first_gap = torch.cat([gaps, torch.ones_like(gaps[:, :1])], dim=1).int().argmax(-1)
        self.num_clean = (first_gap - self.first_column) // self.block_size * self.block_size
        self.first_gap = int(first_gap.min())
        self.block_offset = self.num_clean.new_zeros(1)
        self._last_columns: tuple[int, Tensor] | None = None

    def start_new_block(self) -> None:
        """Begins a block right after each prompt, whose own blocks are counted from its end."""
        self.num_clean, self.block_offset = self.prompt_length, -self.prompt_length % self.block_size

    @property
    def prompt_length(self) -> Tensor:
        """Real tokens of each prompt [batch]."""
        return self.prompt_width - self.first_column

    @property
    def num_stages(self) -> int:
        """Blocks from the first that has a token to fill to the last of the text, in the row that has the most."""
        num_unclean = int((self.prompt_length - self.num_clean).max()) + self.num_new
        return -(-num_unclean // self.block_size)

    def most_to_fill(self) -> list[int]:
        """Of each stage, how many tokens there are to fill in the row that has the most."""
        num_stages = self.num_stages
        columns = (self.first_column + self.num_clean)[:, None] + self.all_columns[: num_stages * self.block_size]
        to_fill = self.to_fill.gather(1, columns.clamp(max=len(self.all_columns) - 1))
        return to_fill.unflatten(1, (num_stages, -1)).sum(-1).amax(0).tolist()

    def columns(self, stage: int) -> Tensor:
        """Columns of each row's block [batch, block_size]; those of the last stage asked for are kept."""
        if self._last_columns is not None and self._last_columns[0] == stage:
            return self._last_columns[1]
        start = self.first_column + self.num_clean + stage * self.block_size
        # Where other rows have a block more, a row that is complete reads the margin.
        columns = (start[:, None] + self.all_columns[: self.block_size]).clamp(max=len(self.all_columns) - 1)
        self._last_columns = stage, columns
        return columns

    def context(self) -> Tensor:
        """The tokens as processors read them: padding as the mask token, which has no probability to be changed."""
        return self.tokens.masked_fill(self.all_columns < self.first_column[:, None], self.mask_token_id)

    def clean_prefix(self) -> Tensor:
        """The id at each position of the rows, of which the first `num_clean` are clean [batch, width]."""
        columns = self.first_column[:, None] + self.all_columns[: int(self.num_clean.max())]
        return self.tokens.gather(1, columns.clamp(max=len(self.all_columns) - 1))


def drop_after_eos(block: Tensor, masked: Tensor, may_end: Tensor, eos_token_id: Tensor) -> Tensor:
    """
    The `masked` positions of a `block` that still matter: none of a row once every token up to its first EOS is known,
    where that `may_end` the row; all [batch, block_size].
    """
    is_eos = (block[..., None] == eos_token_id).any(-1) & may_end
    return masked & ~(is_eos & (masked.long().cumsum(-1) == 0)).any(-1, keepdim=True)


class RowProgress:
    """How far each row of a canvas has come: what criteria and streamer are shown, and where rows end."""

    def __init__(self, canvas: Canvas, generation_config, criteria: StoppingCriteriaList, streamer: Any):
        self.canvas, self.streamer = canvas, streamer
        self.pad_token_id = generation_config._pad_token_tensor
        self.unfinished = torch.ones_like(canvas.num_clean, dtype=torch.bool)
        self.num_generated = torch.zeros_like(canvas.num_clean)
        self.num_streamed = canvas.first_gap
        if streamer is not None:
            streamer.put(canvas.tokens[:, : canvas.first_gap].cpu())
        self.stopping_criteria = copy.copy(criteria)
        if generation_config.entropy_stop_threshold is not None:
            rule = (generation_config.entropy_stop_threshold, generation_config.entropy_stop_window)
            self.stopping_criteria.append(EntropyStoppingCriteria(*rule, canvas.first_column))
        may_end_apart = any(not isinstance(criterion, MaxLengthCriteria) for criterion in self.stopping_criteria)
        if self.pad_token_id is None and len(canvas.tokens) > 1 and may_end_apart:
            raise ValueError("`pad_token_id` must be set for rows that may end at different lengths, but got None.")
        known = (MaxLengthCriteria, EosTokenCriteria)
        self.knows_criteria = all(type(criterion) in known for criterion in self.stopping_criteria)
        lengths = [criterion.max_length for criterion in criteria if isinstance(criterion, MaxLengthCriteria)]
        self.num_allowed = min(canvas.num_new, *(length - canvas.prompt_width for length in lengths), canvas.num_new)
        eos = [criterion.eos_token_id for criterion in criteria if isinstance(criterion, EosTokenCriteria)]
        self.eos_token_id = torch.cat([ids.flatten() for ids in eos]).to(canvas.tokens.device) if eos else None

    def may_end(self, columns: Tensor) -> Tensor | None:
        """Where an EOS would end its row, bool, of `columns` [batch, block_size]; None where there is no EOS."""
        new_index = columns - self.canvas.prompt_width
        return None if self.eos_token_id is None else (new_index >= 0) & (new_index < self.canvas.num_new)

    def finish_block(self, stage: int) -> bool:
        """Shows a finished block to the stopping criteria and to the streamer; returns whether a row goes on."""
        canvas, columns = self.canvas, self.canvas.columns(stage)
        if self.knows_criteria:
            self._find_ends(canvas.tokens.gather(1, columns), columns - canvas.prompt_width)
        else:
            self._ask_criteria((columns[:, -1] + 1 - canvas.prompt_width).clamp(min=0, max=canvas.num_new))
        num_unfinished = int(self.unfinished.sum())
        if self.pad_token_id is not None and num_unfinished < len(self.unfinished):
            canvas.tokens.masked_fill_(self.after_end(), self.pad_token_id)
        if self.streamer is not None:
            self._stream(columns[:, -1] + 1)
        return num_unfinished > 0

    def _find_ends(self, tokens: Tensor, index: Tensor) -> None:
        """What the criteria of EOS and length say of a block, whose tokens are new ones of an `index`, all at once."""
        is_last = index + 1 >= self.num_allowed
        if self.eos_token_id is not None:
            is_last = is_last | (tokens[..., None] == self.eos_token_id).any(-1)
        is_new = self.unfinished[:, None] & (index >= self.num_generated[:, None]) & (index < self.canvas.num_new)
        ends = is_last & is_new
        # Later tokens of a row that ends are not part of it.
        self.num_generated = self.num_generated + (is_new & (ends.long().cumsum(-1) - ends.long() == 0)).sum(-1)
        self.unfinished = self.unfinished & ~ends.any(-1)

    def _ask_criteria(self, block_end: Tensor) -> None:
        """Asks the criteria after each token of a block; the new token after it has the index `block_end` [batch]."""
        canvas, generated_before = self.canvas, self.num_generated.clone()
        for index in range(int(generated_before[self.unfinished].min()), int(block_end.max())):
            stops = self.stopping_criteria(canvas.tokens[:, : canvas.prompt_width + index + 1], None)
            # Later tokens of a row that ends are not part of it.
            reached = self.unfinished & (generated_before <= index) & (index < block_end)
            self.num_generated += reached
            self.unfinished &= ~(reached & (stops.to(reached.device) | (index + 1 == canvas.num_new)))

    def _stream(self, block_end: Tensor) -> None:
        """Shows the columns that are known in every row; `block_end` [batch] comes after each row's finished block."""
        width = self.canvas.prompt_width
        known = torch.where(self.unfinished, block_end, width + self.canvas.num_new)
        ready = min(int(known.min()), width + int(self.num_generated.max()))
        columns = self.canvas.tokens[:, self.num_streamed : ready].cpu()
        self.num_streamed = ready
        # One row at once, several column by column.
        for tokens in columns if len(columns) == 1 else columns.unbind(1):
            self.streamer.put(tokens)

    def after_end(self) -> Tensor:
        """The columns after the ends of rows, bool [batch, columns]."""
        ends = self.canvas.prompt_width + self.num_generated[:, None]
        return ~self.unfinished[:, None] & (self.canvas.all_columns >= ends)

    def finish(self) -> Tensor:
        """The sequences [batch, prompt width + generated], padded after the end of each row."""
        if self.streamer is not None:
            self.streamer.end()
        return self.canvas.tokens[:, : self.canvas.prompt_width + int(self.num_generated.max())]
