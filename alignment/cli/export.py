"""`align export`: what a run made, as a folder that anything can load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignment.cli.common import lazy


def export(
    run: Annotated[str, typer.Argument(help="A run's folder, or a model.", show_default=False)],
    folder: Annotated[
        Path | None,
        typer.Argument(help="Where to write it; by default RUN/export.", show_default=False),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge/--adapter", help="A plain model, or the LoRA adapter alone, as it is."
        ),
    ] = True,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; by default as it is stored.", show_default=False
        ),
    ] = None,
) -> None:
    """Write a run's model in Hugging Face format.

    Weights, tokenizer and chat template, loaded back once and compared. A folder that exists is
    not overwritten.
    """
    typer.echo(
        lazy("alignment.trainers.export:export")(run, folder, adapter=not merge, dtype=dtype)
    )
