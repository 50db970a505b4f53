"""Checkpoint folders: exact, whole or not there, damage always found, kills always survived."""

import errno
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from saved_state import save_checkpoint

from alignment.runs import checkpoint, files
from alignment.runs.checkpoint import (
    checkpoint_problem,
    discard_checkpoints_after,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
)
from alignment.runs.directory import RunDirectory
from alignment.runs.metrics import MetricsWriter, read_metrics
from alignment.runs.rewind import rewind
from alignment.runs.snapshot import take_snapshot
from alignment.types import AlignmentError, UserInputError


def state_of(value=1):
    return {
        "weights": {
            "w": torch.full((2, 3), float(value)),
            "b": torch.full((3,), float(value)).bfloat16(),
        },
        "step": value,
        "lr": 0.1 + 0.2,
        "blob": b"\x00\xff",
    }


def names(directory):
    return sorted(entry.name for entry in directory.iterdir())


def damaged(path):
    return checkpoint_problem(path) is not None


def test_values_come_back_bit_for_bit(tmp_path):
    odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])
    state = {
        "fp32": odd,
        "bf16": odd.bfloat16(),
        "int64": torch.tensor([2**63 - 1, -(2**63)]),
        "bool": torch.tensor([True, False]),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "scalar": torch.tensor(0.1),
        "empty": torch.zeros(0, 4),
        "strided": torch.arange(12.0).view(3, 4).t()[::2],
        "floats": [0.1, 1e308, 5e-324, -0.0, math.inf],
        "nan": math.nan,
        "optimizer": {"state": {0: {"step": 3}, 10: {"step": 4}}},
    }
    back = load_checkpoint(save_checkpoint(tmp_path, 10, state, keep=1))
    assert list(back) == list(state)
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            left = tensor.contiguous().reshape(-1).view(torch.uint8)
            assert torch.equal(left, back[name].reshape(-1).view(torch.uint8)), name
            assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
    assert [x.hex() for x in back["floats"]] == [x.hex() for x in state["floats"]]
    assert math.isnan(back["nan"])
    assert back["optimizer"] == state["optimizer"]


def test_tied_and_overlapping_tensors_come_back(tmp_path):
    """Tied embeddings and views of one buffer: each path gets its own values."""
    embedding = torch.randn(4, 3)
    buffer = torch.arange(10.0)
    state = {"embed": embedding, "head": embedding, "a": buffer[:6], "b": buffer[4:]}
    back = load_checkpoint(save_checkpoint(tmp_path, 1, state, keep=1))
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor)


def test_changing_a_loaded_tensor_leaves_the_checkpoint_valid(tmp_path):
    path = save_checkpoint(tmp_path, 1, state_of(), keep=1)
    load_checkpoint(path)["weights"]["w"].add_(1.0)
    assert torch.equal(load_checkpoint(path)["weights"]["w"], torch.ones(2, 3))


def test_many_tensors_go_into_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100)
    state = {f"t{number}": torch.full((8,), float(number)) for number in range(8)}
    state["large"] = torch.zeros(100)
    path = save_checkpoint(tmp_path, 1, state, keep=1)
    assert len(list(path.glob("*.safetensors"))) == 4  # 3 + 3 + 2 tensors, and the large one
    back = load_checkpoint(path)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_the_folder_holds_no_pickle_and_has_its_name(tmp_path):
    path = save_checkpoint(tmp_path / "checkpoints", 10, state_of(), keep=1)
    assert path == tmp_path / "checkpoints" / "step-000010"
    assert names(path) == ["manifest.json", "state.json", "tensors-00001.safetensors"]
    assert names(path.parent) == ["step-000010"]


