"""Compare models on one task: intervals for each, and paired tests between them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from alignment.runs.files import write_atomic
from alignment.trainers.compared import Role
from alignment.types import UserInputError
from evals.results import EvalRecord, EvalResult
from evals.statistics import holm, paired_difference
from evals.summary import FAILURES, Value, by_problem, correctness

_NO_ROLES: Mapping[str, Role] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ModelScore:
    """One model's row: the metric with its 95% interval, and what it rests on."""

    name: str
    value: float
    low: float | None
    high: float | None
    problems: int
    samples: int
    unscorable: int


@dataclass(frozen=True, slots=True)
class Change:
    """From one model to another on the problems both have: second minus first."""

    first: str
    second: str
    difference: float
    low: float | None
    high: float | None
    p_value: float
    p_holm: float
    problems: int
    test: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A table of models and of the changes between them. `notes` are warnings for the reader."""

    task: str
    metric: str
    models: tuple[ModelScore, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()

    def save(self, path: Path | str) -> None:
        """Write one JSON file, atomically."""
        data = json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomic(path, data)

    @classmethod
    def load(cls, path: Path | str) -> Comparison:
        """Read what `save` wrote.

        Raises:
            UserInputError: the file is missing or is no comparison.
        """
        try:
            data: dict[str, Any] = json.loads(Path(path).read_bytes())
            return cls(
                task=str(data["task"]),
                metric=str(data["metric"]),
                models=tuple(ModelScore(**row) for row in data["models"]),
                changes=tuple(Change(**row) for row in data["changes"]),
                notes=tuple(data["notes"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserInputError(
                f"{path} is not a readable comparison: {error!r}; compare again"
            ) from error


@dataclass(frozen=True, slots=True)
class _Metric:
    """How a metric is read off records: a value per record, and its weight in the mean."""

    value: Value
    weight: Callable[[EvalRecord], float] = lambda record: 1.0


# In order of preference, after the metric that the results themselves call `gold`: the first that
# every result reports is compared.
_METRICS: dict[str, _Metric] = {
    "accuracy": _Metric(correctness),
    "first_error_accuracy": _Metric(correctness),
    "reward": _Metric(lambda record: record.reward),
    "loss": _Metric(
        lambda record: None if record.reward is None else -record.reward,
        weight=lambda record: float(record.n_tokens),
    ),
}


def compare(results: Mapping[str, EvalResult], *, seed: int = 0) -> Comparison:
    """Compare models evaluated by one task, in the order given.

    Compared is the metric that all results label `gold`, or else the first they have in common of
    accuracy, accuracy of the first error, reward and loss. Changes are taken between each model
    and the next, and from the first to the last. Their p-values come from the sign-flip test over
    problems and are adjusted together by Holm.

    Args:
        results: model name -> its result.
        seed: of the bootstrap and of drawn sign flips.

    Raises:
        UserInputError: fewer than one result, results of different tasks, no metric in common, or
            two models without a common problem.
    """
    if not results:
        raise UserInputError("nothing to compare; give at least one evaluation result")
    tasks = sorted({result.task for result in results.values()})
    if len(tasks) > 1:
        raise UserInputError(f"results of different tasks do not compare: {', '.join(tasks)}")
    metric, how = _common_metric(results)
    order = list(results)
    steps = [(i, i + 1) for i in range(len(order) - 1)]
    if len(order) > 2:
        steps.append((0, len(order) - 1))
    pairs = [(order[i], order[j]) for i, j in steps]
    return Comparison(
        task=tasks[0],
        metric=metric,
        models=tuple(_score(name, result, metric, how) for name, result in results.items()),
        changes=_changes(results, pairs, how, seed),
        notes=_notes(results, pairs),
    )


def compare_in_run(
    results: Mapping[str, EvalResult],
    run_dir: Path,
    task: str,
    roles: Mapping[str, Role] = _NO_ROLES,
) -> str:
    """Compare the models of a pipeline, save it all in its run directory, and give the table.

    Writes `comparison.json` (`comparison-TASK.json` where there is one already) and
    `evals/MODEL-TASK.json`; registered as report "comparison".

    Args:
        roles: model name -> what it is to the reference, which becomes the label `reference`; of
            one that has no role, `other`.
    """
    for name, result in results.items():
        labels = {**result.labels, "reference": roles.get(name, "other")}
        labelled = replace(result, labels=labels)
        labelled.save(run_dir / "evals" / f"{name}-{task}.json")
    comparison = compare(results)
    first = run_dir / "comparison.json"
    comparison.save(run_dir / f"comparison-{task}.json" if first.exists() else first)
    return render_text(comparison)


def render_text(comparison: Comparison) -> str:
    """The comparison as aligned plain-text tables for a terminal."""
    models, changes = table_rows(comparison)
    parts = [f"{comparison.task}: {comparison.metric}, 95% intervals", _align(models)]
    if len(changes) > 1:
        parts += ["", "paired differences on the same problems", _align(changes)]
    parts += [f"note: {note}" for note in comparison.notes]
    return "\n".join(parts)


def table_rows(comparison: Comparison) -> tuple[list[list[str]], list[list[str]]]:
    """The two tables as text cells, header rows first: models, and changes between them."""
    models = [["model", comparison.metric, "95% interval", "problems", "samples", "unscorable"]]
    models += [
        [
            row.name,
            f"{row.value:.3f}",
            _interval(row.low, row.high, "{:.3f}"),
            str(row.problems),
            str(row.samples),
            str(row.unscorable),
        ]
        for row in comparison.models
    ]
    changes = [["change", "difference", "95% interval", "p", "p (Holm)", "problems", "test"]]
    changes += [
        [
            f"{row.first} -> {row.second}",
            f"{row.difference:+.3f}",
            _interval(row.low, row.high, "{:+.3f}"),
            format_p(row.p_value),
            format_p(row.p_holm),
            str(row.problems),
            row.test,
        ]
        for row in comparison.changes
    ]
    return models, changes


def format_p(p_value: float) -> str:
    """A p-value for people: three decimals, four where it is small, never "0"."""
    if p_value < 1e-4:
        return "< 0.0001"
    return f"{p_value:.4f}" if p_value < 1e-2 else f"{p_value:.3f}"


def _common_metric(results: Mapping[str, EvalResult]) -> tuple[str, _Metric]:
    candidates = dict(_METRICS)
    gold = {result.labels.get("gold") for result in results.values()}
    if len(gold) == 1 and (name := gold.pop()) is not None:
        candidates = {name: _Metric(lambda record: record.values.get(name)), **_METRICS}
    for metric, how in candidates.items():
        if all(metric in result.metrics for result in results.values()):
            return metric, how
    raise UserInputError(
        f"the results have none of {', '.join(candidates)} in common, so there is nothing to "
        "compare; evaluate every model with the same task and rewards"
    )


def _score(name: str, result: EvalResult, metric: str, how: _Metric) -> ModelScore:
    low, high = result.intervals.get(metric, (None, None))
    problems, _, samples = by_problem(result.records, how.value)
    return ModelScore(
        name=name,
        value=result.metrics[metric],
        low=low,
        high=high,
        problems=len(problems),
        samples=samples,
        unscorable=sum(record.outcome in FAILURES for record in result.records),
    )


def _changes(
    results: Mapping[str, EvalResult],
    pairs: Sequence[tuple[str, str]],
    metric: _Metric,
    seed: int,
) -> tuple[Change, ...]:
    found = []
    for first, second in pairs:
        values, weights = _paired_values(results[first], results[second], metric)
        if not weights:
            raise UserInputError(
                f"{first} and {second} have no scored problem in common; evaluate both on the "
                "same prompts"
            )
        found.append(paired_difference(values[0], values[1], weights=weights, seed=seed))
    adjusted = holm([item.p_value for item in found])
    return tuple(
        Change(
            first=first,
            second=second,
            difference=item.difference,
            low=item.low if math.isfinite(item.low) else None,
            high=item.high if math.isfinite(item.high) else None,
            p_value=item.p_value,
            p_holm=float(p_holm),
            problems=item.n,
            test=item.test,
        )
        for (first, second), item, p_holm in zip(pairs, found, adjusted, strict=True)
    )


def _paired_values(
    first: EvalResult, second: EvalResult, metric: _Metric
) -> tuple[tuple[list[float], list[float]], list[float]]:
    """Per-problem values of both models on the problems both have, and the problems' weights."""
    by_id = [
        dict(zip(problems, means, strict=True))
        for problems, means, _ in (by_problem(r.records, metric.value) for r in (first, second))
    ]
    problems, means, _ = by_problem(first.records, metric.weight)
    weight_of = dict(zip(problems, means, strict=True))
    common = [problem for problem in by_id[0] if problem in by_id[1]]
    values = [by_id[0][p] for p in common], [by_id[1][p] for p in common]
    return values, [weight_of[p] for p in common]


