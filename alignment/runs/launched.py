"""What passes between `align train --processes N` and the ranks that it starts.

The launcher puts three variables into the ranks' environment. A rank that fails leaves its message
in a folder, so that one process says once what all of them found.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

REPORTS = "ALIGN_LAUNCHER_REPORTS"
"""Names the folder for the ranks' messages."""
OPTIONS = "ALIGN_LAUNCHER_OPTIONS"
"""What to add to `align train RECIPE` to start as many processes in the same way again."""
LAUNCHER = "ALIGN_LAUNCHER_PID"
"""The process that the ranks must not outlive."""


@dataclass(frozen=True, slots=True)
class Report:
    """Why a rank ended: its exit code, and what it would have said by itself.

    hang: whether its watch ended it because a rank, this one or another, hangs.
    """

    rank: int
    code: int
    message: str
    time: float
    hang: bool = False


def report(message: str, code: int, *, hang: bool = False) -> bool:
    """Leave a message with the launcher; False where this process has none, and speaks itself."""
    folder = os.environ.get(REPORTS)
    if not folder or "RANK" not in os.environ:
        return False
    rank = int(os.environ["RANK"])
    text = json.dumps(asdict(Report(rank, code, message, time.time(), hang)))
    path = Path(folder) / f"rank-{rank}.json"
    try:  # in one step: the process may be killed while it says why it ends
        path.with_suffix(".tmp").write_text(text, encoding="utf-8")
        os.replace(path.with_suffix(".tmp"), path)
    except OSError:
        return False
    return True


def read_reports(folder: Path) -> list[Report]:
    """What the ranks left, the earliest first."""
    reports = [Report(**json.loads(path.read_text("utf-8"))) for path in folder.glob("*.json")]
    return sorted(reports, key=lambda report: report.time)


def launch_options() -> str:
    """` --accelerate NAME --processes N`, or nothing where no launcher started this process."""
    options = os.environ.get(OPTIONS)
    return f" {options}" if options else ""


def is_orphan() -> bool:
    """Whether the launcher that started this process is gone."""
    launcher = os.environ.get(LAUNCHER)
    return launcher is not None and "RANK" in os.environ and os.getppid() != int(launcher)
