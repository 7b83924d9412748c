"""Tokenized examples -> batches as the model takes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence


@dataclass
class BD3LMDataCollator:
    """
    Batch tokenized examples for training and evaluation: whole texts, prompts with completions, packed documents.

    An example holds `input_ids` (ids of any length, as a list, array or tensor) and may hold, of the same length,

    - `labels`: what to predict at each token (not shifted), -100 for a prompt, which is neither masked nor predicted;
      without them, every token;
    - `document_ids`: equal for the tokens of one document of a packed row, next to each other;
    - `attention_mask`: ones, and zeros for what is padded on the right already.

    Other columns are left out. Shorter examples are padded on the right, with label -100, attention mask 0 and
    document id 0. Unlike `DataCollatorForLanguageModeling`, this tells padding by position and not by token, so an EOS
    stays a target for tokenizers that pad with EOS.

    Args:
        pad_token_id: The token that fills up shorter examples.
        ignore_bos: The model's `config.ignore_bos`: it predicts no first token of a document, so the label there is
            -100. (Trainer scales the loss by the number of other labels.)
        pad_to_multiple_of: Pad every batch to a multiple of this length.

    Returns:
        `input_ids` and `labels` [batch, length]; `document_ids` where an example has them; `attention_mask` only where
        something is padded, as a full batch is computed faster without.

    Raises:
        ValueError: if an example has no `input_ids` or no real token, if another column is of another length, an
            `attention_mask` has zeros before ones, or `document_ids` are negative or come back after others.
    """

    pad_token_id: int
    ignore_bos: bool = True
    pad_to_multiple_of: int | None = None

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of the examples `features`: what stands under Returns and Raises above, [batch, length]."""
        examples = [self._example(row, feature) for row, feature in enumerate(features)]
        columns = {
            name: self._pad([example[name] for example in examples], padding_value)
            for name, padding_value in (
                ("input_ids", self.pad_token_id),
                ("labels", -100),
                ("document_ids", 0),
                ("attention_mask", 0),
            )
        }
        if not any("document_ids" in feature for feature in features):
            del columns["document_ids"]
        if columns["attention_mask"].all():
            del columns["attention_mask"]
        return columns

    def _example(self, row: int, feature: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The four columns of an example, each [length]."""
        if "input_ids" not in feature:
            raise ValueError(f"example {row} of the batch has no `input_ids`; it has {sorted(feature)}")
        input_ids = _column(feature["input_ids"])
        example = {
            "input_ids": input_ids,
            "labels": input_ids,
            "document_ids": torch.ones_like(input_ids),
            "attention_mask": torch.ones_like(input_ids),
        }
        for name in ("labels", "document_ids", "attention_mask"):
            if feature.get(name) is not None:
                example[name] = _column(feature[name])
            if len(example[name]) != len(input_ids):
                raise ValueError(
                    f"`{name}` of example {row} of the batch must be as long as its `input_ids`, {len(input_ids)}, "
                    f"but has length {len(example[name])}"
                )
        is_real, documents = example["attention_mask"] != 0, example["document_ids"]
        if not is_real.any():
            raise ValueError(f"`input_ids` of example {row} of the batch hold no token")
        if (is_real.int().diff() > 0).any():
            raise ValueError(
                f"`attention_mask` of example {row} of the batch must be ones, then zeros (padding on the right), but "
                f"is {example['attention_mask'].tolist()}"
            )
        runs = documents.unique_consecutive()
        if documents.min() < 0 or len(runs) > len(documents.unique()):
            raise ValueError(
                f"`document_ids` of example {row} of the batch must be 0 or more and stand next to their like, but "
                f"go {runs.tolist()}"
            )
        is_predicted = is_real
        if self.ignore_bos:
            is_first = torch.ones_like(is_real)
            is_first[1:] = documents.diff() != 0
            is_predicted = is_real & ~is_first
        return {**example, "labels": example["labels"].masked_fill(~is_predicted, -100)}

    def _pad(self, rows: list[torch.Tensor], padding_value: int) -> torch.Tensor:
        padded = pad_sequence(rows, batch_first=True, padding_value=padding_value)
        if self.pad_to_multiple_of is None:
            return padded
        missing = -padded.shape[1] % self.pad_to_multiple_of
        return torch.nn.functional.pad(padded, (0, missing), value=padding_value)


def _column(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.long)
