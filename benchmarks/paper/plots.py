"""Saving a plot so that equal figures give equal files."""

from pathlib import Path


def save_figure(figure, path: Path) -> None:
    """As PNG, without the date and versions that would make each file differ."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
