"""
Plots: a sample as it is denoised, the attention pattern of training, noise schedules, and training curves.

Each function returns a `matplotlib.figure.Figure` of its own, bound to no window and no global state; `savefig` writes
it. Matplotlib is imported when one is called, and comes with `pip install 'bd3lm-hf[plots]'`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .modeling.attention_block_diffusion import Tokens, is_visible, token_block_ids
from .modeling.configuration_bd3lm import NOISE_SCHEDULE_NAMES, validate_noise_interval
from .modeling.diffusion_block_diffusion import FULL_NOISE_INTERVAL, NOISE_SCHEDULES
from .modeling.network_block_diffusion import BD3LMGenerateOutput


if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAINER_STATE = "trainer_state.json"
# Longer samples and sequences have rows too thin to read.
MOST_TOKENS = 256
# Where the colours of probabilities begin.
LEAST_PROBABILITY = 1e-3
# Values of t over which the variance of a schedule is integrated.
NUM_TIMES = 20001


def _figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'bd3lm-hf[plots]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    return figure


def plot_denoising(
    output: BD3LMGenerateOutput, tokenizer: Any, *, row: int = 0, block_size: int | None = None
) -> "Figure":
    """
    The denoising of one sample: for each token, at which forward it was revealed and how probable it was then.

    Args:
        output: What `generate(..., return_dict_in_generate=True, output_reveal=True)` returned.
        tokenizer: That of the model.
        row: The sample of the batch.
        block_size: That of the model, to show where blocks end, for a row without padding on its left.

    Returns:
        A figure, revealed tokens from top to bottom and forwards from left to right.

    Raises:
        ValueError: `output` holds no record of what was revealed, no such row, no revealed token in it, or more than
            256.
        ImportError: matplotlib is missing.
    """
    if getattr(output, "reveal_steps", None) is None:
        raise ValueError(
            "`output` must come from `generate(..., return_dict_in_generate=True, output_reveal=True)`, but it has no "
            "`reveal_steps`."
        )
    if not 0 <= row < len(output.sequences):
        raise ValueError(f"`row` must be in [0, {len(output.sequences)}), but got {row}.")
    columns = output.reveal_steps[row].nonzero().squeeze(-1)
    if not 1 <= len(columns) <= MOST_TOKENS:
        raise ValueError(f"`output` must reveal 1 to {MOST_TOKENS} tokens in row {row}, but got {len(columns)}.")
    steps = output.reveal_steps[row, columns].cpu()
    probabilities = output.token_probabilities[row, columns].float().cpu()
    num_forwards = int(output.num_forward_passes[row])
    forwards = torch.arange(1, num_forwards + 1)
    grid = torch.where(forwards >= steps[:, None], probabilities[:, None], torch.nan)
    just_now = forwards == steps[:, None]

    figure = _figure(min(max(5.5, 2.6 + 0.22 * num_forwards), 40), 1.2 + 0.2 * len(columns))
    from matplotlib.colors import LogNorm

    axes = figure.subplots()
    axes.set_facecolor("0.9")
    extent = (0.5, num_forwards + 0.5, len(columns) - 0.5, -0.5)
    norm = LogNorm(LEAST_PROBABILITY, 1, clip=True)
    arguments = {"extent": extent, "aspect": "auto", "norm": norm, "cmap": "viridis", "interpolation": "none"}
    axes.imshow(grid.numpy(), alpha=0.3, **arguments)
    image = axes.imshow(torch.where(just_now, grid, torch.nan).numpy(), **arguments)
    labels = axes.set_yticks(
        range(len(columns)), [_visible(tokenizer, token) for token in output.sequences[row, columns].tolist()]
    )
    for label in labels:
        # A dollar is no formula.
        label.label1.set(parse_math=False, family="monospace", size=8)
    for index in range(1, len(columns)):
        if block_size and columns[index] // block_size != columns[index - 1] // block_size:
            axes.axhline(index - 0.5, color="black", linewidth=0.8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(
        xlabel="forward pass",
        ylabel="token",
        title=f"{len(columns)} tokens in {num_forwards} forward passes",
    )
    figure.colorbar(image, ax=axes, label="probability when revealed", extend="min")
    return figure


def _visible(tokenizer: Any, token: int) -> str:
    """A token's text with its spaces and control characters to be seen."""
    return repr(tokenizer.decode([token]))[1:-1].replace(" ", "·")


