"""What can't be trained or evaluated with, found out before the first step."""

from itertools import islice

from accelerate import FullyShardedDataParallelPlugin
from transformers import PreTrainedConfig, TrainingArguments

from ..evaluation.networks import dropout_of


# Rows that are looked at; the collator checks each one when its turn comes.
NUM_CHECKED_ROWS = 256


def check_dataset(name: str, dataset, block_size: int) -> None:
    """
    Args:
        name: What the error calls the dataset.
        dataset: A dataset of tokenized rows, with a length or streamed.

    Raises:
        ValueError: a row has no `input_ids`, its labels are of another length, or no row is as long as a block.
    """
    rows = (dataset[index] for index in range(len(dataset))) if hasattr(dataset, "__len__") else iter(dataset)
    longest = 0
    for index, row in enumerate(islice(rows, NUM_CHECKED_ROWS)):
        if "input_ids" not in row:
            raise ValueError(
                f"`{name}` must have the column `input_ids`, but has {', '.join(sorted(row)) or 'none'}; "
                "`pack_documents` or `prepare_finetuning` make it from text."
            )
        length = len(row["input_ids"])
        for column in ("labels", "attention_mask", "position_ids", "document_ids"):
            if row.get(column) is not None and len(row[column]) != length:
                raise ValueError(
                    f"`{column}` of row {index} of `{name}` must be as long as its `input_ids`, {length}, but has "
                    f"length {len(row[column])}."
                )
        longest = max(longest, length)
    if longest < block_size:
        raise ValueError(
            f"`block_size` must be at most the length of the sequences, but got {block_size}, and the longest of the "
            f"first {NUM_CHECKED_ROWS} of `{name}` has {longest} tokens."
        )


def check_eval_dataset(name: str, dataset, args: TrainingArguments) -> None:
    """
    Raises:
        ValueError: the dataset does not fill one batch on each process, of which some would be scored twice.
    """
    batch_size = args.eval_batch_size * args.world_size
    if hasattr(dataset, "__len__") and len(dataset) < batch_size:
        raise ValueError(
            f"`{name}` must fill one batch, but has {len(dataset)} rows for `per_device_eval_batch_size` "
            f"{args.per_device_eval_batch_size} on {args.world_size} process(es)."
        )


def check_fsdp_plugin(plugin: FullyShardedDataParallelPlugin, config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: FSDP's own activation checkpointing computes a layer again under other dropout masks than the first
            time, whose gradients are of no loss at all.
    """
    dropout = dropout_of(config)
    if plugin.activation_checkpointing and dropout > 0:
        raise ValueError(
            "`fsdp_activation_checkpointing` does not keep the random state that dropout needs, so `hidden_dropout` "
            f"must be 0, but is {dropout}; set `gradient_checkpointing=True` in the training arguments "
            "in its place."
        )
