"""From a loss per token to one number, with a gradient that no batching can change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor

from alignment.losses.inputs import check_shapes, choose, masked
from alignment.types import AlignmentError

ReductionMode = Literal["token", "sequence", "constant"]


def reduce_loss(
    per_token: Tensor,
    mask: Tensor,
    *,
    mode: ReductionMode = "token",
    count: float | Tensor,
) -> Tensor:
    """This micro-batch's share of the loss of the whole optimizer step. Returns a 0-d tensor.

    ``token``:     sum over tokens / count. Every token weighs the same (DAPO, Yu et al. 2025,
                   eq. 8). `count`: loss tokens of the step.
    ``sequence``:  sum over sequences of the mean inside each / count. Every sequence weighs the
                   same, so a token of a long one weighs less (GRPO, Shao et al. 2024, eq. 3).
                   `count`: sequences of the step that have a loss token.
    ``constant``:  sum over tokens / count, with a divisor that does not depend on the data
                   (Dr. GRPO, Liu et al. 2025: sequences * longest allowed completion).

    `count` is **global**: summed by the caller over all micro-batches and ranks of the optimizer
    step (`loss_count` gives the local part). The shares then add up to the loss of the step, and
    their gradients to its gradient. Where gradients are averaged over ranks, as DDP does, the
    caller multiplies by the number of ranks. A row without a loss token adds nothing.

    Args:
        per_token: `[B, T]`.
        mask: `[B, T]`, True = counts.
        mode: which reduction.
        count: the global count. A number must be positive; a tensor is not looked at (that would
            stall the device), and a zero in it shows up as a non-finite loss.

    Raises:
        AlignmentError: `count` is a number that is not positive.
        UserInputError: unknown mode.
    """
    check_shapes(per_token.shape, mask=mask)
    if not isinstance(count, Tensor) and not count > 0:
        raise AlignmentError(
            f"the loss was to be divided by count={count!r}; skip a step that has no loss token"
        )
    return choose(_SUMS, "reduction mode", mode)(masked(per_token, mask), mask.bool()) / count


def loss_count(mask: Tensor, *, mode: Literal["token", "sequence"]) -> Tensor:
    """This micro-batch's part of `reduce_loss`'s count: 0-d integer tensor, to be summed.

    ``token``: True entries of `mask` `[B, T]`; ``sequence``: rows with at least one.
    """
    counts: dict[str, Callable[[Tensor], Tensor]] = {
        "token": lambda m: m.sum(),
        "sequence": lambda m: m.any(dim=1).sum(),
    }
    return choose(counts, "counted reduction mode", mode)(mask.bool())


def _sum_of_tokens(per_token: Tensor, mask: Tensor) -> Tensor:
    return per_token.sum()


def _sum_of_sequence_means(per_token: Tensor, mask: Tensor) -> Tensor:
    return (per_token.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum()


_SUMS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": _sum_of_tokens,
    "sequence": _sum_of_sequence_means,
    "constant": _sum_of_tokens,
}
