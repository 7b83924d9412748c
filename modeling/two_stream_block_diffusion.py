"""
The training pass over [x_t ; x_0]: the blocks of a batch of text, and what the network is given of both streams.

The pass is put together outside of the network, which sees tokens, positions and a mask. Two forms give the same loss:
*static*, both streams whole, so that shapes depend on the batch's shape alone; and *compacted*, which leaves out the
noisy blocks without a masked token and the clean tokens that no noisy block sees.
"""

from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask

from .attention_block_diffusion import (
    block_diffusion_mask,
    block_starts,
    documents_from_positions,
    plain_two_stream_mask,
    token_block_ids,
)


# The compacted noisy stream has one of so many widths, whatever the noise: kernels that are made for each shape, and
# kept, are few then.
NUM_WIDTHS = 32


def positions_and_blocks(
    config,
    shape: torch.Size,
    device: torch.device,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Positions and block ids of a whole text, each [batch, length], or [1, length] where all rows are alike.

    Args:
        config: `block_size`.
        shape, device: of the text, (batch, length).
        attention_mask, position_ids, document_ids: as the model's `forward` takes them [batch, length]; one of them
            is enough.

    Raises:
        ValueError: `document_ids` are of another shape.
    """
    columns = torch.arange(shape[1], device=device)[None]
    if document_ids is not None and document_ids.shape != shape:
        raise ValueError(
            f"`document_ids` must be of shape [batch, length] = {list(shape)}, but got {list(document_ids.shape)}."
        )
    if position_ids is not None:
        if document_ids is None:
            document_ids = documents_from_positions(position_ids)
    elif document_ids is not None:
        first_of_document = torch.where(block_starts(document_ids), columns, 0).cummax(-1).values
        position_ids = columns - first_of_document
    elif attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    else:
        position_ids = columns
    is_padding = None if attention_mask is None else attention_mask == 0
    return position_ids, token_block_ids(position_ids, config.block_size, is_padding, document_ids)


@dataclass
class TextBlocks:
    """
    A batch of clean text, cut into the blocks that each draw a noise level of their own.

    Attributes:
        position_ids, block_ids: of each token [batch, length], or [1, length] where all rows are alike.
        block: number of each token's block within its row, from 0 [batch, length].
        predicted: whether a token may be masked, and is predicted then [batch, length], bool.
        is_plain: whether the text has neither padding nor documents.
        shape: rows, and blocks in the row that has the most.
    """

    position_ids: torch.Tensor
    block_ids: torch.Tensor
    block: torch.Tensor
    predicted: torch.Tensor
    is_plain: bool
    shape: tuple[int, int]

    @classmethod
    def of_batch(
        cls,
        config,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> "TextBlocks":
        """
        Reads a batch as the model's `forward` takes it with `labels`; all arguments are [batch, length].

        Raises:
            ValueError: shapes that differ, padding between real tokens, a mask token among those to be predicted.
        """
        for name, value in (("labels", labels), ("attention_mask", attention_mask)):
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(
                    f"`{name}` must be of the shape of `input_ids`, {list(input_ids.shape)}, but got "
                    f"{list(value.shape)}."
                )
        text = (attention_mask, position_ids, document_ids)
        position_ids, block_ids = positions_and_blocks(config, input_ids.shape, input_ids.device, *text)
        predicted = labels != -100
        if attention_mask is not None:
            predicted = predicted & (attention_mask != 0)
        if config.ignore_bos:
            predicted = predicted & (position_ids != 0)
        if input_ids.device.type != "meta":
            cls._check(config, input_ids, labels, attention_mask, predicted)
        block = (block_starts(block_ids).long().cumsum(-1) - 1).expand(input_ids.shape)
        is_plain = all(given is None for given in text)
        num_blocks = -(-input_ids.shape[1] // config.block_size)
        if not is_plain and input_ids.device.type != "meta":
            num_blocks = int(block.max()) + 1
        return cls(position_ids, block_ids, block, predicted, is_plain, (input_ids.shape[0], num_blocks))

    @staticmethod
    def _check(
        config,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None,
        predicted: torch.Tensor,
    ) -> None:
        if attention_mask is not None:
            real = attention_mask != 0
            if ((real & block_starts(real)).sum(-1) > 1).any():
                raise ValueError(
                    "`attention_mask` must have the real tokens of each row next to each other, but got padding "
                    "between them."
                )
        is_mask_token = (labels == config.mask_token_id) | (input_ids == config.mask_token_id)
        if (predicted & is_mask_token).any():
            raise ValueError(
                f"`labels` must not hold the mask token ({config.mask_token_id}), nor `input_ids` where a label is "
                "given: a clean token is never masked. Set the label to -100 there."
            )


def flagged_first(flags: torch.Tensor, multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The flagged columns of each row in ascending order, filled up with others to the length of the longest row.

    Args:
        flags: bool [batch, length].
        multiple: the number of columns is rounded up to a multiple of this, as far as there are so many.

    Returns:
        (columns [batch, picked], bool [batch, picked]: which of them are flagged); at least one is picked.
    """
    counts = flags.sum(-1, keepdim=True)
    num_picked = -(-max(int(counts.max()), 1) // multiple) * multiple
    columns = flags.int().argsort(dim=-1, descending=True, stable=True)[:, :num_picked]
    return columns, torch.arange(columns.shape[1], device=flags.device) < counts


def columns_to_compute(block_ids: torch.Tensor, masked: torch.Tensor) -> tuple[torch.Tensor, int]:
    """
    The columns of x_t in blocks that hold a prediction, filled up with others [batch, num_noisy], and how many of the
    first clean tokens such a block sees; from the block ids of the text [batch or 1, length] and which tokens of x_t
    are predicted, bool [batch, copies * length].
    """
    num_copies = masked.shape[1] // block_ids.shape[1]
    columns = torch.arange(block_ids.shape[1], device=masked.device)
    first_of_block = torch.where(block_starts(block_ids), columns, 0).cummax(-1).values
    first_of_block = first_of_block.repeat(1, num_copies).expand(masked.shape)
    block = first_of_block + torch.arange(masked.shape[1], device=masked.device) // len(columns) * len(columns)
    is_active = torch.zeros_like(block).scatter_add_(1, block, masked.long()).gather(1, block) > 0
    noisy_columns, _ = flagged_first(is_active, multiple=-(-masked.shape[1] // NUM_WIDTHS))
    return noisy_columns, int(torch.where(is_active, first_of_block, 0).max())


@dataclass
class TwoStreams:
    """
    The input of the pass over [x_t ; x_0]. x_t may hold several noised copies of the text, one after the other.

    Attributes:
        input_ids, position_ids: noisy tokens, then clean ones [batch, num_noisy + num_clean].
        attention_mask: as [`block_diffusion_mask`] makes it.
        timesteps: noise level sigma of each token, 0 for clean ones [batch, num_noisy + num_clean]; or of each row
            [batch]; or None.
        num_noisy: tokens of the noisy stream.
        noisy_columns: the columns of x_t that the noisy stream holds [batch, num_noisy]; None means all.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | BlockMask
    timesteps: torch.Tensor | None
    num_noisy: int
    noisy_columns: torch.Tensor | None = None

    @classmethod
    def of_noise(
        cls,
        config,
        blocks: TextBlocks,
        x_t: torch.Tensor,
        x_0: torch.Tensor,
        timesteps: torch.Tensor | None,
        dtype: torch.dtype,
        masked: torch.Tensor | None = None,
    ) -> "TwoStreams":
        """
        Both streams, whole or compacted.

        Args:
            config: `block_size`, `window_in_blocks` and the attention implementation.
            blocks: those of `x_0`; `predicted` is not used.
            x_t: noised ids [batch, copies * length].
            x_0: clean ids [batch, length].
            timesteps: sigma of each token of `x_t`, or of each row [batch], or None.
            dtype: that of the hidden states.
            masked: the tokens of `x_t` that are predicted, bool [batch, copies * length]: then only what these depend
                on is taken, noisy blocks that hold one and clean tokens before the last such block.
        """
        length, num_copies = x_0.shape[1], x_t.shape[1] // max(x_0.shape[1], 1)
        stream = torch.arange(1, num_copies + 1, device=x_0.device).repeat_interleave(length)[None]
        noisy_columns, num_clean = None, length
        if masked is not None:
            noisy_columns, num_clean = columns_to_compute(blocks.block_ids, masked)

        def noisy_part(values: torch.Tensor) -> torch.Tensor:
            return values if noisy_columns is None else values.expand(x_t.shape).gather(1, noisy_columns)

        def both(noisy: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
            noisy = noisy_part(noisy)
            return torch.cat([noisy, clean[:, :num_clean].expand(noisy.shape[0], -1)], dim=1)

        window, implementation = config.window_in_blocks, config._attn_implementation
        if masked is None and blocks.is_plain:
            size = (length, config.block_size, window, num_copies)
            mask = plain_two_stream_mask(*size, implementation, dtype, x_0.device)
        else:
            block_ids = both(blocks.block_ids.repeat(1, num_copies), blocks.block_ids)
            streams = both(stream, torch.zeros_like(stream[:, :length]))
            mask = block_diffusion_mask(block_ids, block_ids, window, implementation, dtype, streams, streams)
        if timesteps is not None and timesteps.dim() == 2:
            timesteps = both(timesteps, timesteps.new_zeros(x_0.shape))
        position_ids = both(blocks.position_ids.repeat(1, num_copies), blocks.position_ids)
        num_noisy = x_t.shape[1] if noisy_columns is None else noisy_columns.shape[1]
        return cls(both(x_t, x_0), position_ids, mask, timesteps, num_noisy, noisy_columns)

    def of_predictions(self, states: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """
        The states of the predicted tokens in the order of x_t [num_masked, hidden], from those of both streams [batch,
        num_noisy + num_clean, hidden] and which tokens of x_t these are, bool [batch, copies * length].
        """
        if self.noisy_columns is not None:
            # Each column of x_t is there at most once.
            masked = masked.gather(1, self.noisy_columns)
        return tokens_where(masked, states[:, : self.num_noisy])


def tokens_where(masked: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The values [batch, length, ...] of the masked tokens [num_masked, ...]; on `meta`, which knows none, of all."""
    return values.flatten(0, 1) if values.device.type == "meta" else values[masked]
