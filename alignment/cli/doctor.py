"""`align doctor`: what there is to run on, and what would go wrong."""

from __future__ import annotations

import importlib
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import typer

from alignment import __version__, registry
from alignment.cli.common import EXIT_FAILED, lazy, table, usable_cores
from alignment.types import UserInputError

_DISTRIBUTION = "alignment-toolkit"
_SHOWN_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "trl", "vllm")
_LOW_MEMORY_GB = 2.0
_LOW_DISK_GB = 2.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination; with a remedy, it is a problem."""

    topic: str
    text: str
    remedy: str | None = None


def doctor() -> None:
    """Examine the installation and the machine.

    Exit code 1 if a problem was found.
    """
    findings = [finding for examine in EXAMINATIONS for finding in examine()]
    typer.echo(table([(finding.topic, finding.text) for finding in findings]))
    problems = [finding for finding in findings if finding.remedy is not None]
    typer.echo("")
    for finding in problems:
        typer.echo(f"problem: {finding.topic}: {finding.text}\n  remedy: {finding.remedy}")
    if problems:
        raise typer.Exit(EXIT_FAILED)
    typer.echo("no problems found")


def versions() -> Iterator[Finding]:
    """Installed packages, and those too old or missing."""
    yield Finding("alignment", __version__)
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    for name in _SHOWN_PACKAGES:
        yield Finding(name, _version(name) or "not installed (optional)")
    for text in metadata.requires(_DISTRIBUTION) or ():
        requirement = lazy("packaging.requirements:Requirement")(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found = f"found {version}" if version else "it is missing"
            yield Finding(
                "packages", f"{requirement} is needed, {found}", f"pip install '{requirement}'"
            )


def compute() -> Iterator[Finding]:
    """Devices, threads, and what a number format is worth here."""
    torch = importlib.import_module("torch")
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda"
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Finding(
                "device",
                f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB",
            )
    threads, cores = torch.get_num_threads(), usable_cores()
    yield Finding("device", f"cpu, {cores} usable cores, {threads} torch threads")
    if threads > cores:
        yield Finding(
            "threads",
            f"torch runs {threads} threads on {cores} usable cores, which is much slower",
            f"set OMP_NUM_THREADS={cores}",
        )
    speed = {name: _matmul_rate(torch, name, device) for name in ("float32", "bfloat16")}
    ratio = speed["bfloat16"] / speed["float32"]
    advice = "bfloat16" if ratio > 1.0 else "float32"
    yield Finding(
        "speed", f"bfloat16 is {ratio:.1f}x float32 on {device}; use model.dtype: {advice}"
    )


def resources() -> Iterator[Finding]:
    """Free memory and disk."""
    memory = lazy("psutil:virtual_memory")().available / 2**30
    yield Finding(
        "memory",
        f"{memory:.1f} GiB available",
        "close other programs, or use a smaller model" if memory < _LOW_MEMORY_GB else None,
    )
    cache = lazy("alignment.modeling.catalog:cache_directory")()
    for what, folder in (("this folder", Path.cwd()), ("the model cache", cache)):
        free = shutil.disk_usage(_existing(folder)).free / 2**30
        yield Finding(
            "disk",
            f"{free:.1f} GiB free in {what} ({folder})",
            "free some space, or choose another disk" if free < _LOW_DISK_GB else None,
        )


def models() -> Iterator[Finding]:
    """The catalogue, and which of its models are here."""
    cached = lazy("alignment.modeling.catalog:cached")
    for entry in lazy("alignment.modeling.catalog:catalog")():
        here = cached(entry.name)
        state = str(here) if here else f"not fetched (align models fetch {entry.name})"
        yield Finding("model", f"{entry.name}: {state}")


def plugins() -> Iterator[Finding]:
    """Everything registered, by kind; what cannot be imported is a problem."""
    for kind in get_args(registry.Kind):
        names = registry.names(kind)
        yield Finding(kind, ", ".join(names) or "none")
        for name in names:
            try:
                registry.get(kind, name)
            except UserInputError as error:
                yield Finding(
                    kind, f"{name}: {error}", "update, rename or uninstall the package it is from"
                )


EXAMINATIONS: tuple[Callable[[], Iterator[Finding]], ...] = (
    versions,
    compute,
    resources,
    models,
    plugins,
)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _matmul_rate(torch: Any, dtype: str, device: str, size: int = 768, repeats: int = 8) -> float:
    """Multiplications per second of two square matrices, the best of a few tries."""
    matrix = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - start)
    return 1.0 / best


def _existing(folder: Path) -> Path:
    """The nearest folder that exists: the cache may not have been made yet."""
    return next(path for path in (folder, *folder.parents) if path.exists())
