"""Faults to inject into tiny runs."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_runs import GRPO, SFT, metrics_of, weights_of
from typer.testing import CliRunner, Result

from alignment.cli import app
from alignment.runs.checkpoint import checkpoint_problem, list_checkpoints
from alignment.runs.directory import RunDirectory
from alignment.trainers.sft import SFTTrainer

NO_TASKS = "eval={tasks: []}"
SAVED = ("algorithm.steps=5", "checkpoint={every: 2, keep: 2}", NO_TASKS)


class PluginError(Exception):
    """Not one of the toolkit's."""


@contextmanager
def default_interrupts() -> Iterator[None]:
    """Without a handler of its own: a test run started in the background inherits SIGINT ignored,
    and "as usual" is Python's own."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, inherited)


def run_out() -> None:
    """Run out of memory, with the allocator's own error."""
    torch.empty(2**45)


def trained(method: str, folder: Path, *overrides: str) -> Result:
    """The command's result."""
    settings = {"sft": SFT, "grpo": GRPO}[method]
    arguments = ["train", f"tiny/{method}", *settings, f"run.dir={folder}", *overrides]
    return CliRunner().invoke(app, arguments)


def assert_resumes(folder: Path, whole: RunDirectory) -> None:
    """The last checkpoint is whole, and the run goes on from it to the same weights."""
    saved = list_checkpoints(folder / "sft" / "checkpoints")
    assert [step for step, _ in saved] == [2]
    assert checkpoint_problem(saved[-1][1]) is None
    directory = tiny_runs.run("sft", folder, *SAVED)
    assert [record["step"] for record in metrics_of(directory)] == [1, 2, 3, 4, 5]
    for name, weight in weights_of(directory).items():
        assert torch.equal(weight, weights_of(whole)[name])


@contextmanager
def failing_step(number: int, error: BaseException) -> Iterator[None]:
    """A trainer whose step of this number raises after it has drawn its data."""
    original = SFTTrainer.step

    def step(self: SFTTrainer, step: int) -> Any:
        result = original(self, step)
        if step == number:
            raise error
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SFTTrainer, "step", step)
        yield
