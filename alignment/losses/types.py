"""What a loss returns: unreduced values, and metrics that aggregate exactly.

A metric leaves a loss as sums, never as a mean: the mean of the means of unequal micro-batches or
ranks is not the mean of the tokens. `Mean` and `Max` merge without that error, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from alignment.losses.inputs import masked, upcast
from alignment.types import AlignmentError


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """A mean kept as (sum, count). Over ranks: sum `total` and `count`, each on its own.

    total: 0-d float tensor, detached.
    count: how many values went into it; a tensor where it was counted on the device.
    """

    total: Tensor
    count: Tensor | int

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> Mean:
        """The mean of `x` over `mask` (over everything without one). Shapes equal."""
        x = x.detach()
        if mask is None:
            return cls(upcast(x).sum(), x.numel())
        return cls(masked(x, mask).sum(), mask.sum())

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> float:
        """The mean as a number; NaN where nothing was counted."""
        count = float(self.count)
        return float(self.total) / count if count else float("nan")


@dataclass(frozen=True, slots=True, eq=False)
class Max:
    """A maximum. Over ranks: the maximum of `largest`.

    largest: 0-d float tensor, detached; minus infinity where there was nothing to look at.
    """

    largest: Tensor

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> Max:
        """The largest of `x` over `mask` (over everything without one). Shapes equal."""
        x = upcast(x.detach()) if mask is None else masked(x.detach(), mask, float("-inf"))
        return cls(x.amax() if x.numel() else x.new_tensor(float("-inf")))

    def merge(self, other: Max) -> Max:
        return Max(torch.maximum(self.largest, other.largest))

    def value(self) -> float:
        return float(self.largest)


Metric = Mean | Max


@dataclass(frozen=True, slots=True, eq=False)
class TokenLoss:
    """An unreduced loss per token: `per_token` `[B, T]`, exactly 0 outside the mask."""

    per_token: Tensor
    metrics: Mapping[str, Metric]


@dataclass(frozen=True, slots=True, eq=False)
class SequenceLoss:
    """An unreduced loss per sequence or pair: `per_sequence` `[B]`.

    To reduce it, divide its sum by the number of sequences in the whole optimizer step, all
    micro-batches and ranks together.
    """

    per_sequence: Tensor
    metrics: Mapping[str, Metric]


def merge_metrics(*parts: Mapping[str, Metric]) -> dict[str, Metric]:
    """Join the metrics of several micro-batches; a name missing from some is joined over the rest.

    Raises:
        AlignmentError: one name is a `Mean` in one part and a `Max` in another.
    """
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = _merge(name, merged[name], metric) if name in merged else metric
    return merged


def _merge(name: str, left: Metric, right: Metric) -> Metric:
    if isinstance(left, Mean) and isinstance(right, Mean):
        return left.merge(right)
    if isinstance(left, Max) and isinstance(right, Max):
        return left.merge(right)
    raise AlignmentError(
        f"the metric {name!r} is a {type(left).__name__} in one micro-batch and a "
        f"{type(right).__name__} in another; give the two different names"
    )