def test_a_state_without_tensors_works(tmp_path):
    assert load_checkpoint(save_checkpoint(tmp_path, 0, {"a": 1}, keep=1)) == {"a": 1}


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "state.json", "tensors-00001.safetensors", "tensors-00002.safetensors"],
)
class TestDamage:
    """Each file of a checkpoint, each kind of damage: found, named, and passed over."""

    @pytest.fixture
    def pair(self, tmp_path, monkeypatch):
        monkeypatch.setattr(checkpoint, "SHARD_BYTES", 24)  # the size of `w`: two files of tensors
        save_checkpoint(tmp_path, 1, state_of(1), keep=2)
        path = save_checkpoint(tmp_path, 2, state_of(2), keep=2)
        assert len(names(path)) == 4
        return tmp_path, path

    def check(self, pair, name, caplog):
        directory, path = pair
        assert damaged(path)
        with pytest.raises(AlignmentError, match=rf"{path}.*{name}"):
            load_checkpoint(path)
        caplog.clear()
        assert latest_checkpoint(directory) == directory / "step-000001"
        assert str(path) in caplog.text

    def test_deleted(self, pair, name, caplog):
        (pair[1] / name).unlink()
        self.check(pair, name, caplog)

    def test_truncated(self, pair, name, caplog):
        content = (pair[1] / name).read_bytes()
        for length in (0, 1, len(content) // 2, len(content) - 1):
            (pair[1] / name).write_bytes(content[:length])
            self.check(pair, name, caplog)

    def test_lengthened(self, pair, name, caplog):
        with open(pair[1] / name, "ab") as file:
            file.write(b"\n")
        self.check(pair, name, caplog)

    def test_any_byte_flipped(self, pair, name, caplog):
        content = (pair[1] / name).read_bytes()
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 1 << (place % 8)
            (pair[1] / name).write_bytes(changed)
            assert damaged(pair[1]), place
        self.check(pair, name, caplog)

    def test_from_another_checkpoint(self, pair, name, caplog):
        shutil.copy(pair[0] / "step-000001" / name, pair[1] / name)
        self.check(pair, name, caplog)


def test_a_renamed_checkpoint_is_not_another_step(tmp_path):
    path = save_checkpoint(tmp_path, 1, state_of(), keep=1)
    path.rename(tmp_path / "step-000009")
    assert damaged(tmp_path / "step-000009")
    (tmp_path / "step-000009").rename(tmp_path / "mine")
    assert load_checkpoint(tmp_path / "mine")["step"] == 1


def test_a_later_format_is_named(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 99)
        path = save_checkpoint(tmp_path, 1, state_of(), keep=1)
    with pytest.raises(AlignmentError, match="format 99"):
        load_checkpoint(path)


def test_a_run_whose_every_checkpoint_is_damaged_is_not_started_over(tmp_path):
    for step in (1, 2):
        (save_checkpoint(tmp_path, step, state_of(), keep=2) / "state.json").unlink()
    with pytest.raises(AlignmentError, match=r"every checkpoint .*step-000002.*step-000001.*state"):
        latest_checkpoint(tmp_path)
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_nothing_there(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "none") is None
    with pytest.raises(UserInputError, match="no checkpoint"):
        load_checkpoint(tmp_path / "none")


def test_an_unreadable_checkpoint_is_an_error_and_not_passed_over(tmp_path, monkeypatch):
    """A failing disk says nothing about the newest checkpoint; starting over would lose it."""
    save_checkpoint(tmp_path, 1, state_of(), keep=1)

    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "file_hash", fail)
    with pytest.raises(AlignmentError, match="Input/output error"):
        latest_checkpoint(tmp_path)


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, state_of(step), keep=2)
    assert names(tmp_path) == ["step-000003", "step-000004"]
    save_checkpoint(tmp_path, 5, state_of(5), keep=1)
    assert names(tmp_path) == ["step-000005"]


def test_steps_sort_as_numbers(tmp_path):
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, step, state_of(), keep=2)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-1000000"


def test_damaged_ones_do_not_push_out_whole_ones(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, state_of(step), keep=3)
    for step in (2, 3):
        (tmp_path / f"step-00000{step}" / "state.json").unlink()
    save_checkpoint(tmp_path, 4, state_of(4), keep=2)
    assert "step-000001" in names(tmp_path)
    save_checkpoint(tmp_path, 5, state_of(5), keep=2)
    assert names(tmp_path) == ["step-000004", "step-000005"]


def test_the_one_just_written_stays_whatever_stands_there(tmp_path):
    save_checkpoint(tmp_path, 9, state_of(), keep=1)
    path = save_checkpoint(tmp_path, 5, state_of(), keep=1)
    assert path.is_dir()


def test_a_step_saved_again_replaces_itself(tmp_path):
    save_checkpoint(tmp_path, 1, state_of(1), keep=2)
    path = save_checkpoint(tmp_path, 1, state_of(7), keep=2)
    assert load_checkpoint(path)["step"] == 7
    assert names(tmp_path) == ["step-000001"]


@pytest.mark.parametrize(("step", "keep"), [(1, 0), (-1, 1)])
def test_senseless_numbers_are_refused(tmp_path, step, keep):
    with pytest.raises(AlignmentError, match="keep >= 1"):
        save_checkpoint(tmp_path, step, state_of(), keep=keep)


