"""Preference losses for unpaired data: completions found desirable or not, each on its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignment.losses.inputs import check_shapes, upcast
from alignment.losses.types import Mean, Metric, SequenceLoss
from alignment.types import AlignmentError, UserInputError


def kto_kl(mismatched_logps: Tensor, ref_mismatched_logps: Tensor) -> Tensor:
    """KTO's reference point, 0-d, a constant: max(0, mean(log policy - log reference)).

    An estimate of KL(policy || reference) from completions each put behind **another** one's
    prompt (Ethayarajh et al. 2024, section 4.1). The mean is taken before the clamp, so give the
    sequences of the whole batch, all micro-batches and ranks.

    Args:
        mismatched_logps: `[B]`, log-probabilities summed over tokens under the policy.
        ref_mismatched_logps: `[B]`, under the reference.

    Raises:
        AlignmentError: no sequence, or shapes that differ.
    """
    check_shapes(mismatched_logps.shape, ref_mismatched_logps=ref_mismatched_logps)
    if not mismatched_logps.numel():
        raise AlignmentError(
            "KTO's reference point is a mean over mismatched completions, and there is none; give "
            "batches of two or more samples"
        )
    ratio = upcast(mismatched_logps.detach()) - upcast(ref_mismatched_logps.detach())
    return ratio.mean().clamp(min=0)


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> SequenceLoss:
    """Kahneman-Tversky optimization, `[B]`: how far a completion is from the reference point.

        loss = w_d (1 - s(beta (c - kl)))   where desirable
               w_u (1 - s(beta (kl - c)))   where not

    c = logps - ref_logps, s = sigmoid. Ethayarajh et al. 2024, eqs. 7 and 8, with its lambdas as
    weights: the paper chooses them so that both classes weigh about the same. With kl = 0 this is
    APO-zero for unpaired data (trl's `apo_zero_unpaired`).

    Args:
        logps: `[B]`, log-probabilities summed over completion tokens under the policy, in nats.
        ref_logps: `[B]` under the reference. A constant.
        desirable: `[B]`, True = desirable.
        kl: the reference point, 0-d or a number (`kto_kl`), the same for the whole batch. A
            constant, and clamped at 0.
        beta: strength of the pull to the reference.
        desirable_weight: w_d.
        undesirable_weight: w_u.

    Metrics: `reward/desirable`, `reward/undesirable` (beta c), `logps/desirable`,
    `logps/undesirable`, each over its class, and `kl`.

    Raises:
        UserInputError: beta not above 0, or a weight below 0.
        AlignmentError: shapes that do not fit.
    """
    _check(beta, desirable_weight, undesirable_weight)
    ratio = _log_ratio(logps, ref_logps, desirable)
    point = torch.as_tensor(kl, dtype=ratio.dtype, device=ratio.device).detach().clamp(min=0)
    check_shapes(torch.Size(()), kl=point)
    weight, sign = _weight_and_sign(desirable, ratio, desirable_weight, undesirable_weight)
    loss = weight * torch.sigmoid(-sign * beta * (ratio - point))
    metrics = {**_metrics(logps, beta * ratio, desirable), "kl": Mean.of(point)}
    return SequenceLoss(loss, metrics)


def bco_loss(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    shift: float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> SequenceLoss:
    """Binary classifier optimization of unpaired data, `[B]`. Jung et al. 2024.

        loss = -w_d log s(beta c - shift)   where desirable
               -w_u log s(shift - beta c)   where not

    Args:
        shift: the paper's delta, a moving average of the two classes' mean rewards, in units of
            reward; the caller keeps it.

    The other arguments, the metrics (without `kl`) and the errors are those of `kto_loss`.
    """
    _check(beta, desirable_weight, undesirable_weight)
    ratio = _log_ratio(logps, ref_logps, desirable)
    weight, sign = _weight_and_sign(desirable, ratio, desirable_weight, undesirable_weight)
    loss = -weight * logsigmoid(sign * (beta * ratio - shift))
    return SequenceLoss(loss, _metrics(logps, beta * ratio, desirable))


def _log_ratio(logps: Tensor, ref_logps: Tensor, desirable: Tensor) -> Tensor:
    check_shapes(logps.shape[:1], logps=logps, ref_logps=ref_logps, desirable=desirable)
    return upcast(logps) - upcast(ref_logps.detach())


def _weight_and_sign(
    desirable: Tensor, like: Tensor, desirable_weight: float, undesirable_weight: float
) -> tuple[Tensor, Tensor]:
    ones = torch.ones_like(like)
    wanted = desirable.bool()
    weight = torch.where(wanted, desirable_weight * ones, undesirable_weight * ones)
    return weight, torch.where(wanted, ones, -ones)


def _metrics(logps: Tensor, rewards: Tensor, desirable: Tensor) -> dict[str, Metric]:
    wanted = desirable.bool()
    return {
        "reward/desirable": Mean.of(rewards, wanted),
        "reward/undesirable": Mean.of(rewards, ~wanted),
        "logps/desirable": Mean.of(logps, wanted),
        "logps/undesirable": Mean.of(logps, ~wanted),
    }


def _check(beta: float, desirable_weight: float, undesirable_weight: float) -> None:
    if not beta > 0:
        raise UserInputError(f"beta is {beta!r}; give a number above 0")
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    for name, weight in weights.items():
        if not weight >= 0:
            raise UserInputError(f"{name} is {weight!r}; give a number that is not negative")
