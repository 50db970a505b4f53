"""The tool that kills runs: what it compares, and what it counts as killed in writing."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import replay_runs
import tiny_runs
import torch
from saved_state import save_checkpoint

from alignment.config.load import load_recipe
from alignment.runs.checkpoint import load_checkpoint
from alignment.runs.directory import RunDirectory

HELD = {
    "model": frozenset({"model", "rollouts", "evals"}),
    "data": frozenset({"rollouts", "made", "data.jsonl"}),
}
STEPS = {"model": 3, "data": 5}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of `tests/faults`, which runs as a program of its own."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "faults"))
    return importlib.import_module


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """One run that makes a model and one that makes data, to be copied and not changed."""
    settings = (
        "algorithm.steps=3",
        "checkpoint={every: 1, keep: 2}",
        "eval={every: 2, tasks: [{type: verifiable, samples: 1, prompts: 2}]}",
    )
    return {
        "model": tiny_runs.run("grpo", tmp_path_factory.mktemp("model"), *settings),
        "data": replay_runs.run("preferences", tmp_path_factory.mktemp("data")),
    }


def copy_of(run: RunDirectory, folder: Path) -> RunDirectory:
    shutil.copytree(run.path, folder / run.name)
    return RunDirectory(folder / run.name)


def test_each_method_is_killed_in_both_types(harness: Callable[[str], ModuleType]) -> None:
    cases = harness("cases")
    assert cases.CASES.keys() == cases.HOLDS.keys()
    for method in cases.CASES:
        dtypes = set()
        for processes in (1, 2):
            _, name, *settings = cases.command(method, "somewhere", processes)
            dtypes.add(load_recipe(name, settings).model.dtype)
        assert dtypes == {"float32", "bfloat16"}


# -- what is compared -------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Change the last byte of a file to another one."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def first_file(folder: Path) -> Path:
    return min(path for path in folder.rglob("*") if path.is_file())


def change_metric(run: RunDirectory) -> None:
    *lines, last = run.metrics.read_text().splitlines()
    record = json.loads(last)
    record["optim/lr"] = record["optim/lr"] * 2
    run.metrics.write_text("\n".join([*lines, json.dumps(record)]) + "\n")


def drop_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def change_counter(run: RunDirectory) -> None:
    """Another counter in the older checkpoint, with a manifest that fits."""
    path = run.checkpoints_dir / "step-000002"
    state = load_checkpoint(path)
    last = run.checkpoints_dir / "step-000003"
    before = {file: file.read_bytes() for file in last.iterdir()}
    save_checkpoint(run.checkpoints_dir, 2, {**state, "step": 7}, keep=2)
    assert {file: file.read_bytes() for file in last.iterdir()} == before


def change_weight(run: RunDirectory) -> None:
    """One element of one tensor in the older checkpoint."""
    state = load_checkpoint(run.checkpoints_dir / "step-000002")

    def first_tensor(node: object) -> torch.Tensor | None:
        if isinstance(node, torch.Tensor):
            return node if node.is_floating_point() and node.numel() else None
        values = node.values() if isinstance(node, dict) else ()
        return next((t for t in map(first_tensor, values) if t is not None), None)

    tensor = first_tensor(state["model"])
    assert tensor is not None
    tensor.view(-1)[0] += 1.0
    save_checkpoint(run.checkpoints_dir, 2, state, keep=2)


CHANGES: dict[str, tuple[str, str, Callable[[RunDirectory], None]]] = {
    "a metric": ("model", "metrics.jsonl", change_metric),
    "the last line of metrics": ("model", "metrics.jsonl", lambda run: drop_line(run.metrics)),
    "a counter of a checkpoint": ("model", "checkpoints", change_counter),
    "a weight of a checkpoint": ("model", "checkpoints", change_weight),
    "a byte of a checkpoint": (
        "model",
        "checkpoints",
        lambda run: flip(run.checkpoints_dir / "step-000002" / "tensors-00001.safetensors"),
    ),
    "a byte of the model": (
        "model",
        "model",
        lambda run: flip(run.model_dir / "model.safetensors"),
    ),
    "a sample": (
        "model",
        "rollouts",
        lambda run: replay_runs.change_row(run, 2, 1, "reward", lambda value: value + 1.0),
    ),
    "an evaluation": ("model", "evals", lambda run: flip(first_file(run.evals_dir))),
    "a made row": ("data", "made", lambda run: drop_line(first_file(run.made_dir))),
    "the data": ("data", "data.jsonl", lambda run: drop_line(run.data)),
    "the report": ("model", "report.html", lambda run: run.report.unlink()),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_in_any_part_is_named(
    harness: Callable[[str], ModuleType],
    whole: dict[str, RunDirectory],
    tmp_path: Path,
    what: str,
) -> None:
    made, part, change = CHANGES[what]
    differences = harness("comparing").differences
    settings = {"holds": HELD[made], "last_step": STEPS[made]}
    copied = copy_of(whole[made], tmp_path)
    assert differences(copied, whole[made], **settings) == []
    change(copied)
    (found,) = differences(copied, whole[made], **settings)
    assert found.startswith(f"{part}: ")


PARTS = [("model", part) for part in sorted({"checkpoints", "report.html", *HELD["model"]})]
PARTS += [("data", part) for part in sorted(HELD["data"])]


@pytest.mark.parametrize(("made", "part"), PARTS)
def test_a_part_that_neither_has_is_named(
    harness: Callable[[str], ModuleType],
    whole: dict[str, RunDirectory],
    tmp_path: Path,
    made: str,
    part: str,
) -> None:
    one, other = (copy_of(whole[made], tmp_path / name) for name in ("one", "other"))
    for run in (one, other):
        path = run.path / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = harness("comparing").differences(one, other, holds=HELD[made], last_step=STEPS[made])
    assert f"{part}: nothing to compare" in found
    assert all(place.startswith(f"{part}: ") for place in found)


def test_metrics_that_both_end_too_soon_are_named(
    harness: Callable[[str], ModuleType], whole: dict[str, RunDirectory]
) -> None:
    run = whole["model"]
    found = harness("comparing").differences(run, run, holds=HELD["model"], last_step=4)
    assert found == ["metrics.jsonl: it ends at step 3, and not at 4"]


def test_every_case_says_what_its_run_holds(harness: Callable[[str], ModuleType]) -> None:
    cases = harness("cases")
    assert cases.CASES.keys() == cases.HOLDS.keys()
    for method, parts in cases.HOLDS.items():
        made = {"made", "data.jsonl"} if method == "preference_sampling" else {"model"}
        evaluates = any("tasks:" in setting for setting in cases.CASES[method])
        samples = method in ("ppo", "grpo", "rlvr", "preference_sampling")
        others = {name for name, it_has in (("evals", evaluates), ("rollouts", samples)) if it_has}
        assert parts == made | others


# -- what was being written -------------------------------------------------------------------


def test_only_a_checkpoint_of_this_life_that_is_half_written_counts(
    harness: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path)
    launch = harness("killing").Launch([], run, tmp_path / "log", processes=1, steps=3)
    earlier = launch.temporaries()
    assert not launch.is_writing(earlier)
    begun = run.checkpoints_dir / ".tmp-begun"

    def begin(name: str, later: int) -> Path:
        folder = run.checkpoints_dir / name
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{")
        at = (run.checkpoints_dir / "step-000002/manifest.json").stat().st_mtime_ns + later
        os.utime(folder / "state.json", ns=(at, at))
        return folder

    for step in (1, 2):
        save_checkpoint(run.checkpoints_dir, step, {"step": step}, keep=2)
    begin(".tmp-leftover", 1000)
    earlier = launch.temporaries()
    assert earlier == {".tmp-leftover"}
    assert not launch.is_writing(earlier)
    # One that is removed is renamed first, and then loses its files in any order.
    removed = run.checkpoints_dir / ".tmp-removed"
    (run.checkpoints_dir / "step-000001").rename(removed)
    old = (removed / "state.json").stat().st_mtime_ns - 10**9
    os.utime(removed / "state.json", ns=(old, old))
    assert not launch.is_writing(earlier)
    (removed / "manifest.json").unlink()
    assert not launch.is_writing(earlier)
    (removed / "state.json").unlink()
    assert not launch.is_writing(earlier)
    begin(".tmp-begun", 1000)
    assert launch.is_writing(earlier)
    (begun / "manifest.json").write_text('{"format": 1, ')
    assert launch.is_writing(earlier)
    (begun / "manifest.json").write_text('{"format": 1}')
    assert not launch.is_writing(earlier)
