"""Templates of the HTML pages, and the small pictures inside their tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

MARK_WIDTH, MARK_HEIGHT = 180, 18

# Everything is escaped unless it is Markup, which only our own SVG and style sheet are.
_ENVIRONMENT = Environment(
    loader=PackageLoader("evals", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> str:
    """Fill a template of `evals/templates`; plain strings come out escaped."""
    return _ENVIRONMENT.get_template(template).render(**values)


def style_sheet() -> Markup:
    """The pages' style sheet, to stand inside a `<style>` element."""
    loader = _ENVIRONMENT.loader
    assert loader is not None
    return Markup(loader.get_source(_ENVIRONMENT, "report.css")[0])


def interval_marks(
    rows: Sequence[tuple[float, float | None, float | None]], *, zero: bool = False
) -> list[Markup]:
    """One dot with its interval for each (value, low, high), all on one scale.

    Args:
        zero: put a line at zero on every row, as differences need.
    """
    ends = [end for row in rows for end in row if end is not None] + ([0.0] if zero else [])
    if not ends:
        return []
    low, high = min(ends), max(ends)
    pad = 0.06 * (high - low) or 0.5
    low, high = low - pad, high + pad

    def place(value: float) -> str:
        return f"{(value - low) / (high - low) * MARK_WIDTH:.1f}"

    middle = MARK_HEIGHT / 2
    marks = []
    for value, left, right in rows:
        parts = [f'<line class="axis" x1="0" x2="{MARK_WIDTH}" y1="{middle}" y2="{middle}"/>']
        if zero:
            parts.append(f'<path class="zero" d="M{place(0.0)} 0V{MARK_HEIGHT}"/>')
        if left is not None and right is not None:
            bar = f"M{place(left)} {middle - 4}v8m0 -4H{place(right)}m0 -4v8"
            parts.append(f'<path class="bar c0" d="{bar}"/>')
        parts.append(f'<circle class="dot c0" cx="{place(value)}" cy="{middle}" r="4"/>')
        marks.append(
            Markup(
                f'<svg class="mark" viewBox="0 0 {MARK_WIDTH} {MARK_HEIGHT}" aria-hidden="true">'
                f"{''.join(parts)}</svg>"
            )
        )
    return marks
