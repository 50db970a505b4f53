"""Whole tiny runs of several methods to replay, and what tests break in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignment.config.load import load_recipe
from alignment.config.schema import Recipe
from alignment.rollout.hf import HFEngine
from alignment.rollout.native import NativeEngine
from alignment.runs.directory import RunDirectory
from alignment.runs.samples import rollout_path
from alignment.trainers import setup
from alignment.trainers.run import train

_SAMPLED = (
    "data={type: arithmetic, operation: add, operands: 2, low: 1, high: 9, held_out: 8}",
    "algorithm.prompts_per_step=4",
    "rollout.max_new_tokens=8",
    "rewards=[{type: 'replay_runs:even_tokens'}]",
)
_COMMON = ("algorithm.steps=5", "optim.lr=3e-3", "checkpoint={every: 2, keep: 3}", "expect=[]")
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "grpo": (
        "tiny/grpo",
        (
            *_SAMPLED,
            "algorithm.group_size=4",
            "algorithm.updates_per_step=2",
            "algorithm.kl={coef: 0.1, controller: adaptive, target: 0.01, horizon: 50}",
            "model.reference={mode: synced, every: 2, mix: 0.5}",
        ),
    ),
    "refill": (
        "tiny/grpo",
        (
            *_SAMPLED,
            "algorithm.group_size=2",
            "algorithm.dynamic_sampling=refill",
            "algorithm.max_refills=9",
            "rollout.max_new_tokens=1",
        ),
    ),
    "ppo": (
        "tiny/ppo",
        (
            *_SAMPLED,
            "algorithm.samples_per_prompt=2",
            "algorithm.epochs_per_step=2",
            "algorithm.updates_per_step=2",
            "algorithm.normalize_rewards=true",
        ),
    ),
    "raft": ("tiny/raft", (*_SAMPLED, "algorithm.group_size=3")),
    "online_dpo": (
        "tiny/online_dpo",
        (*_SAMPLED, "algorithm.group_size=3", "model.reference=frozen_copy"),
    ),
    "preferences": ("tiny/preferences", (*_SAMPLED, "algorithm.samples_per_prompt=4")),
    "dpo": ("tiny/dpo", ("model.reference=frozen_copy", "algorithm.pairs_per_step=4")),
    "sft": (
        "tiny/sft",
        (
            "algorithm.samples_per_step=4",
            "model.lora={rank: 4, dropout: 0.3}",
            "model.dtype=bfloat16",
        ),
    ),
    "reward_model": ("tiny/reward_model", ("algorithm.pairs_per_step=5",)),
    "ai_feedback": ("tiny/ai_feedback", ("algorithm.prompts_per_step=3",)),
}
"""Name to (recipe, settings): five steps each, a checkpoint after steps 2, 4 and 5."""

SAMPLING = ("grpo", "refill", "ppo", "raft", "online_dpo", "preferences")


def recipe_of(name: str, folder: Path, *overrides: str) -> Recipe:
    """The recipe of a case, called like the case and kept in `folder`."""
    shipped, settings = METHODS[name]
    given = [*_COMMON, *settings, f"run.name={name}", f"run.dir={folder}", *overrides]
    if name in ("preferences", "ai_feedback"):  # they make data, and have no optimizer
        given.remove("optim.lr=3e-3")
    recipe = load_recipe(shipped, given)
    assert isinstance(recipe, Recipe)
    return recipe


def run(
    name: str, folder: Path, *overrides: str, rollouts_from: Path | None = None
) -> RunDirectory:
    """Train to the end."""
    return train(recipe_of(name, folder, *overrides), rollouts_from=rollouts_from)


def made_once(factory: pytest.TempPathFactory) -> Callable[[str], RunDirectory]:
    """Gives the run of a case, made the first time it is asked for; tests do not change it."""
    runs: dict[str, RunDirectory] = {}

    def of(name: str) -> RunDirectory:
        if name not in runs:
            runs[name] = run(name, factory.mktemp("made"))
        return runs[name]

    return of


def even_tokens(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """The share of even token ids."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def forbid(patch: pytest.MonkeyPatch, *, engine: bool = True) -> None:
    """Let no grader be built from now on and, unless told otherwise, no engine be used."""

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is to be sampled or graded")

    patch.setattr(setup, "build_rewards", fail)
    if engine:
        for kind in (NativeEngine, HFEngine):
            patch.setattr(kind, "generate", fail)
            patch.setattr(kind, "weights_updated", fail)


def change_row(
    run: RunDirectory, step: int, row: int, column: str, change: Callable[[Any], Any]
) -> None:
    """Change one value in the recorded samples of a step."""
    path = rollout_path(run.rollouts_dir, step)
    table = pq.read_table(path)
    values = table.column(column).to_pylist()
    values[row] = change(values[row])
    place = table.schema.get_field_index(column)
    field = table.schema.field(place)
    pq.write_table(table.set_column(place, field, pa.array(values, field.type)), path)


def contents_of(run: RunDirectory) -> dict[str, tuple[bytes, int]]:
    """Every file of a run: its bytes and its time of last change."""
    return {
        path.relative_to(run.path).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in run.path.rglob("*")
        if path.is_file()
    }
