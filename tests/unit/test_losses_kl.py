"""KL estimators, the exact KL, and the coefficient controllers."""

from __future__ import annotations

import math

import pytest
import torch

from alignment.losses import AdaptiveKLController, FixedKLController, kl_estimate, kl_full
from alignment.types import AlignmentError, UserInputError


def test_estimators_by_hand() -> None:
    logprobs, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -1.5]])  # d = 1, -0.5
    assert kl_estimate(logprobs, ref, estimator="k1").tolist() == [[1.0, -0.5]]
    assert kl_estimate(logprobs, ref, estimator="k2").tolist() == [[0.5, 0.125]]
    k3 = kl_estimate(logprobs, ref, estimator="k3").tolist()[0]
    assert k3 == pytest.approx([math.exp(-1), math.exp(0.5) - 1.5])
    masked = kl_estimate(logprobs, ref, estimator="k1", mask=torch.tensor([[False, True]]))
    assert masked.tolist() == [[0.0, -0.5]]


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative() -> None:
    logp = torch.randn(6, dtype=torch.float64).log_softmax(0)
    logq = torch.randn(6, dtype=torch.float64).log_softmax(0)
    exact = torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="sum")
    for estimator in ("k1", "k3"):
        expectation = (logp.exp() * kl_estimate(logp, logq, estimator=estimator)).sum()
        torch.testing.assert_close(expectation, exact, rtol=1e-12, atol=1e-12)
    assert (kl_estimate(logp, logq, estimator="k3") >= 0).all()
    torch.testing.assert_close(kl_full(logp, logq), exact, rtol=1e-12, atol=1e-12)


def test_k3_keeps_its_precision_near_zero() -> None:
    """exp(-d) - 1 + d loses every digit of d^2 / 2 in float32; expm1 does not lose all."""
    tiny = torch.tensor([[1e-3]])
    k3 = kl_estimate(tiny, torch.zeros(1, 1), estimator="k3").item()
    assert k3 == pytest.approx(math.exp(-1e-3) - 1 + 1e-3, rel=1e-3)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_not_finite_stays_visible_and_has_no_gradient(estimator: str) -> None:
    logprobs = torch.tensor([[float("nan"), -float("inf"), -1e6, -1.0]], requires_grad=True)
    ref = torch.tensor([[-1.0, -1.0, -1.0, -2.0]])
    estimate = kl_estimate(logprobs, ref, estimator=estimator)
    assert estimate[0, 0].isnan() and not estimate[0, 1].isfinite()
    estimate[:, 3].sum().backward()
    assert logprobs.grad is not None and logprobs.grad.isfinite().all()
    assert (logprobs.grad[0, :3] == 0).all() and logprobs.grad[0, 3] != 0


def test_reference_is_a_constant() -> None:
    logprobs, ref = torch.randn(1, 3, requires_grad=True), torch.randn(1, 3, requires_grad=True)
    kl_estimate(logprobs, ref, estimator="k3").sum().backward()
    assert logprobs.grad is not None and ref.grad is None


def test_kl_full_with_impossible_tokens_and_a_mask() -> None:
    inf, nan = float("inf"), float("nan")
    logp = torch.tensor([[math.log(0.5), math.log(0.5), -inf], [nan, nan, nan]], requires_grad=True)
    logq = torch.tensor([[math.log(0.25), math.log(0.5), math.log(0.25)], [nan, inf, 1e6]])
    kl = kl_full(logp, logq, mask=torch.tensor([True, False]))
    assert kl.tolist() == pytest.approx([0.5 * math.log(2), 0.0])
    kl.sum().backward()
    assert logp.grad is not None and logp.grad.isfinite().all()
    assert (logp.grad[1] == 0).all()
    assert kl_full(logp, logq)[1].isnan()
    outside = kl_full(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log())
    assert outside.item() == inf


def test_unknown_estimator() -> None:
    with pytest.raises(UserInputError, match="unknown KL estimator 'k4'"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), estimator="k4")


def test_fixed_controller() -> None:
    controller = FixedKLController(0.1)
    controller.update(1e9)
    assert controller.coef == 0.1 and controller.state_dict() == {"coef": 0.1}
    with pytest.raises(UserInputError, match="at least 0"):
        FixedKLController(-0.1)


def test_adaptive_controller_by_hand() -> None:
    controller = AdaptiveKLController(0.2, target=6.0)
    controller.update(6.6)  # error 0.1
    assert controller.coef == pytest.approx(0.2 * 1.01)
    controller.update(600.0)  # error clipped to 0.2
    assert controller.coef == pytest.approx(0.2 * 1.01 * 1.02)
    controller.update(-5.0)  # clipped to -0.2
    assert controller.coef == pytest.approx(0.2 * 1.01 * 1.02 * 0.98)


def test_adaptive_controller_state_round_trip() -> None:
    controller = AdaptiveKLController(0.2, target=6.0)
    controller.update(7.0)
    resumed = AdaptiveKLController(0.2, target=6.0)
    resumed.load_state_dict(controller.state_dict())
    for kl in (1.0, 9.0, 6.1):
        controller.update(kl)
        resumed.update(kl)
        assert resumed.coef == controller.coef


def test_adaptive_controller_rejects_nonsense() -> None:
    controller = AdaptiveKLController(0.2, target=6.0)
    with pytest.raises(AlignmentError, match="skipped step"):
        controller.update(float("nan"))
    assert controller.coef == 0.2
    with pytest.raises(UserInputError, match="above 0"):
        AdaptiveKLController(0.0, target=6.0)
    with pytest.raises(UserInputError, match="KL target"):
        AdaptiveKLController(0.1, target=0.0)


def test_the_adaptive_coefficient_stays_above_zero() -> None:
    """64 completions a step: over a horizon of 13, a step takes 64 / 13 / 5 of it at most."""
    controller = AdaptiveKLController(0.2, target=6.0, gain=64 / 13)
    controller.update(0.0)
    assert controller.coef == pytest.approx(0.2 / 65)
    for gain in (64 / 10, 5.0):  # 1 - 0.2 * 6.4 = -0.28: the penalty would be a bonus
        with pytest.raises(UserInputError, match=rf"gain is {gain:g}: .* give less than 5"):
            AdaptiveKLController(0.2, target=6.0, gain=gain)
