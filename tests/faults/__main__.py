"""Kill runs again and again, and see that nothing of them is lost.

    python tests/faults                                  # all cases; what `make faults` does
    python tests/faults --methods grpo --kills 3 --kills-of-two 0 --seed 7

Killed are SFT, reward model, PPO, DPO, KTO (with the loss BCO), GRPO, RLVR, and preference data
made by the policy: 15 times with one process, 5 times with two, one of which is killed; GRPO also
3 times with two processes that share out the weights, by FSDP2 and by ZeRO-3. Each tiny recipe is
run once without interruption, and once more with SIGKILLs at random moments, some of them
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
from importlib.util import find_spec
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from cases import CASES, HOLDS, SHARDED, STEPS, STRATEGIES, command
from comparing import differences
from killing import Launch, Toll, kill_and_resume, require_success, run_through
from victims import import_all, start

from alignment.runs.directory import RunDirectory
from alignment.types import AlignmentError


@dataclass
class Row:
    """What became of one method with so many processes.

    strategy: by which they share out what is trained; empty where each has everything.
    """

    method: str
    processes: int
    strategy: str = ""
    toll: Toll = field(default_factory=Toll)
    problems: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        toll = self.toll
        identical = "no" if self.problems else "yes"
        numbers = (self.processes, toll.kills, toll.in_writing, toll.resumes)
        return [f"{self.method} {self.strategy}".strip(), *map(str, numbers), identical]


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=options.folder))
    began = time.monotonic()
    _import_ahead(options.methods, folder)
    rows = []
    for method in options.methods:
        for row, kills in _rows(method, options):
            _fill(row, kills, options.seed, folder)
            rows.append(row)
            _say("\n  ".join([" ".join(row.cells()), *row.problems]))
            if row.toll.outlived:
                _say(f"{row.toll.outlived} processes outlived a dead one for 10 s")
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


def _rows(method: str, options: argparse.Namespace) -> list[tuple[Row, int]]:
    """What is to be done of a method: each row with the kills that belong into it."""
    rows = [
        (Row(method, 1), options.kills),
        (Row(method, 2), options.kills_of_two),
        *((Row(method, 2, name), options.kills_of_sharded) for name in SHARDED.get(method, ())),
    ]
    return [(row, kills) for row, kills in rows if kills and _is_installed(row.strategy)]


def _is_installed(strategy: str) -> bool:
    if not strategy.startswith("zero") or find_spec("deepspeed") is not None:
        return True
    _say(f"{strategy} is left out: DeepSpeed is not installed")
    return False


def _fill(row: Row, kills: int, seed: int, folder: Path) -> None:
    place = folder / "-".join([row.method, str(row.processes), row.strategy]).rstrip("-")
    place.mkdir()
    rng = random.Random(f"{seed} {row.method} {row.processes} {row.strategy}".rstrip())
    in_writing = -(-kills // 5)  # of 15 kills, 3
    try:
        whole = _launch(row, place / "whole")
        tempo = run_through(whole)
        attempt = 0
        while row.toll.kills < kills or row.toll.in_writing < in_writing:
            attempt += 1  # a run that came to its end too soon is compared, and another is begun
            killed = _launch(row, place / f"killed-{attempt}")
            kill_and_resume(killed, tempo, rng, row.toll, kills=kills, in_writing=in_writing)
            holds = HOLDS[row.method]
            row.problems += differences(killed.run, whole.run, holds=holds, last_step=STEPS)
    except AlignmentError as error:
        row.problems.append(str(error))
    if not row.problems:
        shutil.rmtree(place)


def _launch(row: Row, folder: Path) -> Launch:
    return Launch(
        command=command(row.method, str(folder), row.processes),
        run=RunDirectory(folder / row.method),
        log=folder.with_suffix(".log"),
        processes=row.processes,
        steps=STEPS,
        environment=STRATEGIES.get(row.strategy, {}),
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
    parser.add_argument(
        "--kills-of-sharded", type=int, default=3, help="of two that share out what is trained"
    )
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
