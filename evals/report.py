"""The HTML report of a run: one file, made from the run directory alone, that loads nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from alignment.runs.expect import verify_run
from alignment.runs.files import write_atomic
from alignment.types import AlignmentError, UserInputError
from evals.browser import SampleGroup, eval_group, printable, rollout_groups
from evals.charts import Chart, Charts, run_charts
from evals.compare import Comparison, compare, table_rows
from evals.frontier import read_frontiers
from evals.frontier_charts import FrontierView, frontier_view
from evals.headline import Tile, facts, subtitle, tiles, utc_time
from evals.html import interval_marks, render, style_sheet
from evals.reliability import reliability_charts
from evals.results import EvalResult
from evals.rundata import EvalSummary, RunData, lookup, read_run

MAX_EVENTS = 200

FINISHED = "finished"
_ALARMS = ("error", "diagnosis", "warning", "nonfinite")
# Words of the page that are shown in colour.
_TONES = {
    FINISHED: "good",
    "correct": "good",
    "met": "good",
    "wrong": "bad",
    "error": "bad",
    "failed": "bad",
    "not met": "bad",
    "stopped by an error": "bad",
    "crash": "warn",
    "timeout": "warn",
    "unparseable": "warn",
    "warning": "warn",
    "diagnosis": "warn",
    "nonfinite": "warn",
}


@dataclass(frozen=True, slots=True)
class Event:
    """One line of events.jsonl."""

    time: str
    step: str
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Expectation:
    """One line of the recipe's contract and what became of it."""

    text: str
    verdict: str
    detail: str


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """The metrics of one evaluation: (name, value, interval)."""

    title: str
    rows: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True)
class ComparisonView:
    """A comparison as cells, with the pictures of its intervals."""

    task: str
    metric: str
    models: list[list[str]]
    model_marks: list[Markup]
    changes: list[list[str]]
    change_marks: list[Markup]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunView:
    """Everything the page shows of one run."""

    name: str
    subtitle: str
    status: str
    tiles: list[Tile]
    facts: list[tuple[str, str]]
    expectations: list[Expectation]
    alarms: list[Event]
    alarms_left: int
    comparisons: list[ComparisonView]
    frontiers: list[FrontierView]
    scores: list[ScoreTable]
    charts: Charts
    groups: list[SampleGroup]
    events: list[Event]
    recipe_text: str
    info: list[tuple[str, str]]
    problems: list[str]
    stages: list[RunView] = field(default_factory=list)


def html_report(run_dir: Path | str) -> Path:
    """Write `report.html` into a run directory, of a run that is finished or still going.

    The page holds everything in itself: charts are inline SVG, a content security policy forbids
    scripts and any loading, and all text of the run is escaped.

    Returns:
        the path of the page.

    Raises:
        UserInputError: `run_dir` is no run directory.
        AlignmentError: the page cannot be written.
    """
    path = Path(run_dir)
    view = run_view(path, path.resolve().name)
    page = render("report.html.jinja", view=view, style=style_sheet(), tones=_TONES)
    target = path / "report.html"
    write_atomic(target, page)
    return target


def comparison_html(comparison: Comparison) -> str:
    """The comparison as HTML tables, to stand inside a page that has the report's style sheet."""
    return render("comparison.html.jinja", view=_comparison_view(comparison))


def run_view(path: Path, name: str) -> RunView:
    """Read a run, and its stages where it is a pipeline, into what the page shows."""
    run = read_run(path)
    stages = []
    for stage, folder in run.stages:
        try:
            stages.append(run_view(folder, stage))
        except UserInputError as error:
            run.problems.append(str(error))
    status = _status(run, stages)
    charts = run_charts(run)
    diagrams = tuple(reliability_charts(_last_evals(run), run.problems))
    charts = _drawable(replace(charts, main=(*diagrams, *charts.main)))
    alarms = [_event(row) for row in run.events if row.get("kind") in _ALARMS]
    comparisons = [_comparison_view(one) for one in _comparisons(run)]
    return RunView(
        name=name,
        subtitle=subtitle(run),
        status=status,
        tiles=tiles(run),
        facts=facts(run),
        expectations=_expectations(run, status),
        alarms=alarms[-MAX_EVENTS:],
        alarms_left=max(0, len(alarms) - MAX_EVENTS),
        comparisons=comparisons,
        frontiers=[_drawable_frontier(frontier_view(one)) for one in read_frontiers(run)],
        scores=[_score_table(one) for one in _last_evals(run)],
        charts=charts,
        groups=_groups(run),
        events=[_event(row) for row in run.events[-MAX_EVENTS:]],
        recipe_text=printable_lines(run.recipe_text),
        info=list(_flat(run.info)),
        problems=run.problems,
        stages=stages,
    )


