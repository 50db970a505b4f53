"""Writing files so that a killed or failed write leaves the old file or the new one, never half."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from alignment.types import AlignmentError

TEMPORARY_PREFIX = ".tmp-"

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or write somewhere else",
    errno.EDQUOT: "the disk quota is used up; free some space or write somewhere else",
    errno.EFBIG: "the file is larger than this file system or limit allows; write somewhere else",
    errno.EACCES: "permission denied; make it writable or choose another folder",
    errno.EPERM: "not permitted; make it writable or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOENT: "it, or a folder on the way to it, does not exist; create it or correct the path",
    errno.ENOTDIR: "something on the way to it is a file, not a folder; correct the path",
    errno.EEXIST: "something else is in the way; move it or choose another name",
    errno.EISDIR: "it is a folder where a file was expected; move it or correct the path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


@contextlib.contextmanager
def readable_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into an `AlignmentError` naming the path and the remedy.

    So too what safetensors raises in its place, which has the system's number in its text alone.
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        cause = OSError(int(number[1]) if number else 0, str(error))
        raise AlignmentError(f"cannot {doing} {path}: {_remedy(cause)}") from error
    except OSError as error:
        raise AlignmentError(f"cannot {doing} {path}: {_remedy(error)}") from error


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Replace the file at `path` by `data` (text as UTF-8) in one step.

    The bytes go to a temporary file in the same folder, are forced to disk, and take the final
    name by a rename. Whatever happens before the rename leaves the earlier file as it was.

    Raises:
        AlignmentError: the folder is missing or read-only, the disk is full, and the like.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{secrets.token_hex(4)}")
    with readable_errors("write", path):
        try:
            write_synced(temporary, data.encode() if isinstance(data, str) else data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Create the file `path`, which must not exist, and force its bytes to disk."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Force a folder's entries to disk, where the system can do that to folders."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):  # folders cannot be opened on Windows
        return
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)


def sync_file(descriptor: int) -> None:
    """Force an open file to disk; devices and folders that cannot do that are left as they are."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def remove_leftovers(directory: Path) -> list[Path]:
    """Remove what writes that were killed left in `directory`; returns what was removed.

    Only for folders with a single writer: another writer's file in progress looks the same.
    """
    leftovers = sorted(directory.glob(f"{TEMPORARY_PREFIX}*"))
    for leftover in leftovers:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return leftovers


def file_hash(path: Path | str) -> str:
    """SHA-256 of a file's bytes, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remedy(error: OSError) -> str:
    reason = error.strerror or repr(error)
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{reason} ({remedy})" if remedy else f"{reason}; check the disk and the path"
