"""Two runs of one recipe, compared bit for bit in all that a run is kept for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from alignment.runs.checkpoint import latest_checkpoint, load_checkpoint
from alignment.runs.directory import RunDirectory
from alignment.runs.metrics import read_metrics
from alignment.runs.state_tree import first_difference

_MACHINE = ("time/", "memory/")


def differences(killed: RunDirectory, whole: RunDirectory) -> list[str]:
    """In which parts the runs differ, and where; nothing if they are one."""
    found = {name: compare(killed, whole) for name, compare in _PARTS.items()}
    return [f"{name}: {place}" for name, place in found.items() if place is not None]


def _metrics(killed: RunDirectory, whole: RunDirectory) -> str | None:
    left, right = (_steps(run.metrics) for run in (killed, whole))
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
    """The same ones are kept, and the last one holds the same weights, optimizer and counters.

    A run killed after its last checkpoint came into place may have kept an older one as well.
    """
    kept, wanted = (
        {path.name for path in run.checkpoints_dir.iterdir()} for run in (killed, whole)
    )
    if not wanted <= kept:
        return f"{sorted(kept)} where {sorted(wanted)} are kept"
    left, right = (_last_state(run) for run in (killed, whole))
    return first_difference(left, right)


def _last_state(run: RunDirectory) -> dict[str, Any]:
    path = latest_checkpoint(run.checkpoints_dir)
    assert path is not None
    return load_checkpoint(path)


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
}


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
