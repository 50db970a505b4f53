"""The run folder: whole or not there, never overwritten, readable errors."""

import errno
import json
import os

import pytest

from alignment.runs import files
from alignment.runs.directory import RunDirectory
from alignment.runs.files import remove_leftovers, write_atomic
from alignment.types import AlignmentError, UserInputError

RECIPE = "run: {name: first, seed: 0}\n"
INFO = {"seed": 0, "command": ["align", "train"]}


def names(directory):
    return sorted(entry.name for entry in directory.iterdir())


def fail_with(code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def test_create_writes_recipe_and_info_and_nothing_else(tmp_path):
    run = RunDirectory.create(tmp_path / "runs", "first", recipe_yaml=RECIPE, info=INFO)
    assert names(tmp_path / "runs") == ["first"]
    assert names(run.path) == ["recipe.yaml", "run.json"]
    assert run.recipe.read_text() == RECIPE
    assert json.loads(run.info.read_text()) == INFO == run.read_info()


def test_paths_are_those_of_the_design(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.metrics == tmp_path / "metrics.jsonl"
    assert run.events == tmp_path / "events.jsonl"
    assert run.rollouts_dir == tmp_path / "rollouts"
    assert run.checkpoints_dir == tmp_path / "checkpoints"
    assert run.model_dir == tmp_path / "model"
    assert run.evals_dir == tmp_path / "evals"
    assert run.report == tmp_path / "report.html"


def test_an_existing_name_is_refused_with_three_remedies_and_left_alone(tmp_path):
    run = RunDirectory.create(tmp_path, "first", recipe_yaml=RECIPE, info=INFO)
    with pytest.raises(UserInputError) as caught:
        RunDirectory.create(tmp_path, "first", recipe_yaml="other: 1\n", info={})
    for remedy in ("run.name", "--resume auto", "delete"):
        assert remedy in str(caught.value)
    assert run.recipe.read_text() == RECIPE
    assert names(tmp_path) == ["first"]


def test_a_name_taken_while_creating_is_refused(tmp_path, monkeypatch):
    """Another process makes the folder after the check and before the rename."""
    rename = os.rename

    def other_was_first(source, target):
        os.mkdir(target)
        (target / "metrics.jsonl").write_text("")
        rename(source, target)

    monkeypatch.setattr(os, "rename", other_was_first)
    with pytest.raises(UserInputError, match="exists already"):
        RunDirectory.create(tmp_path, "first", recipe_yaml=RECIPE, info=INFO)
    assert names(tmp_path) == ["first"]
    assert names(tmp_path / "first") == ["metrics.jsonl"]


def test_a_file_of_that_name_is_refused(tmp_path):
    (tmp_path / "first").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UserInputError, match="exists already"):
            RunDirectory.create(tmp_path, "first", recipe_yaml="", info={}, resume=resume)
    assert (tmp_path / "first").read_text() == "mine"


def test_resume_appends_to_the_info_and_keeps_the_old_recipe(tmp_path):
    RunDirectory.create(tmp_path, "first", recipe_yaml=RECIPE, info=INFO, resume=True)
    again = {"seed": 0, "command": ["align", "train", "--resume", "auto"]}
    run = RunDirectory.create(tmp_path, "first", recipe_yaml=RECIPE, info=again, resume=True)
    assert run.read_info() == INFO | {"resumes": [again]}
    assert names(run.path) == ["recipe.yaml", "run.json"]
    run = RunDirectory.create(tmp_path, "first", recipe_yaml="new: 1\n", info=again, resume=True)
    assert run.read_info()["resumes"] == [again, again]
    assert run.recipe.read_text() == "new: 1\n"
    assert (run.path / "recipe-1.yaml").read_text() == RECIPE


@pytest.mark.parametrize("name", ["", " ", "a/b", "..", ".hidden", "a\\b", "a\nb", "a\0b", "/abs"])
def test_names_that_are_no_folder_name_are_refused(tmp_path, name):
    with pytest.raises(UserInputError, match=r"run\.name"):
        RunDirectory.create(tmp_path / "runs", name, recipe_yaml=RECIPE, info=INFO)
    assert not (tmp_path / "runs").exists()


def test_open_names_the_nearest_run(tmp_path):
    RunDirectory.create(tmp_path, "arithmetic", recipe_yaml=RECIPE, info=INFO)
    assert RunDirectory.open(tmp_path / "arithmetic").name == "arithmetic"
    with pytest.raises(UserInputError, match=r"did you mean .*arithmetic"):
        RunDirectory.open(tmp_path / "arithmetik")
    with pytest.raises(UserInputError, match=r"no recipe\.yaml and no run\.json"):
        RunDirectory.open(tmp_path)
    with pytest.raises(UserInputError, match="there is no run"):
        RunDirectory.open(tmp_path / "no" / "where")


def test_a_damaged_info_is_named(tmp_path):
    run = RunDirectory.create(tmp_path, "first", recipe_yaml=RECIPE, info=INFO)
    run.info.write_text('{"seed": ')
    with pytest.raises(AlignmentError, match=r"run\.json is damaged"):
        run.read_info()


def test_a_root_below_a_file_is_a_readable_error(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(AlignmentError, match=str(root)):
            RunDirectory.create(root, "first", recipe_yaml=RECIPE, info=INFO)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission")],
)
def test_a_failed_create_leaves_nothing_and_names_the_remedy(tmp_path, monkeypatch, code, remedy):
    monkeypatch.setattr(os, "fsync", fail_with(code))
    with pytest.raises(AlignmentError, match=remedy):
        RunDirectory.create(tmp_path, "first", recipe_yaml=RECIPE, info=INFO)
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_root_is_a_readable_error(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(AlignmentError, match="permission denied"):
            RunDirectory.create(tmp_path, "first", recipe_yaml=RECIPE, info=INFO)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch, call):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    monkeypatch.setattr(os, call, fail_with(errno.ENOSPC))
    with pytest.raises(AlignmentError, match=r"cannot write .*a\.txt.*disk is full"):
        write_atomic(path, "new")
    assert names(tmp_path) == ["a.txt"]
    assert path.read_text() == "old"


def test_write_atomic_takes_text_and_bytes_and_keeps_the_usual_permissions(tmp_path):
    write_atomic(tmp_path / "a", "é\n")
    write_atomic(tmp_path / "b", b"\xff\r\n")
    (tmp_path / "c").write_text("")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa9\n"
    assert (tmp_path / "b").read_bytes() == b"\xff\r\n"
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "c").stat().st_mode


