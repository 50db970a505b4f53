"""Two runs of one recipe, compared bit for bit in all that a run is kept for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from alignment.runs.checkpoint import list_checkpoints, load_checkpoint
from alignment.runs.directory import RunDirectory
from alignment.runs.metrics import read_metrics
from alignment.runs.state_tree import first_difference
from alignment.types import AlignmentError

_MACHINE = ("time/", "memory/")


def differences(
    killed: RunDirectory, whole: RunDirectory, *, holds: Collection[str], last_step: int
) -> list[str]:
    """In which parts the runs differ, and where; nothing if they are one.

    Args:
        whole: the one that nothing happened to.
        holds: parts that must not be empty, besides metrics, checkpoints and report.
        last_step: the step that the metrics must come to.
    """
    needed = {*holds, *_EVERY_RUN}
    return [
        *(
            f"{name}: nothing to compare"
            for name in _PARTS
            if name in needed and _empty(name, whole)
        ),
        *(f"{name}: {place}" for name, place in _places(killed, whole) if place is not None),
        *_too_short(whole, last_step),
    ]


def _places(killed: RunDirectory, whole: RunDirectory) -> Iterator[tuple[str, str | None]]:
    for name, compare in _PARTS.items():
        try:
            yield name, compare(killed, whole)
        except AlignmentError as error:  # damaged
            yield name, str(error)


def _empty(part: str, run: RunDirectory) -> bool:
    """Whether there is no byte in a part of a run."""
    path = run.path / part
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return not any(file.stat().st_size for file in files)


def _too_short(run: RunDirectory, last_step: int) -> list[str]:
    steps = [record["step"] for record in _steps(run.metrics)] if run.metrics.is_file() else []
    if steps and steps[-1] == last_step:
        return []
    return [f"metrics.jsonl: it ends at step {steps[-1] if steps else 0}, and not at {last_step}"]


def _metrics(killed: RunDirectory, whole: RunDirectory) -> str | None:
    left, right = (_steps(run.metrics) for run in (killed, whole))
    if not left:
        return "nothing is recorded"
    numbers = [record["step"] for record in left]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return f"the steps recorded are {numbers}"
    return first_difference(left, right)


def _steps(path: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if not name.startswith(_MACHINE)}
        for record in read_metrics(path)
    ]


def _checkpoints(killed: RunDirectory, whole: RunDirectory) -> str | None:
    """The same ones are kept, and each holds the same weights, optimizer and counters.

    A run killed after its last checkpoint came into place may have kept an older one as well.
    """
    kept, wanted = (
        {path.name for _, path in list_checkpoints(run.checkpoints_dir)} for run in (killed, whole)
    )
    if not wanted <= kept:
        return f"{sorted(kept)} where {sorted(wanted)} are kept"
    for name in sorted(wanted):
        left, right = (load_checkpoint(run.checkpoints_dir / name) for run in (killed, whole))
        place = first_difference(left, right)
        if place is not None:
            return f"{name}: {place}"
    return None


def _rollouts(killed: RunDirectory, whole: RunDirectory) -> str | None:
    def differ(left: Path, right: Path) -> bool:
        tables = [pq.read_table(path, use_threads=False) for path in (left, right)]
        return not tables[0].equals(tables[1], check_metadata=True)

    return _files(killed.rollouts_dir, whole.rollouts_dir, differ)


def _bytes_differ(left: Path, right: Path) -> bool:
    return left.read_bytes() != right.read_bytes()


def _files(
    left: Path, right: Path, differ: Callable[[Path, Path], bool] = _bytes_differ
) -> str | None:
    """The first file that one folder does not have, or that differs; a folder may be missing."""
    here, there = ({p.relative_to(d) for p in d.rglob("*") if p.is_file()} for d in (left, right))
    if here != there:
        return f"{sorted(map(str, here ^ there))} are not in both"
    return next((str(name) for name in sorted(here) if differ(left / name, right / name)), None)


def _report(killed: RunDirectory, whole: RunDirectory) -> str | None:
    """Both have one. What it shows of times differs."""
    return "missing" if _empty("report.html", killed) else None


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


_PARTS: dict[str, Callable[[RunDirectory, RunDirectory], str | None]] = {
    "metrics.jsonl": _metrics,
    "checkpoints": _checkpoints,
    "model": lambda killed, whole: _files(killed.model_dir, whole.model_dir),
    "rollouts": _rollouts,
    "evals": lambda killed, whole: _files(killed.evals_dir, whole.evals_dir),
    "made": lambda killed, whole: _files(killed.made_dir, whole.made_dir),
    "data.jsonl": lambda killed, whole: (
        "differs" if _text(killed.data) != _text(whole.data) else None
    ),
    "report.html": _report,
}
"""Part to where two runs differ in it. The names are those in the run's folder."""

_EVERY_RUN = ("metrics.jsonl", "checkpoints", "report.html")
