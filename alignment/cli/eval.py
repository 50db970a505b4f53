"""`align eval`: evaluate a run or a model on tasks."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from alignment import registry
from alignment.cli.common import lazy
from alignment.types import UserInputError


def evaluate(
    target: Annotated[str, typer.Argument(help="A run's folder, or a model.", show_default=False)],
    tasks: Annotated[
        list[str],
        typer.Option("--task", help="Name of a task; may be given again.", show_default=False),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Option of the tasks; may be given again."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Short for --set samples=N.", show_default=False)
    ] = None,
) -> None:
    """Evaluate a run or a model."""
    for task in tasks:
        registry.find("task", task)
    options: dict[str, Any] = {}
    parse_override = lazy("alignment.config.overrides:parse_override")
    for setting in settings or ():
        key, value = parse_override(setting)
        options[key] = value
    if samples is not None:
        if "samples" in options:
            raise UserInputError("--samples and --set samples=... were both given; keep one")
        options["samples"] = samples
    lazy("alignment.trainers.evaluation:evaluate_command")(target, tasks, options)
