"""Steps by hand on a byte-level tokenizer: where each ends, and what is left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from chat_tokenizers import bytes_only, merging, metaspace

from alignment.data.report import TOO_LONG, DataReport
from alignment.data.steps import (
    BLANK_STEP,
    NO_WHOLE_STEP,
    SEPARATOR_IN_STEP,
    SHARED_TOKEN,
    UNKNOWN_ENDS,
    build_steps,
)
from alignment.types import UserInputError

START, END = 257, 258
ROW = {"prompt": "hi", "completions": ["a.", "bc"], "labels": [True, 0.25]}


def raw(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


PROMPT = (START, *raw("user\nhi"), END, *raw("\n"), START, *raw("assistant\n"))


def marks(stepped: Any) -> list[int]:
    return [i for i, marked in enumerate(stepped.sample.loss_mask) if marked]


def test_steps_by_hand() -> None:
    (stepped,), report = build_steps([ROW], bytes_only())
    assert stepped.sample.prompt_ids == PROMPT
    assert stepped.sample.completion_ids == (*raw("a.\nbc"), END)
    assert marks(stepped) == [1, 4]
    assert stepped.labels == (1.0, 0.25)
    assert report == DataReport((0,), {})
    (stepped,), _ = build_steps([ROW], bytes_only(), separator=" ## ")
    assert stepped.sample.completion_ids == (*raw("a. ## bc"), END)
    assert marks(stepped) == [1, 7]
    (stepped,), _ = build_steps([ROW], bytes_only(), style="plain")
    assert stepped.sample.prompt_ids == raw("hi")
    assert stepped.sample.completion_ids == (*raw("a.\nbc"), END)
    assert marks(stepped) == [1, 4]


def test_a_step_of_many_bytes_and_of_white_space_at_its_end() -> None:
    row = {"prompt": "hi", "completions": ["\u00e9\U0001f642 \n", " x"], "labels": [1, 0]}
    (stepped,), _ = build_steps([row], bytes_only())
    assert stepped.sample.completion_ids == (*raw("\u00e9\U0001f642 \n\n x"), END)
    assert marks(stepped) == [5, 10]  # 2 and 4 bytes; then 3 of white space, 1 of the next step


def test_a_token_may_hold_the_end_of_a_step_and_the_start_of_the_separator() -> None:
    tokenizer = merging()
    row = {"prompt": "hi", "completions": ["yes", "no"], "labels": [1, 0]}
    separator = "s and s"
    (stepped,), _ = build_steps([row], tokenizer, separator=separator)
    ids = tokenizer.encode("yess and sno<|im_end|>")
    assert list(stepped.sample.completion_ids) == ids
    pieces = [tokenizer.decode(ids[: end + 1]) for end in marks(stepped)]
    assert pieces[0].startswith("yes")
    assert pieces[1] == "yess and sno"
    joined = tokenizer.encode("the", add_special_tokens=False)
    assert len(joined) == 1  # so that these two steps are one token
    rows = [{"prompt": "hi", "completions": ["t", "e"], "labels": [1, 0]}, row]
    _, report = build_steps(rows, tokenizer, separator="h")
    assert report.dropped == {SHARED_TOKEN: (0,)}


def test_control_tokens_spelled_in_a_step_are_text() -> None:
    row = {"prompt": "hi", "completions": ["<|im_end|>", "b"], "labels": [1, 0]}
    (stepped,), _ = build_steps([row], bytes_only())
    assert stepped.sample.completion_ids == (*raw("<|im_end|>\nb"), END)
    assert marks(stepped) == [9, 11]
    _, report = build_steps([row, ROW], metaspace())  # what stands before matters to this one
    assert report.dropped == {UNKNOWN_ENDS: (0,)}


def test_rows_that_cannot_be_used_are_dropped_and_counted() -> None:
    blank = {"prompt": "hi", "completions": ["a", " "], "labels": [1, 0]}
    _, report = build_steps([ROW, blank], bytes_only())
    assert report == DataReport((0,), {BLANK_STEP: (1,)})


def test_rows_whose_steps_would_be_found_elsewhere_are_dropped_and_counted() -> None:
    def answer(*steps: str) -> dict[str, Any]:
        return {"prompt": "hi", "completions": list(steps), "labels": [1] * len(steps)}

    two_lines = answer("a\nb", "c")
    _, report = build_steps([ROW, two_lines], bytes_only())
    assert report == DataReport((0,), {SEPARATOR_IN_STEP: (1,)})
    (stepped,), _ = build_steps([two_lines], bytes_only(), separator="\n\n")
    assert marks(stepped) == [2, 5]
    # In "xaaay", the first "aa" begins inside the step "xa".
    _, report = build_steps([answer("xa", "y"), answer("x", "y")], bytes_only(), separator="aa")
    assert report == DataReport((1,), {SEPARATOR_IN_STEP: (0,)})
    # Around a step, separators make blank steps, which are none.
    kept, _ = build_steps([answer("a\n", "\nb"), answer("\na", "b\n")], bytes_only())
    assert [marks(one) for one in kept] == [[0, 4], [1, 3]]
    with pytest.raises(UserInputError, match="separator is empty"):
        build_steps([ROW], bytes_only(), separator="")


def test_truncation_keeps_whole_steps_with_their_labels() -> None:
    long = {"prompt": "hi", "completions": ["abcdef"], "labels": [1]}
    limit = len(PROMPT) + 4
    (stepped,), report = build_steps([ROW, long], bytes_only(), max_tokens=limit)
    assert stepped.sample.completion_ids == raw("a.\nb")
    assert marks(stepped) == [1]
    assert stepped.labels == (1.0,)
    assert report == DataReport((0,), {NO_WHOLE_STEP: (1,)}, (0,))
    short = {"prompt": "hi", "completions": ["a"], "labels": [1]}
    _, report = build_steps([ROW, short], bytes_only(), max_tokens=limit, too_long="drop")
    assert report == DataReport((1,), {TOO_LONG: (0,)})
    with pytest.raises(UserInputError, match=rf"row 0 .* limit of {limit}"):
        build_steps([ROW], bytes_only(), max_tokens=limit, too_long="error")


def test_malformed_rows_and_slow_tokenizers_are_an_error() -> None:
    with pytest.raises(UserInputError, match=r"^row 1 .*1 labels for 2 completions"):
        build_steps([ROW, {**ROW, "labels": [1]}], bytes_only())
    slow: Any = SimpleNamespace()
    with pytest.raises(UserInputError, match="fast version"):
        build_steps([ROW], slow)
