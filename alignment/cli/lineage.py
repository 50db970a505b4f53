"""`align lineage`: what a run came from, as a tree."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from alignment.cli.common import lazy
from alignment.cli.verify import RunFolder

if TYPE_CHECKING:
    from alignment.runs.ancestry import Ancestry


def lineage(
    run: RunFolder,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: every run once, by its folder.")
    ] = False,
) -> None:
    """Print what a run, a stage or a pipeline came from.

    Parents stand below the run that started from them, the base model at the ends. Those that are
    gone or have changed since are marked.
    """
    ancestry: Ancestry = lazy("alignment.runs.ancestry:trace")(run)
    if as_json:
        typer.echo(json.dumps(ancestry.as_json(), indent=2))
        return
    lazy("alignment.cli.lineage_tree:show")(ancestry)
