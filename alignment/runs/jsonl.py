"""Files of one JSON object a line, which outlive being cut off in the middle of a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.runs.files import readable_errors, sync_file, write_atomic
from alignment.types import AlignmentError


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of `path`, in order; none if there is no such file.

    A last line that is torn (its writer was killed) is left out.

    Raises:
        AlignmentError: a line with its line end is not a JSON object, which no killed writer
            explains.
    """
    records, _ = _scan(path)
    return records


class JsonLinesFile:
    """Appends objects to `path`. Opening it removes a torn last line of an earlier writer.

    Each object reaches the operating system as one whole line before `append` returns: a killed
    process loses nothing it appended. `sync` also guards against the machine losing power.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with readable_errors("open", path):
            self._repair()
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open while the run lasts)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line.

        Raises:
            AlignmentError: it cannot be written. The file then ends where it ended before.
        """
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with readable_errors("write to", self.path):
            end = os.fstat(self._file.fileno()).st_size
            try:
                self._write_all(line)
            except OSError:
                os.ftruncate(self._file.fileno(), end)
                raise

    def keep(self, lines: list[dict[str, Any]]) -> None:
        """Replace the whole file by these objects, in one step."""
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        self._file.close()
        try:
            write_atomic(self.path, text)
        finally:
            with readable_errors("open", self.path):
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (as above)

    def sync(self) -> None:
        """Force everything appended so far to disk."""
        with readable_errors("write to", self.path):
            sync_file(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _write_all(self, line: bytes) -> None:
        written = 0
        while written < len(line):
            written += self._file.write(line[written:]) or 0

    def _repair(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        if content.endswith(b"\n") or not content:  # not touched: others may have it open
            return
        _, end = _scan(self.path)
        with open(self.path, "r+b") as file:
            file.truncate(end)
            if end == len(content):  # whole, but for its line end
                file.seek(end)
                file.write(b"\n")


def json_safe(value: float) -> float | str:
    """`value`, or its name where JSON has no number for it: "nan", "inf" or "-inf"."""
    return value if math.isfinite(value) else str(value)


def _scan(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file, and how many bytes they take, without a torn last line."""
    if not path.exists():
        return [], 0
    with readable_errors("read", path):
        content = path.read_bytes()
    records: list[dict[str, Any]] = []
    end = 0
    lines = [line + b"\n" for line in content.split(b"\n")]
    lines[-1] = lines[-1][:-1]  # what stands after the last line end
    lines = lines if lines[-1] else lines[:-1]
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None and not line.endswith(b"\n"):  # can only be the last
            break
        if record is None:
            raise AlignmentError(
                f"{path}, line {number} is not a JSON object: the file was damaged or edited; "
                "mend or remove that line"
            )
        records.append(record)
        end += len(line)
    return records, end


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
