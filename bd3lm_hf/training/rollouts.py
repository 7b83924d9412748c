"""Texts that a model has written itself, as batches to train on."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def roll_out(
    model: nn.Module, input_ids: Tensor, prompt_length: int, seeds: list[int], **arguments: Any
) -> dict[str, Tensor]:
    """
    Goes on from the first `prompt_length` tokens of each row of `input_ids` [batch, length], to the same length or to
    the end of the text.

    Args:
        model: with the `generate` of block diffusion; it is in evaluation mode meanwhile.
        input_ids: without padding among the prompts.
        prompt_length: tokens that are kept, and not predicted.
        seeds: of each row.
        arguments: further arguments of `generate`.

    Returns:
        `input_ids`, `labels` (-100 for the prompt and after the end) and `attention_mask` [batch, at most length].
    """
    is_training, device = model.training, input_ids.device
    prompts = input_ids[:, :prompt_length].to(model.device)
    arguments = {"max_new_tokens": input_ids.shape[1] - prompt_length, "seed": seeds, **arguments}
    if getattr(model.generation_config, "pad_token_id", None) is None and "pad_token_id" not in arguments:
        arguments["pad_token_id"] = 0
    model.eval()
    try:
        ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), **arguments)
    finally:
        model.train(is_training)
    ends = arguments.get("eos_token_id", model.generation_config.eos_token_id)
    is_end = torch.zeros_like(ids, dtype=torch.bool)
    if ends is not None:
        is_end[:, prompt_length:] = torch.isin(ids[:, prompt_length:], torch.as_tensor(ends, device=ids.device))
    # An end is a part of the text; what comes after the first is not.
    is_text = (is_end.long().cumsum(-1) - is_end.long()) == 0
    labels = ids.masked_fill(~is_text, -100)
    labels[:, :prompt_length] = -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": is_text.long()}
    return {name: part.to(device) for name, part in batch.items()}


def own_texts(
    model: nn.Module,
    rows: Iterable[Mapping[str, Sequence[int]]],
    prompt_length: int,
    batch_size: int = 32,
    **arguments: Any,
) -> list[dict[str, list[int]]]:
    """
    A dataset of what a model writes by itself, one token per forward, the likeliest where it is surest. Trained on
    these texts it learns to write in fewer forwards what its sampler gives in many (sequence-level distillation; Kim
    and Rush, arXiv 1606.07947).

    Args:
        model: with the `generate` of block diffusion.
        rows: texts, `input_ids` of each, from whose beginnings it goes on to their length or to the end of a text.
        prompt_length: tokens of each that are kept, and not predicted.
        batch_size: texts of one length that are written together.
        arguments: of `generate`, in the place of these or beside them.

    Returns:
        `input_ids` and `labels` of each text, in the order of `rows`.

    Raises:
        ValueError: a row that is no longer than `prompt_length`.
    """
    texts = [list(row["input_ids"]) for row in rows]
    shortest = min(map(len, texts), default=prompt_length + 1)
    if not 1 <= prompt_length < shortest:
        raise ValueError(
            f"`prompt_length` must be at least 1 and less than the length of all rows, but got {prompt_length} for a "
            f"row of {shortest} tokens."
        )
    arguments = {"sampler": "confidence", "tokens_per_step": 1, "do_sample": False, **arguments}
    written: list[dict[str, list[int]]] = [{} for _ in texts]
    for length in sorted({len(text) for text in texts}):
        numbers = [index for index, text in enumerate(texts) if len(text) == length]
        for start in range(0, len(numbers), batch_size):
            part = numbers[start : start + batch_size]
            ids = torch.tensor([texts[index] for index in part], device=model.device)
            batch = roll_out(model, ids, prompt_length, part, **arguments)
            for row, index in enumerate(part):
                is_text = batch["attention_mask"][row].bool()
                written[index] = {name: batch[name][row][is_text].tolist() for name in ("input_ids", "labels")}
    return written