def plot_attention_pattern(length: int = 16, block_size: int = 4, *, window: int | None = None) -> "Figure":
    """
    Who attends to whom in the two-stream pass over [x_t ; x_0] (arXiv 2503.09573, Sec. 3.3).

    Args:
        length: Tokens of each stream.
        block_size: Tokens per block.
        window: Earlier blocks that are seen; all by default.

    Returns:
        A figure, queries from top to bottom and keys from left to right.

    Raises:
        ValueError: a size is out of range.
        ImportError: matplotlib is missing.
    """
    if not 1 <= length <= MOST_TOKENS:
        raise ValueError(f"`length` must be from 1 to {MOST_TOKENS} tokens, but got {length}.")
    if not 1 <= block_size <= length:
        raise ValueError(f"`block_size` must be from 1 to `length` ({length}), but got {block_size}.")
    if window is not None and window < 0:
        raise ValueError(f"`window` must be a number of blocks >= 0, but got {window}.")
    block_ids = token_block_ids(torch.arange(length), block_size).repeat(2)
    copy = (torch.arange(2 * length) < length).long()
    query, key = (Tokens(block_ids[index], streams=copy[index]) for index in ((slice(None), None), slice(None)))
    seen = is_visible(query, key, length if window is None else window)
    kinds = {
        "noisy to noisy: its own block": (copy[:, None] == 1) & (copy == 1),
        "noisy to clean: the blocks before": (copy[:, None] == 1) & (copy == 0),
        "clean to clean: its own block and those before": (copy[:, None] == 0) & (copy == 0),
    }
    number = sum((index + 1) * (seen & kind) for index, kind in enumerate(kinds.values()))

    figure = _figure(6.5, 8)
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colors = ["white", "tab:orange", "tab:green", "tab:blue"]
    axes = figure.subplots()
    extent = (0, 2 * length, 2 * length, 0)
    axes.imshow(number.numpy(), cmap=ListedColormap(colors), vmin=0, vmax=3, extent=extent, interpolation="none")
    borders = [start + stream for stream in (0, length) for start in range(0, length, block_size)]
    for border in borders:
        width = 1.6 if border == length else 0.4
        axes.axhline(border, color="black", linewidth=width)
        axes.axvline(border, color="black", linewidth=width)
    middles = [length / 2, 3 * length / 2]
    axes.set_xticks(middles, ["noisy $x_t$", "clean $x_0$"])
    axes.set_yticks(middles, ["noisy $x_t$", "clean $x_0$"], rotation="vertical", va="center")
    axes.tick_params(length=0)
    share = seen.float().mean().item()
    axes.set(
        xlabel="key",
        ylabel="query",
        title=f"Two-stream attention: {length} tokens, block size {block_size}; {share:.0%} of the pairs",
    )
    patches = [Patch(facecolor=color, label=kind) for color, kind in zip(colors[1:], kinds, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", frameon=False)
    return figure


def loss_variance(
    schedule: str, block_sizes: Sequence[int], noise_interval: tuple[float, float] = FULL_NOISE_INTERVAL
) -> list[float]:
    """
    How much the loss of one block varies with the noise alone, where every token costs the same.

    With p the mask probability, w the weight and K ~ Binomial(s, p(t)) masked tokens of a block of s, the loss per
    token is w K / s times the cost, and its variance relative to its squared mean is

        E_t[w^2 (p^2 + p (1 - p) / s)] / E_t[w p]^2 - 1,    t ~ U[beta, omega].

    Args:
        schedule: One of `NOISE_SCHEDULES`.
        block_sizes: Tokens per block.
        noise_interval: (beta, omega), 0 < beta < omega <= 1.

    Returns:
        A ratio without unit for each block size.

    Raises:
        ValueError: an unknown schedule, an interval or a block size out of range.
    """
    if schedule not in NOISE_SCHEDULES:
        raise ValueError(f"`schedule` must be one of {', '.join(NOISE_SCHEDULE_NAMES)}, but got {schedule!r}.")
    if any(size < 1 for size in block_sizes):
        raise ValueError(f"`block_sizes` must be integers >= 1, but got {list(block_sizes)}.")
    t, p, w = _curve(schedule, noise_interval)

    def mean(values: torch.Tensor) -> float:
        return torch.trapezoid(values, t).item() / (t[-1] - t[0]).item()

    squared_mean = mean(w * p) ** 2
    return [mean(w**2 * (p**2 + p * (1 - p) / size)) / squared_mean - 1 for size in block_sizes]


def _curve(schedule: str, noise_interval: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """t, p(t) and w(t), float64 [times]; dense where t is small and w changes fast."""
    validate_noise_interval(noise_interval)
    beta, omega = noise_interval
    if not 0 < beta < omega:
        raise ValueError(f"`noise_interval` must be (beta, omega) with 0 < beta < omega, but got {noise_interval}.")
    t = torch.logspace(0, 1, NUM_TIMES, base=omega / beta, dtype=torch.float64) * beta
    return t, NOISE_SCHEDULES[schedule].mask_probability(t), NOISE_SCHEDULES[schedule].loss_weight(t)


def plot_noise_schedules(
    schedules: Sequence[str] = NOISE_SCHEDULE_NAMES,
    *,
    noise_interval: tuple[float, float] = FULL_NOISE_INTERVAL,
    max_block_size: int = 1024,
) -> "Figure":
    """
    Noise schedules: how likely a token is masked at time t, what its loss weighs, and how much a block's loss varies.

    Args:
        schedules: Names out of `NOISE_SCHEDULES`.
        noise_interval: (beta, omega) that t is drawn from in training; shaded.
        max_block_size: Largest block size of the third panel; see [`loss_variance`].

    Returns:
        A figure of three panels.

    Raises:
        ValueError: no or an unknown schedule, an interval or a block size out of range.
        ImportError: matplotlib is missing.
    """
    if not schedules:
        raise ValueError(f"`schedules` must name at least one of {', '.join(NOISE_SCHEDULE_NAMES)}, but got none.")
    if max_block_size < 1:
        raise ValueError(f"`max_block_size` must be an integer >= 1, but got {max_block_size}.")
    sizes = [2**power for power in range(max_block_size.bit_length())]
    variances = {name: loss_variance(name, sizes, noise_interval) for name in schedules}

    figure = _figure(14, 4.2)
    masking, weighting, varying = figure.subplots(1, 3)
    for name in schedules:
        t, p, w = _curve(name, FULL_NOISE_INTERVAL)
        masking.plot(t, p, label=name)
        weighting.plot(t, w, label=name)
        varying.plot(sizes, variances[name], marker="o", markersize=3, label=name)
    beta, omega = noise_interval
    is_clipped = tuple(noise_interval) != FULL_NOISE_INTERVAL
    for axes in (masking, weighting):
        axes.set_xlabel("t")
        if is_clipped:
            axes.axvspan(beta, omega, color="0.9", zorder=0)
    masking.set(ylabel="mask probability p(t)", title="How likely a token is masked")
    weighting.set(ylabel="loss weight w(t)", title="What a masked token's loss weighs", yscale="log")
    varying.set(
        xlabel="block size",
        ylabel="variance / squared mean",
        title=f"How much a block's loss varies, t in [{beta:g}, {omega:g}]",
        xscale="log",
        yscale="log",
    )
    varying.set_xscale("log", base=2)
    varying.set_xticks(sizes[:: max(1, len(sizes) // 6)], [str(size) for size in sizes[:: max(1, len(sizes) // 6)]])
    masking.legend(frameon=False)
    for axes in (masking, weighting, varying):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_training(trainer_state: str | Path | Mapping[str, Any]) -> "Figure":
    """
    Training curves over the steps, as far as they were logged: loss and evaluations, learning rate, gradient norm, and
    the noise intervals that were searched for.

    The training loss is that of the noise interval in force, so it is no bound where the interval is clipped.

    Args:
        trainer_state: What Trainer saved as `trainer_state.json`: the file, a folder that holds it, or its content.

    Returns:
        A figure with one panel for each unit.

    Raises:
        ValueError: there is no such file, it holds something else, or nothing was logged.
        ImportError: matplotlib is missing.
    """
    history = _log_history(trainer_state)
    names = dict.fromkeys(name for entry in history for name in entry)
    evaluated = [name for name in names if name.startswith("eval_") and name.endswith("_nelbo")]
    # To BD3LMTrainer the two are one.
    evaluated = evaluated or [name for name in names if name.startswith("eval_") and name.endswith("_loss")]
    units = {
        "nats per token": {"loss": "training loss", **{name: name for name in evaluated}},
        "learning rate": {"learning_rate": "learning rate"},
        "gradient norm": {"grad_norm": "gradient norm"},
        "noise interval, t": {"noise_interval_beta": "beta", "noise_interval_omega": "omega"},
    }
    curves = {
        unit: {label: points for name, label in names.items() if (points := _points(history, name))}
        for unit, names in units.items()
    }
    curves = {unit: lines for unit, lines in curves.items() if lines}
    if not curves:
        raise ValueError("`trainer_state` must hold logged figures, but got none: was `logging_steps` reached?")
    figure = _figure(4.8 * len(curves), 3.8)
    for axes, (unit, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for label, points in lines.items():
            is_sparse = len(points) < 40
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if is_sparse else None, markersize=3)
        axes.set(xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(frameon=False)
    return figure


def _log_history(trainer_state: str | Path | Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if not isinstance(trainer_state, Mapping):
        path = Path(trainer_state)
        path = path / TRAINER_STATE if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"`trainer_state` must be a {TRAINER_STATE} or a folder with one, but got {path}.")
        try:
            trainer_state = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"`trainer_state` must be JSON, but {path} is not: {error}") from error
    history = trainer_state.get("log_history", []) if isinstance(trainer_state, Mapping) else None
    if not isinstance(history, list) or not all(isinstance(entry, Mapping) for entry in history):
        raise ValueError("`trainer_state` must be a mapping whose `log_history` is a list of mappings, but is not.")
    return history


def _points(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of each entry that holds it."""
    points = [(entry.get("step"), entry[name]) for entry in history if name in entry]
    for point in points:
        if not all(isinstance(number, (int, float)) for number in point):
            raise ValueError(f"`trainer_state` must hold a number as `step` and as `{name}`, but got {point}.")
    return points
