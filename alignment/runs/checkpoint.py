"""Checkpoints that are whole or not there: `checkpoints/step-000010/`.

    state.json                    structure and small values (`state_tree`)
    tensors-00001.safetensors     the tensors, in files of about `SHARD_BYTES`
    manifest.json                 step, size and sha256 of each file above, and a sum of itself

A checkpoint is written into a temporary folder, every file forced to disk, the manifest last, and
takes its name by a rename. A checkpoint is valid if every byte is as its manifest says, and only
valid ones are loaded.

Saving has two halves: `snapshot.take_snapshot` copies the state, and `write_checkpoint` puts the
copy on disk, which `checkpoint_writer` does while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from alignment.runs.files import (
    TEMPORARY_PREFIX,
    file_hash,
    readable_errors,
    remove_leftovers,
    sync_directory,
    write_synced,
)
from alignment.runs.snapshot import Snapshot
from alignment.runs.state_tree import decode_tree, tensor_bytes
from alignment.types import AlignmentError, UserInputError

logger = logging.getLogger(__name__)

FORMAT = 1
SHARD_BYTES = 2**28  # a file is put together in memory, twice its size for a moment
_SPARE_BYTES = 2**20  # folder entries, and blocks that are not full
_STATE = "state.json"
_MANIFEST = "manifest.json"
_REPLACED = ".replaced"
_NAME = re.compile(rf"step-(?P<step>[0-9]+)({re.escape(_REPLACED)})?")


def write_checkpoint(
    directory: Path | str,
    step: int,
    snapshot: Snapshot,
    *,
    keep: int,
    scores: Mapping[int, float] | None = None,
) -> Path:
    """Write `snapshot` as `directory/step-NNNNNN`, and remove what need not be kept any more.

    Kept are the newest `keep` checkpoints and, of all, the one with the highest score. Damaged
    ones do not count, and the one just written always stays.

    Args:
        keep: at least 1.
        scores: of steps, higher is better. A step without a score, or with NaN, is not the best.

    Raises:
        AlignmentError: the disk has too little room, or a write failed. Earlier checkpoints are
            then untouched.
    """
    if keep < 1 or step < 0:
        raise AlignmentError(f"a checkpoint needs keep >= 1 and step >= 0, not {keep} and {step}")
    directory = Path(directory)
    with readable_errors("create the folder", directory):
        directory.mkdir(parents=True, exist_ok=True)
    clear_up(directory)
    # An earlier checkpoint of this step stays until the new one is whole: its room is not free.
    _check_space(directory, snapshot.n_bytes)
    path = directory / f"step-{step:06d}"
    with readable_errors("write the checkpoint", path):
        temporary = _temporary(directory)
        try:
            temporary.mkdir()
            _write_files(temporary, step, snapshot)
            _put_in_place(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    _retain(directory, path, keep, scores or {})
    return path


def clear_up(directory: Path) -> None:
    """Settle what writers that were killed left in `directory`. Only while nothing writes there."""
    with readable_errors("clear up", directory):
        _finish_replacements(directory)
        remove_leftovers(directory)


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """The state saved at `path`, after its every byte has been checked.

    Raises:
        UserInputError: there is no checkpoint.
        AlignmentError: it is damaged; the message says where.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserInputError(f"there is no checkpoint at {path}; give a step-NNNNNN folder")
    problem = checkpoint_problem(path)
    if problem is not None:
        raise AlignmentError(
            f"the checkpoint {path} is damaged: {problem}; resume from another one (--resume auto "
            "takes the newest that is whole)"
        )
    with readable_errors("read the checkpoint", path):
        document = json.loads((path / _STATE).read_bytes())
        tensors: dict[str, Tensor] = {}
        for name in _read_manifest(path)["files"]:
            if name.endswith(".safetensors"):
                tensors |= load_file(path / name)
    state: dict[str, Any] = decode_tree(document, tensors)
    return state


def latest_checkpoint(
    directory: Path | str, *, warn: Callable[[str], object] = logger.warning
) -> Path | None:
    """The newest valid checkpoint in `directory`; None if no checkpoint was ever saved there.

    Args:
        warn: is told of each damaged one that is passed over, and what is wrong with it.

    Raises:
        AlignmentError: there are checkpoints and all are damaged. No killed write does that, and
            starting over would throw the run away: that is for its owner to decide.
    """
    problems = []
    for _, path in reversed(list_checkpoints(directory)):
        problem = checkpoint_problem(path)
        if problem is None:
            return path
        warn(f"the checkpoint {path} is damaged and passed over: {problem}")
        problems.append(f"{path.name}: {problem}")
    if problems:
        raise AlignmentError(
            f"every checkpoint in {directory} is damaged ({'; '.join(problems)}); delete that "
            "folder to begin the run again, or begin another run"
        )
    return None


def list_checkpoints(directory: Path | str) -> list[tuple[int, Path]]:
    """(step, path) of what has a checkpoint's name, valid or not, oldest first."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    found = []
    for path in directory.glob("step-*"):
        step = _step_of(path)
        if step is not None and path.is_dir():
            found.append((step, not path.name.endswith(_REPLACED), path))
    return [(step, path) for step, _, path in sorted(found)]


def checkpoint_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if every byte is as it was written.

    Raises:
        AlignmentError: it cannot be read, which says nothing about what stands in it.
    """
    with readable_errors("read the checkpoint", path):
        return _problem(path, read_everything=True)


