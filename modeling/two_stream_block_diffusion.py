"""
The training pass over [x_t ; x_0]: the blocks of a batch of text, and what the network is given of both streams.

The pass is put together outside of the network, which sees tokens, positions and a mask. Two forms give the same loss:
*static*, both streams whole, so that shapes depend on the batch's shape alone; and *compacted*, which leaves out the
noisy blocks without a masked token and the clean tokens that no noisy block sees.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention_block_diffusion import (
    MaskKind,
    Tokens,
    block_diffusion_mask,
    block_starts,
    plain_two_stream_mask,
    token_block_ids,
    without_masked,
)


# The compacted noisy stream has one of so many widths, so that kernels made for each shape, and kept, are few.
NUM_WIDTHS = 32


def check_shape(name: str, value: Tensor | None, other: str, shape: torch.Size) -> None:
    """Raises a ValueError where a tensor is given of another shape than that of another argument."""
    if value is not None and value.shape != shape:
        raise ValueError(f"`{name}` must be of the shape of `{other}`, {list(shape)}, but got {list(value.shape)}.")


def positions_and_blocks(config, shape: torch.Size, device: torch.device, text: tuple) -> tuple[Tensor, Tensor]:
    """
    Positions and block ids of whole rows of `shape` [batch, length], each [1, length] where all rows are alike. Of
    `text`, (attention_mask, position_ids, document_ids) as the model's `forward` takes them, one is enough. Raises a
    ValueError for `document_ids` of another shape.
    """
    attention_mask, position_ids, document_ids = text
    columns = torch.arange(shape[1], device=device)[None]
    if document_ids is not None and document_ids.shape != shape:
        rule = f"of shape [batch, length] = {list(shape)}"
        raise ValueError(f"`document_ids` must be {rule}, but got {list(document_ids.shape)}.")
    if position_ids is not None:
        if document_ids is None:
            # Of packed rows: a document starts wherever positions do not go up by one.
            document_ids = nn.functional.pad(position_ids.diff(dim=-1) != 1, (1, 0)).long().cumsum(-1)
    elif document_ids is not None:
        position_ids = columns - torch.where(block_starts(document_ids), columns, 0).cummax(-1).values
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

    position_ids: Tensor
    block_ids: Tensor
    block: Tensor
    predicted: Tensor
    is_plain: bool
    shape: tuple[int, int]
    # The host waits for the values that it reads.
    reads_values = True

    @classmethod
    def of_batch(cls, config, input_ids, labels, attention_mask=None, position_ids=None, document_ids=None):
        """
        Reads a batch as the model's `forward` takes it with `labels`; all arguments are [batch, length]. Raises a
        ValueError for other shapes, padding between real tokens, and a mask token among those to be predicted.
        """
        check_shape("labels", labels, "input_ids", input_ids.shape)
        check_shape("attention_mask", attention_mask, "input_ids", input_ids.shape)
        (batch_size, length), has_values = input_ids.shape, cls.reads_values and not input_ids.is_meta
        text = (attention_mask, position_ids, document_ids)
        position_ids, block_ids = positions_and_blocks(config, input_ids.shape, input_ids.device, text)
        predicted = labels != -100
        if attention_mask is not None:
            real = attention_mask != 0
            predicted = predicted & real
            if has_values and ((real & block_starts(real)).sum(-1) > 1).any():
                rule = "the real tokens of each row next to each other"
                raise ValueError(f"`attention_mask` must have {rule}, but got padding between them.")
        if config.ignore_bos:
            predicted = predicted & (position_ids != 0)
        is_mask_token = (labels == config.mask_token_id) | (input_ids == config.mask_token_id)
        if has_values and (predicted & is_mask_token).any():
            rule = f"the mask token ({config.mask_token_id}), nor `input_ids` where a label is given"
            reason = "a clean token is never masked. Set the label to -100 there"
            raise ValueError(f"`labels` must not hold {rule}: {reason}.")
        block = (block_starts(block_ids).long().cumsum(-1) - 1).expand(input_ids.shape)
        is_plain = all(given is None for given in text)
        num_blocks = -(-length // config.block_size) if is_plain else int(block.max()) + 1 if has_values else length
        return cls(position_ids, block_ids, block, predicted, is_plain, (batch_size, num_blocks))


def flagged_first(flags: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """
    The flagged columns of each row in ascending order [batch, picked], filled up with others to the length of the
    longest row, and bool [batch, picked]: which of them are flagged; from `flags`, bool [batch, length]. At least one
    is picked, and as far as there are so many, a whole number of `multiple`.
    """
    counts = flags.sum(-1, keepdim=True)
    num_picked = -(-max(int(counts.max()), 1) // multiple) * multiple
    columns = flags.int().argsort(dim=-1, descending=True, stable=True)[:, :num_picked]
    return columns, torch.arange(columns.shape[1], device=flags.device) < counts


def columns_to_compute(block_ids: Tensor, masked: Tensor) -> tuple[Tensor, int]:
    """
    The columns of x_t in blocks that hold a prediction, `masked` [batch, copies * length], filled up with others
    [batch, num_noisy], and how many of the first clean tokens such a block sees.
    """
    columns = torch.arange(block_ids.shape[1], device=masked.device)
    first_of_block = torch.where(block_starts(block_ids), columns, 0).cummax(-1).values
    is_active = ~without_masked(block_ids[:, None], masked.unflatten(1, (-1, len(columns))))
    noisy_columns, _ = flagged_first(is_active.flatten(1), multiple=-(-masked.shape[1] // NUM_WIDTHS))
    return noisy_columns, int(torch.where(is_active, first_of_block[:, None], 0).max())


@dataclass
class TwoStreams:
    """
    The input of the pass over [x_t ; x_0]. x_t may hold several noised copies of the text, one after the other.

    Attributes:
        input_ids, position_ids: noisy tokens, then clean ones [batch, num_noisy + num_clean].
        attention_mask: as [`block_diffusion_mask`] makes it.
        timesteps: sigma of each token, 0 for clean ones [batch, num_noisy + num_clean], of each row [batch], or None.
        num_noisy: tokens of the noisy stream.
        noisy_columns: the columns of x_t that the noisy stream holds [batch, num_noisy]; None means all.
        read_at: where in both streams the prediction of each noisy token is read, if not at itself [batch, num_noisy].
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Any
    timesteps: Tensor | None
    num_noisy: int
    noisy_columns: Tensor | None = None
    read_at: Tensor | None = None

    @classmethod
    def of_noise(cls, config, blocks, x_t, x_0, timesteps, dtype, masked=None, reads_noisy=False) -> "TwoStreams":
        """
        Both streams, of x_t [batch, copies * length] and x_0 [batch, length], the text of `blocks`, under sigma of
        each token of x_t, or of each row [batch], or None. With `masked`, the tokens of x_t that are predicted, bool
        [batch, copies * length], only what these depend on is taken: noisy blocks that hold one, and clean tokens
        before the last such block. With `reads_noisy`, shifted logits of a block's first token are read at the noised
        token before it.
        """
        length, num_copies = x_0.shape[1], x_t.shape[1] // max(x_0.shape[1], 1)
        noisy_columns, num_clean = (None, length) if masked is None else columns_to_compute(blocks.block_ids, masked)

        def both(noisy: Tensor, clean: Tensor) -> Tensor:
            if noisy_columns is not None:
                noisy = noisy.expand(x_t.shape).gather(1, noisy_columns)
            return torch.cat([noisy, clean[:, :num_clean].expand(noisy.shape[0], -1)], dim=1)

        def of_both(values: Tensor) -> Tensor:
            return both(values.repeat(1, num_copies), values)

        kind, position_ids = MaskKind.of(config, dtype), of_both(blocks.position_ids)
        if masked is None and blocks.is_plain:
            mask = plain_two_stream_mask(length, num_copies, kind, x_0.device)
        else:
            stream = torch.arange(1, num_copies + 1, device=x_0.device).repeat_interleave(length)[None]
            streams = both(stream, torch.zeros_like(stream[:, :length]))
            tokens = Tokens(of_both(blocks.block_ids), position_ids, streams, kind.clean_is_causal and streams == 0)
            mask = block_diffusion_mask(tokens, tokens, kind)
        if timesteps is not None and timesteps.dim() == 2:
            timesteps = both(timesteps, timesteps.new_zeros(x_0.shape))
        input_ids, read_at = both(x_t, x_0), None
        num_noisy = input_ids.shape[1] - num_clean
        if config.shift_logits:
            # The token before: of the same block in the noisy stream, of an earlier block in the clean one.
            read_at = torch.arange(num_noisy, device=x_0.device)[None] - 1
            if not reads_noisy:
                columns = torch.arange(length, device=x_0.device)[None]
                is_first = of_both(block_starts(blocks.block_ids))[:, :num_noisy]
                read_at = torch.where(is_first, num_noisy + of_both(columns)[:, :num_noisy] - 1, read_at)
            read_at = read_at.clamp(0, input_ids.shape[1] - 1).expand(len(x_0), -1)
        return cls(input_ids, position_ids, mask, timesteps, num_noisy, noisy_columns, read_at)

    def noisy_states(self, states: Tensor) -> Tensor:
        """States [batch, num_noisy + num_clean, hidden] -> what predicts noisy tokens [batch, num_noisy, hidden]."""
        if self.read_at is None:
            return states[:, : self.num_noisy]
        return states.gather(1, self.read_at[..., None].expand(-1, -1, states.shape[-1]))

    def of_predictions(self, states: Tensor, masked: Tensor) -> Tensor:
        """States of both streams [batch, num_noisy + num_clean, hidden] -> of `masked` tokens [num_masked, hidden]."""
        if self.noisy_columns is not None:
            # Each column of x_t is there at most once.
            masked = masked.gather(1, self.noisy_columns)
        return tokens_where(masked, self.noisy_states(states))


def tokens_where(masked: Tensor, values: Tensor) -> Tensor:
    """The values [batch, length, ...] of the masked tokens [num_masked, ...]; on `meta`, which knows none, of all."""
    return values.flatten(0, 1) if values.device.type == "meta" else values[masked]
