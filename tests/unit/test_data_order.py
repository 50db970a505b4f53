"""The order of rows: whole epochs, exact resumption, splits without leaks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.data.order import DataOrder, split_held_out
from alignment.types import UserInputError


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 30), takes=st.lists(st.integers(0, 40), max_size=6), seed=st.integers(0, 9))
def test_each_epoch_is_a_permutation_however_it_is_taken(
    n: int, takes: list[int], seed: int
) -> None:
    order = DataOrder(n, seed=seed, shuffle=True)
    drawn = [pair for k in takes for pair in order.take(k)]
    assert [draw for draw, _ in drawn] == list(range(sum(takes)))
    assert drawn == DataOrder(n, seed=seed).take(sum(takes))
    rows = [row for _, row in drawn]
    for start in range(0, len(rows) - n + 1, n):
        assert sorted(rows[start : start + n]) == list(range(n))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 20), before=st.integers(0, 50), after=st.integers(0, 50))
def test_resuming_is_exact(n: int, before: int, after: int) -> None:
    order = DataOrder(n, seed=3)
    order.take(before)
    resumed = DataOrder(n, seed=3)
    resumed.load_state_dict(order.state_dict())
    assert resumed.take(after) == order.take(after)
    assert resumed.position == before + after


def test_epochs_and_seeds_differ() -> None:
    order = DataOrder(50, seed=0)
    first, second = order.take(50), order.take(50)
    assert [r for _, r in first] != [r for _, r in second]
    assert order.epoch == 2.0
    assert [r for _, r in DataOrder(50, seed=1).take(50)] != [r for _, r in first]
    assert [r for _, r in DataOrder(3, seed=0, shuffle=False).take(5)] == [0, 1, 2, 0, 1]


def test_another_order_is_refused() -> None:
    order = DataOrder(5, seed=0)
    with pytest.raises(UserInputError, match="n_rows = 6, this run's has 5"):
        order.load_state_dict(DataOrder(6, seed=0).state_dict())
    with pytest.raises(UserInputError, match="no rows"):
        DataOrder(0, seed=0)


def split(
    rows: list[dict[str, Any]], k: int, seed: int, **how: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(kept rows, held-out rows)"""
    kept, held = split_held_out(rows, k, seed, **how)
    assert sorted(kept + held) == list(range(len(rows)))
    return [rows[index] for index in kept], [rows[index] for index in held]


def test_held_out_rows_share_nothing_with_the_rest() -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"p{i % 20}", "answer": i} for i in range(60)]
    kept, held = split(rows, 12, seed=1)
    assert len(held) == 12
    assert len(kept) == 48
    assert not {r["prompt"] for r in kept} & {r["prompt"] for r in held}
    assert [r["answer"] for r in kept] == sorted(r["answer"] for r in kept)
    again = split(rows[::-1], 12, seed=1)[1]
    assert sorted(r["answer"] for r in again) == [r["answer"] for r in held]
    assert split(rows, 12, seed=2)[1] != held


def test_identical_rows_stay_together() -> None:
    rows = [{"text": "a"}, {"text": "b"}, {"text": "a"}, {"text": "c"}]
    for seed in range(8):
        kept, held = split(rows, 2, seed, by="row")
        assert not {r["text"] for r in kept} & {r["text"] for r in held}
        assert len(held) == 2
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    talks = [{"messages": messages}, {"messages": [messages[0], messages[0]]}]
    assert len(split(talks, 1, 0)[1]) == 1


def test_impossible_splits_are_refused() -> None:
    same = [{"prompt": "p", "answer": i} for i in range(4)]
    with pytest.raises(UserInputError, match='split by="row"'):
        split(same, 2, 0)
    assert len(split(same, 2, 0, by="row")[1]) == 2
    assert split(same, 0, 0) == (same, [])
    with pytest.raises(UserInputError, match="cannot be held out"):
        split(same, 4, 0)
