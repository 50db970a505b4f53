"""Small data sets that come with the toolkit, written for its recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import alignment
from alignment.data.formats import Row
from alignment.data.sources import file
from alignment.registry import unknown_name
from alignment.types import UserInputError

# Beside the package, in a checkout as in an installation.
_FOLDER = Path(alignment.__file__).parent.parent / "recipes" / "data"


def shipped(name: str, columns: Mapping[str, str] | None = None) -> list[Row]:
    """The rows of a data set in the toolkit's `recipes/data`.

    Args:
        name: of the data set: `requests` has `prompt` and `kind`: 120 everyday requests
            (`everyday`) and ones that should be declined politely (`harmful`).
        columns: what to rename, from the file's name to the toolkit's.

    Raises:
        UserInputError: there is no data set of this name.
    """
    known = shipped_data()
    if name not in known:
        raise UserInputError(unknown_name("shipped data set", name, list(known)))
    return file(str(known[name]), columns=columns)


def shipped_data() -> dict[str, Path]:
    """The data sets that come with the toolkit: name -> file."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.jsonl"))}
