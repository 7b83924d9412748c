"""Documents as a model of limited context reads them: encoded, and cut into windows that slide over them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class Window:
    """
    A part of a sequence that is read at once.

    Attributes:
        sequence: number of the sequence among all.
        start: position in it of the window's first token.
        input_ids: ids [length], int64.
        labels: the id of each token that is predicted in this window, -100 for what is read alone [length], int64.
    """

    sequence: int
    start: int
    input_ids: np.ndarray
    labels: np.ndarray


def choose_window(
    context: int | None, block_size: int, window: int | None = None, stride: int | None = None
) -> tuple[int, int]:
    """
    The window and stride that were asked for, or by default the whole context and half of it, in whole blocks.

    Args:
        context: tokens that the model reads at once; None if it doesn't say.
        block_size: tokens per block, 1 for an autoregressive model.
        window, stride: see [`evaluate_likelihood`].

    Returns:
        (window, stride) in tokens.

    Raises:
        ValueError: a window longer than the context or of less than two tokens, a stride that leaves no token to
            read in front of those to predict, or one of them cuts a block.
    """
    if context is not None:
        context = -(-context // block_size) * block_size
    if window is None:
        window = context
    if window is None:
        raise ValueError("`window` must be given for this model, whose configuration names no context length.")
    limit = "" if context is None else f" and at most {context}, the model's context,"
    if window < 2 or window % block_size or (context is not None and window > context):
        raise ValueError(
            f"`window` must be at least 2 tokens{limit} in whole blocks (`block_size` {block_size}), but got {window}."
        )
    if stride is None:
        # A single block has no blocks to slide by.
        stride = window - 1 if window == block_size else max(window // 2 // block_size, 1) * block_size
    if not 1 <= stride < window or (window > block_size and stride % block_size):
        raise ValueError(
            f"`stride` must be at least 1 and less than `window` ({window}), and in whole blocks (`block_size` "
            f"{block_size}) where the window holds several, but got {stride}."
        )
    return window, stride


def cut_windows(
    sequences: Iterable[Sequence[int]],
    labels: Sequence[Sequence[int]] | None,
    *,
    window: int,
    stride: int,
    vocab_size: int,
    predicts_first: bool = False,
) -> list[Window]:
    """
    Windows over each sequence that begin `stride` tokens apart; every token is predicted in the first that holds it.

    So a token has `window - stride` tokens or more in front of it, or all that there are. Windows without a token to
    predict are left out.

    Args:
        sequences: ids, one row per sequence, of any lengths.
        labels: what to predict at each token, -100 for what is only read; of the shapes of `sequences`.
        window, stride: in tokens.
        vocab_size: ids lie below it.
        predicts_first: whether the first token of a sequence is predicted as well.

    Raises:
        ValueError: ids outside the vocabulary, labels of another length than their sequence, or not as many.
    """
    windows = []
    rows = [np.asarray(ids, dtype=np.int64) for ids in sequences]
    label_rows = rows if labels is None else [np.asarray(ids, dtype=np.int64) for ids in labels]
    if len(rows) != len(label_rows):
        raise ValueError(f"`labels` must be as many as `sequences`, {len(rows)}, but got {len(label_rows)}.")
    for number, (ids, targets) in enumerate(zip(rows, label_rows, strict=True)):
        if ids.shape != targets.shape:
            raise ValueError(
                f"`labels` of sequence {number} must be as long as it, {len(ids)}, but got {len(targets)}."
            )
        for name, known in (("sequences", ids), ("labels", targets[targets != -100])):
            if known.size and not 0 <= known.min() <= known.max() < vocab_size:
                raise ValueError(
                    f"`{name}` must hold ids from 0 to {vocab_size - 1}, but got {known.min()} to {known.max()} in "
                    f"sequence {number}."
                )
        targets = targets.copy()
        if not predicts_first:
            targets[:1] = -100
        predicted_to = 0
        for start in range(0, max(len(ids) - window + stride, 1), stride):
            part = slice(start, start + window)
            window_labels = targets[part].copy()
            window_labels[: predicted_to - start] = -100
            predicted_to = start + window
            if (window_labels != -100).any():
                windows.append(Window(number, start, ids[part], window_labels))
    return windows


def most_predicted_in_a_block(windows: Iterable[Window], block_size: int) -> int:
    """The largest number of tokens to predict that a block of these windows holds; 0 without windows."""
    return max(
        (int(np.bincount(np.flatnonzero(window.labels != -100) // block_size).max()) for window in windows), default=0
    )
