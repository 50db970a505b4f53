"""Running mean and deviation of a stream, for normalising rewards and returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

Sum = Callable[[Sequence[float]], list[float]]
"""Sums numbers elementwise over ranks."""


class RunningMoments:
    """Mean and variance of all numbers seen so far, over all ranks (Chan et al. 1979, eq. 2.1).

    Before anything was seen, the mean is 0 and the deviation 1.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.mean = 0.0
        self._squares = 0.0  # sum of squared deviations from the mean

    @property
    def std(self) -> float:
        """Deviation of the numbers seen (divided by n), at least 1e-4; 1 before two were seen."""
        if self.count < 2:
            return 1.0
        return max(math.sqrt(self._squares / self.count), 1e-4)

    def update(self, values: Tensor, over_ranks: Sum) -> None:
        """Take in `values` (any shape, finite) of this rank; every rank calls it equally often."""
        values = values.double()
        count, total = over_ranks([float(values.numel()), float(values.sum())])
        if not count:
            over_ranks([0.0])
            return
        mean = total / count
        (squares,) = over_ranks([float((values - mean).square().sum())])
        everything = self.count + count
        shift = mean - self.mean
        self._squares += squares + shift * shift * self.count * count / everything
        self.mean += shift * count / everything
        self.count = everything

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.count, self.mean = state["count"], state["mean"]
        self._squares = state["squares"]
