"""Running moments: against the moments of everything at once."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from alignment.trainers.moments import RunningMoments


def alone(sums: Sequence[float]) -> list[float]:
    """One rank."""
    return list(sums)


def of(*batches: Sequence[float]) -> RunningMoments:
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch), alone)
    return moments


def test_nothing_seen_changes_nothing() -> None:
    assert (of().mean, of().std, of().rms) == (0.0, 1.0, 1.0)
    assert (of([], []).mean, of([], []).std, of([], []).rms) == (0.0, 1.0, 1.0)


def test_by_hand() -> None:
    moments = of([1.0, 2.0], [6.0])
    assert moments.mean == pytest.approx(3.0)
    assert moments.std == pytest.approx((14 / 3) ** 0.5)  # 4 + 1 + 9, divided by n
    assert moments.rms == pytest.approx((41 / 3) ** 0.5)  # 1 + 4 + 36
    assert of([5.0]).std == 1.0  # a single number has no spread to divide by
    assert of([5.0]).rms == 5.0


def test_batches_are_as_everything_at_once() -> None:
    numbers = np.random.default_rng(0).normal(3.0, 2.0, size=97)
    moments = RunningMoments()
    for batch in np.split(numbers, [1, 1, 20, 63]):  # one is empty
        moments.update(torch.tensor(batch), alone)
    assert moments.count == 97
    assert moments.mean == pytest.approx(numbers.mean(), rel=1e-12)
    assert moments.std == pytest.approx(numbers.std(), rel=1e-12)
    assert moments.rms == pytest.approx(np.sqrt((numbers**2).mean()), rel=1e-12)


def test_a_large_offset_costs_no_precision() -> None:
    small = np.random.default_rng(1).normal(size=64)
    moments = RunningMoments()
    for batch in np.split(small + 1e8, 4):
        moments.update(torch.tensor(batch, dtype=torch.float64), alone)
    assert moments.std == pytest.approx(small.std(), rel=1e-6)


def test_shape_does_not_matter_and_what_is_not_finite_does_not_count() -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([[1.0, float("nan")], [float("inf"), 3.0]]), alone)
    assert (moments.count, moments.mean, moments.std) == (2.0, 2.0, 1.0)


def test_equal_numbers_are_divided_by_the_smallest_deviation() -> None:
    assert of([0.3] * 8).std == 1e-4
    assert of([0.0] * 8).rms == 1e-4
    assert of([0.3] * 8).rms == pytest.approx(0.3)


def test_two_ranks_are_as_one() -> None:
    """The other rank holds more numbers; its sums are worked out here."""
    ours, theirs = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 4.0, 9.0])
    rounds = iter([[3.0, 17.0], [0.0 + 0.0 + 25.0]])  # count and sum; squares around the mean 4

    def with_the_other(sums: Sequence[float]) -> list[float]:
        return [a + b for a, b in zip(sums, next(rounds), strict=True)]

    moments = RunningMoments()
    moments.update(ours, with_the_other)
    whole = torch.cat([ours, theirs]).numpy()
    assert moments.mean == pytest.approx(whole.mean())
    assert moments.std == pytest.approx(whole.std())


def test_a_rank_without_numbers_takes_part_in_both_sums() -> None:
    calls = []

    def counted(sums: Sequence[float]) -> list[float]:
        calls.append(len(sums))
        return list(sums)

    RunningMoments().update(torch.tensor([]), counted)
    assert calls == [2, 1]


def test_the_state_goes_through_json_and_comes_back_exactly() -> None:
    moments = of([0.1, 0.2], [0.7])
    other = RunningMoments()
    other.load_state_dict(json.loads(json.dumps(moments.state_dict())))
    for one in (moments, other):
        one.update(torch.tensor([1.0, 3.0]), alone)
    assert other.state_dict() == moments.state_dict()
