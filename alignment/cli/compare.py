"""`align compare`: two runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignment import registry
from alignment.cli.verify import RunFolder


def compare(
    first: RunFolder,
    second: Annotated[Path, typer.Argument(help="Another run's folder.", show_default=False)],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task", help="Only this one of the tasks; may be given again.", show_default=False
        ),
    ] = None,
) -> None:
    """Compare two runs' last evaluations.

    The difference, its 95% interval and its p-value are of pairs: the same problems under both.
    Runs that were evaluated on other problems are refused.
    """
    typer.echo(registry.get("report", "compare_runs")(first, second, tasks or ()))