def test_a_state_that_cannot_be_saved_touches_nothing(tmp_path):
    save_checkpoint(tmp_path, 1, state_of(), keep=1)
    with pytest.raises(AlignmentError, match="'hook'"):
        save_checkpoint(tmp_path, 2, {"hook": print}, keep=1)
    assert names(tmp_path) == ["step-000001"]
    assert not damaged(tmp_path / "step-000001")


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, state_of(), keep=1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 3 * 2**20))
    with pytest.raises(AlignmentError, match=r"4\.0 MiB does not fit.*3\.0 MiB are free"):
        save_checkpoint(tmp_path, 2, {"w": torch.zeros(2**20)}, keep=1)
    assert names(tmp_path) == ["step-000001"]


def test_the_room_of_a_checkpoint_that_is_replaced_is_not_free(tmp_path, monkeypatch):
    """The earlier one of the step stays until the new one is whole."""
    state = {"w": torch.zeros(2**20)}
    path = save_checkpoint(tmp_path, 1, state, keep=1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 3 * 2**20))
    with pytest.raises(AlignmentError, match="does not fit"):
        save_checkpoint(tmp_path, 1, state, keep=1)
    assert not damaged(path)


def test_room_is_asked_for_headers_and_names_too(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 4000)
    tensors = {f"a.rather.long.name.of.layer.{n}": torch.zeros(n % 7, 3) for n in range(500)}
    path = save_checkpoint(tmp_path, 1, tensors, keep=1)
    written = sum(file.stat().st_size for file in path.iterdir())
    asked = take_snapshot(tensors).n_bytes
    assert written - (path / "manifest.json").stat().st_size <= asked <= 3 * written


def test_a_disk_that_fills_up_on_the_way_is_a_readable_error(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, state_of(), keep=1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AlignmentError, match=r"step-000002.*disk is full"):
        save_checkpoint(tmp_path, 2, state_of(), keep=1)
    assert names(tmp_path) == ["step-000001"]


def test_a_folder_that_is_a_file_is_a_readable_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AlignmentError, match="cannot create the folder"):
        save_checkpoint(tmp_path / "file", 1, state_of(), keep=1)


def test_an_old_checkpoint_that_cannot_be_removed_does_not_stop_the_run(
    tmp_path, monkeypatch, caplog
):
    save_checkpoint(tmp_path, 1, state_of(), keep=1)

    def fail(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "_remove", fail)
    path = save_checkpoint(tmp_path, 2, state_of(2), keep=1)
    assert not damaged(path)
    assert "step-000001 cannot be removed" in caplog.text


class Killed(BaseException):
    """Stands for SIGKILL: from then on, no call reaches the disk."""


def kill_at(monkeypatch, moment):
    """Let `moment` calls that change the disk go through, and then none at all, ever."""
    calls = 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > moment:
                raise Killed
            return function(*args, **kwargs)

        return call

    for name in ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    monkeypatch.setattr(Path, "mkdir", dying(Path.mkdir))
    monkeypatch.setattr(files, "write_synced", dying(files.write_synced))
    monkeypatch.setattr(checkpoint, "write_synced", dying(checkpoint.write_synced))
    monkeypatch.setattr(shutil, "rmtree", dying(shutil.rmtree))


@pytest.mark.parametrize("step", [1, 2], ids=["the same step again", "a new step"])
def test_a_kill_at_any_moment_leaves_a_valid_checkpoint(tmp_path, monkeypatch, step):
    """Stop the second save after each of its calls in turn; then save once more."""
    for moment in range(100):
        directory = tmp_path / str(moment)
        save_checkpoint(directory, 1, state_of(1), keep=1)
        finished = False
        with monkeypatch.context() as patch:
            kill_at(patch, moment)
            try:
                save_checkpoint(directory, step, state_of(5), keep=1)
                finished = True
            except Killed:
                pass
        path = latest_checkpoint(directory)
        assert path is not None
        found = load_checkpoint(path)["step"]
        assert found in ((5,) if finished else (1, 5))
        with pytest.raises(AlignmentError, match="'hook'"):  # the next save clears up, and fails
            save_checkpoint(directory, 2, {"hook": print}, keep=1)
        assert load_checkpoint(latest_checkpoint(directory))["step"] == found
        save_checkpoint(directory, 3, state_of(3), keep=1)
        assert names(directory) == ["step-000003"]
        if finished:
            assert moment > 8  # the kills did land inside the save
            return
    raise AssertionError("the save was never let through")


