"""docs/faults.md: every row has a test that exists, and names events that the code writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
COLUMNS = ["fault", "noticed by", "what happens", "event", "tests"]


def rows() -> list[dict[str, str]]:
    """The rows of the page's tables."""
    text = (REPOSITORY / "docs" / "faults.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == COLUMNS
    return [
        dict(zip(COLUMNS, row, strict=True))
        for row in cells
        if row != COLUMNS and set(row[0]) != {"-"}
    ]


def names(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.fixture(scope="module")
def tests() -> set[str]:
    """Every test function of the repository."""
    sources = [path.read_text(encoding="utf-8") for path in REPOSITORY.glob("tests/**/test_*.py")]
    return set(re.findall(r"def (test_\w+)\(", "\n".join(sources)))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["fault"][:40])
def test_every_row_is_held_by_tests_that_exist(row: dict[str, str], tests: set[str]) -> None:
    assert names(row["tests"])
    assert set(names(row["tests"])) <= tests


def test_every_event_is_one_that_the_code_writes() -> None:
    sources = [path.read_text(encoding="utf-8") for path in REPOSITORY.glob("alignment/**/*.py")]
    written = set(re.findall(r'(?:write\(\s*|Verdict\(|event = )"(\w+)"', "\n".join(sources)))
    named = {name for row in rows() for name in names(row["event"])}
    assert {"error", "out_of_memory", "nonfinite", "unscorable"} <= named <= written
