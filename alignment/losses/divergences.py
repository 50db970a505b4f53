"""The derivatives f' of f-divergences, which take the place of the log-ratio in f-DPO."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignment.losses.inputs import choose
from alignment.types import UserInputError

# The square of their exp, which IPO takes, is finite.
_LARGEST_EXPONENT = {torch.float32: 40.0, torch.float64: 350.0}


def divergence_score(log_ratio: Tensor, *, divergence: str, alpha: float = 0.5) -> Tensor:
    """f'(t) of the ratio t = policy / reference, from log t; any shape. Wang et al. 2023, table 1.

    Regularizing with an f-divergence makes beta f'(t), up to a constant per prompt, the reward a
    policy implies; with the reverse KL that is beta log t. Each f' has the constant that makes it
    0 at t = 1. There its slope in log t is 1 for all but JS, where it is 1/2.

    ``reverse_kl``: log t.
    ``forward_kl``: 1 - 1/t.
    ``js``:         log(2 t / (1 + t)); never above log 2.
    ``alpha``:      (1 - t^-alpha) / alpha, 0 < alpha < 1: from reverse KL (0) to forward KL (1).
                    trl's `f_alpha_divergence_coef` is 1 - alpha.

    Where the policy has made a completion much less likely, 1/t and t^-alpha grow beyond all
    bounds. They are held at e^40 (in float64, at e^350), where their gradient ends: without that, a
    completion pushed far down would have an infinite loss, or the gradient 0 * inf.

    Args:
        log_ratio: in float32 or float64.

    Raises:
        UserInputError: unknown divergence, or alpha not between 0 and 1.
    """
    if divergence == "alpha" and not 0 < alpha < 1:
        raise UserInputError(
            f"alpha of the alpha-divergence is {alpha!r}; give a number between 0 and 1, or use "
            "divergence 'reverse_kl' (its limit at 0) or 'forward_kl' (at 1)"
        )
    return choose(_SCORES, "divergence", divergence)(log_ratio, alpha)


def _reverse_kl(log_ratio: Tensor, alpha: float) -> Tensor:
    return log_ratio


def _forward_kl(log_ratio: Tensor, alpha: float) -> Tensor:
    return -torch.expm1((-log_ratio).clamp(max=_LARGEST_EXPONENT[log_ratio.dtype]))


def _js(log_ratio: Tensor, alpha: float) -> Tensor:
    return math.log(2) + logsigmoid(log_ratio)


def _alpha(log_ratio: Tensor, alpha: float) -> Tensor:
    largest = _LARGEST_EXPONENT[log_ratio.dtype]
    return -torch.expm1((-alpha * log_ratio).clamp(max=largest)) / alpha


_SCORES: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js": _js,
    "alpha": _alpha,
}

DIVERGENCES: tuple[str, ...] = tuple(_SCORES)
"""The divergences of `divergence_score`."""
