"""The names of metrics that docs/metrics.md explains."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def documented_metrics() -> list[re.Pattern[str]]:
    """The names in the first column of docs/metrics.md (the second in its table of tasks)."""
    text = _PAGE.read_text(encoding="utf-8")
    training, evaluation = text.split("## Evaluation")
    names = [
        name
        for line in training.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([^`]+)`", line.split("|")[1])
    ]
    for line in evaluation.splitlines():
        if line.startswith("| "):
            cells = line.split("|")
            names += [f"eval/<task>/{name}" for name in re.findall(r"`([^`]+)`", cells[2])]
    return [re.compile(re.sub(r"<\w+>", r"[^/]+", re.escape(name))) for name in names]


def undocumented(recorded: Iterable[str]) -> list[str]:
    """Those of the names of recorded metrics that the page does not explain."""
    documented = documented_metrics()
    return sorted(n for n in recorded if not any(one.fullmatch(n) for one in documented))


def never_recorded(recorded: Iterable[str]) -> list[str]:
    """The names on the page, as patterns, that no recorded metric has."""
    recorded = list(recorded)
    documented = documented_metrics()
    return [o.pattern for o in documented if not any(o.fullmatch(name) for name in recorded)]
