"""The command `align`: one file per command, nothing heavy imported until a command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from alignment import __version__
from alignment.cli.chat import chat
from alignment.cli.check import check
from alignment.cli.common import EXIT_INTERRUPTED, guarded
from alignment.cli.doctor import doctor
from alignment.cli.eval import evaluate
from alignment.cli.models import models_fetch, models_list
from alignment.cli.recipes import recipes_copy, recipes_list, recipes_show
from alignment.cli.report import report
from alignment.cli.train import train
from alignment.cli.verify import verify

app = typer.Typer(
    name="align",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_recipes = typer.Typer(no_args_is_help=True, help="The recipes that come with the toolkit.")
_models = typer.Typer(no_args_is_help=True, help="The models that need no hub.")


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Post-training alignment of language models: SFT, GRPO, RLVR and the tools around them."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


_COMMANDS: tuple[tuple[typer.Typer, str, Callable[..., None]], ...] = (
    (app, "train", train),
    (app, "check", check),
    (app, "eval", evaluate),
    (app, "verify", verify),
    (app, "report", report),
    (app, "chat", chat),
    (app, "doctor", doctor),
    (_recipes, "list", recipes_list),
    (_recipes, "show", recipes_show),
    (_recipes, "copy", recipes_copy),
    (_models, "list", models_list),
    (_models, "fetch", models_fetch),
)
for _group, _name, _command in _COMMANDS:
    _group.command(_name)(guarded(_command))
app.add_typer(_recipes, name="recipes")
app.add_typer(_models, name="models")


def main() -> None:
    """Run `align`. Exit code 0: done, 2: the user's input is wrong, 1: anything else."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        # As with `python -m`: a recipe may name a reward of the user's own, "my_rewards:score".
        sys.path.append(here)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
