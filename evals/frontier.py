"""The points of a reward-KL frontier, read from a pipeline's run directory.

Per model the comparison's result of task `reward_kl`; per stage that started from the reference
the way it took there, from its own evaluations or else from its training metrics; and best-of-n
from the reference. What a model is to the reference is in the results' labels; results of earlier
versions have none, and there the reference is the model that is as good as no distance from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alignment.types import UserInputError
from evals.reward_kl_task import BEST_OF, TASK, deviation_of
from evals.rundata import EvalSummary, RunData, lookup, number, read_run

MAX_TRAINING_POINTS = 20
REFERENCE_KL = 0.05
"""Where results have no labels, a model within so many nats per completion of the reference is the
reference: its own KL is 0, up to what two scorings of the same weights differ by."""
BEST_OF_N = "best of n"

Kind = Literal["model", "best_of", "evaluation", "training"]


@dataclass(frozen=True, slots=True)
class Span:
    """A value, and its 95% interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    def moved(self, shift: float, scale: float) -> Span:
        """(value - shift) / scale, of the ends too; scale above 0."""
        low, high = (
            None if end is None else (end - shift) / scale for end in (self.low, self.high)
        )
        return Span((self.value - shift) / scale, low, high)


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """Where one policy stands.

    kind: a compared model, best-of-n from the reference, or a place on a stage's way: measured by
        an evaluation, or a mean over neighbouring training steps.
    kl:   KL(policy || reference) of a completion, nats; an upper bound for best-of-n.
    step, n: of a place on the way; of best-of-n.
    """

    method: str
    kind: Kind
    kl: Span
    gold: Span | None
    proxy: Span | None
    step: int | None = None
    n: int | None = None


@dataclass(frozen=True, slots=True)
class Frontier:
    """All that one `reward_kl` task of a pipeline found.

    task: its name in the recipe. gold, proxy: metrics of the result; `gold` is the weighted sum of
        rewards where none was named.
    reference: the compared model that is the reference, if one is.
    ancestors: the compared models that the reference was made from.
    labelled: whether the results say what is the reference; else it was told by its divergence.
    deviation: standard deviation of gold and proxy over the reference's completions, by metric.
    """

    task: str
    gold: str
    proxy: str | None
    reference: str | None
    ancestors: tuple[str, ...]
    labelled: bool
    deviation: Mapping[str, float]
    points: tuple[FrontierPoint, ...]

    def of_kind(self, *kinds: Kind) -> list[FrontierPoint]:
        return [point for point in self.points if point.kind in kinds]

    def reference_point(self) -> FrontierPoint | None:
        return next((p for p in self.of_kind("model") if p.method == self.reference), None)


def read_frontiers(run: RunData) -> list[Frontier]:
    """The frontiers of a run: one for each `reward_kl` task that its models were compared on."""
    models = list(dict.fromkeys(row.name for one in run.comparisons for row in one.models))
    tasks: dict[str, dict[str, EvalSummary]] = {}
    for one in run.evals:
        name = _model_of(one.path.stem, models)
        if one.step is None and one.kind == TASK and name is not None and "kl" in one.metrics:
            tasks.setdefault(one.path.stem[len(name) + 1 :], {})[name] = one
    return [
        _frontier(task, {name: found[name] for name in models if name in found}, run)
        for task, found in tasks.items()
    ]


def _model_of(stem: str, models: Sequence[str]) -> str | None:
    """The model that a file MODEL-TASK is of; the longest name that fits."""
    fitting = [name for name in models if stem.startswith(f"{name}-")]
    return max(fitting, key=len, default=None)


def _frontier(task: str, found: Mapping[str, EvalSummary], run: RunData) -> Frontier:
    labels = next(iter(found.values())).labels
    gold, proxy = labels.get("gold", "reward"), labels.get("proxy")
    labelled = any("reference" in one.labels for one in found.values())
    stages = [name for name, _ in run.stages]
    parts = _labels(found) if labelled else _by_divergence(found, stages)
    reference = next((name for name, part in parts.items() if part == "itself"), None)
    ancestors = tuple(name for name, part in parts.items() if part == "ancestor")
    points = [_model_point(name, "model", one, gold, proxy) for name, one in found.items()]
    if reference is not None:
        points += _best_of_points(found[reference], gold, proxy)
    for name, folder in run.stages:
        if parts.get(name) == "start":
            points += _stage_points(name, folder, gold, proxy)
    spreads = found[reference].metrics if reference is not None else {}
    deviation = {
        metric: spreads[deviation_of(metric)]
        for metric in (gold, proxy)
        if metric is not None and spreads.get(deviation_of(metric), 0.0) > 0
    }
    return Frontier(task, gold, proxy, reference, ancestors, labelled, deviation, tuple(points))


