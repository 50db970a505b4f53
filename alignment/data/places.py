"""Where rows stand in what the user gave: how messages name them, after a split as before it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Places:
    """The place of each row of a list in the source that the list was taken from.

    numbers: one a row: its line in `file`, counting from 1; without a file, or where its rows are
             not lines, its number among the source's rows, counting from 0.
    file:    that the rows are in, or "".
    by_line: whether the file's rows are lines.
    """

    numbers: Sequence[int]
    file: str = ""
    by_line: bool = True

    def name(self, index: int) -> str:
        """What messages call a row of the list: "train.jsonl:4", "train.json, row 3 (counting
        from 0)", "row 3 (counting from 0)"."""
        name = self.names([index])
        return name if self._has_lines else f"{name} (counting from 0)"

    def names(self, indices: Sequence[int]) -> str:
        """One phrase for several: "train.jsonl:4, 7", "train.json, row 3, 6", "row 3, 6"."""
        numbers = ", ".join(str(self.numbers[index]) for index in indices)
        if self._has_lines:
            return f"{self.file}:{numbers}"
        return f"{self.file}, row {numbers}" if self.file else f"row {numbers}"

    def select(self, indices: Sequence[int]) -> Places:
        """Those of a part of the list."""
        return Places([self.numbers[index] for index in indices], self.file, self.by_line)

    @property
    def _has_lines(self) -> bool:
        return bool(self.file) and self.by_line


# Of a list that is the source itself.
WHOLE_SOURCE = Places(range(sys.maxsize))


@dataclass(frozen=True, slots=True)
class PlacedRows:
    """Rows, and where each of them stands in its source."""

    rows: Sequence[Mapping[str, Any]]
    places: Places = WHOLE_SOURCE

    def select(self, indices: Sequence[int]) -> PlacedRows:
        """A part of the rows, in the order given."""
        return PlacedRows([self.rows[index] for index in indices], self.places.select(indices))
