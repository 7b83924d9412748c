"""The intervals of t that training draws from: those that a search chooses among, and those that were chosen."""

from ..modeling.diffusion_block_diffusion import FULL_NOISE_INTERVAL


# The grid of arXiv 2503.09573, Sec. 5.3: intervals of these widths, a start every 0.05, and the whole.
INTERVAL_WIDTHS = (0.5, 0.6, 0.7, 0.8, 0.9)
INTERVAL_STEP = 0.05


def noise_interval_grid() -> list[tuple[float, float]]:
    """The intervals (beta, omega) that the search chooses among; each starts at 1e-3 or later, as evaluation does."""
    lowest, highest = FULL_NOISE_INTERVAL
    grid = [FULL_NOISE_INTERVAL]
    for width in INTERVAL_WIDTHS:
        for step in range(round((1 - width) / INTERVAL_STEP) + 1):
            beta = round(step * INTERVAL_STEP, 2)
            grid.append((max(beta, lowest), min(round(beta + width, 2), highest)))
    return grid


def chosen_noise_intervals(log_history: list[dict]) -> list[tuple[float, float]]:
    """The intervals that evaluations chose, in their order."""
    return [
        (entry["noise_interval_beta"], entry["noise_interval_omega"])
        for entry in log_history
        if "noise_interval_beta" in entry
    ]
