"""What the rows of a batch hold: the position, document and block of each token, and which tokens are predicted."""

from dataclasses import dataclass

import torch

from .attention_bd3lm import block_starts, documents_from_positions, visibility_code
from .configuration_bd3lm import BD3LMConfig


def text_code(
    config: BD3LMConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Positions and visibility codes of uncached tokens, from whichever of the three descriptions is given.

    Args:
        input_ids: ids [batch, length], or embeddings [batch, length, hidden]; only their shape counts.
        attention_mask: 0 at padding [batch, length].
        position_ids: positions, counted in real tokens of each row [batch, length].
        document_ids: equal for the tokens of one document of a packed row [batch, length].

    Returns:
        (position_ids, code), each [batch, length], or [1, length] where all rows are alike.

    Raises:
        ValueError: `document_ids` are of another shape.
    """
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    if document_ids is not None and document_ids.shape != input_ids.shape[:2]:
        raise ValueError(
            f"`document_ids` must be of shape [batch, length] = {list(input_ids.shape[:2])}, but got "
            f"{list(document_ids.shape)}."
        )
    if position_ids is not None:
        if document_ids is None:
            document_ids = documents_from_positions(position_ids)
    elif document_ids is not None:
        first = torch.where(block_starts(document_ids), columns, 0).cummax(-1).values
        position_ids = columns - first
    elif attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    else:
        position_ids = columns
    is_padding = None if attention_mask is None else attention_mask == 0
    return position_ids, visibility_code(position_ids, config.block_size, is_padding, document_ids)


@dataclass
class TextBlocks:
    """
    A batch of clean text, cut into the blocks that each draw a noise level of their own.

    Attributes:
        code: visibility code of each token [batch, length], or [1, length] where all rows are alike.
        block: number of each token's block within its row, from 0 [batch, length].
        predicted: whether a token may be masked, and is predicted then [batch, length], bool.
    """

    code: torch.Tensor
    block: torch.Tensor
    predicted: torch.Tensor

    @classmethod
    def of_batch(
        cls,
        config: BD3LMConfig,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> "TextBlocks":
        """
        Reads a batch as [`BD3LMForMaskedLM.forward`] takes it with `labels`; all arguments are [batch, length].

        Raises:
            ValueError: shapes that differ, padding between real tokens, a mask token among those to be predicted.
        """
        for name, value in (("labels", labels), ("attention_mask", attention_mask)):
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(
                    f"`{name}` must be of the shape of `input_ids`, {list(input_ids.shape)}, but got "
                    f"{list(value.shape)}."
                )
        position_ids, code = text_code(config, input_ids, attention_mask, position_ids, document_ids)
        predicted = labels != -100
        if attention_mask is not None:
            real = attention_mask != 0
            if ((real & block_starts(real)).sum(-1) > 1).any():
                raise ValueError(
                    "`attention_mask` must have the real tokens of each row next to each other, but got padding "
                    "between them."
                )
            predicted = predicted & real
        if config.ignore_bos:
            predicted = predicted & (position_ids != 0)
        is_mask_token = (labels == config.mask_token_id) | (input_ids == config.mask_token_id)
        if (predicted & is_mask_token).any():
            raise ValueError(
                f"`labels` must not hold the mask token ({config.mask_token_id}), nor `input_ids` where a label is "
                "given: a clean token is never masked. Set the label to -100 there."
            )
        block = (block_starts(code).long().cumsum(-1) - 1).expand(input_ids.shape)
        return cls(code, block, predicted)
