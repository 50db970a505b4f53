"""The small data sets that come with the toolkit."""

from __future__ import annotations

from collections import Counter

import pytest

from alignment.data.formats import demonstration_of, detect
from alignment.data.order import split_held_out
from alignment.data.shipped import shipped, shipped_data
from alignment.feedback.constitution import load_constitution
from alignment.types import UserInputError


def test_a_name_that_does_not_exist_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserInputError, match="'request'; did you mean 'requests'"):
        shipped("request")
    assert set(shipped_data()) == {"critiques", "requests"}


def test_columns_can_be_renamed() -> None:
    assert set(shipped("requests", columns={"prompt": "question"})[0]) == {"question", "kind"}


def test_the_requests_are_different_and_of_two_kinds() -> None:
    rows = shipped("requests")
    assert Counter(row["kind"] for row in rows) == {"everyday": 80, "harmful": 40}
    assert len({row["prompt"].lower() for row in rows}) == 120
    _, held_out = split_held_out(rows, 24, seed=0)  # as the recipes hold them out
    assert 5 <= sum(rows[index]["kind"] == "harmful" for index in held_out) <= 12


def test_the_critiques_are_asked_for_as_the_constitution_does() -> None:
    rows = shipped("critiques")
    principles = load_constitution("requests").principles
    asked = Counter(row["prompt"][-1]["content"] for row in rows)
    assert set(asked) == {text for p in principles for text in (p.critique, p.revision)}
    kinds = {(row["prompt"][-1]["content"], row["kind"]) for row in rows}
    assert len(kinds) == 2 * len(asked)  # each is asked about harmful and about other requests
    for critique, revision in zip(rows[::2], rows[1::2], strict=True):
        assert detect(critique) == detect(revision) == "demonstration"
        said = {"role": "assistant", "content": critique["completion"]}
        assert revision["prompt"][:-1] == [*critique["prompt"], said]
        turns, answer = demonstration_of(revision, chat=True)
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2 + ["user"]
        declined = "I won't" in answer[0]["content"]
        assert declined == (revision["kind"] == "harmful")


def test_the_critic_is_not_trained_on_the_requests() -> None:
    learned = {row["prompt"][0]["content"].lower() for row in shipped("critiques")}
    assert not learned & {row["prompt"].lower() for row in shipped("requests")}


def test_all_rows_of_a_request_stay_on_one_side() -> None:
    rows = shipped("critiques")
    kept, held_out = split_held_out(rows, 32, seed=0)
    assert len(held_out) == 32
    assert not {rows[i]["split_key"] for i in kept} & {rows[i]["split_key"] for i in held_out}
