"""Kill runs again and again, and see that nothing of them is lost.

    python tests/faults                                  # all cases; what `make faults` does
    python tests/faults --methods grpo --kills 3 --kills-of-two 0 --seed 7

Killed are SFT, reward model, PPO, DPO, KTO (with the loss BCO), GRPO, RLVR, and preference data
made by the policy: 15 times with one process, 5 times with two, one of which is killed. Each tiny
recipe is run once without interruption, and once more with SIGKILLs at random moments, some of them
while a checkpoint is written; each time it is started again by the same command. Then both are
compared, bit for bit: weights, checkpoints with optimizer and counters, metrics (but for times and
memory), samples, evaluations, made rows. The table goes to standard output; where something
differs, its folder stays, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from cases import CASES, HOLDS, STEPS, command
from comparing import differences
from killing import Launch, Toll, kill_and_resume, require_success, run_through
from victims import import_all, start

from alignment.runs.directory import RunDirectory
from alignment.types import AlignmentError


@dataclass
class Row:
    """What became of one method with so many processes."""

    method: str
    processes: int
    toll: Toll = field(default_factory=Toll)
    problems: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        toll = self.toll
        identical = "no" if self.problems else "yes"
        numbers = (self.processes, toll.kills, toll.in_writing, toll.resumes)
        return [self.method, *map(str, numbers), identical]


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=options.folder))
    began = time.monotonic()
    _import_ahead(options.methods, folder)
    rows = []
    for method in options.methods:
        for processes, kills in ((1, options.kills), (2, options.kills_of_two)):
            if kills:
                rows.append(_row(method, processes, kills, options.seed, folder))
                _say("\n  ".join([" ".join(rows[-1].cells()), *rows[-1].problems]))
                if rows[-1].toll.outlived:
                    _say(f"{rows[-1].toll.outlived} processes outlived a dead one for 10 s")
    _say(f"\n{_table(rows)}\n\n{time.monotonic() - began:.0f} s, seed {options.seed}")
    if any(row.problems for row in rows):
        _say(f"what differs is kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def _import_ahead(methods: list[str], folder: Path) -> None:
    """Import what runs of these methods import, found out by short ones."""
    for method in methods:
        place = folder / f"{method}-imports"
        settings = [*command(method, str(place), 1), "algorithm.steps=2", "optim.warmup_steps=0"]
        log, modules = place.with_suffix(".log"), place.with_suffix(".json")
        require_success(start(settings, log, processes=1, modules=modules))
        import_all(modules)


def _row(method: str, processes: int, kills: int, seed: int, folder: Path) -> Row:
    row = Row(method, processes)
    place = folder / f"{method}-{processes}"
    place.mkdir()
    rng = random.Random(f"{seed} {method} {processes}")
    in_writing = -(-kills // 5)  # of 15 kills, 3
    try:
        whole = _launch(method, processes, place / "whole")
        tempo = run_through(whole)
        attempt = 0
        while row.toll.kills < kills or row.toll.in_writing < in_writing:
            attempt += 1  # a run that came to its end too soon is compared, and another is begun
            killed = _launch(method, processes, place / f"killed-{attempt}")
            kill_and_resume(killed, tempo, rng, row.toll, kills=kills, in_writing=in_writing)
            row.problems += differences(killed.run, whole.run, holds=HOLDS[method], last_step=STEPS)
    except AlignmentError as error:
        row.problems.append(str(error))
    if not row.problems:
        shutil.rmtree(place)
    return row


def _launch(method: str, processes: int, folder: Path) -> Launch:
    return Launch(
        command=command(method, str(folder), processes),
        run=RunDirectory(folder / method),
        log=folder.with_suffix(".log"),
        processes=processes,
        steps=STEPS,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tests/faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--methods", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--kills", type=int, default=15, help="of a run of one process")
    parser.add_argument("--kills-of-two", type=int, default=5, help="of a run of two processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, default=None, help="where the runs are made")
    return parser.parse_args()


def _table(rows: list[Row]) -> str:
    header = ["method", "processes", "kills", "in writing", "resumes", "identical"]
    lines = [header, ["---"] * len(header), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
