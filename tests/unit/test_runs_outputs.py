"""What a run made: hashes by hand, files that are not read again, and records of older versions."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from alignment.runs import outputs
from alignment.runs.outputs import (
    Contents,
    Encoding,
    FileStamp,
    contents,
    output_hash,
    read_finished,
    write_finished,
)
from alignment.types import AlignmentError


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with what a run made."""
    (tmp_path / "model" / "adapter").mkdir(parents=True)
    (tmp_path / "model" / "weights").write_bytes(b"abc")
    (tmp_path / "model" / "adapter" / "weights").write_bytes(b"d")
    (tmp_path / "data.jsonl").write_bytes(b'{"a": 1}\n')
    return tmp_path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read to be hashed."""
    names: list[str] = []
    original = outputs.file_hash

    def counted(path: Path) -> str:
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(outputs, "file_hash", counted)
    return names


def change(path: Path, data: bytes) -> None:
    """Change a file as time passes: its time of last change differs."""
    path.write_bytes(data)
    later = path.stat().st_mtime_ns + 5_000_000_000
    os.utime(path, ns=(later, later))


def test_a_files_hash_is_the_sha256_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert contents(tmp_path / "a").hash == known


def test_a_folders_hash_is_that_of_its_files_names_and_hashes(run: Path) -> None:
    lines = f"adapter/weights {sha(b'd')}\nweights {sha(b'abc')}\n"
    found = contents(run / "model")
    assert found.hash == sha(lines.encode())
    assert {name: stamp.size for name, stamp in found.files.items()} == {
        "adapter/weights": 1,
        "weights": 3,
    }


@pytest.mark.parametrize("what", ["content", "name", "added", "removed"])
def test_whatever_changes_in_a_folder_changes_its_hash(run: Path, what: str) -> None:
    before = contents(run / "model").hash
    weights = run / "model" / "weights"
    if what == "content":
        weights.write_bytes(b"abd")
    elif what == "name":
        weights.rename(run / "model" / "heavier")
    elif what == "added":
        (run / "model" / "chat_template.jinja").write_bytes(b"")
    else:
        weights.unlink()
    assert contents(run / "model").hash != before


def test_hidden_files_and_times_do_not_count(run: Path) -> None:
    before = contents(run / "model").hash
    (run / "model" / ".DS_Store").write_bytes(b"x")
    (run / "model" / ".cache").mkdir()
    (run / "model" / ".cache" / "file").write_bytes(b"x")
    change(run / "model" / "weights", b"abc")
    assert contents(run / "model").hash == before


def test_a_file_of_the_recorded_size_and_time_is_not_read_again(
    run: Path, reads: list[str]
) -> None:
    first = contents(run / "model")
    assert sorted(reads) == ["weights", "weights"]
    reads.clear()
    assert contents(run / "model", first.files) == first
    assert reads == []
    change(run / "model" / "weights", b"abd")
    again = contents(run / "model", first.files)
    assert reads == ["weights"]
    assert again.hash == contents(run / "model").hash != first.hash


def test_a_file_of_another_size_is_read_again_whatever_its_time(run: Path) -> None:
    weights = run / "model" / "weights"
    first = contents(run / "model")
    time = weights.stat().st_mtime_ns
    weights.write_bytes(b"longer")
    os.utime(weights, ns=(time, time))
    assert contents(run / "model", first.files).hash == contents(run / "model").hash != first.hash


def test_what_is_recorded_at_the_end_reads_back(run: Path) -> None:
    encoding = Encoding("t" * 64, None, 260)
    write_finished(run, steps=7, encoding=encoding)
    finished = read_finished(run)
    assert finished is not None
    assert (finished.steps, finished.encoding, finished.compared) == (7, encoding, None)
    assert finished.outputs["model"] == contents(run / "model")
    status = (run / "data.jsonl").stat()
    stamp = FileStamp(sha(b'{"a": 1}\n'), 9, status.st_mtime_ns)
    assert finished.outputs["data"] == Contents(stamp.hash, {"data.jsonl": stamp})
    assert finished.time is not None
    assert json.loads((run / "finished.json").read_text())["steps"] == 7


def test_a_run_records_only_what_it_made(tmp_path: Path) -> None:
    write_finished(tmp_path, compared={"base": None})
    finished = read_finished(tmp_path)
    assert finished is not None
    assert (finished.outputs, finished.compared) == ({}, {"base": None})


@pytest.mark.parametrize("text", ["{}\n", '{"steps": 60}\n'])
def test_the_record_of_an_older_version_is_read(run: Path, text: str) -> None:
    (run / "finished.json").write_text(text)
    finished = read_finished(run)
    assert finished is not None
    assert (finished.encoding, finished.outputs, finished.compared) == (None, {}, None)
    assert output_hash(run, "model") == contents(run / "model").hash


@pytest.mark.parametrize("text", ["", "[1]", '{"outputs": {"model": {}}}', '{"encoding": 3}'])
def test_a_damaged_record_says_what_to_do(run: Path, text: str) -> None:
    assert read_finished(run) is None
    (run / "finished.json").write_text(text)
    with pytest.raises(AlignmentError, match=r"finished\.json is damaged .*delete that file"):
        read_finished(run)


def test_the_hash_of_an_output_is_of_what_is_there_now(run: Path, reads: list[str]) -> None:
    write_finished(run, steps=1)
    reads.clear()
    assert output_hash(run, "model") == contents(run / "model").hash
    assert output_hash(run, "data") == sha(b'{"a": 1}\n')
    reads.clear()
    output_hash(run, "model")
    assert reads == []
    change(run / "data.jsonl", b'{"a": 2}\n')
    assert output_hash(run, "data") == sha(b'{"a": 2}\n')
    (run / "data.jsonl").unlink()
    assert output_hash(run, "data") is None
    assert output_hash(run, "run") == sha((run / "finished.json").read_bytes())
    (run / "finished.json").unlink()
    assert output_hash(run, "run") is None
    assert output_hash(run, "model/adapter/weights") == sha(b"d")
    assert output_hash(run, "gone.txt") is None


def test_what_cannot_be_read_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(outputs, "file_hash", fails)
    with pytest.raises(AlignmentError, match=r"cannot read .*model: Permission denied"):
        contents(run / "model")
