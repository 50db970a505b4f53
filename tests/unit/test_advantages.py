"""Advantages against loops in plain floats and numbers worked by hand."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignment.advantages import gae, group_relative, leave_one_out, place_rewards, whiten
from alignment.types import AlignmentError, UserInputError

NAN = float("nan")


def gae_loop(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """The definition, as a double sum: A_t = sum over l of (gamma lam)^l delta_{t+l}."""
    n = len(rewards)
    following = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    advantages = [
        sum((gamma * lam) ** step * deltas[t + step] for step in range(n - t)) for t in range(n)
    ]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def test_gae_by_hand() -> None:
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.6, 0.8]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    # deltas 0.1, 0.2, 0.2; backwards 0.2, 0.2 + 0.1, 0.1 + 0.15
    torch.testing.assert_close(advantages, torch.tensor([[0.25, 0.3, 0.2]]))
    torch.testing.assert_close(returns, torch.tensor([[0.75, 0.9, 1.0]]))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_gae_against_the_definition(data: Any) -> None:
    length = data.draw(st.integers(1, 8))
    number = st.floats(-3, 3)
    rows = data.draw(
        st.lists(
            st.lists(st.tuples(number, number, st.booleans()), min_size=length, max_size=length),
            min_size=1,
            max_size=3,
        )
    )
    gamma, lam = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1))
    rewards = torch.tensor([[x[0] for x in row] for row in rows], dtype=torch.float64)
    values = torch.tensor([[x[1] for x in row] for row in rows], dtype=torch.float64)
    mask = torch.tensor([[x[2] for x in row] for row in rows])
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()
    for b in range(len(rows)):
        kept = mask[b]
        expected = gae_loop(rewards[b][kept].tolist(), values[b][kept].tolist(), gamma, lam)
        assert advantages[b][kept].tolist() == pytest.approx(expected[0], abs=1e-10)
        assert returns[b][kept].tolist() == pytest.approx(expected[1], abs=1e-10)


def test_gae_makes_constants_and_stands_empty_batches() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    advantages, returns = gae(x, x, torch.ones(2, 3, dtype=torch.bool), gamma=1.0, lam=0.95)
    assert not advantages.requires_grad and not returns.requires_grad
    empty = torch.zeros(2, 0)
    assert gae(empty, empty, empty.bool(), gamma=1.0, lam=1.0)[0].shape == (2, 0)
    with pytest.raises(AlignmentError, match="gae was given"):
        gae(x, x[:1], torch.ones(2, 3, dtype=torch.bool), gamma=1.0, lam=1.0)


def test_gae_in_low_precision_computes_in_float32() -> None:
    x, mask = torch.randn(2, 5).bfloat16(), torch.ones(2, 5, dtype=torch.bool)
    low, full = (gae(y, y, mask, gamma=0.9, lam=0.8)[0] for y in (x, x.float()))
    assert low.dtype == torch.float32 and torch.equal(low, full)


def test_place_rewards_by_hand() -> None:
    mask = torch.tensor([[True, True, False, True, False], [True] + [False] * 4, [False] * 5])
    kl = torch.tensor([[1.0, 2.0, NAN, 3.0, NAN], [4.0] + [NAN] * 4, [NAN] * 5])
    placed = place_rewards(torch.tensor([10.0, 20.0, 30.0]), mask, kl=kl, kl_coef=0.5)
    expected = [[-0.5, -1.0, 0.0, 8.5, 0.0], [18.0, 0, 0, 0, 0], [0.0] * 5]
    assert placed.tolist() == expected
    with pytest.raises(AlignmentError, match="do not go with a mask"):
        place_rewards(torch.ones(2), mask)


def test_group_relative_by_hand() -> None:
    rewards = torch.tensor([1.0, 3.0, 5.0, 0.0, 2.0])
    groups = torch.tensor([7, 7, 7, -2, -2])
    none = group_relative(rewards, groups, scale="none")
    assert none.tolist() == [-2.0, 0.0, 2.0, -1.0, 1.0]
    by_group = group_relative(rewards, groups, scale="group")
    root = math.sqrt(2.0)
    expected = [-2 / 2.0001, 0.0, 2 / 2.0001, -1 / (root + 1e-4), 1 / (root + 1e-4)]
    assert by_group.tolist() == pytest.approx(expected, abs=1e-6)
    by_batch = group_relative(rewards, groups, scale="batch")
    std = statistics.stdev([1.0, 3.0, 5.0, 0.0, 2.0]) + 1e-4
    assert by_batch.tolist() == pytest.approx([x / std for x in none.tolist()], abs=1e-6)


def test_leave_one_out_by_hand() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0, 4.0, 9.0])
    groups = torch.tensor([0, 0, 0, 1, 1])
    expected = [1 - 4.0, 2 - 3.5, 6 - 1.5, 4 - 9.0, 9 - 4.0]
    assert leave_one_out(rewards, groups).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("scale", ["group", "batch", "none", "rloo"])
def test_failed_graders_are_left_out(bad: float, scale: Any) -> None:
    def advantages(rewards: list[float], groups: list[int]) -> list[float]:
        tensors = torch.tensor(rewards), torch.tensor(groups)
        both = leave_one_out(*tensors) if scale == "rloo" else group_relative(*tensors, scale=scale)
        result: list[float] = both.tolist()
        return result

    clean = advantages([1.0, 3.0, 8.0, 0.5, 0.25], [0, 0, 0, 1, 1])
    failed = advantages([1.0, bad, 3.0, 8.0, 0.5, 0.25, bad], [0, 0, 0, 0, 1, 1, 1])
    assert failed == [clean[0], 0.0, *clean[1:], 0.0]
    # one valid member, or none
    assert advantages([5.0, bad, bad, bad], [0, 0, 1, 1]) == [0.0] * 4


def test_group_arguments_are_checked() -> None:
    with pytest.raises(UserInputError, match="unknown advantage scale 'std'"):
        group_relative(torch.ones(2), torch.ones(2), scale="std")
    for function in (group_relative, leave_one_out):
        with pytest.raises(AlignmentError, match="must both be"):
            function(torch.ones(2, 1), torch.ones(2, 1))


def test_whiten_by_hand() -> None:
    x = torch.tensor([[1.0, 3.0, NAN], [5.0, NAN, 7.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    root = math.sqrt(5.0)  # mean 4, variance (9 + 1 + 1 + 9) / 4
    z = torch.tensor([[-3.0, -1.0, 0.0], [1.0, 0.0, 3.0]]) / root
    torch.testing.assert_close(whiten(x, mask), z)
    torch.testing.assert_close(whiten(x, mask, shift_mean=False), torch.where(mask, z + 4.0, 0.0))


def test_whiten_is_stable_around_a_large_mean() -> None:
    x = torch.tensor([[10000.0, 10001.0, 10002.0, 10003.0]])
    whitened = whiten(x, torch.ones(1, 4, dtype=torch.bool))
    expected = torch.tensor([[-1.5, -0.5, 0.5, 1.5]]) / math.sqrt(1.25)
    torch.testing.assert_close(whitened, expected, rtol=1e-6, atol=1e-6)


def test_whiten_degenerate_sets() -> None:
    ones = torch.ones(2, 3)
    assert not whiten(ones, torch.zeros(2, 3, dtype=torch.bool)).any()
    assert not whiten(ones, ones.bool()).any()
    with pytest.raises(AlignmentError, match="shapes must match"):
        whiten(ones, torch.ones(3, dtype=torch.bool))


def test_whiten_calls_its_reducer_twice_with_sums() -> None:
    calls: list[list[float]] = []

    def record(sums: Tensor) -> Tensor:
        calls.append(sums.tolist())
        return sums

    whiten(torch.tensor([1.0, 3.0]), torch.tensor([True, True]), reduce_sums=record)
    assert calls == [[2.0, 4.0], [2.0]]
