"""What the commands share: imports on first use, exit codes, and plain tables."""

from __future__ import annotations

import functools
import importlib
import os
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer

from alignment.runs.launched import report
from alignment.types import AlignmentError, UserInputError

EXIT_FAILED = 1
EXIT_USER_INPUT = 2
EXIT_INTERRUPTED = 130


def lazy(target: str) -> Any:
    """The object at ``"module:attribute"``, imported now.

    Commands import what they run by name and when they run, so that `align --help` answers at
    once and `align check` never waits for torch.
    """
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with this program's exit codes.

    2 where the user's input is wrong and 1 for any other `AlignmentError` (or its `exit_code`,
    where it has one: 0 for a run that was asked to stop), each with the message alone; 1 with a
    traceback for what nobody expected; 130 when interrupted.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except UserInputError as error:
            fail(_told(error), EXIT_USER_INPUT)
        except AlignmentError as error:
            fail(_told(error), getattr(error, "exit_code", EXIT_FAILED))
        except KeyboardInterrupt as error:
            fail(f"interrupted{_told(error)}", EXIT_INTERRUPTED)
        except BrokenPipeError:
            # Whoever reads the output may stop reading. Any other pipe, such as one to a reward's
            # worker, is an error like every other; typer would swallow it.
            if not _reader_is_gone():
                traceback.print_exc()
            raise typer.Exit(EXIT_FAILED) from None

    return run


def _told(error: BaseException) -> str:
    """An error's message and the notes that were added to it."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def fail(message: str, code: int) -> NoReturn:
    """Say why on stderr, or to the launcher that speaks for all ranks, and leave with `code`."""
    if not report(message, code):
        typer.echo(f"align: {message}", err=True)
    raise typer.Exit(code)


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Left-aligned columns; the last one may be of any width."""
    lines = [list(header), *rows] if header else list(rows)
    if not lines:
        return ""
    widths = [max(len(row[column]) for row in lines) for column in range(len(lines[0]) - 1)]
    return "\n".join(
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]
        ).rstrip()
        for row in lines
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    affinity: Callable[[int], Any] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any more; if so, no later flush will complain."""
    try:
        descriptor = sys.stdout.fileno()
        watch = select.poll()
    except (OSError, AttributeError):  # not a file, or a system without poll
        return False
    watch.register(descriptor, 0)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return gone
