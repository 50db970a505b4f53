"""One quantity against another as inline SVG: marks with error bars both ways, joined or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

from evals.svg import BOTTOM, HEIGHT, LEFT, N_COLOURS, RIGHT, TOP, WIDTH, Frame, axes, frame_of

Ends = tuple[float, float] | None
Box = tuple[float, float, float, float]

_LETTER, _ROW = 7.2, 18.0  # width of a letter and height of a row of the legend, in pixels
_LABEL_LETTER = 8.0  # labels are mostly digits and signs, which are wide
_GAP = 18.0
_DOWN = (-7, -18, 5, -26, 13)  # tops of a label beside its mark, in pixels below it
_RADIUS = {"large": 5.0, "small": 3.2}
# Outlines around the origin, of radius 1; a circle is drawn as one.
_SHAPES = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "diamond": ((0.0, -1.25), (1.25, 0.0), (0.0, 1.25), (-1.25, 0.0)),
    "triangle": ((0.0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
}
SHAPES = ("circle", *_SHAPES)


@dataclass(frozen=True, slots=True)
class Mark:
    """One point with the ends of its intervals. `label` is written beside it where there is room;
    `tip` is what pointing at it shows."""

    x: float
    y: float
    x_ends: Ends = None
    y_ends: Ends = None
    label: str = ""
    tip: str = ""


@dataclass(frozen=True, slots=True)
class Track:
    """Marks that belong together, joined in their order by a line or not.

    shape: of each mark, one of `SHAPES`, or "" for a line alone. hollow: outline only.
    legend: whether the track's name is in the legend.
    """

    name: str
    marks: tuple[Mark, ...]
    colour: int
    line: Literal["solid", "dashed", "none"] = "none"
    shape: str = "circle"
    size: Literal["large", "small"] = "large"
    hollow: bool = False
    legend: bool = True


def scatter_chart(
    tracks: Sequence[Track],
    *,
    title: str,
    x_label: str,
    y_label: str,
    keys: Sequence[Track] = (),
) -> str:
    """An `<svg>` element.

    Args:
        keys: tracks without marks that stand in the legend alone, after the others.

    Raises:
        ValueError: there is no point to draw.
    """
    marks = [mark for track in tracks for mark in track.marks]
    xs = [x for mark in marks for x in (mark.x, *(mark.x_ends or ()))]
    ys = [y for mark in marks for y in (mark.y, *(mark.y_ends or ()))]
    frame = frame_of(xs, ys, (None, None))
    legend, rows = _legend([*(track for track in tracks if track.legend), *keys])
    down = _ROW * (rows - 1)
    names = ", ".join(dict.fromkeys(track.name for track in tracks))
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT + down:.0f}" role="img" '
        f'aria-label="{escape(f"{title}: {names} against {x_label}")}">',
        *legend,
        f'<g transform="translate(0 {down:.0f})">',
        *axes(frame, x_label, y_label),
        *(_line(track, frame) for track in tracks if track.line != "none"),
        *(bar for track in tracks for bar in _bars(track, frame)),
        *(_mark(track, mark, frame) for track in tracks if track.shape for mark in track.marks),
        *_labels(tracks, frame),
        "</g></svg>",
    ]
    return "".join(parts)


def _colour(track: Track) -> str:
    return f"c{track.colour % N_COLOURS}"


def _line(track: Track, frame: Frame) -> str:
    path = "L".join(f"{frame.x(one.x):.1f} {frame.y(one.y):.1f}" for one in track.marks)
    return f'<path class="line {track.line} {_colour(track)}" d="M{path}"/>' if path else ""


def _bars(track: Track, frame: Frame) -> list[str]:
    parts = []
    for mark in track.marks:
        x, y = frame.x(mark.x), frame.y(mark.y)
        path = ""
        if mark.y_ends is not None:
            low, high = (frame.y(end) for end in mark.y_ends)
            path += f"M{x - 3.5:.1f} {low:.1f}h7m-3.5 0V{high:.1f}m-3.5 0h7"
        if mark.x_ends is not None:
            low, high = (frame.x(end) for end in mark.x_ends)
            path += f"M{low:.1f} {y - 3.5:.1f}v7m0 -3.5H{high:.1f}m0 -3.5v7"
        if path:
            parts.append(f'<path class="bar {_colour(track)}" d="{path}"/>')
    return parts


def _mark(track: Track, mark: Mark, frame: Frame) -> str:
    tip = mark.tip or f"{track.name}: {mark.y:.4g} at {mark.x:.4g}"
    return _shape(track, frame.x(mark.x), frame.y(mark.y), f"<title>{escape(tip)}</title>")


def _shape(track: Track, x: float, y: float, inside: str = "") -> str:
    radius = _RADIUS[track.size]
    look = f'class="{"hollow" if track.hollow else "dot"} {_colour(track)}"'
    if track.shape == "circle":
        return f'<circle {look} r="{radius:.1f}" cx="{x:.1f}" cy="{y:.1f}">{inside}</circle>'
    outline = "L".join(
        f"{x + radius * a:.1f} {y + radius * b:.1f}" for a, b in _SHAPES[track.shape]
    )
    return f'<path {look} d="M{outline}Z">{inside}</path>'


def _labels(tracks: Sequence[Track], frame: Frame) -> list[str]:
    """Labels beside their marks, each where it covers nothing that is drawn, or else left out."""
    taken = [box for track in tracks for box in _drawn(track, frame)]
    parts = []
    for mark in (mark for track in tracks for mark in track.marks if mark.label):
        place = _place(mark, frame, taken)
        if place is not None:
            taken.append(place)
            parts.append(f'<text x="{place[0]:.1f}" y="{place[3] - 3:.1f}">{escape(mark.label)}')
            parts.append("</text>")
    return parts


def _drawn(track: Track, frame: Frame) -> list[Box]:
    """Boxes that cover a track: its marks, its error bars, and points close together on its
    lines."""
    at = [(frame.x(mark.x), frame.y(mark.y)) for mark in track.marks]
    boxes = [(x - 5, y - 5, x + 5, y + 5) for x, y in at] if track.shape else []
    for mark, (x, _) in zip(track.marks, at, strict=True):
        if mark.y_ends is not None:
            low, high = (frame.y(end) for end in mark.y_ends)
            boxes.append((x - 4, high, x + 4, low))
    for (x0, y0), (x1, y1) in pairwise(at) if track.line != "none" else ():
        n = 1 + int(max(abs(x1 - x0), abs(y1 - y0)) / 4)
        points = [(x0 + (x1 - x0) * i / n, y0 + (y1 - y0) * i / n) for i in range(n + 1)]
        boxes += [(x - 1, y - 1, x + 1, y + 1) for x, y in points]
    return boxes


def _place(mark: Mark, frame: Frame, taken: Sequence[Box]) -> Box | None:
    """The first free box for the label around its mark, those on the right first."""
    x, y, wide = frame.x(mark.x), frame.y(mark.y), _LABEL_LETTER * len(mark.label)
    beside = [(left, y + down) for left in (x + 7, x - 7 - wide) for down in _DOWN]
    for left, top in (*beside, (x - wide / 2, y - 20), (x - wide / 2, y + 7)):
        box = (left, top, left + wide, top + 13)
        inside = left > LEFT and top > TOP and box[2] < WIDTH - RIGHT and box[3] < HEIGHT - BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            return box
    return None


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _legend(tracks: Sequence[Track]) -> tuple[list[str], int]:
    """The legend's parts, and how many rows it takes."""
    parts: list[str] = []
    x, row = float(LEFT), 0
    for track in tracks:
        width = 26 + _LETTER * len(track.name)
        if x > LEFT and x + width > WIDTH - RIGHT:
            x, row = float(LEFT), row + 1
        y = 14 + _ROW * row
        if track.line != "none":
            parts.append(
                f'<path class="line {track.line} {_colour(track)}" d="M{x:.0f} {y:.0f}h20"/>'
            )
        if track.shape:
            parts.append(_shape(track, x + 10, y))
        parts.append(f'<text x="{x + 26:.0f}" y="{y + 4:.0f}">{escape(track.name)}</text>')
        x += width + _GAP
    return parts, row + 1
