"""Texts that a model has written itself, as batches to train on."""

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
