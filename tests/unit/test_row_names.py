"""Rewards name the row that they cannot grade as the user's file does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from chat_tokenizers import bytes_only

from alignment.data.places import Places
from alignment.data.prompts import build_prompts
from alignment.rewards.protocol import FunctionReward, RewardError
from alignment.types import Completion, Prompt, StopReason, UserInputError
from reward_models import judge, reasoning_gym
from reward_models.declines import DeclinesReward
from reward_models.exact import ExactReward, NumberReward
from reward_models.math import reference_answer
from reward_models.scalar_scoring import _Retokenizer

Item = tuple[Prompt, Completion]


def drawn() -> Item:
    """The third line of a file, drawn as the 90th prompt of the run, with an answer to it."""
    rows = [{"prompt": "a"}, {"prompt": "b", "answer": "four"}]
    prompts, _ = build_prompts(rows, bytes_only(), places=Places([1, 3], "sums.jsonl"))
    answer = Completion(89, 0, (5,), (-1.0,), StopReason.STOP, 0, "4")
    return replace(prompts[1], index=89), answer


def without(item: Item, *columns: str) -> Item:
    prompt, completion = item
    row = {key: value for key, value in prompt.row.items() if key not in columns}
    return replace(prompt, row=row), completion


def function(completions: list[str], level: list[int]) -> list[float]:
    """A reward that needs a column."""
    return [1.0 for _ in completions]


GRADED: dict[str, Callable[[Item], Any]] = {
    "math": lambda item: reference_answer(without(item, "answer")[0], "answer"),
    "number": lambda item: NumberReward()([item]),
    "exact": lambda item: ExactReward()([without(item, "answer")]),
    "declines": lambda item: DeclinesReward()([item]),
    "judge": lambda item: judge._question(replace(item[0], row={"prompt": 3})),
    "reasoning_gym": lambda item: reasoning_gym._task_of(item[0]),
    "retokenizer": lambda item: _Retokenizer(bytes_only(), None)(without(item, "prompt")),
    "function": lambda item: FunctionReward("f", function, {})([item]),
}


@pytest.mark.parametrize("reward", GRADED)
def test_a_reward_names_the_line_of_a_row_that_it_cannot_grade(reward: str) -> None:
    with pytest.raises((UserInputError, RewardError), match=r"sums\.jsonl:3\b") as caught:
        GRADED[reward](drawn())
    assert "89" not in str(caught.value)


def test_a_prompt_of_no_known_row_is_named_by_its_number() -> None:
    prompt = Prompt((1,), "a", 4)
    assert prompt.row_name == "the row of prompt 4"
    assert prompt == replace(prompt, place="sums.jsonl:3")  # a recorded prompt has no place
