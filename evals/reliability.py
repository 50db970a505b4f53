"""The reliability diagram of a reward model: how often it is right against how sure it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from alignment.types import AlignmentError
from evals.calibration import ReliabilityBin
from evals.charts import Chart
from evals.preference_task import TASK, result_bins
from evals.results import EvalResult
from evals.rundata import EvalSummary
from evals.scatter import Mark, Track, scatter_chart

GREY = 5


def reliability_charts(evals: Sequence[EvalSummary], problems: list[str]) -> Iterable[Chart]:
    """A diagram for each of the evaluations of task `preference` whose model gives probabilities.

    Args:
        problems: what cannot be read is added here.
    """
    for one in evals:
        if one.kind != TASK or "ece" not in one.metrics:
            continue
        try:
            bins = result_bins(EvalResult.load(one.path))
        except AlignmentError as error:
            problems.append(str(error))
            continue
        if bins:
            place = f"step {one.step}" if one.step is not None else one.path.stem
            yield reliability_chart(bins, f"Reliability ({one.task}, {place})", one.metrics)


def reliability_chart(
    bins: Sequence[ReliabilityBin], title: str, metrics: Mapping[str, float]
) -> Chart:
    """Accuracy over confidence, after Guo et al. (2017, figure 1), a mark for each bin."""
    marks = tuple(
        Mark(
            x=one.confidence,
            y=one.accuracy,
            y_ends=(one.accuracy_low, one.accuracy_high),
            label=str(one.count),
            tip=f"{one.count} pairs: right {one.accuracy:.3f} at confidence {one.confidence:.3f}",
        )
        for one in bins
    )
    tracks = [
        Track("calibrated", (Mark(0.5, 0.5), Mark(1.0, 1.0)), GREY, "dashed", ""),
        Track("measured", marks, 0, "solid", "circle", "small"),
    ]
    svg = scatter_chart(
        tracks, title=title, x_label="mean confidence in the winner", y_label="share ranked right"
    )
    ece = f" Expected calibration error {metrics['ece']:.3f}." if "ece" in metrics else ""
    caption = f"Numbers are pairs of the bin, bars 95% intervals of their accuracy.{ece}"
    header = ("confidence", "pairs", "mean confidence", "accuracy", "95% interval")
    return Chart(title, svg, caption, header, tuple(_row(one) for one in bins))


def _row(one: ReliabilityBin) -> tuple[str, ...]:
    return (
        f"{one.low:.2f} to {one.high:.2f}",
        str(one.count),
        f"{one.confidence:.3f}",
        f"{one.accuracy:.3f}",
        f"{one.accuracy_low:.3f} to {one.accuracy_high:.3f}",
    )