def test_write_atomic_names_a_missing_folder(tmp_path):
    with pytest.raises(AlignmentError, match="does not exist"):
        write_atomic(tmp_path / "no" / "a", "text")


def test_folders_that_cannot_be_synced_are_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail_with(errno.EINVAL))
    files.sync_directory(tmp_path)


def test_leftovers_are_removed_and_only_they(tmp_path):
    (tmp_path / ".tmp-a").write_text("")
    (tmp_path / ".tmp-b").mkdir()
    (tmp_path / ".tmp-b" / "inside").write_text("")
    (tmp_path / "keep.tmp").write_text("")
    assert [path.name for path in remove_leftovers(tmp_path)] == [".tmp-a", ".tmp-b"]
    assert names(tmp_path) == ["keep.tmp"]


def test_what_a_killed_write_left_is_gone_when_the_run_is_taken_up(tmp_path):
    run = RunDirectory.create(tmp_path, "first", recipe_yaml=RECIPE, info=INFO)
    run.evals_dir.mkdir(exist_ok=True)
    for folder in (run.path, run.evals_dir):
        (folder / ".tmp-held_out_loss-step-000000.jsonl-d31d2a09").touch()
    (run.evals_dir / "held_out_loss-step-000000.jsonl").touch()
    RunDirectory.create(tmp_path, "first", recipe_yaml=RECIPE, info=INFO, resume=True)
    assert not list(run.path.rglob(".tmp-*"))
    assert names(run.evals_dir) == ["held_out_loss-step-000000.jsonl"]
