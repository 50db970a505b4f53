"""Read a run directory as it is, finished or not. What cannot be read is listed, not raised."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from alignment.runs.samples import rollout_files
from alignment.types import AlignmentError, UserInputError
from evals.compare import Comparison

T = TypeVar("T")

_EVAL_NAME = re.compile(r"(?P<task>.+)-step-(?P<step>\d+)")


@dataclass(frozen=True, slots=True)
class EvalSummary:
    """The summary of one saved evaluation.

    task: its name in the recipe. kind: its registered name.
    step: None for the evaluation of a finished pipeline stage.
    """

    path: Path
    task: str
    kind: str
    step: int | None
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunData:
    """What a run directory holds.

    metrics:  one object a step, the last one written for each step, in order of steps.
    rollouts: (step, parquet file), in order of steps.
    finished: the run came to its end and said so.
    stages:   (name, run directory) of a pipeline, in order.
    problems: what could not be read, for people.
    """

    path: Path
    recipe_text: str
    recipe: Mapping[str, Any]
    info: Mapping[str, Any]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    rollouts: list[tuple[int, Path]]
    evals: list[EvalSummary]
    comparisons: list[Comparison]
    finished: bool
    stages: list[tuple[str, Path]]
    problems: list[str] = field(default_factory=list)


def read_run(run_dir: Path | str) -> RunData:
    """Read everything of a run but its rollouts and evaluation records.

    Raises:
        UserInputError: `run_dir` is no run directory at all.
    """
    path = Path(run_dir)
    known = ("run.json", "recipe.yaml", "metrics.jsonl", "comparison.json", "stages", "evals")
    if not any((path / name).exists() for name in known):
        raise UserInputError(
            f"{path} is not a run directory: it has none of {', '.join(known)}; give the folder "
            "that `align train` made"
        )
    problems: list[str] = []
    recipe_text = _attempt(problems, path / "recipe.yaml", _read_text, "")
    nothing: Mapping[str, Any] = {}
    recipe = _attempt(problems, path / "recipe.yaml", _read_yaml, nothing)
    steps: dict[int, dict[str, Any]] = {}
    for row in _read_lines(path / "metrics.jsonl", problems):
        if isinstance(row.get("step"), int):
            steps[row["step"]] = row  # a resumed run may write a step again: the last one counts
    return RunData(
        path=path,
        recipe_text=recipe_text,
        recipe=recipe,
        info=_attempt(problems, path / "run.json", _read_object, nothing),
        metrics=[steps[step] for step in sorted(steps)],
        events=_read_lines(path / "events.jsonl", problems),
        rollouts=rollout_files(path / "rollouts"),
        evals=_evals(path / "evals", problems),
        comparisons=_comparisons(path, problems),
        finished=(path / "finished.json").is_file(),
        stages=_stages(path / "stages", recipe),
        problems=problems,
    )


def number(value: Any) -> float | None:
    """A finite number, or None: metrics may hold "nan", text or nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def lookup(data: Any, *paths: str) -> Any:
    """The first of several dotted paths that leads somewhere in nested mappings; else None."""
    for path in paths:
        found = data
        for key in path.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        if found is not None:
            return found
    return None


def _attempt(problems: list[str], path: Path, read: Callable[[Path], T], default: T) -> T:
    if not path.exists():
        return default
    try:
        return read(path)
    except (OSError, ValueError, YAMLError, AlignmentError) as error:
        problems.append(f"{path.name}: {error}")
        return default


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _read_object(path: Path) -> Mapping[str, Any]:
    data = json.loads(path.read_bytes())
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    return data


def _read_yaml(path: Path) -> Mapping[str, Any]:
    data = YAML(typ="safe").load(path)
    if not isinstance(data, dict):
        raise ValueError("not a YAML mapping")
    return data


def _read_lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. A torn last line is the mark of a run still writing."""
    lines = _attempt(problems, path, Path.read_bytes, b"").split(b"\n")
    rows: list[dict[str, Any]] = []
    for index, line in enumerate(lines):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            if index < len(lines) - 1:
                problems.append(f"{path.name}: line {index + 1} is not JSON and is left out")
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _comparisons(folder: Path, problems: list[str]) -> list[Comparison]:
    """A pipeline's comparison.json, and comparison-TASK.json where there are several tasks."""
    paths = [*folder.glob("comparison.json"), *sorted(folder.glob("comparison-*.json"))]
    found = [_attempt(problems, path, Comparison.load, None) for path in paths]
    return [one for one in found if one is not None]


def _evals(folder: Path, problems: list[str]) -> list[EvalSummary]:
    found = []
    nothing: Mapping[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        data = _attempt(problems, path, _read_object, nothing)
        metrics, intervals = data.get("metrics"), data.get("intervals")
        if not isinstance(metrics, Mapping):
            continue
        match = _EVAL_NAME.fullmatch(path.stem)
        kind = str(data.get("task") or path.stem)
        labels = data.get("labels")
        found.append(
            EvalSummary(
                path=path,
                # The recipe may name a task, so that it can be there twice.
                task=match["task"] if match else kind,
                kind=kind,
                step=int(match["step"]) if match else None,
                metrics={k: v for k, x in metrics.items() if (v := number(x)) is not None},
                intervals=_read_intervals(intervals),
                labels={k: str(v) for k, v in labels.items()} if isinstance(labels, dict) else {},
            )
        )
    return sorted(found, key=lambda one: (one.task, one.step is None, one.step or 0))


def _read_intervals(data: Any) -> dict[str, tuple[float, float]]:
    intervals = {}
    for name, ends in data.items() if isinstance(data, Mapping) else ():
        if isinstance(ends, list) and len(ends) == 2:
            low, high = number(ends[0]), number(ends[1])
            if low is not None and high is not None:
                intervals[name] = (low, high)
    return intervals


def _stages(folder: Path, recipe: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """Stage directories in the order of the recipe; unknown ones last, by name."""
    listed = recipe.get("stages")
    order = [
        str(stage.get("name"))
        for stage in (listed if isinstance(listed, list) else ())
        if isinstance(stage, Mapping)
    ]
    names = [path.name for path in folder.glob("*") if path.is_dir()]
    rank = {name: index for index, name in enumerate(order)}
    names.sort(key=lambda name: (rank.get(name, len(rank)), name))
    return [(name, folder / name) for name in names]