def _labels(found: Mapping[str, EvalSummary]) -> dict[str, str | None]:
    """model -> what it is to the reference."""
    return {name: one.labels.get("reference") for name, one in found.items()}


def _by_divergence(
    found: Mapping[str, EvalSummary], stages: Sequence[str]
) -> dict[str, str | None]:
    """As `_labels`, guessed: the nearest model is the reference if it is near enough, stages after
    it started from it, and what the pipeline had before is an ancestor."""
    distances = {name: abs(one.metrics["kl"]) for name, one in found.items()}
    nearest = min(distances, key=distances.__getitem__)
    if distances[nearest] > REFERENCE_KL:
        return dict.fromkeys(found, "start")
    place = {name: index for index, name in enumerate(stages)}  # what is no stage was there before
    at = place.get(nearest, -1)
    before = {name: place.get(name, -1) < at for name in found}
    parts = {name: "ancestor" if before[name] else "start" for name in found}
    return {**parts, nearest: "itself"}


def _span(one: EvalSummary, metric: str | None) -> Span | None:
    if metric is None or metric not in one.metrics:
        return None
    return Span(one.metrics[metric], *one.intervals.get(metric, (None, None)))


def _model_point(
    method: str, kind: Kind, one: EvalSummary, gold: str, proxy: str | None
) -> FrontierPoint:
    kl = Span(one.metrics["kl"], *one.intervals.get("kl", (None, None)))
    return FrontierPoint(method, kind, kl, _span(one, gold), _span(one, proxy), step=one.step)


def _best_of_points(one: EvalSummary, gold: str, proxy: str | None) -> Iterable[FrontierPoint]:
    found = (re.fullmatch(rf"{BEST_OF}(\d+)/kl_bound", name) for name in one.metrics)
    for n in sorted(int(match[1]) for match in found if match):
        prefix = f"{BEST_OF}{n}/"
        yield FrontierPoint(
            method=BEST_OF_N,
            kind="best_of",
            kl=Span(one.metrics[f"{prefix}kl_bound"]),
            gold=_span(one, prefix + gold),
            proxy=_span(one, f"{prefix}{proxy}"),
            n=n,
        )


def _stage_points(name: str, folder: Path, gold: str, proxy: str | None) -> Sequence[FrontierPoint]:
    """A stage's way: its evaluations by the same task, or else its training metrics, as far as
    these are of the divergence that the models are compared by."""
    try:
        stage = read_run(folder)
    except UserInputError:
        return []
    if lookup(stage.recipe, "model.reference.mode") == "synced":  # it left the start
        return []
    steps = [one for one in stage.evals if one.kind == TASK and one.step is not None]
    steps = [one for one in steps if one.task == steps[0].task and "kl" in one.metrics]
    if len(steps) > 1:
        return [_model_point(name, "evaluation", one, gold, proxy) for one in steps]
    if not _measures_divergence(stage):
        return []
    return _training_points(name, stage.metrics, gold, proxy)


def _measures_divergence(stage: RunData) -> bool:
    """Whether `kl/sequence` of a stage estimates the KL of its policy at temperature 1, as the task
    does: at another one, that of other distributions is logged, and k2 is biased."""
    temperature = lookup(stage.recipe, "rollout.temperature")
    return temperature in (None, 1) and lookup(stage.recipe, "algorithm.kl.estimator") != "k2"


def _training_points(
    name: str, metrics: Sequence[Mapping[str, Any]], gold: str, proxy: str | None
) -> list[FrontierPoint]:
    """Means over neighbouring steps, where the stage logs its divergence and the rewards."""
    # In training the weighted sum goes by the name of a mean.
    columns = [one and ("reward/mean" if one == "reward" else one) for one in (gold, proxy)]
    rows = [row for row in metrics if number(row.get("kl/sequence")) is not None]
    size = -(-len(rows) // MAX_TRAINING_POINTS) or 1
    points = []
    for start in range(0, len(rows), size):
        bucket = rows[start : start + size]
        kl = _mean(bucket, "kl/sequence")
        means = [None if column is None else _mean(bucket, column) for column in columns]
        if kl is not None and means[0] is not None:
            step = int(bucket[-1]["step"])
            points.append(FrontierPoint(name, "training", kl, means[0], means[1], step=step))
    return points if len(points) > 1 else []


def _mean(rows: Sequence[Mapping[str, Any]], metric: str) -> Span | None:
    values = [value for row in rows if (value := number(row.get(metric))) is not None]
    return Span(sum(values) / len(values)) if values else None
