"""`align recipes`: the recipes that come with the toolkit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignment.cli.common import lazy, table
from alignment.registry import unknown_name
from alignment.types import UserInputError

ShippedName = Annotated[str, typer.Argument(help="Name of a shipped recipe.", show_default=False)]


def list_recipes() -> None:
    """List the shipped recipes and what each is for."""
    shipped: dict[str, Path] = lazy("alignment.config:shipped_recipes")()
    rows = [(name, _first_comment(path)) for name, path in shipped.items()]
    typer.echo(table(rows) if rows else "there are no shipped recipes")


def show(name: ShippedName) -> None:
    """Print a shipped recipe."""
    typer.echo(_find(name).read_text(encoding="utf-8"), nl=False)


def copy(
    name: ShippedName,
    destination: Annotated[
        Path, typer.Argument(help="File or folder to copy it to.", show_default=False)
    ],
) -> None:
    """Copy a shipped recipe to a file of your own; never overwrites one."""
    source = _find(name)
    target = destination / source.name if destination.is_dir() else destination
    try:
        # Mode x fails where the file exists, also if it appeared a moment ago.
        with target.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise UserInputError(f"{target} exists and is not overwritten; give another name") from None
    except OSError as error:
        raise UserInputError(f"{target} cannot be written: {error.strerror}") from error
    typer.echo(str(target))


def _find(name: str) -> Path:
    shipped: dict[str, Path] = lazy("alignment.config:shipped_recipes")()
    if name not in shipped:
        raise UserInputError(unknown_name("recipe", name, list(shipped)))
    return shipped[name]


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        first = file.readline().strip()
    return first.lstrip("# ") if first.startswith("#") else ""
