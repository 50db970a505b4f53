"""Running mean and deviation of a stream, for normalising rewards and returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

Sum = Callable[[Sequence[float]], list[float]]
"""Sums numbers elementwise over ranks."""

_SMALLEST = 1e-4  # a deviation below it is a tie, and would blow rounding noise up


class RunningMoments:
    """Mean and variance of all numbers seen so far, over all ranks (Chan et al. 1979, eq. 2.1).

    Before anything was seen, the mean is 0, and the deviation and the root mean square are 1.
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
        return max(math.sqrt(self._squares / self.count), _SMALLEST)

    @property
    def rms(self) -> float:
        """Root of the mean square of the numbers seen, at least 1e-4; 1 before any was seen."""
        if not self.count:
            return 1.0
        return max(math.sqrt(self._squares / self.count + self.mean**2), _SMALLEST)

    def update(self, values: Tensor, over_ranks: Sum) -> None:
        """Take in this rank's `values` (any shape), but for those that are not finite.

        Every rank calls it equally often, with as many values as it has, or none.
        """
        values = values[values.isfinite()].double()
        count, total = over_ranks([float(values.numel()), float(values.sum())])
        # Around the mean of all ranks, in a second pass: a large common offset costs no precision.
        mean = total / max(count, 1.0)
        (squares,) = over_ranks([float((values - mean).square().sum())])
        if not count:
            return
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
