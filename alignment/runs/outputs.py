"""What a run made, and the hashes of it: `finished.json`, the last file that a run writes.

    {"time": "2026-01-31T12:00:00+00:00", "steps": 60,
     "encoding": {"tokenizer": SHA-256, "template": SHA-256, "vocab_size": 49152},
     "outputs": {"model": {"hash": SHA-256, "files": {
                     "model.safetensors": {"hash": SHA-256, "size": 269060552, "mtime_ns": ...}}},
                 "data": {...}}}

What went into a run is in its `run.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from alignment.runs.directory import RunDirectory
from alignment.runs.events import utc_now
from alignment.runs.files import file_hash, readable_errors, write_atomic
from alignment.types import AlignmentError

FINISHED = "finished.json"
"""Its presence says that a run is complete."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a run turns conversations into tokens.

    tokenizer, template: sha256 of the tokenizer and of its chat template; None is not known.
    vocab_size:          number of tokens, for messages; None is not known.
    """

    tokenizer: str | None
    template: str | None
    vocab_size: int | None = None


@dataclass(frozen=True, slots=True)
class FileStamp:
    """A file's SHA-256, and its size and time of last change when that was computed."""

    hash: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Contents:
    """The hash of a file or a folder, and the stamps of the files it was computed from."""

    hash: str
    files: Mapping[str, FileStamp]


@dataclass(frozen=True, slots=True)
class Finished:
    """What `finished.json` holds. Runs of an older version noted their steps and no more.

    compared: of a pipeline, hashes of what its comparison rests on, by what it is; empty where it
        has none. Earlier versions noted the hash of each stage's model, by the stage's name.
    """

    time: str | None = None
    steps: int | None = None
    encoding: Encoding | None = None
    outputs: Mapping[str, Contents] = field(default_factory=dict)
    compared: Mapping[str, str | None] | None = None


_NOTHING_KNOWN: Mapping[str, FileStamp] = MappingProxyType({})


def output_paths(run: Path) -> dict[str, Path]:
    """Where a run puts what other runs may start from: the weights, and the data set it made."""
    directory = RunDirectory(run)
    return {"model": directory.model_dir, "data": directory.data}


def contents(path: Path, known: Mapping[str, FileStamp] = _NOTHING_KNOWN) -> Contents:
    """Hash a file or a folder.

    Of a file: the SHA-256 of its bytes. Of a folder: the SHA-256 of one line `NAME HASH` for each
    file in it or below, by name; hidden files do not count. Names are relative to the folder.

    Args:
        known: stamps from an earlier time. A file whose size and time of last change are still
            those of its stamp is taken to be the same and is not read again, so that a model of
            500 MB costs nothing to look at. Whoever changes a file and puts both back deceives
            this.

    Raises:
        AlignmentError: a file cannot be read.
    """
    with readable_errors("read", path):
        if path.is_file():
            stamp = _stamp(path, known.get(path.name))
            return Contents(stamp.hash, {path.name: stamp})
        files = {name: _stamp(path / name, known.get(name)) for name in sorted(_visible(path))}
    lines = "".join(f"{name} {stamp.hash}\n" for name, stamp in files.items())
    return Contents(hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest(), files)


def write_finished(
    run: Path,
    *,
    steps: int | None = None,
    encoding: Encoding | None = None,
    compared: Mapping[str, str | None] | None = None,
) -> None:
    """Say that the run is complete, and with what: every output that is in its folder is hashed.

    Raises:
        AlignmentError: an output cannot be read, or the file cannot be written.
    """
    made = {out: contents(path) for out, path in output_paths(run).items() if path.exists()}
    record = {
        "time": utc_now(),
        "steps": steps,
        "encoding": None if encoding is None else asdict(encoding),
        "outputs": {output: asdict(what) for output, what in made.items()},
        "compared": None if compared is None else dict(compared),
    }
    text = json.dumps({key: value for key, value in record.items() if value is not None}, indent=2)
    write_atomic(run / FINISHED, text + "\n")


def read_finished(run: Path) -> Finished | None:
    """What the run recorded at its end; None if it has not come to its end.

    Raises:
        AlignmentError: the file is damaged.
    """
    path = run / FINISHED
    if not path.is_file():
        return None
    with readable_errors("read", path):
        text = path.read_bytes()
    try:
        record = json.loads(text)
        encoding = record.get("encoding")
        return Finished(
            time=record.get("time"),
            steps=record.get("steps"),
            encoding=None if encoding is None else Encoding(**encoding),
            outputs={name: _contents(made) for name, made in record.get("outputs", {}).items()},
            compared=record.get("compared"),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AlignmentError(
            f"{path} is damaged ({error!r}); delete that file and give the run's command again, to "
            "finish the run from its last checkpoint"
        ) from error


def output_hash(
    run: Path, output: str, known: Mapping[str, FileStamp] = _NOTHING_KNOWN
) -> str | None:
    """The hash of what is there now of a run's output, None if there is nothing.

    Args:
        output: "model", "data", the path of anything else in the run's folder relative to that, or
            "run" for the whole of a finished run: the hash of its `finished.json`, which is written
            once.
        known: stamps as of `contents`, of an output that the run's `finished.json` has none of.

    Raises:
        AlignmentError: it cannot be read.
    """
    found = output_contents(run, output, known)
    return None if found is None else found.hash


def output_contents(
    run: Path, output: str, known: Mapping[str, FileStamp] = _NOTHING_KNOWN
) -> Contents | None:
    """As `output_hash`, with the stamps of the files."""
    path = {**output_paths(run), "run": run / FINISHED}.get(output, run / output)
    if not path.exists():
        return None
    finished = read_finished(run)
    made = finished.outputs.get(output) if finished is not None else None
    return contents(path, known if made is None else made.files)


def short_hash(value: str | None) -> str:
    """The first eight digits, for people."""
    return "unknown" if value is None else value[:8]


def _stamp(path: Path, known: FileStamp | None) -> FileStamp:
    status = path.stat()  # before the bytes: a change meanwhile then shows
    if known is not None and (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns):
        return known
    return FileStamp(file_hash(path), status.st_size, status.st_mtime_ns)


def _visible(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix()


def _contents(record: Mapping[str, Any]) -> Contents:
    files = {name: FileStamp(**stamp) for name, stamp in record["files"].items()}
    return Contents(record["hash"], files)
