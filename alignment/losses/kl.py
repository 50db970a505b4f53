"""Divergence from the reference policy: estimators, exact value, coefficient controllers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from alignment.losses.inputs import check_shapes, choose, masked, upcast
from alignment.types import AlignmentError, UserInputError

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    estimator: KLEstimator = "k1",
    mask: Tensor | None = None,
) -> Tensor:
    """Estimate KL(policy || reference) from sampled tokens, in nats per token, `[B, T]`.

    With d = logprobs - ref_logprobs at a token drawn from the policy (Schulman 2020):

        k1 = d                  unbiased, may be negative
        k2 = d^2 / 2            biased, never negative
        k3 = exp(-d) - 1 + d    unbiased, never negative, low variance

    **The value and the gradient are different questions.** The expectation over the policy's own
    samples, worked out exactly on small categoricals in `tests/invariants/test_loss_invariants.py`:

        estimator   differentiated as a loss              put in the reward, score function
        k1          0: no pull at all                     the reverse-KL gradient
        k2          the reverse-KL gradient               biased
        k3          the *forward*-KL gradient,            the difference of the two, which can
                    grad KL(reference || policy)          even point against the true one

    So the true gradient of KL(policy || reference) is had from k1 in the reward or from k2 in the
    loss (and from `kl_full` in the loss). k3 in the loss is what GRPO (Shao et al. 2024, eq. 4)
    does: same minimum and, near it, the same curvature, but another gradient away from it.

    `ref_logprobs` is a constant: no gradient flows into it. A token whose estimate is not finite
    keeps that value and gets gradient 0, so that padding cannot poison the gradient even without
    `mask`, while inside the mask it still shows as a non-finite loss.

    Args:
        logprobs: `[B, T]`, current policy.
        ref_logprobs: `[B, T]`, reference.
        estimator: k1, k2 or k3.
        mask: `[B, T]`, True = counts; the estimate is 0 elsewhere. Optional, because `reduce_loss`
            masks too.

    Raises:
        UserInputError: unknown estimator.
    """
    check_shapes(logprobs.shape, ref_logprobs=ref_logprobs)
    estimate = choose(_ESTIMATORS, "KL estimator", estimator)
    difference = upcast(logprobs) - upcast(ref_logprobs.detach())
    if mask is not None:
        check_shapes(logprobs.shape, mask=mask)
        difference = masked(difference, mask)
    raw = estimate(difference.detach())
    finite = raw.isfinite()
    return torch.where(finite, estimate(torch.where(finite, difference, 0.0)), raw)


def kl_full(
    logprobs_all: Tensor, ref_logprobs_all: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """KL(policy || reference) summed over the whole vocabulary: `[..., V]` in, `[...]` out, nats.

        sum over v of p(v) (log p(v) - log q(v))

    Exact, so no sampling noise, and its gradient is the reverse-KL gradient. A token with p(v) = 0
    (log-probability minus infinity) adds 0; one with q(v) = 0 and p(v) > 0 makes it infinite.
    `ref_logprobs_all` is a constant.

    Args:
        logprobs_all: `[..., V]`, normalized log-probabilities of the policy.
        ref_logprobs_all: `[..., V]`, of the reference.
        mask: `[...]`, True = counts; 0 elsewhere.
    """
    check_shapes(logprobs_all.shape, ref_logprobs_all=ref_logprobs_all)
    logp, logq = upcast(logprobs_all), upcast(ref_logprobs_all.detach())
    used = logp.detach() != float("-inf")
    if mask is not None:
        check_shapes(logprobs_all.shape[:-1], mask=mask)
        used = used & mask.bool().unsqueeze(-1)
    logp, logq = torch.where(used, logp, float("-inf")), torch.where(used, logq, 0.0)
    difference = torch.where(used, logp, 0.0) - logq
    return (logp.exp() * difference).sum(dim=-1)


def _k1(difference: Tensor) -> Tensor:
    return difference


def _k2(difference: Tensor) -> Tensor:
    return 0.5 * difference.square()


def _k3(difference: Tensor) -> Tensor:
    return torch.expm1(-difference) + difference


_ESTIMATORS: Mapping[str, Callable[[Tensor], Tensor]] = {"k1": _k1, "k2": _k2, "k3": _k3}


class KLController(Protocol):
    """Holds the KL coefficient, and moves it once per step from the KL that was measured."""

    @property
    def coef(self) -> float: ...

    def update(self, kl: float) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class FixedKLController:
    """A coefficient that stays where it is."""

    def __init__(self, coef: float) -> None:
        self._coef = _checked("KL coefficient", coef, lowest=0.0)

    @property
    def coef(self) -> float:
        return self._coef

    def update(self, kl: float) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self._coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._coef = float(state["coef"])


class AdaptiveKLController:
    """Clipped proportional control in log space (Ziegler et al. 2019, section 2.2).

        e    = clip((kl - target) / target, -max_error, max_error)
        coef = coef (1 + gain e)

    Args:
        coef: where to start; above 0, since 0 could never grow.
        target: the KL to hold, in the units of what `update` is given (the paper: nats per
            sequence).
        gain: the paper's K, 0.1, for one update a step.
        max_error: the paper's 0.2. Below 1 / gain, so that `coef` stays above 0.

    Raises:
        UserInputError: a number is out of range.
    """

    def __init__(
        self, coef: float, *, target: float, gain: float = 0.1, max_error: float = 0.2
    ) -> None:
        self._coef = _checked("KL coefficient of the adaptive controller", coef, above=0.0)
        self._target = _checked("KL target", target, above=0.0)
        self._gain = _checked("KL controller gain", gain, above=0.0)
        self._max_error = _checked("KL controller max_error", max_error, above=0.0)
        if gain * max_error >= 1.0:
            raise UserInputError(
                f"the KL controller's gain is {gain:g}: with errors as large as {max_error:g}, one "
                f"step could take the coefficient to 0 or below; give less than {1 / max_error:g} "
                "(the completions of a step divided by the horizon)"
            )

    @property
    def coef(self) -> float:
        return self._coef

    def update(self, kl: float) -> None:
        """Move the coefficient by the KL of the step just made, averaged over all ranks.

        Raises:
            AlignmentError: `kl` is not finite; the coefficient is left as it was.
        """
        if not math.isfinite(kl):
            raise AlignmentError(
                f"the KL controller was given KL {kl!r}; don't update it on a skipped step"
            )
        error = (kl - self._target) / self._target
        error = max(-self._max_error, min(self._max_error, error))
        self._coef *= 1 + self._gain * error

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self._coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._coef = float(state["coef"])


def _checked(
    what: str, value: float, *, lowest: float | None = None, above: float | None = None
) -> float:
    if lowest is not None and not lowest <= value < math.inf:
        raise UserInputError(f"{what} is {value!r}; give a finite number of at least {lowest}")
    if above is not None and not above < value < math.inf:
        raise UserInputError(f"{what} is {value!r}; give a finite number above {above}")
    return value
