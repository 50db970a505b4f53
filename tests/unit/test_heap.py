"""What is freed stays with the process: page faults counted in processes of their own."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from alignment.modeling import heap
from alignment.modeling.heap import keep_freed_memory

ROOT = Path(__file__).parents[2]
SIZE = 64 * 2**20
PAGES = SIZE // resource.getpagesize()
ROUNDS = 10

glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets options of glibc's")

# Huge pages are off (PR_SET_THP_DISABLE is 41), so that each page of memory is a fault of its own.
START = """
import ctypes, resource
from alignment.modeling.heap import keep_freed_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)

def faults(fill, n_before, rounds):
    for _ in range(n_before):
        fill()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        fill()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""

BYTES = f"""
def fill():
    b"x" * {SIZE}
"""

TENSOR = f"""
import torch
def fill():
    torch.empty({SIZE} // 4).fill_(1)
"""


def printed(code: str, **more: str) -> list[str]:
    """The words that a fresh process prints, whose environment says of malloc only `more`."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", START + code],
        env={**plain, "OMP_NUM_THREADS": "1", **more},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@glibc_only
# What has been freed has room for the next tensor, which torch wants aligned, only where smaller
# holes have grown together.
@pytest.mark.parametrize(("fill", "n_before"), [(BYTES, 2), (TENSOR, 20)], ids=["bytes", "tensor"])
def test_memory_that_is_freed_is_not_fetched_again(fill: str, n_before: int) -> None:
    """Without the call each of ten times 64 MB comes from the kernel; with it, none."""
    without, kept, faults = printed(
        f"{fill}\nprint(faults(fill, 2, {ROUNDS}), keep_freed_memory(), "
        f"faults(fill, {n_before}, {ROUNDS}))"
    )
    assert int(without) >= ROUNDS * PAGES
    assert kept == "True"
    assert int(faults) < PAGES // 100


@glibc_only
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("MALLOC_MMAP_MAX_", "65536"),
        ("MALLOC_MMAP_THRESHOLD_", "131072"),
        ("MALLOC_TOP_PAD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072"),
        ("GLIBC_TUNABLES", "glibc.pthread.rseq=1:glibc.malloc.mmap_max=65536"),
    ],
)
def test_what_the_environment_says_of_malloc_stays(name: str, value: str) -> None:
    kept, faults = printed(
        f"{BYTES}\nprint(keep_freed_memory(), faults(fill, 2, 3))", **{name: value}
    )
    assert kept == "False"
    assert int(faults) >= 3 * PAGES


@glibc_only
@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.pthread.rseq=1")]
)
def test_what_the_environment_says_of_other_things_is_no_objection(name: str, value: str) -> None:
    kept, faults = printed(
        f"{BYTES}\nprint(keep_freed_memory(), faults(fill, 2, 3))", **{name: value}
    )
    assert kept == "True"
    assert int(faults) < PAGES // 100


Library = Callable[[Callable[[int, int], int] | None], list[tuple[int, int]]]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Puts a C library with this `mallopt`, or none, in the place of the real one."""
    for name in [k for k in os.environ if k.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)

    def put(mallopt: Callable[[int, int], int] | None) -> list[tuple[int, int]]:
        calls: list[tuple[int, int]] = []

        def recorded(option: int, value: int) -> int:
            calls.append((option, value))
            return mallopt(option, value)

        found = SimpleNamespace() if mallopt is None else SimpleNamespace(mallopt=recorded)
        monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: found)
        return calls

    return put


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_elsewhere_than_on_linux_nothing_is_set(
    library: Library, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    calls = library(lambda option, value: 1)
    monkeypatch.setattr(sys, "platform", system)
    assert keep_freed_memory() is False
    assert not calls


def test_a_library_without_the_options_keeps_its_ways(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    library(None)  # musl
    assert keep_freed_memory() is False


@pytest.mark.parametrize("refused", [-1, -4])  # M_TRIM_THRESHOLD, M_MMAP_MAX
def test_an_option_that_is_refused_is_told(
    library: Library, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    """`mallopt` returns 0 for an error."""
    monkeypatch.setattr(sys, "platform", "linux")
    calls = library(lambda option, value: int(option != refused))
    assert keep_freed_memory() is False
    assert refused in dict(calls)
    calls = library(lambda option, value: 1)
    assert keep_freed_memory() is True
    assert dict(calls) == {-4: 0, -1: -1}
