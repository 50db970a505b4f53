"""Preference pairs by hand on a byte-level tokenizer: what is kept, what is dropped, and why."""

from __future__ import annotations

from typing import Any

import pytest
from chat_tokenizers import CHATML, bytes_only

from alignment.data.labelled import build_labelled
from alignment.data.pairs import (
    BLANK_RESPONSE,
    NO_COMMON_PROMPT,
    NOT_THE_PROMPT,
    SAME_ONCE_CUT,
    SAME_SIDES,
    build_pairs,
)
from alignment.data.report import (
    NOTHING_TO_TRAIN_ON,
    PROMPT_TOO_LONG,
    TOO_LONG,
    DataReport,
    check_dropped,
)
from alignment.types import UserInputError

START, END = 257, 258
GOOD = {"prompt": "hi", "chosen": "yes", "rejected": "no"}


def raw(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


PROMPT = (START, *raw("user\nhi"), END, *raw("\n"), START, *raw("assistant\n"))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_pairs_by_hand() -> None:
    whole = {"chosen": [user("hi"), said("yes")], "rejected": [user("hi"), said("no")]}
    for row in (GOOD, whole, {"prompt": "hi", **whole}, {"prompt": [user("hi")], **whole}):
        pairs, report = build_pairs([row], bytes_only())
        assert pairs.chosen[0].prompt_ids == pairs.rejected[0].prompt_ids == PROMPT
        assert pairs.chosen[0].completion_ids == (*raw("yes"), END)
        assert pairs.rejected[0].completion_ids == (*raw("no"), END)
        assert pairs.chosen[0].loss_mask == (True,) * 4
        assert pairs.margins == ()
        assert report == DataReport((0,), {})


def test_plain_pairs_by_hand() -> None:
    row = {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}
    pairs, _ = build_pairs([row], bytes_only(), style="plain")
    assert pairs.chosen[0].prompt_ids == pairs.rejected[0].prompt_ids == raw("1 + 1 =")
    assert pairs.chosen[0].completion_ids == (*raw(" 2"), END)  # END is its EOS
    assert pairs.rejected[0].completion_ids == (*raw(" 3"), END)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "hi", "chosen": "a", "rejected": "a"}, SAME_SIDES),
        ({"prompt": "hi", "chosen": "", "rejected": "a"}, BLANK_RESPONSE),
        ({"prompt": "hi", "chosen": "a", "rejected": " \n"}, BLANK_RESPONSE),
        ({"prompt": "hi", "chosen": "", "rejected": ""}, BLANK_RESPONSE),
        ({"prompt": "hi", "chosen": "a", "rejected": [user("b")]}, BLANK_RESPONSE),
        ({"chosen": "a", "rejected": "b"}, NO_COMMON_PROMPT),
        (
            {"chosen": [user("hi"), said("a")], "rejected": [user("ho"), said("b")]},
            NO_COMMON_PROMPT,
        ),
        ({"prompt": "hi", "chosen": [user("ho"), said("a")], "rejected": "b"}, NOT_THE_PROMPT),
        (
            {
                "prompt": "hi",
                "chosen": [user("ho"), said("a")],
                "rejected": [user("ho"), said("b")],
            },
            NOT_THE_PROMPT,
        ),
        (
            {
                "prompt": [{"role": "system", "content": "s"}],
                "chosen": [user("hi"), said("a")],
                "rejected": [user("ho"), said("a")],
            },
            NOT_THE_PROMPT,
        ),
    ],
)
def test_bad_pairs_are_dropped_and_counted(row: dict[str, Any], reason: str) -> None:
    pairs, report = build_pairs([GOOD, row, GOOD, row], bytes_only())
    assert len(pairs) == 2
    assert report == DataReport((0, 2), {reason: (1, 3)})
    with pytest.raises(UserInputError, match=f"no row can be used: .*{reason}"):
        build_pairs([row], bytes_only())


def test_sides_that_the_template_makes_the_same_are_the_same() -> None:
    trimming = bytes_only(CHATML.replace("message['content']", "message['content'] | trim"))
    row = {"prompt": "hi", "chosen": "a", "rejected": "a "}
    kept, _ = build_pairs([row], bytes_only())
    assert len(kept) == 1
    _, report = build_pairs([row, GOOD], trimming)
    assert report.dropped == {SAME_SIDES: (0,)}


def test_a_context_that_a_system_prompt_begins_is_continued() -> None:
    system = {"role": "system", "content": "s"}
    row = {
        "prompt": [system],
        "chosen": [user("hi"), said("a")],
        "rejected": [user("hi"), said("b")],
    }
    pairs, _ = build_pairs([row], bytes_only())
    assert pairs.chosen[0].prompt_ids == (START, *raw("system\ns"), END, *raw("\n"), *PROMPT)
    assert pairs.chosen[0].completion_ids == (*raw("a"), END)


