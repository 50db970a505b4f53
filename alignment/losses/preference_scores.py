"""The score of one completion behind each kind of preference loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from alignment.losses.divergences import divergence_score
from alignment.losses.inputs import check_shapes, choose
from alignment.losses.preference_kinds import (
    PREFERENCE_KINDS,
    REFERENCE_FREE_KINDS,
    Side,
    log_odds,
)


def preference_score(
    logps: Tensor,
    ref_logps: Tensor,
    lengths: Tensor,
    *,
    kind: str,
    beta: float,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
) -> Tensor:
    """The score that a kind of `preference_loss` ranks a completion by, `[B]` in float64.

    Sums and lengths are those that the loss is given, so that a score is normalized as in training.
    With t = exp(logps - ref_logps) and f' the `divergence_score`, log t for the reverse KL:

    ``sigmoid_norm``, ``ipo_norm``: beta f'(t) / lengths.
    ``simpo``: beta logps / lengths.
    ``cpo``:   beta logps.
    ``orpo``:  log odds of exp(logps / lengths), without beta, which weighs the whole term there.
    all other kinds: beta f'(t).

    In the `LOGISTIC_KINDS` sigmoid(chosen - rejected) is the policy's probability of the
    preference.

    Args:
        logps: `[B]`, log p(completion | prompt) under the policy, in nats.
        ref_logps: `[B]` under the reference; 0 for simpo, cpo, orpo, which have none.
        lengths: `[B]` tokens behind each sum.
        kind: a name in `PREFERENCE_KINDS`.
        beta: as in `preference_loss`.
        divergence: likewise.
        alpha: likewise.

    Raises:
        UserInputError: unknown kind or divergence.
        AlignmentError: tensors that are not all `[B]`.
    """
    score_of = choose(_SCORES, "preference loss", kind)
    check_shapes(logps.shape[:1], logps=logps, ref_logps=ref_logps, lengths=lengths)
    logps = logps.double()  # f' flattens out, and what it ranks would tie in less
    ref_logps = ref_logps.double()
    score = divergence_score(logps - ref_logps, divergence=divergence, alpha=alpha)
    return score_of(Side(logps, ref_logps, score, lengths.double().clamp(min=1)), beta)


def _ratio(side: Side, beta: float) -> Tensor:
    return beta * side.score


def _mean_ratio(side: Side, beta: float) -> Tensor:
    return beta * side.mean_score


def _sum(side: Side, beta: float) -> Tensor:
    return beta * side.logps


def _mean(side: Side, beta: float) -> Tensor:
    return beta * side.mean_logps


def _odds(side: Side, beta: float) -> Tensor:
    return log_odds(side.mean_logps)


_SCORES: Mapping[str, Callable[[Side, float], Tensor]] = {
    **{kind: _ratio for kind in PREFERENCE_KINDS if kind not in REFERENCE_FREE_KINDS},
    "sigmoid_norm": _mean_ratio,
    "ipo_norm": _mean_ratio,
    "simpo": _mean,
    "cpo": _sum,
    "orpo": _odds,
}

LOGISTIC_KINDS = frozenset({"sigmoid", "sigmoid_norm", "robust", "exo", "simpo", "cpo", "orpo"})
"""The kinds whose loss is of s(x), x = chosen - rejected score, as a probability: its logarithm, or
for exo its divergence from the label's; simpo's margin is not part of it. The others fit x to a
target (ipo, ipo_norm, sppo), bound it (hinge), or push each side or a whole batch."""
