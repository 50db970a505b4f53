"""The numbers of a run: summed up within a step, one JSON object a step in `metrics.jsonl`.

JSON has no NaN and no infinity. A metric that is one of them is written as null, and its name is
listed under `"nonfinite"` with what it was, so that any JSON reader can read the file and
`read_metrics` gives the number back:

    {"step": 7, "loss": null, "reward/mean": 0.25, "nonfinite": {"loss": "nan"}}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat

from alignment.runs.jsonl import JsonLinesFile, read_json_lines
from alignment.types import AlignmentError

_RESERVED = ("step", "nonfinite")


@dataclass
class MetricSums:
    """Metrics of one step while it runs: means as (total, count), maxima, and counts.

    A mean of means is wrong where the parts differ in size, so micro-batches and processes hand
    in totals and counts, and the division happens once, in `result`.
    """

    means: dict[str, tuple[float, float]] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: float, count: float = 1) -> None:
        """Add `count` observations that sum to `total`."""
        if name in self.maxima:
            raise AlignmentError(f"metric {name!r} is a maximum already; name the mean otherwise")
        if not count >= 0:
            raise AlignmentError(f"metric {name!r} came with a count of {count}; it must be >= 0")
        old_total, old_count = self.means.get(name, (0.0, 0))
        self.means[name] = (old_total + total, old_count + count)

    def add_max(self, name: str, value: float) -> None:
        """Keep the largest value seen. A NaN stays: it must not hide behind a number."""
        if name in self.means:
            raise AlignmentError(f"metric {name!r} is a mean already; name the maximum otherwise")
        old = self.maxima.get(name, -math.inf)
        self.maxima[name] = math.nan if math.isnan(old) or math.isnan(value) else max(old, value)

    def add_count(self, name: str, amount: float) -> None:
        """Add to a count, which is reported as it is, summed over micro-batches and processes."""
        self.counts[name] = self.counts.get(name, 0.0) + amount

    def merge(self, other: MetricSums) -> None:
        """Add what another micro-batch or process measured."""
        for name, (total, count) in other.means.items():
            self.add(name, total, count)
        for name, value in other.maxima.items():
            self.add_max(name, value)
        for name, amount in other.counts.items():
            self.add_count(name, amount)

    def copy(self) -> MetricSums:
        """The sums as they are now, for `restore`."""
        copied = MetricSums()
        copied.restore(self)
        return copied

    def restore(self, earlier: MetricSums) -> None:
        """Forget what came after `earlier`: an attempt that failed counts for nothing."""
        self.means = dict(earlier.means)
        self.maxima = dict(earlier.maxima)
        self.counts = dict(earlier.counts)

    def result(self) -> dict[str, float]:
        """Name to number. A mean over nothing was not measured, and is left out."""
        means = {name: total / count for name, (total, count) in self.means.items() if count}
        return means | self.maxima | self.counts


class MetricsWriter:
    """Appends one object a step to `metrics.jsonl`, each step later than the one before.

    A line is with the operating system when `write` returns. Call `sync` before a checkpoint, so
    that a machine that loses power has the metrics of every step its checkpoint has behind it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file = JsonLinesFile(self.path)
        self.last_step = _last_step(self.path, read_json_lines(self.path))

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Append the metrics of `step`.

        Raises:
            AlignmentError: the step is not after the last one, or a name is reserved, or a value
                is no number, or the file cannot be written.
        """
        if self.last_step is not None and step <= self.last_step:
            raise AlignmentError(
                f"{self.path} ends with step {self.last_step}, and step {step} came to be "
                "written; after a resume, call truncate_after(step of the checkpoint) first"
            )
        self._file.append(_record(step, metrics))
        self.last_step = step

    def truncate_after(self, step: int) -> int:
        """Drop the records of later steps, as a resume from `step` needs: each step once.

        Returns:
            How many records were dropped.
        """
        records = read_json_lines(self.path)
        kept = [record for record in records if record["step"] <= step]
        if len(kept) < len(records):
            self._file.keep(kept)
        self.last_step = _last_step(self.path, kept)
        return len(records) - len(kept)

    def sync(self) -> None:
        """Force everything written so far to disk."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order; none if there is no such file yet.

    NaN and infinities come back as floats. A torn last line is left out.

    Raises:
        AlignmentError: the file is damaged elsewhere.
    """
    records = read_json_lines(Path(path))
    for record in records:
        for name, kind in record.pop("nonfinite", {}).items():
            record[name] = float(kind)
    return records


def _record(step: int, metrics: Mapping[str, SupportsFloat]) -> dict[str, Any]:
    record: dict[str, Any] = {"step": step}
    nonfinite: dict[str, str] = {}
    for name, value in metrics.items():
        if name in _RESERVED:
            raise AlignmentError(f"a metric cannot be named {name!r}; choose another name")
        number = _number(name, value)
        if math.isfinite(number):
            record[name] = number
        else:
            record[name] = None
            nonfinite[name] = str(number)
    return record | ({"nonfinite": nonfinite} if nonfinite else {})


def _number(name: str, value: SupportsFloat) -> float:
    if isinstance(value, int):
        return int(value)  # True becomes 1
    if isinstance(value, SupportsFloat):
        return float(value)
    raise AlignmentError(f"metric {name!r} is {value!r}, which is no number")


def _last_step(path: Path, records: list[dict[str, Any]]) -> int | None:
    if not all(isinstance(record.get("step"), int) for record in records):
        raise AlignmentError(f"{path} has lines without a step: it is no metrics file; move it")
    return max((record["step"] for record in records), default=None)