def test_a_kill_while_removing_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, state_of(1), keep=1)

    def die_half_way(folder, **kwargs):
        (folder / "state.json").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die_half_way)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, 2, state_of(2), keep=1)
    assert [path.name for _, path in list_checkpoints(tmp_path)] == ["step-000002"]
    assert not damaged(tmp_path / "step-000002")


def test_a_write_that_raises_leaves_nothing_behind(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, state_of(1), keep=2)
    for name in ("fsync", "rename"):
        for step in (1, 2):
            with monkeypatch.context() as patch:

                def interrupted(*args):
                    raise KeyboardInterrupt

                patch.setattr(os, name, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    save_checkpoint(tmp_path, step, state_of(5), keep=2)
            assert names(tmp_path) == ["step-000001"]
            assert load_checkpoint(tmp_path / "step-000001")["step"] == 1


CHILD = """
import sys, torch
from saved_state import save_checkpoint
torch.set_num_threads(1)
step = 0
while True:
    step += 1
    state = {"step": step, "w": torch.full((50000,), float(step))}
    save_checkpoint(sys.argv[1], step, state, keep=2)
    print(step, flush=True)
"""


def test_a_killed_process_leaves_the_last_checkpoint_it_told_of(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        for _ in range(3):
            assert child.stdout.readline()
        time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        told = 3 + len(child.communicate()[0].splitlines())
    path = latest_checkpoint(tmp_path)
    state = load_checkpoint(path)
    assert state["step"] in (told, told + 1)
    assert torch.equal(state["w"], torch.full((50000,), float(state["step"])))
    save_checkpoint(tmp_path, told + 2, {"step": told + 2}, keep=1)
    assert names(tmp_path) == [f"step-{told + 2:06d}"]


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "step-abc").mkdir()
    (tmp_path / "best").mkdir()
    save_checkpoint(tmp_path, 1, state_of(), keep=1)
    assert names(tmp_path) == ["best", "notes.txt", "step-000001", "step-abc"]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1]


def test_discard_removes_later_steps_only(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, state_of(), keep=3)
    (tmp_path / "step-000003" / "state.json").unlink()
    discard_checkpoints_after(tmp_path, 1)
    assert names(tmp_path) == ["step-000001"]


def test_rewind_takes_the_whole_run_back(tmp_path):
    run = RunDirectory.create(tmp_path, "r", recipe_yaml="a: 1\n", info={})
    writer = MetricsWriter(run.metrics)
    for step in (1, 2, 3):
        writer.write(step, {})
        save_checkpoint(run.checkpoints_dir, step, state_of(), keep=3)
    writer.close()
    run.rollouts_dir.mkdir()
    for step in (2, 3):
        (run.rollouts_dir / f"step-00000{step}.parquet").write_text("")
    run.evals_dir.mkdir()
    for name in ("quiz-step-000000", "quiz,seed=0-step-000002", "quiz-step-000003"):
        for form in ("json", "jsonl"):
            (run.evals_dir / f"{name}.{form}").write_text("")
    (run.checkpoints_dir / ".tmp-0123").mkdir()  # what a killed write leaves
    rewind(run, 2)
    assert [name for name in names(run.evals_dir) if name.endswith(".json")] == [
        "quiz,seed=0-step-000002.json",
        "quiz-step-000000.json",
    ]
    assert len(names(run.evals_dir)) == 4
    assert [record["step"] for record in read_metrics(run.metrics)] == [1, 2]
    assert names(run.rollouts_dir) == ["step-000002.parquet"]
    assert names(run.checkpoints_dir) == ["step-000001", "step-000002"]
    rewind(run, 0)
    assert names(run.checkpoints_dir) == names(run.rollouts_dir) == []
    assert read_metrics(run.metrics) == []


def test_the_manifest_gives_plain_sha256_sums(tmp_path):
    """`sha256sum` on the files agrees with the manifest."""
    tool = shutil.which("sha256sum")
    if tool is None:
        pytest.skip("no sha256sum here")
    path = save_checkpoint(tmp_path, 1, state_of(), keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        output = subprocess.run([tool, path / name], capture_output=True, text=True, check=True)
        assert output.stdout.split()[0] == entry["sha256"]
        assert (path / name).stat().st_size == entry["size"]


def test_no_warning_for_whole_checkpoints(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save_checkpoint(tmp_path, 1, state_of(), keep=1)
    latest_checkpoint(tmp_path)
    assert caplog.text == ""
