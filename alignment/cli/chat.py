"""`align chat`: talk with what a run made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from alignment.cli.common import lazy

Message = dict[str, str]


def chat(
    run: Annotated[str, typer.Argument(help="A run's folder, or a model.", show_default=False)],
) -> None:
    """Talk with a model.

    A line is a turn; /reset starts over; /quit or the end of input ends.
    """
    reply = lazy("alignment.trainers.chat:chat")(run)
    converse(reply, _turns())


def converse(reply: Callable[[list[Message]], str], turns: Iterator[str]) -> None:
    """Answer each turn with all earlier ones in view."""
    messages: list[Message] = []
    for turn in turns:
        if turn == "/quit":
            return
        if turn == "/reset":
            messages = []
            continue
        if not turn:
            continue
        messages.append({"role": "user", "content": turn})
        answer = reply(messages)
        messages.append({"role": "assistant", "content": answer})
        typer.echo(answer)


def _turns() -> Iterator[str]:
    """Lines of standard input, with a prompt where a person types them."""
    while True:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()
