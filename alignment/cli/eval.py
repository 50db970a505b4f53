"""`align eval`: evaluate a run or a model on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from alignment.cli.common import lazy, table
from alignment.types import UserInputError


def evaluate(
    target: Annotated[str, typer.Argument(help="A run's folder, or a model.", show_default=False)],
    tasks: Annotated[
        list[str],
        typer.Option("--task", help="Name of a task; may be given again.", show_default=False),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe with the data, rewards and sampling; by default the run's own.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Option of the tasks; may be given again."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Short for --set samples=N.", show_default=False)
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Evaluate the model that the run started from.")
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Run or model to compare with, in tasks that do; by default the model that the "
            "run started from.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Save there; by default in the run.", show_default=False
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a saved evaluation of the same name.")
    ] = False,
) -> None:
    """Evaluate a run or a model.

    Results are saved in the run's folder, where `align compare` and `align report` find them. Those
    of a model are saved where `--out` says, to be compared and reported as if it were a run.
    """
    given = [*(settings or ()), *([f"samples={samples}"] if samples is not None else [])]
    configs = [lazy("alignment.config:load_task")(task, given) for task in tasks]
    data_from = None
    if recipe is not None:
        data_from = lazy("alignment.config:load_recipe")(recipe)
        if not isinstance(data_from, lazy("alignment.config:Recipe")):
            raise UserInputError(f"--recipe {recipe}: a pipeline; name the recipe of one run")
    evaluated = lazy("alignment.trainers.evaluate:evaluate")(
        target,
        configs,
        data_from=data_from,
        base=base,
        reference=reference,
        seed=seed,
        out=out,
        overwrite=overwrite,
    )
    results = evaluated.results.items()
    typer.echo(table([row for name, result in results for row in _rows(name, result)]))
    place = evaluated.folder
    typer.echo("not saved: no --out FOLDER" if place is None else f"saved in {place}")


def _rows(task: str, result: Any) -> list[tuple[str, str, str, str]]:
    """Metrics of one task, with their confidence intervals where there are some."""
    rows = []
    for metric, value in result.metrics.items():
        interval = result.intervals.get(metric)
        bounds = f"[{interval[0]:.4g}, {interval[1]:.4g}]" if interval is not None else ""
        rows.append((task, metric, f"{value:.4g}", bounds))
    return rows
