"""A figure with its standard error, over independent sequences or batches."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Estimate:
    """
    A figure and the standard error of it; differences and ratios of two of them over the same sequences or batches are
    paired, so that what both have in common does not count.

    Attributes:
        value: the figure.
        influence: how much each independent sequence, or batch, moves it (the infinitesimal jackknife): its
            derivative with respect to their relative weight, divided by their number.
    """

    value: float
    influence: np.ndarray

    @property
    def standard_error(self) -> float:
        """From the spread of the influences; NaN where there is but one sequence."""
        number = len(self.influence)
        return float(np.sqrt(number / (number - 1) * (self.influence**2).sum())) if number > 1 else float("nan")

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.influence - other.influence)

    def __truediv__(self, other: "Estimate") -> "Estimate":
        ratio = self.value / other.value
        return Estimate(ratio, (self.influence - ratio * other.influence) / other.value)

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.standard_error:.2g}"


def sum_per_sequence(influence: np.ndarray, sequence: np.ndarray) -> np.ndarray:
    """[blocks] -> [sequences]"""
    _, sequence = np.unique(sequence, return_inverse=True)
    return np.bincount(sequence, weights=influence)


def variance_of_blocks(first: np.ndarray, second: np.ndarray, sequence: np.ndarray) -> Estimate:
    """The variance of a block's loss, from estimates of its mean and its mean square in each block."""
    mean = first.mean()
    influence = second - second.mean() - 2 * mean * (first - mean)
    return Estimate(float(second.mean() - mean**2), sum_per_sequence(influence / len(influence), sequence))