def discard_checkpoints_after(directory: Path | str, step: int) -> list[Path]:
    """Remove the checkpoints of later steps, which a resume from `step` leaves behind."""
    later = [path for at, path in list_checkpoints(directory) if at > step]
    for path in later:
        with readable_errors("remove the checkpoint", path):
            _remove(path)
    return later


def _write_files(folder: Path, step: int, snapshot: Snapshot) -> None:
    write_synced(folder / _STATE, snapshot.document)
    files = {_STATE: _entry(snapshot.document)}
    for number, shard in enumerate(_shards(snapshot.tensors), start=1):
        content = to_safetensors(shard)
        name = f"tensors-{number:05d}.safetensors"
        write_synced(folder / name, content)
        files[name] = _entry(content)
    write_synced(folder / _MANIFEST, _manifest_bytes(step, files))
    sync_directory(folder)


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Tensors in batches of about `SHARD_BYTES`."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor_bytes(tensor) > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor_bytes(tensor)
    if shard:
        yield shard


def _put_in_place(temporary: Path, path: Path) -> None:
    """Give the finished folder its name. An earlier one of that name gives way only then: at
    every moment one of the two stands whole under a name that `list_checkpoints` finds."""
    replaced = path.with_name(path.name + _REPLACED)
    if path.exists():
        os.rename(path, replaced)
    try:
        os.rename(temporary, path)
    except BaseException:
        if replaced.exists():
            os.rename(replaced, path)
        raise
    sync_directory(path.parent)
    if replaced.exists():
        _remove(replaced)


def _finish_replacements(directory: Path) -> None:
    """Settle what a kill inside `_put_in_place` left."""
    for replaced in directory.glob(f"step-*{_REPLACED}"):
        path = replaced.with_name(replaced.name.removesuffix(_REPLACED))
        if path.exists():
            _remove(replaced)
        else:
            os.rename(replaced, path)


def _retain(directory: Path, written: Path, keep: int, scores: Mapping[int, float]) -> None:
    kept = 1
    best = _best(directory, scores)
    for _, path in reversed(list_checkpoints(directory)):
        if path == written:
            continue
        try:
            if kept >= keep and path != best:
                _remove(path)
            elif _problem(path, read_everything=False) is None:
                kept += 1
        except OSError as error:  # the new checkpoint is safe: not worth stopping a run
            logger.warning("the old checkpoint %s cannot be removed: %s", path, error)


def _best(directory: Path, scores: Mapping[int, float]) -> Path | None:
    """The checkpoint with the highest score, the later one of equals; None where none has any."""
    found = [
        (scores[step], step, path)
        for step, path in list_checkpoints(directory)
        if not math.isnan(scores.get(step, math.nan)) and _is_whole(path)
    ]
    return max(found)[2] if found else None


def _is_whole(path: Path) -> bool:
    try:
        return _problem(path, read_everything=False) is None
    except OSError:  # says nothing about what stands in it
        return True


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill half-way leaves nothing that looks like one."""
    condemned = _temporary(path.parent)
    os.rename(path, condemned)
    shutil.rmtree(condemned)


def _temporary(directory: Path) -> Path:
    return directory / f"{TEMPORARY_PREFIX}{secrets.token_hex(6)}"


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed + _SPARE_BYTES:
        raise AlignmentError(
            f"a checkpoint of {_readable(needed)} does not fit into {directory}: "
            f"{_readable(free)} are free; free some space, lower checkpoint.keep, or put the run "
            "on another disk"
        )


def _readable(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _entry(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _manifest_bytes(step: int, files: Mapping[str, Any]) -> bytes:
    """The manifest, closed by the sum of what stands in it: no byte of it can change unseen."""
    body = {"format": FORMAT, "step": step, "files": dict(files)}
    return _sealed(body)


def _sealed(body: Mapping[str, Any]) -> bytes:
    seal = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps({**body, "seal": seal}, indent=1) + "\n").encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_bytes())
    return manifest


def _problem(path: Path, *, read_everything: bool) -> str | None:
    """What is wrong with a checkpoint. Without `read_everything`, sizes stand in for sums."""
    try:
        problem = _manifest_problem(path)
        if problem is not None:
            return problem
        for name, entry in _read_manifest(path)["files"].items():
            if (path / name).stat().st_size != entry["size"]:
                return f"{name} has not the size its manifest gives"
            if read_everything and file_hash(path / name) != entry["sha256"]:
                return f"{name} has not the content its manifest gives"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    return None


def _manifest_problem(path: Path) -> str | None:
    content = (path / _MANIFEST).read_bytes()
    try:
        body = json.loads(content)
        del body["seal"]
    except (ValueError, KeyError, TypeError):
        return f"{_MANIFEST} cannot be read"
    if _sealed(body) != content:
        return f"{_MANIFEST} was changed"
    if body["format"] != FORMAT:
        return f"{_MANIFEST} is of format {body['format']}, and this version reads format {FORMAT}"
    if _step_of(path) not in (None, body["step"]):
        return f"{_MANIFEST} is of step {body['step']}, which its name does not say"
    return None


def _step_of(path: Path) -> int | None:
    """The step a checkpoint's name gives; None for a copy under a name of the user's own."""
    match = _NAME.fullmatch(path.name)
    return int(match["step"]) if match else None
