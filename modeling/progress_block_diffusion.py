"""The text under generation: where the blocks of each row lie in it, how far each row has come, where rows end."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation import StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria


class EntropyStoppingCriteria(StoppingCriteria):
    """
    Ends a row whose last `window` tokens repeat themselves (arXiv 2503.09573, Sec. 6.2).

    Args:
        threshold: least entropy of the window's tokens as a distribution over ids, in nats.
        window: number of tokens.
        first_column: column of each row's first real token [batch]; rows with fewer than `window` real tokens go on.
    """

    def __init__(self, threshold: float, window: int, first_column: torch.Tensor | None = None):
        self.threshold = threshold
        self.window = window
        self.first_column = first_column

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor | None, **kwargs: Any
    ) -> torch.BoolTensor:
        length = input_ids.shape[1]
        if length < self.window:
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        tokens = input_ids[:, -self.window :]
        # Each token contributes its share of the entropy: - log(count / window) / window.
        counts = (tokens[:, :, None] == tokens[:, None, :]).sum(-1)
        entropy = -(counts / self.window).log().mean(-1)
        long_enough = True if self.first_column is None else length - self.first_column >= self.window
        return (entropy < self.threshold) & long_enough


@dataclass
class Canvas:
    """
    The text under generation, and where each row's blocks lie in it.

    Blocks are counted in each row's own positions, so rows of a left-padded batch have their blocks in different
    columns. Stage k works on block `first_block + k` of every row.

    Attributes:
        tokens: prompts, then one column per new token, masked until revealed, then a margin of masked columns.
        to_fill: the gaps of the prompts and the new columns, bool, of the shape of `tokens`.
        num_clean: tokens in the whole blocks of each prompt before its first gap [batch].
        first_column: column of each row's position 0 [batch].
        prompt_width: columns of the prompts, padding included.
        num_new: columns to generate.
    """

    tokens: torch.Tensor
    to_fill: torch.Tensor
    num_clean: torch.Tensor
    first_column: torch.Tensor
    prompt_width: int
    num_new: int
    block_size: int
    mask_token_id: int

    @classmethod
    def of_prompts(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        gaps: torch.Tensor,
        num_new: int,
        block_size: int,
        mask_token_id: int,
    ) -> "Canvas":
        batch_size, prompt_width = input_ids.shape
        if attention_mask is None:
            first_column = torch.zeros(batch_size, dtype=torch.long, device=input_ids.device)
        else:
            first_column = (attention_mask == 0).sum(-1)
        blank = input_ids.new_full((batch_size, num_new + block_size), mask_token_id)
        to_fill = torch.cat([gaps, torch.ones_like(blank, dtype=torch.bool)], dim=1)
        to_fill[:, prompt_width + num_new :] = False
        # Where nothing is to be filled, all of the prompt comes before it.
        first_gap = torch.cat([gaps, torch.ones_like(gaps[:, :1])], dim=1).int().argmax(-1)
        num_clean = (first_gap - first_column) // block_size * block_size
        tokens, sizes = torch.cat([input_ids, blank], dim=1), (prompt_width, num_new, block_size, mask_token_id)
        return cls(tokens, to_fill, num_clean, first_column, *sizes)

    @property
    def prompt_length(self) -> torch.Tensor:
        """Real tokens of each prompt [batch]."""
        return self.prompt_width - self.first_column

    def block_numbers(self, stage: int) -> list[int]:
        """The number of each row's block, counted in the row's own positions."""
        return (self.num_clean // self.block_size + stage).tolist()

    @property
    def num_stages(self) -> int:
        """Blocks from the first that has a token to fill to the last of the text, in the row that has the most."""
        after_clean = (self.prompt_length - self.num_clean).max()
        return -(-(int(after_clean) + self.num_new) // self.block_size)

    def columns(self, stage: int) -> torch.Tensor:
        """Columns of each row's block [batch, block_size]."""
        start = self.first_column + self.num_clean + stage * self.block_size
        columns = start[:, None] + torch.arange(self.block_size, device=start.device)
        # Where other rows have a block more, a row that is complete reads the margin.
        return columns.clamp(max=self.tokens.shape[1] - 1)

    def is_new(self, columns: torch.Tensor) -> torch.Tensor:
        """Which columns are to be generated, bool of the shape of `columns`."""
        return (columns >= self.prompt_width) & (columns < self.prompt_width + self.num_new)

    def clean_prefix(self) -> torch.Tensor:
        """The id at each position of the rows, of which the first `num_clean` are clean [batch, width]."""
        columns = self.first_column[:, None] + torch.arange(int(self.num_clean.max()), device=self.tokens.device)
        return self.tokens.gather(1, columns.clamp(max=self.tokens.shape[1] - 1))