def _notes(results: Mapping[str, EvalResult], pairs: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """What a reader must know before trusting the pairs: other problems, other texts."""
    texts = {
        name: {record.problem_id: record.prompt_text for record in result.records}
        for name, result in results.items()
    }
    notes = []
    for first, second in pairs:
        common = texts[first].keys() & texts[second].keys()
        apart = len(texts[first].keys() ^ texts[second].keys())
        differing = sum(texts[first][p] != texts[second][p] for p in common)
        if apart:
            notes.append(
                f"{first} and {second}: {apart} problems belong to one of them only and are "
                "left out of the difference"
            )
        if differing:
            notes.append(
                f"{first} and {second}: {differing} of {len(common)} problems have another prompt "
                "text under the same id; unless only the chat template differs, the pairs are "
                "not the same problems"
            )
    failed = {name: _failure_share(result) for name, result in results.items()}
    notes += [
        f"{name}: the grader failed on {share:.0%} of the samples, which are in no score"
        for name, share in failed.items()
        if share > 0.05
    ]
    return tuple(notes)


def _failure_share(result: EvalResult) -> float:
    if not result.records:
        return 0.0
    return float(np.mean([record.outcome in FAILURES for record in result.records]))


def _interval(low: float | None, high: float | None, form: str) -> str:
    if low is None or high is None:
        return "n/a"
    return f"{form.format(low)} to {form.format(high)}"


def _align(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell: the first and last words left, numbers right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    words = {0} | {i for i, cell in enumerate(rows[0]) if cell == "test"}
    lines = [
        "  ".join(
            cell.ljust(width) if i in words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
