"""Which curves a run's report shows, and the charts of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evals.rundata import EvalSummary, RunData, number
from evals.svg import N_COLOURS, Series, line_chart

Bounds = tuple[float | None, float | None]

MAX_POINTS = 300  # of a curve; longer runs are averaged over neighbouring steps
MAX_TABLE_ROWS = 60
MAX_OTHER = 60
SHARE: Bounds = (0.0, 1.0)
NON_NEGATIVE: Bounds = (0.0, None)


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure: title, SVG, what the reader must know, and the same numbers as a table."""

    title: str
    svg: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class _Curves:
    """One chart of training metrics: (metric name, legend) lines that share a unit.

    A trainer may put a prefix of one word before a metric's name, as in `policy/entropy`.

    spread: a metric to add to and subtract from the first line for a band, if any.
    rest:   also draw every metric of this prefix that no chart names.
    """

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    bounds: Bounds = (None, None)
    spread: str = ""
    rest: str = ""


# In order of appearance. A chart is drawn from those of its lines that the run has.
_CURVES: tuple[_Curves, ...] = (
    _Curves("Reward", "reward", (("reward/mean", "mean"),), spread="reward/std_in_group"),
    _Curves("Reward parts", "mean of each part", (), rest="reward/"),
    _Curves(
        "Outcomes in training",
        "share of samples",
        (
            ("outcome/correct", "correct"),
            ("outcome/wrong", "wrong"),
            ("outcome/unparseable", "unparseable"),
            ("outcome/timeout", "timeout"),
            ("outcome/crash", "crash"),
        ),
        SHARE,
    ),
    _Curves("Loss", "loss", (("loss", "loss"),)),
    _Curves("Negative log-likelihood", "nats per token", (("nll", "NLL"),), NON_NEGATIVE),
    _Curves(
        "Token accuracy in training",
        "share of tokens",
        (("token_accuracy", "token accuracy"),),
        SHARE,
    ),
    _Curves(
        "Pairs ranked as preferred",
        "share of pairs",
        (("reward/accuracy", "accuracy"), ("accuracy", "accuracy")),
        SHARE,
    ),
    _Curves(
        "Preference margin",
        "chosen minus rejected",
        (("reward/margin", "margin"), ("margin", "margin")),
    ),
    _Curves(
        "Scores of preference pairs",
        "score",
        (("score/chosen", "chosen"), ("score/rejected", "rejected")),
    ),
    _Curves(
        "Implicit rewards",
        "reward",
        (("reward/chosen", "chosen"), ("reward/rejected", "rejected")),
    ),
    _Curves("KL to the reference", "nats per token", (("kl/mean", "mean KL"),)),
    _Curves("Completion length", "tokens", (("completion/length", "mean"),), NON_NEGATIVE),
    _Curves(
        "Completions cut off at the limit",
        "share of samples",
        (("completion/cut_off", "cut off"),),
        SHARE,
    ),
    _Curves("Entropy of the policy", "nats per token", (("entropy", "entropy"),), NON_NEGATIVE),
    _Curves(
        "Gradient norm", "norm before clipping", (("grad_norm", "gradient norm"),), NON_NEGATIVE
    ),
    _Curves("Learning rate", "learning rate", (("lr", "rate"),), NON_NEGATIVE),
    _Curves(
        "Clipped tokens",
        "share of tokens",
        (("clip_fraction/low", "below"), ("clip_fraction/high", "above")),
        SHARE,
    ),
    _Curves(
        "Groups with differing rewards",
        "share of groups",
        (("groups/with_spread", "with spread"),),
        SHARE,
    ),
    _Curves(
        "Engine against trainer log-probabilities",
        "nats per token",
        (("engine/logprob_gap", "mean absolute gap"),),
        NON_NEGATIVE,
    ),
)
_NAMED = {name for curves in _CURVES for name, _ in curves.lines} | {c.spread for c in _CURVES}


@dataclass(frozen=True, slots=True)
class _EvalCurves:
    """One chart of evaluation metrics over training steps, with 95% intervals."""

    title: str
    unit: str
    prefixes: tuple[str, ...]
    bounds: Bounds = (None, None)


_EVAL_CURVES: tuple[_EvalCurves, ...] = (
    _EvalCurves("accuracy", "share of samples", ("accuracy", "pass@"), SHARE),
    _EvalCurves("reward", "reward", ("reward",)),
    _EvalCurves("loss", "nats per token", ("loss",)),
    _EvalCurves("token accuracy", "share of tokens", ("token_accuracy",), SHARE),
    _EvalCurves("completion length", "tokens", ("length",), NON_NEGATIVE),
)


@dataclass(frozen=True, slots=True)
class _Point:
    """One step of a curve, with the ends of its band."""

    x: float
    y: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Charts:
    """The chosen charts, and those of all other metrics."""

    main: tuple[Chart, ...] = ()
    other: tuple[Chart, ...] = field(default=())


def run_charts(run: RunData) -> Charts:
    """All charts that the run's metrics and evaluations allow."""
    left = {
        name: None
        for row in run.metrics
        for name in row
        if name not in ("step", "nonfinite") and not name.startswith("eval/")  # drawn from evals/
    }
    main = list(_eval_charts(run.evals))
    for curves in _CURVES:
        chart = _training_chart(run, curves, left)
        if chart is not None:
            main.append(chart)
    other = [
        chart
        for name in sorted(left)
        if (chart := _training_chart(run, _Curves(name, "value", ((name, name),)), left))
    ]
    return Charts(tuple(main), tuple(other[:MAX_OTHER]))