class RowProgress:
    """How far each row of a canvas has come: what criteria and streamer are shown, and where rows end."""

    def __init__(
        self,
        canvas: Canvas,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList,
        streamer: Any,
    ):
        self.canvas = canvas
        self.streamer = streamer
        self.pad_token_id = generation_config._pad_token_tensor
        batch_size, device = canvas.tokens.shape[0], canvas.tokens.device
        self.unfinished = torch.ones(batch_size, dtype=torch.bool, device=device)
        self.num_generated = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.num_streamed = 0
        self.stopping_criteria = copy.copy(stopping_criteria)
        if generation_config.entropy_stop_threshold is not None:
            rule = (generation_config.entropy_stop_threshold, generation_config.entropy_stop_window)
            self.stopping_criteria.append(EntropyStoppingCriteria(*rule, canvas.first_column))
        may_end_apart = any(not isinstance(criterion, MaxLengthCriteria) for criterion in self.stopping_criteria)
        if self.pad_token_id is None and batch_size > 1 and may_end_apart:
            raise ValueError(
                "`pad_token_id` must be set where rows of a batch may end at different lengths, but got None."
            )
        eos = [criterion.eos_token_id for criterion in stopping_criteria if isinstance(criterion, EosTokenCriteria)]
        self.eos_token_id = torch.cat([ids.flatten() for ids in eos]).to(device) if eos else None

    def drop_after_eos(self, block: torch.Tensor, columns: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Masked positions that still matter: none of a row once every token up to its first EOS is known."""
        if self.eos_token_id is None:
            return masked
        is_eos = torch.isin(block, self.eos_token_id) & self.canvas.is_new(columns)
        ends_here = (is_eos & (masked.long().cumsum(-1) == 0)).any(-1, keepdim=True)
        return masked & ~ends_here

    def finish_block(self, stage: int) -> None:
        """Shows a finished block to the stopping criteria, one token after the other, and to the streamer."""
        canvas = self.canvas
        block_end = (canvas.columns(stage)[:, -1] + 1 - canvas.prompt_width).clamp(min=0, max=canvas.num_new)
        generated_before = self.num_generated.clone()
        for index in range(int(generated_before[self.unfinished].min()), int(block_end.max())):
            stops = self.stopping_criteria(canvas.tokens[:, : canvas.prompt_width + index + 1], None)
            # Later tokens of a row that ends are not part of it.
            reached = self.unfinished & (generated_before <= index) & (index < block_end)
            self.num_generated += reached
            self.unfinished &= ~(reached & (stops.to(reached.device) | (index + 1 == canvas.num_new)))
        if self.pad_token_id is not None:
            canvas.tokens.masked_fill_(self._after_end(), self.pad_token_id)
        if self.streamer is not None:
            self._stream()

    def _stream(self) -> None:
        ended = torch.where(self.unfinished, self.num_generated, self.canvas.num_new)
        ready = min(int(ended.min()), int(self.num_generated.max()))
        start = self.canvas.prompt_width
        new_tokens = self.canvas.tokens[:, start + self.num_streamed : start + ready].cpu()
        self.num_streamed = ready
        if new_tokens.shape[0] == 1:
            self.streamer.put(new_tokens[0])
        else:
            for column in new_tokens.unbind(1):
                self.streamer.put(column)

    def _after_end(self) -> torch.Tensor:
        """The columns after the ends of rows, bool [batch, columns]."""
        columns = torch.arange(self.canvas.tokens.shape[1], device=self.canvas.tokens.device)
        ends = self.canvas.prompt_width + self.num_generated[:, None]
        return ~self.unfinished[:, None] & (columns >= ends)

    def without_padding(self, record: torch.Tensor, empty: float) -> torch.Tensor:
        """What was noted of each token [batch, columns], `empty` after the ends of rows."""
        return record.masked_fill(self._after_end(), empty)

    def finish(self) -> torch.Tensor:
        """The sequences [batch, prompt width + generated], padded after the end of each row."""
        if self.streamer is not None:
            self.streamer.end()
        return self.canvas.tokens[:, : self.canvas.prompt_width + int(self.num_generated.max())]
