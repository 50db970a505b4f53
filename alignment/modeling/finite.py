"""Numbers that are not finite where a model is sampled from or scored: an error that says why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from alignment.modeling.shards import held, own_part
from alignment.types import AlignmentError


class NonFiniteError(AlignmentError):
    """A model gave NaN or an infinity where nothing can be skipped.

    A loss or gradient that is not finite is no such error: that update is skipped and counted.
    """

    event = "nonfinite"


def first_nonfinite(model: nn.Module) -> str | None:
    """Name of the first parameter that holds a NaN or an infinity; None if all are finite.

    Of sharded weights this rank looks at its own parts: the others may be doing something else.
    """
    for name, parameter in model.named_parameters():
        if not bool(own_part(held(parameter)).isfinite().all()):
            return name
    return None


@contextmanager
def explained(model: nn.Module, where: str) -> Iterator[None]:
    """Add to a `NonFiniteError` of the block where it came up, and what is wrong with the model."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{where}: {error}; {_cause(model)}") from None


def require_finite(rows: Sequence[Tensor], model: nn.Module, what: str) -> None:
    """Refuse numbers of tokens (log-probabilities, values) that are not finite.

    Args:
        rows: `[completion length]` each.
        model: whose they are.
        what: they are, for the message.

    Raises:
        NonFiniteError: naming the first row and token, and the likely cause.
    """
    if not rows or bool(torch.cat(list(rows)).isfinite().all()):
        return
    row = next(i for i, row in enumerate(rows) if not bool(row.isfinite().all()))
    token = int((~rows[row].isfinite()).int().argmax())
    raise NonFiniteError(
        f"scoring: {what} is not finite, first at token {token} of completion {row} of "
        f"{len(rows)}; {_cause(model)}"
    )


def require_finite_scores(scores: Sequence[float], model: nn.Module) -> None:
    """Refuse scores of completions that are not finite, as `require_finite` does tokens' numbers.

    Raises:
        NonFiniteError: naming the first completion, and the likely cause.
    """
    row = next((i for i, score in enumerate(scores) if not math.isfinite(score)), None)
    if row is not None:
        raise NonFiniteError(
            f"scoring: a score is not finite, first of completion {row} of {len(scores)}; "
            f"{_cause(model)}"
        )


def _cause(model: nn.Module) -> str:
    name = first_nonfinite(model)
    if name is not None:
        return (
            f"its weights are not finite, {name} first: the last update broke them. Go on from an "
            "earlier checkpoint (--resume DIR) with a lower optim.lr, or take other weights"
        )
    return (
        "its weights are finite, so its numbers overflow on the way: use model.dtype bfloat16 or "
        "float32, or another model.attention"
    )