def _training_chart(run: RunData, curves: _Curves, left: dict[str, None]) -> Chart | None:
    """The chart of those metrics of `left` it names, which are taken out."""
    series: list[Series] = []
    notes: list[str] = []
    for metric, legend in _lines(curves, left):
        # A step that has the metric without a number (it was NaN) leaves a gap in the line.
        rows = [row for row in run.metrics if metric in row]
        left.pop(metric)
        if legend in (one.name for one in series) or not any(_finite(r, metric) for r in rows):
            continue
        spread = "" if series else curves.spread
        left.pop(spread, None)
        one = _averaged(legend, [_point(row, metric, spread) for row in rows])
        if one.low:
            notes.append("The band is one standard deviation inside a group of samples.")
        broken = [str(row["step"]) for row in rows if not _finite(row, metric)]
        if broken:
            more = ", ..." if len(broken) > 5 else ""
            notes.append(f"No finite {legend} at step {', '.join(broken[:5])}{more}.")
        series.append(one)
    # Lines that stay at zero say little next to others: outcomes that never happen.
    series = [one for one in series if any(one.y)] or series[:1]
    if not series:
        return None
    size = _bucket_size(len(run.metrics))
    if size > 1:
        notes.append(f"Each point is the mean of {size} steps.")
    return _chart(curves.title, curves.unit, series, curves.bounds, " ".join(notes))


def _lines(curves: _Curves, left: Iterable[str]) -> list[tuple[str, str]]:
    """The (metric, legend) lines of a chart that are among the metrics `left`."""
    found = [
        (metric, legend)
        for name, legend in curves.lines
        for metric in left
        if metric == name or metric.partition("/")[2] == name
    ]
    if curves.rest:
        found += [
            (metric, metric.removeprefix(curves.rest))
            for metric in left
            if metric.startswith(curves.rest) and metric not in _NAMED
        ]
    return found[:N_COLOURS]


def _finite(row: Mapping[str, Any], metric: str) -> bool:
    return number(row[metric]) is not None


def _point(row: Mapping[str, Any], metric: str, spread: str) -> _Point:
    value, width = number(row[metric]), number(row.get(spread))
    if value is None or width is None:
        return _Point(float(row["step"]), value)
    return _Point(float(row["step"]), value, value - width, value + width)


def _eval_charts(evals: Sequence[EvalSummary]) -> Iterable[Chart]:
    tasks = sorted({one.task for one in evals if one.step is not None})
    for task in tasks:
        rows = [one for one in evals if one.task == task and one.step is not None]
        for curves in _EVAL_CURVES:
            names = sorted(
                {n for one in rows for n in one.metrics if n.startswith(curves.prefixes)}
            )
            if "accuracy" in names and "pass@1" in names:
                names.remove("pass@1")  # the same number
            series = [_eval_series(rows, name) for name in names]
            if series:
                title = f"Held-out {curves.title} ({task})"
                bars = any(one.low for one in series)
                caption = "Bars are 95% intervals over problems." if bars else ""
                yield _chart(title, curves.unit, series, curves.bounds, caption)


def _eval_series(rows: Sequence[EvalSummary], name: str) -> Series:
    found = [one for one in rows if name in one.metrics]
    ends = [one.intervals.get(name) for one in found]
    return Series(
        name,
        x=[float(one.step or 0) for one in found],
        y=[one.metrics[name] for one in found],
        low=[end[0] if end else None for end in ends] if any(ends) else None,
        high=[end[1] if end else None for end in ends] if any(ends) else None,
        spread="bars",
    )


def _bucket_size(n_steps: int) -> int:
    return -(-n_steps // MAX_POINTS) or 1


def _averaged(name: str, points: Sequence[_Point]) -> Series:
    """The points, averaged over neighbours where there are too many to draw."""
    size = _bucket_size(len(points))
    buckets = [points[i : i + size] for i in range(0, len(points), size)]
    low = [_mean_of(one.low for one in bucket) for bucket in buckets]
    high = [_mean_of(one.high for one in bucket) for bucket in buckets]
    banded = any(end is not None for end in low)
    return Series(
        name,
        x=[sum(one.x for one in bucket) / len(bucket) for bucket in buckets],
        y=[_mean_of(one.y for one in bucket) for bucket in buckets],
        low=low if banded else None,
        high=high if banded else None,
    )


def _mean_of(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _chart(title: str, unit: str, series: Sequence[Series], bounds: Bounds, caption: str) -> Chart:
    header = ["step"]
    columns: list[dict[float, str]] = []
    for one in series:
        header.append(one.name)
        columns.append({x: f"{y:.5g}" for x, y in zip(one.x, one.y, strict=True) if y is not None})
        if one.low and one.high:
            header.append(f"{one.name}, low to high")
            ends = zip(one.x, one.low, one.high, strict=True)
            columns.append(
                {x: f"{a:.5g} to {b:.5g}" for x, a, b in ends if a is not None and b is not None}
            )
    steps = sorted({x for one in series for x in one.x})
    every = -(-len(steps) // MAX_TABLE_ROWS)
    shown = [x for i, x in enumerate(steps) if i % every == 0 or i == len(steps) - 1]
    rows = tuple((f"{x:g}", *(column.get(x, "") for column in columns)) for x in shown)
    svg = line_chart(series, title=title, x_label="training step", y_label=unit, bounds=bounds)
    return Chart(title, svg, caption, tuple(header), rows)
