"""Line charts as inline SVG: axes with units, ticks, legend, bands and error bars. No scripts.

Colours are CSS classes (`c0` to `c5`) that the page defines for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from typing import Literal

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 76, 14, 30, 46
N_COLOURS = 6
MAX_MARKED = 40  # points of a series that are marked one by one


@dataclass(frozen=True, slots=True)
class Series:
    """One line. `y` is None where there is no value: the line has a gap there.

    low, high: ends of a band or of error bars around each point; None where there are none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    spread: Literal["band", "bars"] = "band"


@dataclass(frozen=True, slots=True)
class Frame:
    """From data to pixels."""

    x_ticks: list[float]
    y_ticks: list[float]
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    bounds: tuple[float | None, float | None] = (None, None),
) -> str:
    """An `<svg>` element.

    Args:
        bounds: values the y axis never goes beyond, such as (0, 1) for a share.

    Raises:
        ValueError: there is no point to draw.
    """
    frame = _frame(series, bounds)
    # Error bars at the same step stand side by side.
    bars = sum(one.spread == "bars" for one in series)
    shifts = [4.0 * (i - (bars - 1) / 2) if bars > 1 else 0.0 for i in range(len(series))]
    names = ", ".join(one.name for one in series)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(f"{title}: {names} against {x_label}")}">',
        *axes(frame, x_label, y_label),
        *(part for i, one in enumerate(series) for part in _spread(one, i, frame, shifts[i])),
        *(part for i, one in enumerate(series) for part in _line(one, i, frame, shifts[i])),
        *_legend(series),
        "</svg>",
    ]
    return "".join(parts)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart), about `count` in [low, high]."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Labels with just the decimals that tell neighbouring ticks apart."""
    step = min((b - a for a, b in pairwise(values)), default=1.0)
    largest = max(abs(value) for value in values)
    if largest >= 1e6 or 0 < largest < 1e-3:
        digits = max(0, math.floor(math.log10(largest)) - math.floor(math.log10(step) + 1e-9))
        labels = ["0" if abs(value) < step / 2 else f"{value:.{digits}e}" for value in values]
        return [label.replace("e-0", "e-").replace("e+0", "e+") for label in labels]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{0.0 if abs(value) < step / 2 else value:,.{decimals}f}" for value in values]


def _frame(series: Sequence[Series], bounds: tuple[float | None, float | None]) -> Frame:
    xs = [x for one in series for x, y in zip(one.x, one.y, strict=True) if y is not None]
    ys = [
        value
        for one in series
        for row in (one.y, one.low or (), one.high or ())
        for value in row
        if value is not None
    ]
    frame = frame_of(xs, ys, bounds)
    whole = [x for x in frame.x_ticks if x == round(x)] or [min(xs)]  # there is no step 2.5
    return replace(frame, x_ticks=whole)


def frame_of(
    xs: Sequence[float], ys: Sequence[float], bounds: tuple[float | None, float | None]
) -> Frame:
    """The frame that holds all the points with some room around them.

    Raises:
        ValueError: there is no point.
    """
    if not xs:
        raise ValueError("a chart needs at least one point")
    floor, ceiling = bounds
    low, high = min(ys), max(ys)
    rounding = 1e-9 * max(abs(low), abs(high))  # equal numbers whose means were rounded
    pad = (0.06 * (high - low) if high - low > rounding else 0.0) or 0.1 * abs(high) or 0.5
    low, high = low - pad, high + pad
    low = low if floor is None else max(low, floor)
    high = high if ceiling is None else min(high, ceiling)
    if not low < high:  # every value is outside the bounds, as one that is -1e-9 for 0
        low, high = min(ys) - pad, max(ys) + pad
    x_low, x_high = min(xs), max(xs)
    x_pad = 0.02 * (x_high - x_low) or 0.5
    x_range = (x_low - x_pad, x_high + x_pad)
    return Frame(ticks(*x_range, count=7), ticks(low, high, count=6), x_range, (low, high))


def axes(frame: Frame, x_label: str, y_label: str) -> list[str]:
    """Grid, ticks, tick labels and axis titles."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value, label in zip(frame.y_ticks, tick_labels(frame.y_ticks), strict=True):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in zip(frame.x_ticks, tick_labels(frame.x_ticks), strict=True):
        x = frame.x(value)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>'
        )
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{label}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    middle_x, middle_y = (LEFT + right) / 2, (TOP + bottom) / 2
    parts.append(
        f'<text class="label" x="{middle_x}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="label" transform="translate(12 {middle_y}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    return parts


def _spread(one: Series, index: int, frame: Frame, shift: float) -> list[str]:
    ends = [
        (frame.x(x) + shift, frame.y(low), frame.y(high))
        for x, low, high in zip(one.x, one.low or (), one.high or (), strict=False)
        if low is not None and high is not None
    ]
    colour = f"c{index % N_COLOURS}"
    if one.spread == "bars" or len(ends) == 1:
        return [
            f'<path class="bar {colour}" d="M{x - 4:.1f} {low:.1f}h8m-4 0V{high:.1f}m-4 0h8"/>'
            for x, low, high in ends
        ]
    if not ends:
        return []
    there = [f"{x:.1f} {high:.1f}" for x, _, high in ends]
    back = [f"{x:.1f} {low:.1f}" for x, low, _ in reversed(ends)]
    return [f'<path class="band {colour}" d="M{"L".join(there + back)}Z"/>']


def _line(one: Series, index: int, frame: Frame, shift: float) -> list[str]:
    colour = f"c{index % N_COLOURS}"
    path, pen_down = [], False
    for x, y in zip(one.x, one.y, strict=True):
        if y is not None:
            path.append(f"{'L' if pen_down else 'M'}{frame.x(x) + shift:.1f} {frame.y(y):.1f}")
        pen_down = y is not None
    parts = [f'<path class="line {colour}" d="{"".join(path)}"/>']
    points = [(x, y) for x, y in zip(one.x, one.y, strict=True) if y is not None]
    if len(points) <= MAX_MARKED:
        parts += [
            f'<circle class="dot {colour}" r="2.8" cx="{frame.x(x) + shift:.1f}" '
            f'cy="{frame.y(y):.1f}"><title>{escape(one.name)}: {y:.4g} at {x:g}</title></circle>'
            for x, y in points
        ]
    return parts


def _legend(series: Sequence[Series]) -> list[str]:
    if len(series) == 1 and not series[0].low:
        return []
    parts, x = [], float(LEFT)
    for index, one in enumerate(series):
        colour = f"c{index % N_COLOURS}"
        parts.append(f'<path class="line {colour}" d="M{x:.0f} 14h18"/>')
        parts.append(f'<text x="{x + 24:.0f}" y="18">{escape(one.name)}</text>')
        x += 24 + 6.6 * len(one.name) + 18
    return parts
