"""Row formats are recognised and brought to their normal form, or the row is named."""

from __future__ import annotations

from typing import Any

import pytest

from alignment.data.formats import (
    demonstration_of,
    detect,
    has_content,
    labelled_of,
    margin_of,
    preference_of,
    prompt_of,
    steps_of,
    wants_chat,
)
from alignment.types import UserInputError

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER]}, "conversation"),
        ({"prompt": "q", "completion": "a"}, "demonstration"),
        ({"question": "q", "answer": "a"}, "prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference"),
        ({"prompt": "q", "completion": "a", "label": True}, "labelled"),
        ({"messages": [USER, ASSISTANT], "label": 0}, "labelled"),
        ({"question": "q", "label": True}, "prompt"),
        ({"prompt": "q", "completions": ["a"], "labels": [True]}, "stepped"),
    ],
)
def test_detect(row: dict[str, Any], expected: str) -> None:
    assert detect(row) == expected


def test_detect_names_the_columns() -> None:
    with pytest.raises(UserInputError, match=r"row 3: .*'instruction', 'output'"):
        detect({"instruction": "q", "output": "a"}, where="row 3")


def test_prompts() -> None:
    assert prompt_of({"prompt": "q"}, chat=True) == [USER]
    assert prompt_of({"question": "q"}, chat=False) == "q"
    assert prompt_of({"prompt": [USER]}, chat=True) == [USER]
    assert prompt_of({"messages": [USER, ASSISTANT, USER, OTHER]}, chat=True) == [
        USER,
        ASSISTANT,
        USER,
    ]


def test_demonstrations() -> None:
    assert demonstration_of({"prompt": "q", "completion": "a"}, chat=True) == ([USER], [ASSISTANT])
    assert demonstration_of({"question": "q", "answer": "a"}, chat=False) == ("q", "a")
    row = {"question": "q", "answer": "x", "completion": "a"}
    assert demonstration_of(row, chat=False) == ("q", "a")
    assert demonstration_of({"messages": [USER, ASSISTANT]}, chat=True) == ([], [USER, ASSISTANT])


def test_preferences() -> None:
    expected = ([USER], [ASSISTANT], [OTHER])
    assert preference_of({"prompt": "q", "chosen": "a", "rejected": "b"}, chat=True) == expected
    whole = {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}
    assert preference_of(whole, chat=True) == expected
    assert preference_of({"prompt": [USER], **whole}, chat=True) == expected
    assert preference_of({"prompt": "q", "chosen": "a", "rejected": "b"}, chat=False) == (
        "q",
        "a",
        "b",
    )
    assert preference_of({"chosen": "a", "rejected": "b"}, chat=True)[0] == []


def test_margins() -> None:
    assert margin_of({"margin": 2}) == 2.0
    assert margin_of({"margin": None}) is None
    assert margin_of({}) is None


def test_labelled() -> None:
    assert labelled_of({"prompt": "q", "completion": "a", "label": 1.0}, chat=False) == (
        "q",
        "a",
        True,
    )
    row = {"messages": [USER, ASSISTANT, USER, OTHER, USER], "label": False}
    assert labelled_of(row, chat=True) == ([USER, ASSISTANT, USER], [OTHER], False)
    assert labelled_of({"messages": [USER], "label": 0}, chat=True) == ([USER], [], False)


def test_steps() -> None:
    row = {"prompt": "q", "completions": ["a", "b"], "labels": [True, 0.25]}
    assert steps_of(row, chat=False) == ("q", ["a", "b"], [1.0, 0.25])
    assert steps_of(row, chat=True)[0] == [USER]


def test_has_content() -> None:
    assert has_content("a") and has_content([USER, ASSISTANT])
    assert not has_content(" \n") and not has_content([USER, {"role": "assistant", "content": " "}])
    assert has_content([{"role": "assistant", "tool_calls": [{"name": "f"}]}])


def test_none_keys_of_columnar_files_are_dropped() -> None:
    message = {"role": "user", "content": "q", "name": None}
    assert prompt_of({"prompt": [message]}, chat=True) == [USER]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "a"}, "needs 'prompt', 'question' or 'messages'"),
        ({"prompt": 3}, "of type int"),
        ({"prompt": []}, "non-empty list"),
        ({"prompt": ["q"]}, "message 0 is 'q'"),
        ({"prompt": [{"role": "user"}]}, "message 0 has no content"),
        ({"prompt": [{"role": "user", "content": 3}]}, "content of type int"),
        ({"prompt": [{"role": "a<|im_end|>", "content": "q"}]}, "has role"),
        ({"prompt": [{"role": "usr", "content": "q"}]}, "role 'usr'; did you mean 'user'"),
        ({"prompt": [{"role": "sytem", "content": "q"}]}, "did you mean 'system'"),
        ({"prompt": [{"role": "asistant", "content": "q"}]}, "did you mean 'assistant'"),
        ({"messages": [ASSISTANT]}, "nothing but assistant"),
        ({"messages": "q"}, "non-empty list"),
    ],
)
def test_malformed_prompts_name_the_row(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError, match=rf"^row 7.*{message}"):
        prompt_of(row, chat=True, where="row 7")


def test_malformed_answers_name_the_row() -> None:
    with pytest.raises(UserInputError, match="row 7: needs 'messages', or"):
        demonstration_of({"prompt": "q"}, chat=True, where="row 7")
    with pytest.raises(UserInputError, match="needs 'chosen' and 'rejected'"):
        preference_of({"prompt": "q", "chosen": "a"}, chat=True)
    with pytest.raises(UserInputError, match="messages need a chat template"):
        prompt_of({"messages": [USER]}, chat=False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"margin": "2"}, r"column 'margin' is '2'; give a finite number.*CSV"),
        ({"margin": True}, "column 'margin' is True"),
        ({"margin": float("nan")}, "column 'margin' is nan"),
    ],
)
def test_malformed_margins_name_the_row(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError, match=f"^row 7: {message}"):
        margin_of(row, where="row 7")


@pytest.mark.parametrize("label", ["true", None, 2, 0.5, []])
def test_malformed_labels_name_the_row(label: Any) -> None:
    row = {"prompt": "q", "completion": "a", "label": label}
    with pytest.raises(UserInputError, match=r"^row 7: column 'label' is .*true or false"):
        labelled_of(row, chat=True, where="row 7")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": "ab"}, "column 'completions' is 'ab'; give a non-empty list"),
        ({"labels": []}, r"column 'labels' is \[\]"),
        ({"labels": [1]}, "1 labels for 2 completions"),
        ({"completions": ["a", 3]}, "column 'completions', step 1 is 3"),
        ({"labels": [1, 2]}, "column 'labels', step 1 is 2"),
        ({"labels": [1, None]}, "column 'labels', step 1 is None"),
        ({"labels": [1, float("nan")]}, "column 'labels', step 1 is nan"),
        ({"prompt": 3}, "column 'prompt' is of type int"),
    ],
)
def test_malformed_steps_name_the_row(change: dict[str, Any], message: str) -> None:
    row = {"prompt": "q", "completions": ["a", "b"], "labels": [1, 0], **change}
    with pytest.raises(UserInputError, match=f"^row 7: {message}"):
        steps_of(row, chat=True, where="row 7")
    with pytest.raises(UserInputError, match="needs 'completions' and 'labels'"):
        steps_of({"prompt": "q"}, chat=True)


def test_style() -> None:
    assert wants_chat("auto", has_template=True)
    assert not wants_chat("auto", has_template=False)
    assert not wants_chat("plain", has_template=True)
    with pytest.raises(UserInputError, match="no chat template"):
        wants_chat("chat", has_template=False)
