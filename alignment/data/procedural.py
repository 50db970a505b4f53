"""Prompts from reasoning-gym: 100 procedural tasks, each with its own verifier."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from alignment.data.formats import Row
from alignment.registry import unknown_name
from alignment.types import UserInputError


def reasoning_gym(
    task: str, size: int = 500, seed: int = 0, options: Mapping[str, Any] | None = None
) -> list[Row]:
    """Problems of one reasoning-gym task.

    Each row has `question`, `answer` (one right answer; others may be right too), and what scores
    a completion: `task`, `options`, and `entry`, the task's own record of the problem, so that
    `reasoning_gym.create_dataset(row["task"], **row["options"]).score_answer(text, row["entry"])`
    is the score.

    Args:
        task: the task's name, such as `leg_counting`.
        size: number of problems.
        seed: of the problems; another seed gives other problems, which may overlap.
        options: the task's own options, such as `{max_animals: 5}`.

    Raises:
        UserInputError: an unknown task, or options it does not take.
    """
    if size < 1:
        raise UserInputError(f"reasoning_gym: size is {size}; give 1 or more")
    gym = importlib.import_module("reasoning_gym")  # most of a second to import
    known = sorted(importlib.import_module("reasoning_gym.factory").DATASETS)
    if task not in known:
        raise UserInputError(unknown_name("reasoning_gym task", task, known))
    chosen = dict(options or {})
    try:
        dataset = gym.create_dataset(task, size=size, seed=seed, **chosen)
        entries = [dataset[index] for index in range(size)]
    except (TypeError, ValueError, AssertionError) as error:
        raise UserInputError(
            f"reasoning_gym task {task!r} does not take the options {chosen}: {error}"
        ) from error
    return [
        {
            "question": entry["question"],
            "answer": str(entry["answer"]),
            "task": task,
            "options": chosen,
            "entry": entry,
        }
        for entry in entries
    ]
