"""`align models`: models that need no hub."""

from __future__ import annotations

from typing import Annotated

import typer

from alignment.cli.common import lazy, table


def list_models() -> None:
    """List the models of the catalogue, and which of them are here."""
    cached = lazy("alignment.modeling.catalog:cached")
    rows = [
        (
            entry.name,
            f"{entry.parameters / 1e6:.1f}M",
            entry.licence,
            "here" if cached(entry.name) else f"{entry.download_mb} MB to download",
            entry.summary,
        )
        for entry in lazy("alignment.modeling.catalog:catalog")()
    ]
    typer.echo(table(rows, ("name", "size", "licence", "state", "what it is")))


def fetch(
    name: Annotated[
        str, typer.Argument(help="Name in the catalogue (align models list).", show_default=False)
    ],
) -> None:
    """Download and convert a model, once; prints its folder."""
    typer.echo(str(lazy("alignment.modeling.catalog:fetch")(name)))
