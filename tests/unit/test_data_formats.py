"""Row formats are recognised and brought to their normal form, or the row is named."""

from __future__ import annotations

from typing import Any

import pytest

from alignment.data.formats import (
    demonstration_of,
    detect,
    preference_of,
    prompt_of,
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
    with pytest.raises(UserInputError, match="are the same"):
        preference_of({"prompt": "q", "chosen": "a", "rejected": "a"}, chat=True)
    with pytest.raises(UserInputError, match="needs 'chosen' and 'rejected'"):
        preference_of({"prompt": "q", "chosen": "a"}, chat=True)
    with pytest.raises(UserInputError, match="do not begin with the same messages"):
        preference_of({"chosen": "a", "rejected": "b"}, chat=True)
    with pytest.raises(UserInputError, match="messages need a chat template"):
        prompt_of({"messages": [USER]}, chat=False)


def test_style() -> None:
    assert wants_chat("auto", has_template=True)
    assert not wants_chat("auto", has_template=False)
    assert not wants_chat("plain", has_template=True)
    with pytest.raises(UserInputError, match="no chat template"):
        wants_chat("chat", has_template=False)