def test_long_pairs_under_each_policy() -> None:
    rows = [
        GOOD,
        {"prompt": "hi", "chosen": "same end", "rejected": "same start"},
        {"prompt": "hi", "chosen": "a long answer", "rejected": "b"},
        {"prompt": "hi" * 9, "chosen": "a", "rejected": "b"},
    ]
    limit = len(PROMPT) + 4
    pairs, report = build_pairs(rows, bytes_only(), max_tokens=limit)
    assert report == DataReport((0, 2), {SAME_ONCE_CUT: (1,), PROMPT_TOO_LONG: (3,)}, (2,))
    assert pairs.chosen[1].completion_ids == raw("a lo")
    assert pairs.chosen[1].loss_mask == (True,) * 4
    assert pairs.rejected[1].completion_ids == (*raw("b"), END)
    _, report = build_pairs(rows, bytes_only(), max_tokens=limit, too_long="drop")
    assert report == DataReport((0,), {TOO_LONG: (1, 2, 3)})
    with pytest.raises(UserInputError, match=rf"row 1 .* limit of {limit}"):
        build_pairs(rows, bytes_only(), max_tokens=limit, too_long="error")


def test_margins_follow_the_pairs_that_are_kept() -> None:
    same = {"prompt": "hi", "chosen": "a", "rejected": "a", "margin": 7}
    rows = [{**GOOD, "margin": 1}, same, {**GOOD, "margin": -0.5}]
    assert build_pairs(rows, bytes_only())[0].margins == (1.0, -0.5)
    with pytest.raises(UserInputError, match=r"row 2 .*no margin"):
        build_pairs([*rows[:2], GOOD], bytes_only())
    with pytest.raises(UserInputError, match=r"row 1 .*'margin' is 'big'"):
        build_pairs([GOOD, {**GOOD, "margin": "big"}], bytes_only())


@pytest.mark.parametrize(
    "row", [{"prompt": "hi", "chosen": "a"}, {"prompt": "hi", "chosen": "a", "rejected": 3}]
)
def test_malformed_rows_are_an_error(row: dict[str, Any]) -> None:
    with pytest.raises(UserInputError, match=r"^row 1 \(counting from 0\)"):
        build_pairs([GOOD, row], bytes_only())
    with pytest.raises(UserInputError, match=r"^row 1 \(counting from 0\)"):
        build_labelled([GOOD, row], bytes_only())


def test_dropped_rows_have_a_limit() -> None:
    report = DataReport(tuple(range(4, 10)), {SAME_SIDES: (0, 1, 2), TOO_LONG: (3,)})
    check_dropped(report, 0.4, "training data")
    with pytest.raises(UserInputError) as caught:
        check_dropped(report, 0.39, "training data")
    message = str(caught.value)
    assert "training data: 4 of 10 rows (40.0%) cannot be used" in message
    assert "limit of 39.0%" in message
    assert f"3 dropped, {SAME_SIDES} (row 0, 1, 2); 1 dropped, {TOO_LONG} (row 3)" in message
    check_dropped(DataReport((0,), {}), 0.0, "training data")


def test_labelled_rows_by_hand() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "hi", "completion": "yes", "label": True},
        {"messages": [user("hi"), said("no")], "label": 0},
        {"messages": [user("ho"), said("x"), user("hi"), said("yes"), user("?")], "label": True},
        {"messages": [user("hi")], "label": True},
        {"prompt": "hi", "completion": " ", "label": False},
    ]
    samples, report = build_labelled(rows, bytes_only())
    assert [one.desirable for one in samples] == [True, False, True]
    assert samples[0].sample.prompt_ids == samples[1].sample.prompt_ids == PROMPT
    assert [one.sample.completion_ids for one in samples] == [
        (*raw("yes"), END),
        (*raw("no"), END),
        (*raw("yes"), END),
    ]
    earlier = (START, *raw("user\nho"), END, *raw("\n"), START, *raw("assistant\nx"), END)
    assert samples[2].sample.prompt_ids == (*earlier, *raw("\n"), *PROMPT)
    assert all(all(one.sample.loss_mask) for one in samples)
    assert report == DataReport((0, 1, 2), {NOTHING_TO_TRAIN_ON: (3, 4)})


def test_preferences_are_labelled_too() -> None:
    same = {"prompt": "hi", "chosen": "a", "rejected": "a"}
    long = {"prompt": "hi", "chosen": "a long answer", "rejected": "b"}
    samples, report = build_labelled(
        [GOOD, same, long], bytes_only(), max_tokens=len(PROMPT) + 4, too_long="drop"
    )
    assert [one.sample.completion_ids for one in samples] == [
        (*raw("yes"), END),
        (*raw("no"), END),
        (*raw("b"), END),
    ]
    assert [one.desirable for one in samples] == [True, False, False]
    assert report == DataReport((0, 0, 2), {SAME_SIDES: (1, 1), TOO_LONG: (2,)})


def test_preferences_are_labelled_only_where_they_are_pairs() -> None:
    """What makes no pair is neither good nor bad: the same tokens would be called both."""
    cut = {"prompt": "hi", "chosen": "same end", "rejected": "same start"}
    samples, report = build_labelled([GOOD, cut], bytes_only(), max_tokens=len(PROMPT) + 4)
    assert [one.sample.completion_ids for one in samples] == [(*raw("yes"), END), (*raw("no"), END)]
    assert report == DataReport((0, 0), {SAME_ONCE_CUT: (1, 1)})
    trimming = bytes_only(CHATML.replace("message['content']", "message['content'] | trim"))
    spaced = {"prompt": "hi", "chosen": "a", "rejected": "a "}
    samples, report = build_labelled([spaced, GOOD], trimming)
    assert [one.desirable for one in samples] == [True, False]
    assert report == DataReport((1, 1), {SAME_SIDES: (0, 0)})
