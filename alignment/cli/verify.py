"""`align verify`: does a finished run meet what its recipe expects?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignment.cli.common import EXIT_FAILED, lazy, table

RunFolder = Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)]


def verify(run: RunFolder) -> None:
    """Check a run against what its recipe expects.

    Exit code 1 if an expectation fails.
    """
    results = lazy("alignment.runs.expect:verify_run")(run)
    if not results:
        typer.echo("the recipe expects nothing")
        return
    rows = [("pass" if result.passed else "FAIL", result.text, result.detail) for result in results]
    typer.echo(table(rows))
    failed = sum(not result.passed for result in results)
    if failed:
        typer.echo(f"align: {failed} of {len(results)} expectations failed", err=True)
        raise typer.Exit(EXIT_FAILED)
