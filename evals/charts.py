"""Which curves a run's report shows, and the charts of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from evals.curves import CURVES, EVAL_CURVES, NAMED, Bounds, Curves, EvalCurves
from evals.rundata import EvalSummary, RunData, number
from evals.svg import N_COLOURS, Series, line_chart

MAX_POINTS = 300  # of a curve; longer runs are averaged over neighbouring steps
MAX_TABLE_ROWS = 60
MAX_OTHER = 60
MAX_SCALES = 6.0  # lines of one chart are within this factor in size, where a chart takes any


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure: title, SVG, what the reader must know, and the same numbers as a table."""

    title: str
    svg: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


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
    main += [
        chart
        for curves in CURVES
        for one in _by_scale(run, curves, left)
        if (chart := _training_chart(run, one, left))
    ]
    other = [
        chart
        for name in sorted(left)
        if (chart := _training_chart(run, Curves(name, "value", ((name, name),)), left))
    ]
    return Charts(tuple(main), tuple(other[:MAX_OTHER]))


def _by_scale(run: RunData, curves: Curves, left: Iterable[str]) -> list[Curves]:
    """A chart of whatever a run has under a prefix, as one chart for each size of number."""
    if not curves.rest:
        return [curves]
    lines = _lines(curves, left)
    sizes = {
        legend: [abs(value) for row in run.metrics if (value := number(row.get(metric)))]
        for metric, legend in lines
    }
    groups = same_scale({legend: max(found, default=0.0) for legend, found in sizes.items()})
    if len(groups) < 2:
        return [curves]
    return [
        replace(
            curves,
            title=f"{curves.title}: {', '.join(group)}",
            lines=tuple(line for line in lines if line[1] in group),
            rest="",
        )
        for group in groups
    ]


def same_scale(sizes: Mapping[str, float]) -> list[list[str]]:
    """Names in groups, largest first, whose sizes are within a factor of `MAX_SCALES` of the
    group's largest; those of size 0 are with the smallest. Names of a group keep their order."""
    groups: list[list[str]] = []
    largest = 0.0
    for name in sorted(sizes, key=lambda one: -sizes[one]):
        if not groups or 0 < sizes[name] * MAX_SCALES < largest:
            groups.append([])
            largest = sizes[name]
        groups[-1].append(name)
    order = list(sizes)
    return [sorted(group, key=order.index) for group in groups]


def _training_chart(run: RunData, curves: Curves, left: dict[str, None]) -> Chart | None:
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


def _lines(curves: Curves, left: Iterable[str]) -> list[tuple[str, str]]:
    """The (metric, legend) lines of a chart that are among the metrics `left`."""
    found = [
        (metric, legend)
        for name, legend in curves.lines
        for metric in left
        if metric == name or (metric.partition("/")[2] == name and metric not in NAMED)
    ]
    if curves.rest:
        found += [
            (metric, metric.removeprefix(curves.rest))
            for metric in left
            if metric.startswith(curves.rest) and metric not in NAMED
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
        for curves in EVAL_CURVES:
            names = sorted({n for one in rows for n in one.metrics if curves.has(n)})
            if "accuracy" in names and "pass@1" in names:
                names.remove("pass@1")  # the same number
            sizes = {n: max(abs(one.metrics.get(n, 0.0)) for one in rows) for n in names}
            groups = same_scale(sizes)
            for group in groups:
                part = f": {', '.join(group)}" if len(groups) > 1 else ""
                yield _eval_chart(rows, group, f"Held-out {curves.title}{part} ({task})", curves)


def _eval_chart(
    rows: Sequence[EvalSummary], names: Sequence[str], title: str, curves: EvalCurves
) -> Chart:
    series = [_eval_series(rows, name) for name in names]
    caption = "Bars are 95% intervals over problems." if any(one.low for one in series) else ""
    return _chart(title, curves.unit, series, curves.bounds, caption)


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
