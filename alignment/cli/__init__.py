"""The command `align`: one file per command, nothing heavy imported until a command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from alignment import __version__
from alignment.cli import (
    chat,
    check,
    compare,
    doctor,
    eval,
    export,
    lineage,
    models,
    recipes,
    replay,
    report,
    reward,
    train,
    verify,
)
from alignment.cli.common import EXIT_INTERRUPTED, guarded

app = typer.Typer(
    name="align",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_recipes = typer.Typer(no_args_is_help=True, help="The recipes that come with the toolkit.")
_models = typer.Typer(no_args_is_help=True, help="The models that need no hub.")
_reward = typer.Typer(no_args_is_help=True, help="The rewards of a recipe.")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Post-training alignment of language models.

    SFT, reward models, PPO, DPO, GRPO and AI feedback on one core, and the tools around them.
    """


_COMMANDS: tuple[tuple[typer.Typer, str, Callable[..., None]], ...] = (
    (app, "train", train.train),
    (app, "check", check.check),
    (app, "eval", eval.evaluate),
    (app, "compare", compare.compare),
    (app, "verify", verify.verify),
    (app, "replay", replay.replay),
    (app, "report", report.report),
    (app, "lineage", lineage.lineage),
    (app, "chat", chat.chat),
    (app, "export", export.export),
    (app, "doctor", doctor.doctor),
    (_recipes, "list", recipes.list_recipes),
    (_recipes, "show", recipes.show),
    (_recipes, "copy", recipes.copy),
    (_models, "list", models.list_models),
    (_models, "fetch", models.fetch),
    (_reward, "test", reward.test),
)
for _group, _name, _command in _COMMANDS:
    _group.command(_name)(guarded(_command))
app.add_typer(_recipes, name="recipes")
app.add_typer(_models, name="models")
app.add_typer(_reward, name="reward")


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
