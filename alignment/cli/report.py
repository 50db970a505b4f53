"""`align report`: one HTML file about a run."""

from __future__ import annotations

import typer

from alignment import registry
from alignment.cli.verify import RunFolder


def report(run: RunFolder) -> None:
    """Write a run's report, one HTML file."""
    typer.echo(str(registry.get("report", "html")(run)))
