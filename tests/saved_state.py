"""A checkpoint of any state at once, without the thread that writes those of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.runs.checkpoint import write_checkpoint
from alignment.runs.snapshot import take_snapshot


def save_checkpoint(
    directory: Path | str,
    step: int,
    state: Mapping[str, Any],
    *,
    keep: int,
    scores: Mapping[int, float] | None = None,
) -> Path:
    """The two halves of saving in one go; arguments and errors are theirs."""
    return write_checkpoint(directory, step, take_snapshot(state), keep=keep, scores=scores)
