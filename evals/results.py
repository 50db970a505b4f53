"""What an evaluation leaves behind: one record per graded completion, and their summary."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignment.runs.files import write_atomic
from alignment.types import AlignmentError, Outcome, StopReason, UserInputError


@dataclass(frozen=True, slots=True)
class EvalRecord:
    """One completion and its grade.

    problem_id:  the problem it answers; equal ids across models are the same problem.
    reward:      the weighted sum of the rewards, or None where a grader failed. Tasks that grade
                 nothing store their own number per problem (see the task).
    n_tokens:    completion tokens, stop token included.
    stop_reason: None where nothing was sampled.
    values:      further finite numbers of this record by name, such as the parts of the reward; one
                 that does not exist here (its grader failed) is absent.
    """

    problem_id: int | str
    sample_index: int
    outcome: Outcome
    reward: float | None
    prompt_text: str
    completion_text: str
    n_tokens: int
    stop_reason: StopReason | None
    values: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = {**self.values} if self.reward is None else {"reward": self.reward, **self.values}
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise AlignmentError(
                    f"problem {self.problem_id!r}, sample {self.sample_index}: the {name} is "
                    f"{value}; it must be a finite number, or a failure that is reported as one"
                )


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Everything one task found out about one model.

    metrics:   finite numbers by name; a metric that is undefined here is absent.
    intervals: 95% intervals (low, high) of some of the metrics.
    labels:    which metric or reward plays a part that readers of the result look for, such as
               `gold`; the tasks that write labels list them. In a pipeline's comparison
               `reference`: what the model is to it (`alignment.trainers.compared.Role`).
    """

    task: str
    records: tuple[EvalRecord, ...]
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: Path | str) -> None:
        """Write `path`.jsonl (records) and `path`.json (summary), each atomically.

        The summary comes last and holds the hash of the records, so that a pair torn by a crash
        is noticed. A suffix .json or .jsonl on `path` is ignored.
        """
        stem = _stem(path)
        stem.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(
            json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n"
            for record in self.records
        ).encode("utf-8", "backslashreplace")
        summary = {
            "task": self.task,
            "metrics": dict(self.metrics),
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "labels": dict(self.labels),
            "records": len(self.records),
            "records_sha256": hashlib.sha256(lines).hexdigest(),
        }
        write_atomic(stem.with_name(stem.name + ".jsonl"), lines)
        write_atomic(
            stem.with_name(stem.name + ".json"),
            (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode(),
        )

    @classmethod
    def load(cls, path: Path | str) -> EvalResult:
        """Read what `save(path)` wrote.

        Raises:
            UserInputError: a file is missing, is not one of ours, or the two do not belong
                together.
        """
        stem = _stem(path)
        try:
            summary = json.loads(stem.with_name(stem.name + ".json").read_bytes())
            lines = stem.with_name(stem.name + ".jsonl").read_bytes()
            if hashlib.sha256(lines).hexdigest() != summary["records_sha256"]:
                raise UserInputError(
                    f"{stem}: the records do not match their summary, as after an interrupted "
                    "write; run the evaluation again"
                )
            return cls(
                task=summary["task"],
                records=tuple(_record(json.loads(line)) for line in lines.split(b"\n") if line),
                metrics={name: float(value) for name, value in summary["metrics"].items()},
                intervals={name: (ends[0], ends[1]) for name, ends in summary["intervals"].items()},
                labels=dict(summary.get("labels", {})),
            )
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserInputError(
                f"{stem}.json and .jsonl are not a readable evaluation: {error!r}; run it again"
            ) from error


def _record(row: Mapping[str, Any]) -> EvalRecord:
    reason = row["stop_reason"]
    return EvalRecord(
        **{
            **row,
            "outcome": Outcome(row["outcome"]),
            "stop_reason": None if reason is None else StopReason(reason),
        }
    )


def _stem(path: Path | str) -> Path:
    # Not Path.with_suffix: a name such as "model-1.5b" has a dot that is no suffix.
    given = Path(path)
    return given.with_suffix("") if given.suffix in (".json", ".jsonl") else given
