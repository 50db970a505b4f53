"""Whole runs of the tiny catalogue model in the test's own process, and rewards for them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors.torch import load_file
from torch import Tensor

from alignment.config.load import load_recipe
from alignment.config.schema import Recipe
from alignment.runs.directory import RunDirectory
from alignment.runs.metrics import read_metrics
from alignment.trainers.run import train
from alignment.types import Completion, Outcome, Prompt, Score

GRPO = (
    "run.name=grpo",
    "data={type: arithmetic, operation: add, operands: 2, low: 1, high: 9, held_out: 8}",
    "algorithm.steps=2",
    "algorithm.prompts_per_step=4",
    "algorithm.group_size=4",
    "algorithm.kl.coef=0.0",
    "rollout.max_new_tokens=8",
    "rewards=[{type: 'tiny_runs:even_tokens'}]",
    "optim.lr=3e-3",
    "optim.schedule=constant",
    "expect=[]",
)
"""A step learns something from the first one on: random tokens differ in how many are even."""

RLVR = (
    *(setting for setting in GRPO if not setting.startswith(("run.name", "rewards"))),
    "run.name=rlvr",
    "rewards=[{type: number}, {type: regex, pattern: '[0-9]', mode: search}]",
)
"""As GRPO, with a verifier, and a reward by which random tokens differ."""

SFT = (
    "run.name=sft",
    "data={type: arithmetic, operation: add, operands: 2, low: 1, high: 4, held_out: 3}",
    "algorithm.steps=2",
    "algorithm.samples_per_step=4",
    "optim.lr=3e-3",
    "optim.schedule=constant",
    "expect=[]",
)

_METHODS = {"grpo": ("tiny/grpo", GRPO), "rlvr": ("tiny/rlvr", RLVR), "sft": ("tiny/sft", SFT)}


def recipe_of(method: str, folder: Path, *overrides: str) -> Recipe:
    """The tiny recipe of a method, a few steps long, kept in `folder`."""
    name, settings = _METHODS[method]
    recipe = load_recipe(name, [*settings, f"run.dir={folder}", *overrides])
    assert isinstance(recipe, Recipe)
    return recipe


def run(method: str, folder: Path, *overrides: str, resume: str = "auto") -> RunDirectory:
    """Train to the end."""
    return train(recipe_of(method, folder, *overrides), resume=resume)


@contextmanager
def one_nan(shards: Any, happens: bool) -> Iterator[None]:
    """The first loss is NaN on its way back, if that `happens` on this rank.

    Args:
        shards: the class of the model's.
    """
    backward = shards.backward
    left = [math.nan] if happens else []

    def poisoned(self: Any, loss: Tensor) -> None:
        backward(self, loss * left.pop() if left else loss)

    shards.backward = poisoned
    try:
        yield
    finally:
        shards.backward = backward


def metrics_of(run: RunDirectory) -> list[dict[str, Any]]:
    """The metrics of each training step."""
    return [record for record in read_metrics(run.metrics) if record["step"] > 0]


def steps_of(run: RunDirectory) -> list[dict[str, Any]]:
    """The metrics of each training step that say what was computed, not how fast."""
    machine = ("time/", "memory/", "eval/")
    return [
        {name: value for name, value in record.items() if not name.startswith(machine)}
        for record in metrics_of(run)
    ]


def events_of(run: RunDirectory, kind: str) -> list[dict[str, Any]]:
    """The events of one kind."""
    lines = run.events.read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def weights_of(run: RunDirectory) -> dict[str, Tensor]:
    """The final weights."""
    weights: dict[str, Tensor] = load_file(run.model_dir / "model.safetensors")
    return weights


def rollouts_of(run: RunDirectory) -> list[list[dict[str, Any]]]:
    """The recorded samples of each step, row by row."""
    return [pq.read_table(path).to_pylist() for path in sorted(run.rollouts_dir.iterdir())]


def even_tokens(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """The share of even token ids."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def constant(completions: Sequence[str], value: float = 0.5, **_: Any) -> list[float]:
    """The same for everyone."""
    return [value] * len(completions)


class FailsOn:
    """Even tokens, but a crash for the samples of some numbers."""

    def __init__(self, samples: list[int]) -> None:
        self._samples = samples

    def __call__(self, items: Sequence[tuple[Prompt, Completion]], /) -> list[Score]:
        return [self._score(completion) for _, completion in items]

    def _score(self, completion: Completion) -> Score:
        if completion.sample_index in self._samples:
            return Score(None, Outcome.CRASH, "the grader fell over")
        return Score(even_tokens([completion.token_ids])[0])


class FailsForPrompts:
    """Even tokens, but a crash for all samples of some prompts."""

    def __init__(self, prompts: list[int]) -> None:
        self._prompts = prompts

    def __call__(self, items: Sequence[tuple[Prompt, Completion]], /) -> list[Score]:
        failed = Score(None, Outcome.CRASH, "the grader fell over")
        return [
            failed
            if prompt.index in self._prompts
            else Score(even_tokens([completion.token_ids])[0])
            for prompt, completion in items
        ]
