"""The HTML report of a run: one file, made from the run directory alone, that loads nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from alignment.runs.files import write_atomic
from alignment.types import AlignmentError, UserInputError
from evals.browser import SampleGroup, eval_group, printable, rollout_groups
from evals.charts import Chart, Charts, run_charts
from evals.compare import Comparison, compare, table_rows
from evals.html import interval_marks, render, style_sheet
from evals.results import EvalResult
from evals.rundata import EvalSummary, RunData, lookup, number, read_run

MAX_EVENTS = 200
ENDS = 5  # steps averaged at either end of the run for its headline numbers

_ALARMS = ("error", "diagnosis", "warning")
# Words of the page that are shown in colour.
_TONES = {
    "finished": "good",
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
}


@dataclass(frozen=True, slots=True)
class Tile:
    """One headline number."""

    label: str
    value: str
    note: str


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
    charts = _drawable(run_charts(run))
    alarms = [_event(row) for row in run.events if row.get("kind") in _ALARMS]
    comparisons = [_comparison_view(one) for one in _comparisons(run)]
    return RunView(
        name=name,
        subtitle=_subtitle(run),
        status=_status(run),
        tiles=_tiles(run),
        facts=_facts(run),
        expectations=_expectations(run),
        alarms=alarms[-MAX_EVENTS:],
        alarms_left=max(0, len(alarms) - MAX_EVENTS),
        comparisons=comparisons,
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
    if run.comparison is not None:
        yield run.comparison
        return
    for task in sorted({one.task for one in run.evals}):
        steps = [one for one in run.evals if one.task == task and one.step is not None]
        if len(steps) < 2:
            continue
        try:
            ends = {f"step {one.step}": EvalResult.load(one.path) for one in (steps[0], steps[-1])}
            yield compare(ends)
        except AlignmentError as error:
            run.problems.append(str(error))


def _last_evals(run: RunData) -> list[EvalSummary]:
    """The final evaluation of each task, and all of a pipeline's."""
    last = {one.task: one for one in run.evals if one.step is not None}
    return [*last.values(), *(one for one in run.evals if one.step is None)]


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


def _status(run: RunData) -> str:
    kinds = [row.get("kind") for row in run.events]
    last = next(
        (kind for kind in reversed(kinds) if kind in ("start", "resume", "end", "error")), ""
    )
    if last == "end":
        return "finished"
    if last == "error":
        return "stopped by an error"
    return "not finished, or still going"


def _subtitle(run: RunData) -> str:
    kind = lookup(run.recipe, "algorithm.type")
    words = [str(kind) if kind else ("pipeline" if run.stages else "run")]
    model = lookup(run.recipe, "model.path")
    if model:
        words.append(str(model))
    if run.metrics:
        words.append(f"{len(run.metrics)} steps")
    if run.stages:
        words.append(f"{len(run.stages)} stages")
    return " · ".join(words)


def _facts(run: RunData) -> list[tuple[str, str]]:
    versions = lookup(run.info, "versions")
    listed = versions.items() if isinstance(versions, Mapping) else ()
    parents = lookup(run.info, "parents")
    last_event = run.events[-1] if run.events else {}
    found = [
        ("Started", lookup(run.info, "time")),
        ("Last event", lookup(last_event, "time")),
        ("Command", _command(lookup(run.info, "command"))),
        ("Seed", lookup(run.info, "seed")),
        ("Data", _one_line(lookup(run.recipe, "data"))),
        ("Rewards", _one_line(lookup(run.recipe, "rewards"))),
        ("Starts from", ", ".join(map(str, parents)) if isinstance(parents, list) else None),
        ("Resumed", _times(lookup(run.info, "resumes"))),
        ("Versions", ", ".join(f"{name} {version}" for name, version in listed if version)),
    ]
    return [(label, printable(value)) for label, value in found if value not in (None, "")]


def _times(resumes: Any) -> str | None:
    return f"{len(resumes)} times" if isinstance(resumes, list) and resumes else None


def _command(command: Any) -> str | None:
    return " ".join(map(str, command)) if isinstance(command, list) else command


def _one_line(value: Any) -> str | None:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_one_line(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(str(_one_line(item)) for item in value)
    return None if value is None else str(value)


def _tiles(run: RunData) -> list[Tile]:
    tiles = [*_eval_tiles(run)]
    for metric, label in (
        ("reward/mean", "Training reward"),
        ("loss", "Training loss"),
        ("reward/accuracy", "Pairs ranked as preferred"),
        ("accuracy", "Pairs ranked as preferred"),
        ("kl/mean", "KL to the reference, nats per token"),
    ):
        values = [v for row in run.metrics if (v := number(row.get(metric))) is not None]
        # A policy-gradient loss says nothing by itself; where there is a reward, that is shown.
        if values and not (metric == "loss" and "reward/mean" in run.metrics[-1]):
            first, last = values[:ENDS], values[-ENDS:]
            shown = f"{_mean(first):.3g} → {_mean(last):.3g}"
            tiles.append(Tile(label, shown, f"mean of first and last {len(first)} steps"))
    return tiles[:5]


def _eval_tiles(run: RunData) -> Iterable[Tile]:
    for task in sorted({one.task for one in run.evals}):
        steps = [one for one in run.evals if one.task == task and one.step is not None]
        for metric, label in (("accuracy", "accuracy"), ("perplexity", "perplexity")):
            found = [one for one in steps if metric in one.metrics]
            if not found:
                continue
            first, last = found[0], found[-1]
            value = f"{last.metrics[metric]:.3g}"
            if len(found) > 1:
                value = f"{first.metrics[metric]:.3g} → {value}"
            ends = last.intervals.get(metric)
            interval = f", 95% interval {ends[0]:.3g} to {ends[1]:.3g}" if ends else ""
            yield Tile(f"Held-out {label} ({task})", value, f"step {last.step}{interval}")


def _expectations(run: RunData) -> list[Expectation]:
    """The recipe's `expect` with the last `expect` event about each.

    Such an event has the fields `expectation` (the text), `passed` (bool) and, in its message,
    what was measured.
    """
    results = {str(e.get("expectation")): e for e in run.events if e.get("kind") == "expect"}
    listed = lookup(run.recipe, "expect")
    texts = [str(text) for text in listed] if isinstance(listed, list) else []
    found = []
    for text in dict.fromkeys([*texts, *results]):
        event = results.get(text)
        if event is None:
            found.append(Expectation(printable(text), "not checked yet", ""))
        else:
            verdict = "met" if event.get("passed") else "not met"
            detail = printable(event.get("message", ""))
            found.append(Expectation(printable(text), verdict, detail))
    return found


def _event(row: Mapping[str, Any]) -> Event:
    return Event(
        time=str(row.get("time", ""))[:19].replace("T", " "),
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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
