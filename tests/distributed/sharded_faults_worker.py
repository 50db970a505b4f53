"""Runs of two processes that share out what is trained, each met by one fault after the other.

Usage: python sharded_faults_worker.py FOLDER. It imports everything once and forks the ranks, as
the tool that kills runs does. Leaves, for each strategy, the run `whole/STRATEGY` that met no
fault, the run `met/STRATEGY`, and how each start ended in `starts.json`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from sharded_worker import FSDP2, inside
from victims import Victim, import_all, start
from zero_worker import zero

from alignment.runs.checkpoint import list_checkpoints

SETTINGS = (
    "run.name=run",
    "run.dir=runs",
    "data={type: arithmetic, operation: add, operands: 2, low: 1, high: 9, held_out: 8}",
    "algorithm.steps=6",
    "algorithm.prompts_per_step=4",
    "algorithm.group_size=4",
    "rollout.max_new_tokens=4",
    "rewards=[{type: 'faulty_rewards:even_tokens'}]",
    "optim={lr: 3e-3, schedule: constant}",
    "checkpoint={every: 3, keep: 6}",
    "eval={}",
    "expect=[]",
)
IMPATIENT = ("limits.hang_minutes=0.07",)
"""For where something hangs: DeepSpeed imports for seconds the first time it begins."""
STRATEGIES = {"zero3": zero("3"), "zero2": zero("2"), "fsdp2": FSDP2}
STARTS = {
    "zero3": ("stop", "hang", "death in backward", ""),
    "zero2": ("stop", "death in backward", ""),
    "fsdp2": ("stop", "hang", "death in backward", ""),
}
"""Strategy to the faults of its run, in order; the last start meets none.

Strategies differ in the exchange in which the others wait, in what it raises when one of them is
gone, and in what is gathered for a checkpoint. For one that hangs in a grader the others wait
between passes, where stage 2 of ZeRO has nothing of its own.
"""
_PATIENCE = 60.0


def outcome(
    folder: Path, strategy: str, fault: str, settings: Sequence[str], modules: Path | None = None
) -> dict[str, Any]:
    """How a start in `folder` ended: exit codes, what was said, and the last step saved."""
    with inside(folder):
        log = folder / f"{fault or 'none'}.log"
        variables = STRATEGIES[strategy] | {"FAULT": fault}
        command = ["train", "tiny/grpo", *SETTINGS, *settings]
        codes = _codes(start(command, log, processes=2, environment=variables, modules=modules))
        saved = [step for step, _ in list_checkpoints(Path("runs/run/checkpoints"))]
        said = log.read_text(encoding="utf-8")
        return {"codes": codes, "said": said, "steps": max(saved, default=0)}


def _codes(victim: Victim) -> list[int]:
    """The ranks' exit codes; those that hang are killed."""
    deadline = time.monotonic() + _PATIENCE
    while not victim.ended() and time.monotonic() < deadline:
        time.sleep(0.02)
    if not victim.ended():
        victim.kill(0)
    return victim.codes()


def meet_all(folder: Path, strategy: str) -> dict[str, dict[str, Any]]:
    """The outcomes of a strategy's starts."""
    modules = folder / "modules.json"
    whole = outcome(folder / "whole" / strategy, strategy, "", (), modules)
    assert whole["codes"] == [0, 0], whole["said"][-3000:]
    import_all(modules)
    gc.freeze()  # what is imported is not looked at again by any of the ranks
    place = folder / "met" / strategy
    return {fault: outcome(place, strategy, fault, IMPATIENT) for fault in STARTS[strategy]}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    starts = {strategy: meet_all(target, strategy) for strategy in STARTS}
    (target / "starts.json").write_text(json.dumps(starts), encoding="utf-8")
