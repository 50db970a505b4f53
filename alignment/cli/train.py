"""`align train`: run a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from alignment.cli.common import lazy
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and its counts, and stop.")
    ] = False,
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
    command = ["align", *sys.argv[1:]]
    if isinstance(config, lazy("alignment.config:PipelineRecipe")):
        lazy("alignment.trainers.pipeline:run_pipeline")(config, resume=resume, command=command)
    else:
        lazy("alignment.trainers.run:train")(config, resume=resume, command=command)
