"""`align reward test`: what a recipe's rewards say, before anything is trained on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from alignment.cli.common import lazy
from alignment.types import UserInputError

if TYPE_CHECKING:
    from alignment.types import RewardedCompletion

_ROWS = 4
_SHOWN = 90


def test(
    recipe: Annotated[str, typer.Argument(help="A recipe, or a run's folder.", show_default=False)],
    rows: Annotated[
        int | None,
        typer.Option(min=1, help=f"Rows of the data to grade; by default {_ROWS}."),
    ] = None,
    completion: Annotated[
        str | None,
        typer.Option(help="Grade this text, as an answer to the first row.", show_default=False),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="What the completion answers, in place of a row.", show_default=False),
    ] = None,
) -> None:
    """Grade completions with a recipe's rewards.

    Graded are those that the data has (a preference's both sides), or a text of yours. Printed are
    the sum, the outcome, and what each reward said.
    """
    if prompt is not None and rows is not None:
        raise UserInputError("--prompt stands in place of the data's rows; leave --rows out")
    n_rows = rows or (_ROWS if completion is None else 1)
    graded = lazy("alignment.trainers.reward_trial:try_rewards")(
        recipe, rows=n_rows, prompt=prompt, completion=completion
    )
    typer.echo("\n\n".join(_shown(name, item) for name, item in graded))


def _shown(name: str, item: RewardedCompletion) -> str:
    lines = {
        "prompt": _short(item.prompt.text),
        "completion": _short(item.completion.text),
        "reward": _grade(item.reward, item.outcome),
    }
    lines |= {
        f"  {part}": f"{_grade(score.value, score.outcome)}  {_short(score.detail)}".rstrip()
        for part, score in item.parts.items()
    }
    width = max(map(len, lines))
    return "\n".join([name, *(f"  {key.ljust(width)}  {text}" for key, text in lines.items())])


def _grade(value: float | None, outcome: str) -> str:
    number = "none" if value is None else f"{value:.4g}"
    return f"{number:<8}  {outcome}"


def _short(text: str) -> str:
    """One line of a text that may have many."""
    line = text.replace("\n", "\\n")
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."
