"""Which samples a report shows: the ends and the middle of training, the best and the worst."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from alignment.types import Outcome
from evals.results import EvalResult
from evals.rundata import RunData, number

MAX_CHARACTERS = 6000
_COLUMNS = (
    "prompt",
    "completion",
    "outcome",
    "reward",
    "stop_reason",
    "sample_index",
    "prompt_index",
    "reward_parts",
    "kept",
)


@dataclass(frozen=True, slots=True)
class ShownSample:
    """One sample as the report prints it. `why` says what it was chosen for."""

    why: str
    prompt: str
    completion: str
    outcome: str
    reward: float | None
    stop_reason: str
    problem: str
    sample_index: str
    parts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class SampleGroup:
    """Samples of one place in the run."""

    title: str
    total: int
    samples: tuple[ShownSample, ...]


def rollout_groups(run: RunData) -> list[SampleGroup]:
    """Samples that the first, the middle and the last recorded step trained on."""
    chosen = sorted({0, len(run.rollouts) // 2, len(run.rollouts) - 1}) if run.rollouts else []
    groups = []
    for index in chosen:
        step, path = run.rollouts[index]
        try:
            rows = _read_rows(path)
        except (OSError, ValueError, pa.ArrowException) as error:
            run.problems.append(f"{path.name}: {error}")
            continue
        if rows:
            groups.append(SampleGroup(f"Training step {step}", len(rows), choose(rows)))
    return groups


def eval_group(title: str, result: EvalResult) -> SampleGroup | None:
    """Samples of one evaluation, if it sampled anything."""
    rows = [
        {
            "prompt": record.prompt_text,
            "completion": record.completion_text,
            "outcome": record.outcome.value,
            "reward": record.reward,
            "stop_reason": "" if record.stop_reason is None else record.stop_reason.value,
            "sample_index": record.sample_index,
            "prompt_index": record.problem_id,
        }
        for record in result.records
        if record.stop_reason is not None
    ]
    return SampleGroup(title, len(rows), choose(rows)) if rows else None


def choose(rows: Sequence[Mapping[str, Any]]) -> tuple[ShownSample, ...]:
    """The two best, a median one, the two worst by reward, and up to two without a score.

    The pairs come from different problems where they can.
    """
    scored = [row for row in rows if number(row.get("reward")) is not None]
    scored.sort(key=lambda row: (-float(row["reward"]), row.get("outcome") != Outcome.CORRECT))
    failed = [row for row in rows if number(row.get("reward")) is None]
    n = len(scored)
    ranks: dict[int, str] = {}
    for why, order in (("best", range(n)), ("worst", range(n - 1, -1, -1))):
        for rank in _two_problems(scored, [rank for rank in order if rank not in ranks]):
            ranks[rank] = why
    if n:
        ranks.setdefault(n // 2, "median")
    shown = [_shown(why, scored[rank]) for rank, why in sorted(ranks.items())]
    return (*shown, *(_shown("unscorable", row) for row in failed[:2]))


def _two_problems(rows: Sequence[Mapping[str, Any]], ranks: Sequence[int]) -> list[int]:
    """The first rank and the next one of another problem, or else just the next one."""
    others = [r for r in ranks if rows[r].get("prompt_index") != rows[ranks[0]].get("prompt_index")]
    return [*ranks[:1], *(others or ranks[1:])[:1]]


def printable(text: object) -> str:
    """Text with invisible characters made visible, and cut where it is very long.

    Control characters and those that reorder text (U+202E and its kind) would let a completion
    look like something it is not.
    """
    raw = str(text)
    hidden = len(raw) - MAX_CHARACTERS
    shown = "".join(_visible(char) for char in raw[:MAX_CHARACTERS])
    return f"{shown} [... {hidden} more characters]" if hidden > 0 else shown


def _visible(char: str) -> str:
    # Cc: control, Cf: format (direction overrides, zero width), Cs: lone surrogates.
    if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return char
    # The zero-width joiner is part of emoji.
    return char if char == "\u200d" else f"[U+{ord(char):04X}]"


def _read_rows(path: Path) -> list[dict[str, Any]]:
    available = set(pq.read_schema(path).names)
    rows: list[dict[str, Any]] = pq.read_table(
        path, columns=[name for name in _COLUMNS if name in available]
    ).to_pylist()
    return [row for row in rows if row.get("kept", True)]


def _shown(why: str, row: Mapping[str, Any]) -> ShownSample:
    return ShownSample(
        why=why,
        prompt=printable(row.get("prompt") or ""),
        completion=printable(row.get("completion") or ""),
        outcome=str(row.get("outcome") or Outcome.SCORED.value),
        reward=number(row.get("reward")),
        stop_reason=str(row.get("stop_reason") or ""),
        problem=str(row.get("prompt_index", "")),
        sample_index=str(row.get("sample_index", "")),
        parts=_parts(row.get("reward_parts")),
    )


def _parts(text: Any) -> tuple[tuple[str, str], ...]:
    """Reward parts as (name, verdict) from their JSON."""
    try:
        parts = json.loads(text) if text else {}
    except (TypeError, ValueError):
        return (("reward_parts", printable(text)),)
    if not isinstance(parts, Mapping):
        return ()
    return tuple((str(name), _verdict(part)) for name, part in parts.items())


def _verdict(part: Any) -> str:
    if not isinstance(part, Mapping):
        return printable(part)
    value = number(part.get("value"))
    words = ["no score" if value is None else f"{value:.4g}", str(part.get("outcome", ""))]
    detail = printable(part.get("detail", ""))
    verdict = " ".join(word for word in words if word and word != Outcome.SCORED.value)
    return f"{verdict} ({detail})" if detail else verdict
