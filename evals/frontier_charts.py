"""A reward-KL frontier as two figures and a table, and as files of a run directory.

The first figure shows what each policy earns of the gold reward for its divergence from the
reference. The second shows proxy and gold over the square root of the divergence, where
over-optimisation is gold that falls while the proxy still rises (Gao et al. 2022, figure 1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from alignment.runs.files import write_atomic
from alignment.types import UserInputError
from evals.charts import Chart
from evals.frontier import BEST_OF_N, Frontier, FrontierPoint, Span, read_frontiers
from evals.html import style_sheet
from evals.reward_kl_task import PART
from evals.rundata import read_run
from evals.scatter import SHAPES, Mark, Track, scatter_chart

GREY = 5  # the colour of what belongs to no method
_BEST_OF_COLOUR = 1
_MODEL_COLOURS = (0, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class FrontierView:
    """What a page shows of a frontier. `rows` has a header row first."""

    title: str
    rows: list[list[str]]
    charts: tuple[Chart, ...]
    notes: tuple[str, ...]


Role = Literal["gold", "proxy"]
Look = Callable[[FrontierPoint], Span | None]

_WAYS = {
    "evaluation": "A line of marks is the way of {} in training, measured on held-out prompts.",
    "training": "A line without marks is the way of {} in training: means over neighbouring steps, "
    "on training prompts.",
}


@dataclass(frozen=True, slots=True)
class _Style:
    """How a method looks in both figures."""

    colour: int
    shape: str


def frontier_view(frontier: Frontier) -> FrontierView:
    """The figures and the table of one frontier."""
    charts = [_gold_chart(frontier)]
    if frontier.proxy is not None:
        charts.append(_proxy_chart(frontier))
    return FrontierView(
        title=f"Reward against divergence from {frontier.reference or 'the reference'}",
        rows=table_rows(frontier),
        charts=tuple(chart for chart in charts if chart is not None),
        notes=_notes(frontier),
    )


def frontier_report(run_dir: Path | str) -> Path:
    """Write the frontiers of a pipeline's run directory as files, for papers and other programs.

    Writes `frontier.json`, a list of frontiers with all their points, and for each the figures
    `frontier-TASK-1.svg` and `frontier-TASK-2.svg`; registered as report "frontier".

    Returns:
        the path of the JSON file.

    Raises:
        UserInputError: the run has compared no models on task `reward_kl`.
    """
    path = Path(run_dir)
    frontiers = read_frontiers(read_run(path))
    if not frontiers:
        raise UserInputError(
            f"{path} holds no comparison of models on task 'reward_kl'; add the task to the "
            "pipeline's compare.tasks and give its command again (finished stages stay)"
        )
    for frontier in frontiers:
        for index, chart in enumerate(frontier_view(frontier).charts, start=1):
            write_atomic(path / f"frontier-{frontier.task}-{index}.svg", _standalone(chart.svg))
    target = path / "frontier.json"
    data = json.dumps([asdict(one) for one in frontiers], indent=2, allow_nan=False) + "\n"
    write_atomic(target, data)
    return target


def table_rows(frontier: Frontier) -> list[list[str]]:
    """Models and best-of-n as text cells, header row first."""
    interval = "95% interval"
    header = ["policy", "n", "KL, nats", interval, f"gold: {reward_name(frontier.gold)}", interval]
    if frontier.proxy is not None:
        header += [f"proxy: {reward_name(frontier.proxy)}", interval]
    rows = [header]
    for point in frontier.of_kind("model", "best_of"):
        bound = "≤ " if point.kind == "best_of" else ""
        row = [point.method, str(point.n or ""), f"{bound}{point.kl.value:.2f}"]
        row += [_interval(point.kl, decimals=2), *_cells(point.gold)]
        rows.append(row if frontier.proxy is None else [*row, *_cells(point.proxy)])
    return rows


def reward_name(metric: str) -> str:
    """What the recipe calls the reward of a metric; the weighted sum is "reward"."""
    return metric.removeprefix(PART)


def _cells(span: Span | None) -> tuple[str, str]:
    return ("", "") if span is None else (f"{span.value:.3f}", _interval(span))


def _interval(span: Span, decimals: int = 3) -> str:
    if span.low is None or span.high is None:
        return ""
    return f"{span.low:.{decimals}f} to {span.high:.{decimals}f}"


def _notes(frontier: Frontier) -> tuple[str, ...]:
    notes = []
    if frontier.reference is None:
        notes.append(
            "None of the compared models is the reference itself, so best-of-n, which starts from "
            "it, has no place here. Compare the reference too."
        )
    if not frontier.labelled:
        name = frontier.reference
        taken = f"; {name}, at no distance from it, is taken for it" if name else ""
        notes.append(
            "An earlier version of the toolkit made this comparison, and did not note which model "
            f"the reference is{taken}. To have it noted, delete finished.json in the pipeline's "
            "folder (not in its stages) and give the pipeline's command again, which only compares."
        )
    return tuple(notes)


def _models(frontier: Frontier) -> list[str]:
    return [point.method for point in frontier.of_kind("model")]


def _shown(frontier: Frontier) -> list[str]:
    """The models but the reference's ancestors, which can be so far away that they squeeze
    everything else together."""
    return [name for name in _models(frontier) if name not in frontier.ancestors]


def _styles(frontier: Frontier) -> dict[str, _Style]:
    styles = {BEST_OF_N: _Style(_BEST_OF_COLOUR, "circle")}
    for index, name in enumerate(_shown(frontier)):
        colour = _MODEL_COLOURS[index % len(_MODEL_COLOURS)]
        styles[name] = _Style(colour, SHAPES[index % len(SHAPES)])
    return styles


def _gold_chart(frontier: Frontier) -> Chart | None:
    title = f"Gold reward ({reward_name(frontier.gold)}) against divergence"
    tracks = _tracks(frontier, lambda point: point.gold, "gold")
    if not tracks:
        return None
    svg = scatter_chart(
        tracks,
        title=title,
        x_label="KL(policy || reference), nats per completion",
        y_label=f"gold reward ({reward_name(frontier.gold)})",
    )
    return _chart(frontier, title, svg, "")


def _proxy_chart(frontier: Frontier) -> Chart | None:
    """Proxy and gold on one axis: as gain over the reference, in the spread of its completions,
    since the two have no scale in common."""
    gold, proxy = _scaled(frontier, "gold"), _scaled(frontier, "proxy")
    both = gold is not None and proxy is not None
    gold = gold if gold is not None and both else lambda point: point.gold
    proxy = proxy if proxy is not None and both else lambda point: point.proxy
    rooted = replace(frontier, points=tuple(_rooted(point) for point in frontier.points))
    tracks = _tracks(rooted, gold, "gold")
    tracks += [
        replace(
            track,
            hollow=True,
            legend=False,
            line="none" if track.line == "none" else "dashed",
            marks=tuple(replace(mark, label="") for mark in track.marks),
        )
        for track in _tracks(rooted, proxy, "proxy")
    ]
    if not tracks:
        return None
    keys = (
        Track(f"gold ({reward_name(frontier.gold)})", (), GREY, "solid"),
        Track(f"proxy ({reward_name(frontier.proxy or '')})", (), GREY, "dashed", hollow=True),
    )
    title = "Proxy and gold against the square root of divergence"
    svg = scatter_chart(
        tracks,
        title=title,
        x_label="square root of KL(policy || reference) in nats",
        y_label="gain over reference, std. deviations" if both else "reward",
        keys=keys,
    )
    caption = "Gains are in standard deviations of the reference's own completions." if both else ""
    return _chart(frontier, title, svg, caption)


def _rooted(point: FrontierPoint) -> FrontierPoint:
    ends = (point.kl.value, point.kl.low, point.kl.high)
    roots = [None if end is None else math.sqrt(max(end, 0.0)) for end in ends]
    return replace(point, kl=Span(roots[0] or 0.0, roots[1], roots[2]))


def _reward(point: FrontierPoint, role: Role) -> Span | None:
    return point.gold if role == "gold" else point.proxy


def _scaled(frontier: Frontier, role: Role) -> Look | None:
    """How to read a reward as gain over the reference; None where that is not known."""
    metric = frontier.gold if role == "gold" else frontier.proxy
    origin = frontier.reference_point()
    start = None if origin is None else _reward(origin, role)
    scale = frontier.deviation.get(metric or "")
    if start is None or scale is None:
        return None
    shift = start.value

    def look(point: FrontierPoint) -> Span | None:
        span = _reward(point, role)
        return None if span is None else span.moved(shift, scale)

    return look


def _tracks(frontier: Frontier, look: Look, role: Role) -> list[Track]:
    """Each model's mark with the way that led to it, and the curve of best-of-n."""
    tracks = []
    for name, style in _styles(frontier).items():
        own = [(p, s) for p in frontier.points if p.method == name and (s := look(p)) is not None]
        way = [(p, s) for p, s in own if p.kind in ("evaluation", "training")]
        if way:
            shape = style.shape if way[0][0].kind == "evaluation" else ""
            marks = tuple(_mark(p, s, role) for p, s in way)
            tracks.append(Track(name, marks, style.colour, "solid", shape, "small", legend=False))
        ends = tuple(_mark(p, s, role) for p, s in own if p.kind in ("model", "best_of"))
        if ends and name == BEST_OF_N:
            tracks.append(Track(name, ends, style.colour, "solid", style.shape, "small"))
        elif ends:
            tracks.append(Track(name, ends, style.colour, "none", style.shape))
    return tracks


