"""The small data sets that come with the toolkit."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from alignment.data.formats import detect
from alignment.data.order import split_held_out
from alignment.data.samples import build_samples
from alignment.data.shipped import shipped, shipped_data
from alignment.feedback.constitution import load_constitution
from alignment.modeling.tiny import byte_tokenizer
from alignment.types import UserInputError
from reward_models.declines import declines


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
    assert Counter(row["kind"] for row in rows) == {"everyday": 218, "harmful": 95}
    asked = {(p.critique, p.revision) for p in load_constitution("requests").principles}
    seen: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        assert detect(row) == "demonstration"
        critique, said, revision, answer = row["completion"]
        assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant"]
        assert (critique["role"], revision["role"]) == ("user", "user")
        assert (said["role"], answer["role"]) == ("assistant", "assistant")
        seen[critique["content"], revision["content"], row["kind"]] += 1
        harmful = row["kind"] == "harmful"
        verdict = "I must decline this. It would help " if harmful else "I may help with this. My "
        assert said["content"].startswith(verdict)
        assert declines(answer["content"]) == harmful
    assert set(seen) == {(*texts, kind) for texts in asked for kind in ("everyday", "harmful")}
    assert min(seen.values()) >= 30  # each is asked as often about both kinds


def test_the_critic_learns_from_every_request_once_and_from_none_of_the_others() -> None:
    learned = Counter(_words(row["prompt"][0]["content"]) for row in shipped("critiques"))
    assert set(learned.values()) == {1}
    assert not set(learned) & {_words(row["prompt"]) for row in shipped("requests")}


def test_the_critic_learns_both_verdicts() -> None:
    """The loss is on the critique and on the revision, and on nothing before."""
    tokenizer = byte_tokenizer()
    row = shipped("critiques")[0]
    (sample,), _ = build_samples([row], tokenizer)
    scored = [t for t, keep in zip(sample.completion_ids, sample.loss_mask, strict=True) if keep]
    said = tokenizer.decode(scored)
    assert row["completion"][1]["content"] in said and row["completion"][3]["content"] in said
    assert row["prompt"][1]["content"] not in said


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+", text.lower()))
