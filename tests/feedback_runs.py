"""Whole tiny runs of the methods that ask a chat model, and servers that answer in a known way."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, TypeVar

from chat_server import Behaviour, error, says
from tiny_runs import metrics_of

from alignment import registry
from alignment.config.load import load_recipe
from alignment.config.schema import Recipe
from alignment.distributed import Distributed
from alignment.runs.directory import RunDirectory
from alignment.runs.events import EventLog
from alignment.trainers.context import StepResult, TrainingContext
from alignment.trainers.run import train
from alignment.trainers.setup import assemble, load_parts

T = TypeVar("T")

DATA = "data={type: arithmetic, operation: multiply, operands: 2, low: 0, high: 3}"
COMMON = (DATA, "data.shuffle=false", "algorithm.keep_cut_off=true", "expect=[]")


def recipe_of(method: str, folder: Path, *overrides: str) -> Recipe:
    """The tiny recipe of a method on all 16 products, called `run` and kept in `folder`."""
    settings = [*COMMON, "run.name=run", f"run.dir={folder}", *overrides]
    recipe = load_recipe(f"tiny/{method}", settings)
    assert isinstance(recipe, Recipe)
    return recipe


def run(method: str, folder: Path, *overrides: str) -> RunDirectory:
    return train(recipe_of(method, folder, *overrides))


def endpoint(url: str, **options: Any) -> str:
    """The override that makes a server the judge."""
    judge = {"kind": "endpoint", "base_url": url, "model": "m", "retries": 0} | options
    return f"algorithm.judge={json.dumps(judge)}"


def rows_of(run: RunDirectory) -> list[dict[str, Any]]:
    """The data set that a run made."""
    return [json.loads(line) for line in run.data.read_text(encoding="utf-8").splitlines()]


def total(run: RunDirectory, metric: str) -> float:
    """The sum of a count over the steps."""
    return sum(float(record[metric]) for record in metrics_of(run))


def answering(reply: Callable[[list[dict[str, Any]]], str | None]) -> Behaviour:
    """A server's behaviour: what a function of the messages says; None is refused."""

    def behave(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        text = reply(request["messages"])
        behaviour = error(400, "not this one") if text is None else says(text)
        behaviour(handler, request)

    return behave


class OneOf:
    """One of several ranks, in a process that is alone: it gets its share, and hears nobody."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.is_main = rank == 0
        self.device = Distributed().device

    def share(self, items: Sequence[T]) -> list[T]:
        n = len(items)
        return list(
            items[n * self.rank // self.world_size : n * (self.rank + 1) // self.world_size]
        )

    def gather(self, items: Sequence[T]) -> list[T]:
        return list(items)


def context_of(recipe: Recipe, folder: Path) -> TrainingContext:
    folder.mkdir(parents=True, exist_ok=True)
    return assemble(
        load_parts(recipe), Distributed(), EventLog(folder / "events.jsonl"), cache=folder
    )


def steps_on_ranks(method: str, recipe: Recipe, folder: Path, n_ranks: int) -> list[Any]:
    """The rows of all steps, made by `n_ranks` ranks one after the other, in the order of the
    steps and of the prompts."""
    rows: list[tuple[int, int, Any]] = []
    for rank in range(n_ranks):
        context: Any = context_of(recipe, folder / str(rank))
        maker = registry.get("trainer", method)(replace(context, distributed=OneOf(rank, n_ranks)))
        for step in range(1, maker.total_steps + 1):
            result: StepResult = maker.step(step)
            rows += [(step, index, row) for index, row in result.rows]
    return [row for _, _, row in sorted(rows, key=lambda one: one[:2])]