def _mark(point: FrontierPoint, span: Span, role: Role) -> Mark:
    place = f", n = {point.n}" if point.n else f", step {point.step}" if point.step else ""
    return Mark(
        x=point.kl.value,
        y=span.value,
        x_ends=_ends(point.kl),
        y_ends=_ends(span),
        label=f"n={point.n}" if point.n and point.n > 1 else "",
        tip=f"{point.method}{place}: {role} {span.value:.4g} at {point.kl.value:.4g}",
    )


def _ends(span: Span) -> tuple[float, float] | None:
    return None if span.low is None or span.high is None else (span.low, span.high)


def _chart(frontier: Frontier, title: str, svg: str, caption: str) -> Chart:
    """The figure with what its reader must know and all of its points."""
    captions = [caption, "Bars are 95% intervals over prompts."]
    if frontier.of_kind("best_of"):
        captions.append("Best of n stands at the upper bound log n - (n - 1)/n of its divergence.")
    ways = {p.method: p.kind for p in frontier.of_kind("evaluation", "training")}
    for kind, text in _WAYS.items():
        names = [name for name, found in ways.items() if found == kind]
        if names:
            captions.append(text.format(", ".join(names)))
    left_out = [name for name in _models(frontier) if name not in _shown(frontier)]
    if left_out:
        captions.append(
            f"In the table alone, as the reference came from it: {', '.join(left_out)}."
        )
    header = ("policy", "kind", "step or n", "KL, nats", "gold", "proxy")
    return Chart(title, svg, " ".join(one for one in captions if one), header, _numbers(frontier))


def _numbers(frontier: Frontier) -> tuple[tuple[str, ...], ...]:
    shown = {*_shown(frontier), BEST_OF_N}
    rows = []
    for point in (one for one in frontier.points if one.method in shown):
        spans = ("" if one is None else f"{one.value:.5g}" for one in (point.gold, point.proxy))
        place = str(point.n or point.step or "")
        kind = point.kind.replace("_", "-")
        rows.append((point.method, kind, place, f"{point.kl.value:.5g}", *spans))
    return tuple(rows)


def _standalone(svg: str) -> str:
    """A figure as a file of its own: with its style sheet inside."""
    opening, _, rest = svg.partition(">")
    name = ' xmlns="http://www.w3.org/2000/svg">'
    return f"{opening}{name}<style>{style_sheet()}</style>{rest}\n"
