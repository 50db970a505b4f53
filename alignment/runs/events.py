"""What happened in a run besides its numbers: `events.jsonl`."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignment.runs.jsonl import JsonLinesFile, json_safe, read_json_lines
from alignment.types import AlignmentError

logger = logging.getLogger(__name__)

_LOG_LEVELS = {
    "warning": logging.WARNING,
    "diagnosis": logging.WARNING,
    "error": logging.ERROR,
}
_OWN_FIELDS = ("time", "kind", "message")


class EventLog:
    """Appends events to `events.jsonl`: UTC time, kind, message, and fields of the event's own.

    Kinds in use: `warning`, `diagnosis` (something is off with the training, with a remedy),
    `error` (what ended the run), `out_of_memory`, `nonfinite`, `unscorable`, `checkpoint`,
    `resume`, `hang`, `start`, `end`; `reference` (its log-probabilities, computed beforehand);
    where data is made, `constitution` (which one), `agreement` (the judge with itself) and
    `left_out` (what was dropped). The first three also go to the logger as warnings and errors,
    the others as information.

    A run has events before it has a folder. Those are held, and written with the first event
    after the folder is there.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file: JsonLinesFile | None = None
        self._held: list[dict[str, Any]] = []

    def write(self, kind: str, message: str, *, logged: bool = True, **fields: Any) -> None:
        """Append one event. A field JSON cannot hold is written as its `repr`: an event must not
        stop the run it tells about.

        Args:
            logged: whether it goes to the logger, too.

        Raises:
            AlignmentError: a field takes a name of the log's own, or the file cannot be written.
        """
        clash = [name for name in fields if name in _OWN_FIELDS]
        if clash:
            raise AlignmentError(f"an event has its own {clash[0]!r}; name that field otherwise")
        record = {"time": utc_now(), "kind": kind, "message": message}
        self._held.append(record | {name: _plain(value) for name, value in fields.items()})
        self._write_held()
        if logged:
            logger.log(_LOG_LEVELS.get(kind, logging.INFO), "%s", message)

    def close(self) -> None:
        self._write_held()
        if self._file is not None:
            self._file.close()

    def _write_held(self) -> None:
        if self._file is None and self.path.parent.is_dir():
            self._file = JsonLinesFile(self.path)
        while self._held and self._file is not None:
            self._file.append(self._held[0])
            del self._held[0]


def read_events(path: Path | str) -> list[dict[str, Any]]:
    """The events of an `events.jsonl`, in order; none if there is no such file yet."""
    return read_json_lines(Path(path))


def utc_now() -> str:
    """The time in UTC, ISO 8601 to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return json_safe(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return json.loads(json.dumps(value, default=repr))
