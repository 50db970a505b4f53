"""The data set that a run makes: one file of rows a step, joined at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.runs.files import readable_errors, remove_leftovers, write_atomic
from alignment.types import AlignmentError


class MadeData:
    """Writes `made/step-000001.jsonl` and its successors, and `data.jsonl` out of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write one step's rows; a file of the same step is replaced in one go.

        Raises:
            AlignmentError: the file cannot be written.
        """
        with readable_errors("create the folder", self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
        write_atomic(self.directory / f"step-{step:06d}.jsonl", text)

    def truncate_after(self, step: int) -> None:
        """Remove the rows of later steps (for a resume from `step`) and of killed writes."""
        if not self.directory.is_dir():
            return
        remove_leftovers(self.directory)
        for path in self._files():
            if int(path.stem.removeprefix("step-")) > step:
                with readable_errors("remove", path):
                    path.unlink()

    def join(self, target: Path) -> int:
        """Write all rows to `target`, in the order of the steps.

        Returns:
            how many there are.

        Raises:
            AlignmentError: a file cannot be read or written, or was damaged since it was written.
        """
        with readable_errors("read", self.directory):
            text = "".join(_whole(path) for path in self._files())
        write_atomic(target, text)
        return text.count("\n")

    def _files(self) -> list[Path]:
        return sorted(self.directory.glob("step-*.jsonl"))


def _whole(path: Path) -> str:
    """The text of a step's file. Writing it leaves it whole or not there at all."""
    try:
        text = path.read_bytes().decode("utf-8")
        lines = text.split("\n")
        if lines.pop():
            raise ValueError("its last line has no end")
        for line in lines:
            json.loads(line)
    except ValueError as error:
        raise AlignmentError(
            f"{path} is damaged ({error}); put it back from a copy, or make it again: go on from a "
            "checkpoint of an earlier step (--resume DIR)"
        ) from error
    return text
