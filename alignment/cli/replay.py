"""`align replay`: one step of a run made again, and compared with what was logged."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from alignment.cli.common import EXIT_FAILED, lazy, table
from alignment.cli.verify import RunFolder


def replay(
    run: RunFolder,
    step: Annotated[int, typer.Option(help="The step to make again.", show_default=False)],
    sample: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Also sample the completion in row K (from 0) of the step's file again.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make one step of a run again, from the nearest checkpoint and the recorded samples.

    Nothing is written into the run. Exit code 1 if a metric or the sample comes out otherwise.
    """
    made = lazy("alignment.trainers.replay:replay")(run, step, sample=sample)
    failed = bool(made.differing) or (made.sample is not None and not made.sample.same)
    if lazy("alignment.distributed:Distributed")().is_main:
        _show(made)
    if failed:
        raise typer.Exit(EXIT_FAILED)


def _show(made: Any) -> None:
    source = f"the checkpoint of step {made.start}" if made.start else "the model as handed over"
    typer.echo(f"step {made.step}, rebuilt from {source}")
    typer.echo(table([_row(metric) for metric in made.metrics], _HEADER))
    n_differing = len(made.differing)
    if not n_differing:
        typer.echo(f"identical: all {len(made.metrics)} metrics are bit for bit as logged")
    else:
        typer.echo(
            f"align: {n_differing} of {len(made.metrics)} metrics differ: "
            f"{', '.join(made.differing)}. The last digits may, where the machine, the versions, "
            "the threads or the number of processes are not those of the run; more may not",
            err=True,
        )
    if made.sample is not None:
        _show_sample(made.sample)


_HEADER = ("metric", "logged", "replayed", "difference")


def _row(metric: Any) -> tuple[str, str, str, str]:
    logged, replayed = metric.logged, metric.replayed
    if metric.same:
        difference = ""
    elif logged is None or replayed is None:
        difference = "not in both"
    else:
        difference = f"{replayed - logged:.3g}"
    return metric.name, _number(logged), _number(replayed), difference


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.10g}"


def _show_sample(sample: Any) -> None:
    visible = lazy("alignment.runs.progress:visible")
    recorded = sample.recorded.completion
    typer.echo(f"\nprompt {recorded.prompt_index}, sample {recorded.sample_index}:")
    typer.echo(visible(sample.recorded.prompt.text))
    typer.echo("completion:")
    typer.echo(visible(sample.again.text))
    if sample.same:
        typer.echo(
            f"token for token identical: all {len(recorded.token_ids)} tokens are as recorded"
        )
        return
    at = sample.first_difference
    old, new = (
        str(ids[at]) if at < len(ids) else "the end"
        for ids in (recorded.token_ids, sample.again.token_ids)
    )
    typer.echo(f"recorded was:\n{visible(recorded.text)}")
    typer.echo(f"align: token {at} (from 0) is {new} and was {old}", err=True)
