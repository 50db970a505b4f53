"""Several programs do the same work in turn, each in a process of its own; their ratios.

A benchmark is a table of sides, the toolkit's first. In each round every side runs once, in an
order that turns with the round, so that a machine whose speed drifts treats all alike. The first
step of each process is not counted. Printed are the medians over all rounds, and the toolkit's
ratio to the fastest of the others.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

OURS = "ours"


@dataclass(frozen=True)
class Job:
    """What a side is asked to do: train `model` for `steps` steps, with `folder` to write in."""

    model: str
    folder: Path
    steps: int
    device: str


@dataclass
class Measured:
    """What a side did.

    seconds:   of each step, by phase; the phase "step" is the whole of it.
    gigabytes: peak memory of the process, before anything is saved.
    shown:     other numbers, to see that the sides did the same work.
    """

    seconds: dict[str, list[float]]
    gigabytes: float
    shown: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """One comparison.

    title:            what is done, for people.
    file:             the script, which is started again for each side.
    sides:            functions by name; "ours" is among them.
    samples_per_step: how many `sample`s a step trains on.
    phases:           phases to print.
    notes:            printed at the end.
    """

    title: str
    file: str
    sides: Mapping[str, Callable[[Job], Measured]]
    samples_per_step: int
    sample: str = "samples"
    phases: tuple[str, ...] = ("step",)
    notes: tuple[str, ...] = ()

    def main(self) -> None:
        """The command line."""
        from alignment.modeling.catalog import resolve

        parser = argparse.ArgumentParser(description=self.title)
        parser.add_argument("--model", default="smollm2-135m-instruct")
        parser.add_argument("--rounds", type=int, default=3)
        parser.add_argument("--steps", type=int, default=4)
        parser.add_argument("--device", default="cpu")
        parser.add_argument("--sides", default=",".join(self.sides), help="which ones to run")
        parser.add_argument("--worker", choices=self.sides, help="one side, in this process")
        args = parser.parse_args()
        args.model = str(resolve(args.model))
        if args.worker:
            self._work(args)
            return
        names = args.sides.split(",")
        results: dict[str, list[Measured]] = {name: [] for name in names}
        for round_ in range(args.rounds):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                measured = self._launch(name, args)
                results[name].append(measured)
                median = statistics.median(measured.seconds["step"][1:])
                _say(f"round {round_ + 1} {name}: {median:.2f} s/step, {measured.gigabytes:.2f} GB")
        self._report(results, args)

    def _work(self, args: argparse.Namespace) -> None:
        with tempfile.TemporaryDirectory() as name:
            job = Job(args.model, Path(name), args.steps, args.device)
            _say("RESULT " + json.dumps(asdict(self.sides[args.worker](job))))

    def _launch(self, side: str, args: argparse.Namespace) -> Measured:
        command = [sys.executable, self.file, "--worker", side, "--model", args.model]
        command += ["--steps", str(args.steps), "--device", args.device]
        folder = Path(self.file).parent
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if done.returncode or not lines:
            sys.exit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return Measured(**json.loads(lines[-1].removeprefix("RESULT ")))

    def _report(self, results: Mapping[str, list[Measured]], args: argparse.Namespace) -> None:
        table = Table(results)
        _say(f"{self.title}\n{_circumstances(args)}")
        table.heading()
        for phase in self.phases:
            table.row(f"{phase}, seconds", {s: seconds(r, phase) for s, r in results.items()})
        step = {side: seconds(runs, "step") for side, runs in results.items()}
        table.row(
            f"{self.sample} per second",
            {side: self.samples_per_step / value for side, value in step.items() if value},
            more_is_better=True,
        )
        table.row("peak memory, GB", {s: _median(r, "gigabytes") for s, r in results.items()})
        for name in next(iter(results.values()))[0].shown:
            table.row(
                name,
                {s: statistics.median(r.shown[name] for r in runs) for s, runs in results.items()},
                ratio=False,
            )
        for note in self.notes:
            _say(note)


class Table:
    """Rows of numbers, a column a side, and the ratio of ours to the fastest of the others.

    Args:
        results: by side.
    """

    def __init__(self, results: Mapping[str, list[Measured]]) -> None:
        self._sides = list(results)
        others = {s: seconds(runs, "step") or 0.0 for s, runs in results.items() if s != OURS}
        self._rival = min(others, key=lambda s: others[s]) if others else None

    def heading(self) -> None:
        cells = "".join(f"{side:>18}" for side in self._sides)
        rival = f"  ours to {self._rival}" if self._rival and OURS in self._sides else ""
        _say(f"{'':28}{cells}{rival}")

    def row(
        self,
        name: str,
        values: Mapping[str, float | None],
        *,
        ratio: bool = True,
        more_is_better: bool = False,
    ) -> None:
        """A line of the table. Times are given as how often ours goes into the rival's, as
        throughput is; memory as a share of the rival's."""
        cells = [values.get(side) for side in self._sides]
        text = "".join(f"{'-' if v is None else format(v, '.3f'):>18}" for v in cells)
        ours, rival = values.get(OURS), values.get(self._rival or "")
        if ratio and ours and rival:
            upside_down = name.endswith("seconds")
            text += f"  {(rival / ours if upside_down else ours / rival):.2f}x"
        _say(f"{name:28}{text}")


def seconds(runs: list[Measured], phase: str) -> float | None:
    """Median over all steps but each process's first; None where the phase was not measured."""
    values = [value for run in runs for value in run.seconds.get(phase, [])[1:]]
    return statistics.median(values) if values else None


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


def peak_gigabytes(device: str) -> float:
    """Peak of the process's memory: resident on a CPU, allocated on a GPU."""
    import torch

    if device != "cpu":
        return float(torch.cuda.max_memory_allocated() / 1e9)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _median(runs: list[Measured], name: str) -> float:
    return statistics.median(getattr(run, name) for run in runs)


def _circumstances(args: argparse.Namespace) -> str:
    import torch
    import transformers
    import trl

    where = torch.cuda.get_device_name() if args.device != "cpu" else platform.processor()
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {args.device} {where or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, trl {trl.__version__}; medians over {args.rounds} rounds "
        f"of {args.steps - 1} steps"
    )


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