def printable_lines(text: str) -> str:
    """A long text with invisible characters made visible, line by line."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _drawable(charts: Charts) -> Charts:
    return Charts(*(tuple(_trusted(one) for one in row) for row in (charts.main, charts.other)))


def _drawable_frontier(view: FrontierView) -> FrontierView:
    return replace(view, charts=tuple(_trusted(one) for one in view.charts))


def _trusted(chart: Chart) -> Chart:
    return Chart(chart.title, Markup(chart.svg), chart.caption, chart.header, chart.rows)


def _comparison_view(comparison: Comparison) -> ComparisonView:
    models, changes = table_rows(comparison)
    return ComparisonView(
        task=comparison.task,
        metric=comparison.metric,
        models=models,
        model_marks=interval_marks([(m.value, m.low, m.high) for m in comparison.models]),
        changes=changes,
        change_marks=interval_marks(
            [(c.difference, c.low, c.high) for c in comparison.changes], zero=True
        ),
        notes=comparison.notes,
    )


def _comparisons(run: RunData) -> Iterable[Comparison]:
    """The pipeline's own comparison; else first against last evaluation of each task."""
    if run.comparisons:
        yield from run.comparisons
        return
    for task in sorted({one.task for one in run.evals}):
        steps = [one for one in run.evals if one.task == task and one.step is not None]
        if len(steps) < 2:
            continue
        try:
            ends = {f"step {one.step}": EvalResult.load(one.path) for one in (steps[0], steps[-1])}
            yield replace(compare(ends), task=task)
        except AlignmentError as error:
            run.problems.append(str(error))


def _last_evals(run: RunData) -> list[EvalSummary]:
    """The final evaluation of each task, and all of a pipeline's, in the order compared."""
    last = {one.task: one for one in run.evals if one.step is not None}
    models = [model.name for one in run.comparisons for model in one.models]
    finals = [one for one in run.evals if one.step is None]
    finals.sort(key=lambda one: (_place(one.path.stem, models), one.path.stem))
    return [*last.values(), *finals]


def _place(stem: str, models: Sequence[str]) -> int:
    """Rank of a file called after a model, or after a model and a task."""
    ranks = [i for i, name in enumerate(models) if stem == name or stem.startswith(f"{name}-")]
    return ranks[0] if ranks else len(models)


def _score_table(one: EvalSummary) -> ScoreTable:
    place = f"step {one.step}" if one.step is not None else one.path.stem
    rows = []
    for name, value in one.metrics.items():
        ends = one.intervals.get(name)
        interval = f"{ends[0]:.4g} to {ends[1]:.4g}" if ends else ""
        rows.append((name, f"{value:.4g}", interval))
    return ScoreTable(f"{one.task}, {place}", tuple(rows))


def _groups(run: RunData) -> list[SampleGroup]:
    groups = rollout_groups(run)
    for one in _last_evals(run):
        try:
            result = EvalResult.load(one.path)
        except AlignmentError as error:
            run.problems.append(str(error))
            continue
        place = f"step {one.step}" if one.step is not None else one.path.stem
        group = eval_group(f"Evaluation {one.task}, {place}", result)
        groups += [group] if group else []
    return groups


def _status(run: RunData, stages: Sequence[RunView]) -> str:
    kinds = [row.get("kind") for row in run.events]
    last = next((k for k in reversed(kinds) if k in ("start", "resume", "end", "error")), "")
    all_stages = bool(stages and run.comparisons) and all(s.status == FINISHED for s in stages)
    if run.finished or last == "end" or (not run.events and all_stages):
        return FINISHED
    if run.evals and not (run.recipe_text or run.events):
        return "evaluated; trained elsewhere"
    return "stopped by an error" if last == "error" else "not finished, or still going"


def _expectations(run: RunData, status: str) -> list[Expectation]:
    """The recipe's `expect`, checked against the metrics once the run is finished.

    An event of kind `expect`, with the fields `expectation` (the text) and `passed`, overrides
    the check, for runs whose expectations are not about metrics.jsonl.
    """
    listed = lookup(run.recipe, "expect")
    texts = [str(text) for text in listed] if isinstance(listed, list) else []
    verdicts: dict[str, tuple[bool, str]] = {}
    if texts and run.metrics and status == FINISHED:
        try:
            verdicts = {one.text: (one.passed, one.detail) for one in verify_run(run.path)}
        except AlignmentError as error:
            run.problems.append(f"expect: {error}")
    for event in run.events:
        if event.get("kind") == "expect":
            passed, message = bool(event.get("passed")), str(event.get("message", ""))
            verdicts[str(event.get("expectation"))] = (passed, message)
    found = []
    for text in dict.fromkeys([*texts, *verdicts]):
        passed_detail = verdicts.get(text)
        if passed_detail is None:
            found.append(Expectation(printable(text), "not checked yet", ""))
        else:
            verdict = "met" if passed_detail[0] else "not met"
            found.append(Expectation(printable(text), verdict, printable(passed_detail[1])))
    return found


def _event(row: Mapping[str, Any]) -> Event:
    return Event(
        time=utc_time(row.get("time")),
        step=str(row.get("step", "")),
        kind=printable(row.get("kind", "")),
        message=printable(row.get("message", "")),
    )


def _flat(data: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested mappings as (dotted path, text)."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None and value != []:
            yield printable(f"{prefix}{key}"), printable(value)
