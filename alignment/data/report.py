"""What became of the rows: kept, cut short, or dropped, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from alignment.data.places import WHOLE_SOURCE, Places
from alignment.types import UserInputError

TooLong = Literal["drop", "truncate", "error"]

PROMPT_TOO_LONG = "the prompt leaves no room for a completion"
TOO_LONG = "longer than the limit"
BLANK_PROMPT = "a user's message is blank"
NOTHING_TO_TRAIN_ON = "nothing to train on"


@dataclass(frozen=True, slots=True)
class DataReport:
    """Rows by what became of them; every number is an index into the rows that came in.

    kept:      rows that were used, in order: `kept[i]` is the row of the i-th result.
    dropped:   rows that were left out, by reason.
    truncated: kept rows whose completion was cut.
    places:    where the rows stand in their source.
    """

    kept: tuple[int, ...]
    dropped: Mapping[str, tuple[int, ...]]
    truncated: tuple[int, ...] = ()
    places: Places = field(default=WHOLE_SOURCE, compare=False)

    @property
    def n_rows(self) -> int:
        return len(self.kept) + self.n_dropped

    @property
    def n_dropped(self) -> int:
        return sum(map(len, self.dropped.values()))

    def summary(self) -> str:
        """One line for people."""
        parts = [f"{len(self.kept)} of {self.n_rows} rows kept"]
        if self.truncated:
            parts.append(f"{len(self.truncated)} truncated")
        return "; ".join([*parts, *self.reasons()])

    def reasons(self) -> list[str]:
        """For each reason of dropping: how many rows, and the first of them."""
        return [
            f"{len(rows)} dropped, {reason} "
            f"({self.places.names(rows[:3])}{', ...' if len(rows) > 3 else ''})"
            for reason, rows in self.dropped.items()
        ]


def check_dropped(report: DataReport, limit: float, what: str) -> None:
    """Check that no more than a share of the rows was dropped.

    Args:
        report: of the rows.
        limit: largest share of them that may be dropped, 0 to 1.
        what: names the data, such as "training data".

    Raises:
        UserInputError: more were, with the reasons and the first rows.
    """
    if report.n_dropped > limit * report.n_rows:
        raise UserInputError(
            f"{what}: {report.n_dropped} of {report.n_rows} rows "
            f"({report.n_dropped / report.n_rows:.1%}) cannot be used, more than the limit of "
            f"{limit:.1%}: {'; '.join(report.reasons())}. Correct or remove these rows, or raise "
            "the limit"
        )


class Tally:
    """Collects a `DataReport` row by row.

    places: as of the report.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self._kept: list[int] = []
        self._truncated: list[int] = []
        self._dropped: dict[str, list[int]] = {}

    def keep(self, row: int, *, truncated: bool = False) -> None:
        self._kept.append(row)
        if truncated:
            self._truncated.append(row)

    def drop(self, row: int, reason: str) -> None:
        self._dropped.setdefault(reason, []).append(row)

    def report(self) -> DataReport:
        """The report.

        Raises:
            UserInputError: no row was kept.
        """
        dropped = {reason: tuple(rows) for reason, rows in self._dropped.items()}
        report = DataReport(tuple(self._kept), dropped, tuple(self._truncated), self._places)
        if not report.kept:
            raise UserInputError(
                f"no row can be used: {report.summary()}. Raise the token limit, or look at the "
                "data's columns"
            )
        return report
