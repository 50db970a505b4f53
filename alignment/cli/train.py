"""`align train`: run a recipe."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from alignment.cli.common import lazy
from alignment.runs.launched import LAUNCHER, launch_options
from alignment.types import UserInputError

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY.PATH=VALUE",
        help="Values to set in the recipe, such as optim.lr=1e-5 or rewards.0.weight=2.",
        show_default=False,
    ),
]
RecipeName = Annotated[
    str,
    typer.Argument(help="A recipe file, or the name of a shipped one.", show_default=False),
]


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|DIR",
            help="Go on with the run of this name, refuse to, or go on from a checkpoint folder.",
        ),
    ] = "auto",
    rollouts_from: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Train on the completions and rewards that this run recorded; sample nothing.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and its counts, and stop.")
    ] = False,
    accelerate: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Start several processes: ddp, fsdp2, zero2, zero3, or a file of accelerate's.",
            show_default="ddp, with --processes",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Processes to start; on GPUs one for each.", show_default=False
        ),
    ] = None,
) -> None:
    """Run a recipe, or all stages of a pipeline recipe."""
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise UserInputError(
            f"--resume {resume!r}: there is no such folder; give auto, never or a checkpoint folder"
        )
    config = lazy("alignment.config:load_recipe")(recipe, overrides or ())
    if dry_run:
        counts = lazy("alignment.config:describe_counts")(config)
        typer.echo("\n".join(f"# {line}" for line in counts))
        typer.echo(lazy("alignment.config:dump_recipe")(config), nl=False)
        return
    if accelerate is not None or processes is not None:
        plan = lazy("alignment.cli.launch:plan_launch")(accelerate, processes)
        run = Path(config.run.dir) / config.run.name
        lazy("alignment.cli.launch:launch")(plan, own_arguments(sys.argv[1:]), run)
        return
    if LAUNCHER in os.environ and os.environ.get("RANK", "0") != "0":
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # rank 0 shows the progress
    command = ["align", *sys.argv[1:], *shlex.split(launch_options())]
    if isinstance(config, lazy("alignment.config:PipelineRecipe")):
        if rollouts_from is not None:
            raise UserInputError("--rollouts-from goes with the recipe of one run, not a pipeline")
        lazy("alignment.trainers.pipeline:run_pipeline")(config, resume=resume, command=command)
    else:
        lazy("alignment.trainers.run:train")(
            config, resume=resume, command=command, rollouts_from=rollouts_from
        )


def own_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments of `align` without those that start processes: what each of them is given."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if name not in ("--accelerate", "--processes"):
            kept.append(argument)
        elif not equals:
            next(rest, None)
    return kept
