"""What the network, the language model and `generate` return; the cache in it goes by two names."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.utils import ModelOutput


def accepts_past_key_values(method: Callable) -> Callable:
    """Lets a method that takes `cache` be called with `past_key_values`, its name before Transformers 5.24."""

    @functools.wraps(method)
    def wrapper(self, *args: Any, **kwargs: Any):
        if (past_key_values := kwargs.pop("past_key_values", None)) is not None:
            if kwargs.get("cache") is not None:
                raise ValueError("`cache` and `past_key_values` are one argument, but got both; give `cache`.")
            kwargs["cache"] = past_key_values
        return method(self, *args, **kwargs)

    return wrapper


class CacheOutput(ModelOutput):
    """An output whose `cache` can be read as `past_key_values` too, its name before Transformers 5.24."""

    @property
    def past_key_values(self) -> Cache | None:
        return self.cache

    def __getitem__(self, key):
        return super().__getitem__("cache" if key == "past_key_values" else key)

    def __contains__(self, key) -> bool:
        return super().__contains__("cache" if key == "past_key_values" else key)

    def get(self, key, default=None):
        return self[key] if key in self else default


@dataclass
class NetworkOutput(CacheOutput):
    """Output of a network: `last_hidden_state` [batch, length, hidden], and fields of [`BlockDiffusionOutput`]."""

    last_hidden_state: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class BlockDiffusionOutput(CacheOutput):
    """
    Output of a block diffusion language model.

    Args:
        loss: sum of `token_nelbo` / number of predicted tokens, in nats per token; a scalar.
        logits: raw scores of the token *at* each position [batch, length, vocab]; None where a loss was asked for.
        cache: the cache, where one was given or asked for; also readable as `past_key_values`.
        hidden_states: with `output_hidden_states`, the embeddings and the states after each layer.
        attentions: with `output_attentions`, the attention weights of each layer.
        token_nelbo: w(t) * -log x_theta of each masked token and 0 elsewhere, in nats [batch, length]; summed over the
            noised copies of the text; differentiable.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    token_nelbo: Tensor | None = None

    def __setitem__(self, key, value):
        if key == "input_ids":
            # `FillMaskPipeline` alone puts them here; it would fill a gap from earlier ones that are still open.
            raise ValueError(
                "`pipeline` must be asked for 'text-infilling' in place of 'fill-mask', which takes the scores of one "
                "pass over all gaps for probabilities."
            )
        super().__setitem__(key, value)


@dataclass
class BD3LMGenerateOutput(CacheOutput):
    """
    Output of `generate(..., return_dict_in_generate=True)`.

    Args:
        sequences: prompts and generated tokens [batch, prompt length + generated length].
        scores: with `output_scores`, for each generated column what its token was drawn from [batch, vocab].
        logits: with `output_logits`, the same before the processors.
        num_forward_passes: forwards in which the row had masked tokens [batch].
        tokens_per_forward: generated tokens, up to the end of the row / `num_forward_passes` [batch].
        reveal_steps: with `output_reveal`, which of the row's forwards revealed each token, from 1; 0 for given tokens
            and padding, of the shape of `sequences`.
        token_probabilities: with `output_reveal`, the model's probability of each token when it was revealed, before
            the processors; NaN for given tokens and padding, of the shape of `sequences`.
        cache: holds every block but the last; also readable as `past_key_values`. Given to `generate` again it spares
            computing the blocks that the new prompts begin with, of any lengths in the rows of the batch.
    """

    sequences: torch.LongTensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    num_forward_passes: torch.LongTensor | None = None
    tokens_per_forward: Tensor | None = None
    reveal_steps: torch.LongTensor | None = None
    token_probabilities: torch.FloatTensor | None = None
    cache: Cache | None = None
