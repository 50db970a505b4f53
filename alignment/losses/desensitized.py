"""Length-desensitized sums of log-probabilities."""

from __future__ import annotations

from torch import Tensor

from alignment.losses.inputs import check_shapes, masked
from alignment.types import UserInputError


def desensitized_sums(
    logprobs: Tensor, mask: Tensor, public_lengths: Tensor, alpha: float
) -> Tensor:
    """Sum over the first tokens, and a part of the sum over those in excess, `[B]`.

        sum_{t <= l} log p(y_t) + alpha sum_{t > l} log p(y_t)

    l is the length both completions of a pair have in common, that of the shorter one. Given to
    `preference_loss` in the place of the plain sums, policy and reference alike, a pair is judged
    less by what the longer one adds. LD-DPO, Liu et al. 2024 (arXiv:2409.06411); trl's `ld_alpha`.
    An NLL term of such sums is desensitized too.

    Args:
        logprobs: `[B, T]`.
        mask: `[B, T]`, True = counts. Places are counted among the True ones.
        public_lengths: `[B]`, l: the smaller of the pair's token counts.
        alpha: in [0, 1]: 1 gives the plain sum, 0 cuts both completions to the same length.

    Raises:
        UserInputError: alpha outside [0, 1].
        AlignmentError: shapes that do not fit.
    """
    if not 0 <= alpha <= 1:
        raise UserInputError(
            f"alpha of the length-desensitized sum is {alpha!r}; give a number in [0, 1]"
        )
    check_shapes(logprobs.shape, mask=mask)
    check_shapes(logprobs.shape[:1], public_lengths=public_lengths)
    place = mask.cumsum(dim=1)
    public = mask.bool() & (place <= public_lengths[:, None])
    excess = mask.bool() & (place > public_lengths[:, None])
    return masked(logprobs, public).sum(dim=1) + alpha * masked(logprobs, excess).sum(dim=1)
