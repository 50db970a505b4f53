"""What a run shows while it goes on: a progress bar on a terminal, one plain line a step elsewhere.

step 12/60  reward 0.41  kl 0.012  4.9 s/step  4 min left
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from alignment.types import RewardedCompletion, Rollout

_RATE_STEPS = 20  # the rate is that of the latest steps: the first ones are slow


class Progress:
    """Shows the step, chosen metrics, the rate and the time left; a context manager.

    Args:
        total: steps of the whole run.
        metrics: what to show, metric name to label, in order: ``{"reward/mean": "reward"}``. Those
            a step did not measure are left out of its line.
        start: steps done before, by the run this one resumes.
        console: where to write; the standard output unless told otherwise.
        clock: seconds, ever growing.
    """

    def __init__(
        self,
        total: int,
        metrics: Mapping[str, str],
        *,
        start: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.metrics = dict(metrics)
        self.console = console or Console()
        self._clock = clock
        self._marks: deque[tuple[int, float]] = deque(maxlen=_RATE_STEPS + 1)
        self._start = start
        self._bar = _bar(self.console) if self.console.is_terminal else None
        self._task = self._bar.add_task("", total=total, completed=start) if self._bar else None

    def __enter__(self) -> Progress:
        self._marks.append((self._start, self._clock()))
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` is done, with its metrics."""
        self._marks.append((step, self._clock()))
        line = self._line(step, metrics)
        if self._bar is None or self._task is None:
            write_plain(self.console, line)
        else:
            self._bar.update(self._task, completed=step, description=line)

    def _line(self, step: int, metrics: Mapping[str, float]) -> str:
        parts = [f"step {step}/{self.total}"]
        parts += [
            f"{label} {_short(metrics[name])}"
            for name, label in self.metrics.items()
            if name in metrics
        ]
        seconds = self._seconds_per_step()
        if seconds is not None:
            parts.append(f"{_short(seconds)} s/step")
            parts.append(f"{duration(seconds * max(self.total - step, 0))} left")
        return "  ".join(parts)

    def _seconds_per_step(self) -> float | None:
        if len(self._marks) < 2 or self._marks[-1][0] <= self._marks[0][0]:
            return None
        (first, begin), (last, end) = self._marks[0], self._marks[-1]
        return (end - begin) / (last - first)


def show_samples(rollout: Rollout, n: int = 3, *, console: Console | None = None) -> None:
    """Print a table of `n` samples from the highest reward to the lowest, evenly spread; those
    without a reward (a grader failed) come last."""
    console = console or Console()
    table = Table(title=f"samples of step {rollout.step}", show_lines=True)
    table.add_column("reward", justify="right", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    for heading in ("prompt", "completion"):
        table.add_column(heading, overflow="fold", ratio=1)
    for item in _spread(rollout.items, n):
        reward = "none" if item.reward is None else _short(item.reward)
        prompt, completion = visible(item.prompt.text), visible(item.completion.text)
        table.add_row(reward, item.outcome.value, Text(prompt), Text(completion))
    console.print(table)


def write_plain(console: Console, line: str) -> None:
    """One line as it is: no markup, no colour, no wrapping."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def visible(text: str) -> str:
    """`text` with its control characters but line ends made visible: a completion must not steer
    the reader's terminal."""
    return "".join(
        char if char == "\n" or char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )


def duration(seconds: float) -> str:
    """A time a person reads at a glance: "45 s", "4 min", "2 h 10 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _bar(console: Console) -> RichProgress:
    description = TextColumn("{task.description}", markup=False)
    return RichProgress(BarColumn(bar_width=20), description, console=console)


def _short(value: float) -> str:
    """Two significant digits at least, and all digits before the point: 0.012, 0.41, 4.9, 1234."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"


def _spread(items: tuple[RewardedCompletion, ...], n: int) -> list[RewardedCompletion]:
    def order(item: RewardedCompletion) -> float:
        return math.inf if item.reward is None or math.isnan(item.reward) else -item.reward

    ranked = sorted(items, key=order)
    if n >= len(ranked):
        return ranked
    if n < 2:
        return ranked[:n]
    return [ranked[round(place * (len(ranked) - 1) / (n - 1))] for place in range(n)]
