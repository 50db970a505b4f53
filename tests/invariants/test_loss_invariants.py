"""The invariants of losses and advantages. Numbers are the rows of the project's list of silent
bugs; a test opens with its number."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignment.advantages import (
    MIN_STD,
    gae,
    group_relative,
    leave_one_out,
    place_rewards,
    whiten,
)
from alignment.losses import (
    TokenLoss,
    cispo_loss,
    clipped_value_loss,
    kl_estimate,
    kl_full,
    loss_count,
    ppo_clip_loss,
    process_reward_loss,
    reduce_loss,
    sft_loss,
)

MODES: tuple[Any, ...] = ("token", "sequence", "constant")
ESTIMATORS: tuple[Any, ...] = ("k1", "k2", "k3")
LEVELS: tuple[Any, ...] = ("token", "sequence")

# Ragged rows with a hole, and one row without any counted token.
MASK = torch.tensor(
    [
        [True, True, False, True, True, False],
        [True, True, True, True, True, True],
        [False, True, False, False, False, False],
        [False] * 6,
    ]
)

TokenLossOf = Callable[[Mapping[str, Tensor], Tensor], TokenLoss]


def _kl(estimator: Any, *, masked: bool) -> TokenLossOf:
    return lambda x, mask: TokenLoss(
        kl_estimate(x["logprobs"], x["old"], estimator=estimator, mask=mask if masked else None),
        {},
    )


def _ppo(**options: Any) -> TokenLossOf:
    return lambda x, mask: ppo_clip_loss(
        x["logprobs"], x["old"], x["advantages"], mask, clip_low=0.2, clip_high=0.28, **options
    )


TOKEN_LOSSES: dict[str, TokenLossOf] = {
    "sft": lambda x, mask: sft_loss(x["logprobs"], mask),
    "ppo": _ppo(),
    "ppo-dual": _ppo(dual_clip=1.5),
    "gspo": _ppo(ratio_level="sequence"),
    "cispo": lambda x, mask: cispo_loss(
        x["logprobs"], x["old"], x["advantages"], mask, clip_high=0.3, clip_low=0.3
    ),
    "value": lambda x, mask: clipped_value_loss(
        x["logprobs"], x["old"], x["advantages"], mask, clip=0.2
    ),
    "value-unclipped": lambda x, mask: clipped_value_loss(
        x["logprobs"], x["old"], x["advantages"], mask, clip=None
    ),
    "process-reward": lambda x, mask: process_reward_loss(
        x["logprobs"], x["advantages"] + 1.5, mask
    ),
    **{f"{k}-masked": _kl(k, masked=True) for k in ESTIMATORS},
    **{f"{k}-bare": _kl(k, masked=False) for k in ESTIMATORS},
    "kl-full": lambda x, mask: TokenLoss(
        kl_full(
            torch.stack([x["logprobs"], x["old"]], -1).log_softmax(-1),
            torch.stack([x["old"], x["advantages"]], -1).log_softmax(-1),
            mask=mask,
        ),
        {},
    ),
}


def _inputs(rows: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    names = ("logprobs", "old", "advantages")
    return {
        name: torch.randn(rows, 6, generator=generator, dtype=dtype) * 0.5 - 1 for name in names
    }


def _global_count(mask: Tensor, mode: Any) -> float | Tensor:
    return 24.0 if mode == "constant" else loss_count(mask, mode=mode)


def _loss_and_gradient(
    loss: TokenLossOf, inputs: Mapping[str, Tensor], mask: Tensor, mode: Any, count: Any
) -> tuple[Tensor, Tensor, TokenLoss]:
    inputs = {name: x.clone() for name, x in inputs.items()}
    inputs["logprobs"].requires_grad_()
    unreduced = loss(inputs, mask)
    value = reduce_loss(unreduced.per_token, mask, mode=mode, count=count)
    value.backward()
    gradient = inputs["logprobs"].grad
    assert gradient is not None
    return value.detach(), gradient, unreduced


# ---------------------------------------------------------------- reduction


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", sorted(TOKEN_LOSSES))
def test_i01_gradient_does_not_depend_on_the_micro_batch_split(name: str, mode: Any) -> None:
    inputs, count = _inputs(dtype=torch.float64), _global_count(MASK, mode)
    value, gradient, whole = _loss_and_gradient(TOKEN_LOSSES[name], inputs, MASK, mode, count)
    for split in ([1, 1, 1, 1], [3, 1], [2, 2]):
        parts = []
        for rows in torch.arange(4).split(split):
            piece = {k: x[rows] for k, x in inputs.items()}
            parts.append(_loss_and_gradient(TOKEN_LOSSES[name], piece, MASK[rows], mode, count))
        total = torch.stack([part[0] for part in parts]).sum()
        torch.testing.assert_close(total, value, rtol=1e-12, atol=1e-12)
        joined = torch.cat([part[1] for part in parts])
        torch.testing.assert_close(joined, gradient, rtol=1e-12, atol=1e-12)
    assert whole.per_token.shape == MASK.shape


def test_i03_each_reduction_by_hand() -> None:
    per_token = torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert reduce_loss(per_token, mask, mode="token", count=4).item() == 2.5
    assert reduce_loss(per_token, mask, mode="sequence", count=2).item() == 3.0
    assert reduce_loss(per_token, mask, mode="constant", count=2 * 5).item() == 1.0


def test_i03_weight_of_a_token_in_each_reduction() -> None:
    """Repeating a sequence's token dilutes the others under ``sequence`` and leaves their weight
    alone under ``constant``; under ``token`` all tokens of the step weigh the same."""
    mask = torch.tensor([[True, True, True], [True, False, False]])

    def weights(mode: Any, count: float) -> list[list[float]]:
        per_token = torch.ones(2, 3, requires_grad=True)
        reduce_loss(per_token, mask, mode=mode, count=count).backward()
        assert per_token.grad is not None
        result: list[list[float]] = per_token.grad.tolist()
        return result

    assert weights("token", 4) == [[0.25] * 3, [0.25, 0.0, 0.0]]
    sixth = pytest.approx(1 / 6)
    assert weights("sequence", 2) == [[sixth] * 3, [0.5, 0.0, 0.0]]
    assert weights("constant", 8) == [[0.125] * 3, [0.125, 0.0, 0.0]]


def test_i03_no_scale_leaves_the_spread_of_a_group_alone() -> None:
    """Dr. GRPO: dividing by the deviation gives an easy prompt the weight of a hard one."""
    rewards, groups = torch.tensor([0.0, 10.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
    assert group_relative(rewards, groups, scale="none").tolist() == [-5.0, 5.0, -0.5, 0.5]
    scaled = group_relative(rewards, groups, scale="group")
    torch.testing.assert_close(scaled[:2], scaled[2:], rtol=1e-3, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", sorted(TOKEN_LOSSES))
def test_i04_a_fully_masked_row_changes_nothing(name: str, mode: Any) -> None:
    inputs = _inputs()
    without = {k: x[:3] for k, x in inputs.items()}
    value, gradient, all_rows = _loss_and_gradient(
        TOKEN_LOSSES[name], inputs, MASK, mode, _global_count(MASK, mode)
    )
    less, its_gradient, three_rows = _loss_and_gradient(
        TOKEN_LOSSES[name], without, MASK[:3], mode, _global_count(MASK[:3], mode)
    )
    assert torch.equal(value, less)
    assert torch.equal(gradient[:3], its_gradient) and not gradient[3].any()
    for key, metric in all_rows.metrics.items():
        assert metric.value() == pytest.approx(three_rows.metrics[key].value(), rel=1e-6)


# ---------------------------------------------------------------- ratios


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_i13_first_minibatch_ratio_is_one(level: Any, dtype: torch.dtype) -> None:
    logprobs = (-5 * torch.rand(4, 6)).to(dtype).requires_grad_()
    loss = ppo_clip_loss(
        logprobs,
        logprobs.detach().clone(),
        torch.randn(4, 6),
        MASK,
        clip_low=0.0,
        clip_high=0.0,
        ratio_level=level,
    )
    values = {name: metric.value() for name, metric in loss.metrics.items()}
    assert values["ratio/mean"] == 1.0 and values["ratio/max"] == 1.0
    assert values["clip_fraction/low"] == 0.0 and values["clip_fraction/high"] == 0.0
    assert values["approx_kl"] == 0.0
    loss.per_token.sum().backward()
    assert logprobs.grad is not None and logprobs.grad[MASK].all()


@pytest.mark.parametrize("length", [2, 16, 256])
@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_i15_sequence_ratio_does_not_depend_on_length(length: int, shift: float) -> None:
    noise = 0.3 * torch.randn(1, length)
    log_ratio = noise - noise.mean() + shift
    mask = torch.ones(1, length, dtype=torch.bool)
    loss = ppo_clip_loss(
        log_ratio,
        torch.zeros(1, length),
        -torch.ones(1, length),
        mask,
        clip_low=1,
        clip_high=9,
        ratio_level="sequence",
    )
    expected = torch.full((1, length), math.exp(shift))
    torch.testing.assert_close(loss.per_token, expected, rtol=1e-5, atol=0)


# ---------------------------------------------------------------- KL


class Categorical:
    """A policy over five outcomes and a reference, in float64, with exact expectations."""

    def __init__(self, seed: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()
        self.logq = torch.randn(5, dtype=torch.float64, generator=generator).log_softmax(0)

    @property
    def logp(self) -> Tensor:
        return self.logits.log_softmax(0)

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.logits)[0]

    def expectation(self, per_outcome: Tensor) -> Tensor:
        """Over samples of the policy, the sampling itself not differentiated."""
        return (self.logp.detach().exp() * per_outcome).sum()

    def in_loss(self, estimator: Any) -> Tensor:
        estimate = kl_estimate(self.logp[None], self.logq[None], estimator=estimator)[0]
        return self.gradient(self.expectation(estimate))

    def in_reward(self, estimator: Any) -> Tensor:
        """On-policy surrogate loss with -KL as the advantage, as PPO has it."""
        penalty = kl_estimate(self.logp[None], self.logq[None], estimator=estimator).detach()
        mask = torch.ones(1, 5, dtype=torch.bool)
        loss = ppo_clip_loss(
            self.logp[None], self.logp[None], -penalty, mask, clip_low=0.2, clip_high=0.2
        )
        return self.gradient(self.expectation(loss.per_token[0]))

    def reverse(self) -> Tensor:
        return self.gradient((self.logp.exp() * (self.logp - self.logq)).sum())

    def forward(self) -> Tensor:
        return self.gradient((self.logq.exp() * (self.logq - self.logp)).sum())


def _close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def test_i17_true_gradient_from_k1_in_the_reward_and_k2_or_full_in_the_loss() -> None:
    policy = Categorical()
    _close(policy.in_reward("k1"), policy.reverse())
    _close(policy.in_loss("k2"), policy.reverse())
    _close(policy.gradient(kl_full(policy.logp, policy.logq)), policy.reverse())


def test_i17_k1_in_the_loss_does_nothing() -> None:
    policy = Categorical()
    _close(policy.in_loss("k1"), torch.zeros(5, dtype=torch.float64))


def test_i17_k3_in_the_loss_is_the_forward_gradient() -> None:
    policy = Categorical()
    _close(policy.in_loss("k3"), policy.forward())
    assert torch.cosine_similarity(policy.in_loss("k3"), policy.reverse(), dim=0) < 0.99


def test_i17_k2_and_k3_in_the_reward_are_biased() -> None:
    policy = Categorical()
    # E[(q/p - 1 + log p/q) grad log p] = sum q grad log p + grad KL(p || q)
    _close(policy.in_reward("k3"), policy.reverse() - policy.forward())
    cosines = {
        estimator: [
            float(torch.cosine_similarity(p.in_reward(estimator), p.reverse(), dim=0))
            for p in map(Categorical, range(40))
        ]
        for estimator in ESTIMATORS
    }
    assert min(cosines["k1"]) > 1 - 1e-12
    assert min(cosines["k2"]) < 0.95
    assert min(cosines["k3"]) < -0.5  # against the true gradient


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_i18_coefficient_derivative_in_loss_and_in_reward(estimator: Any) -> None:
    """Where the KL is placed, the derivative in its coefficient is the KL; elsewhere it is 0."""
    inputs = _inputs(dtype=torch.float64)
    kl = kl_estimate(inputs["logprobs"], inputs["old"], estimator=estimator, mask=MASK)
    rewards = torch.randn(4, dtype=torch.float64)
    policy = _ppo()(inputs, MASK).per_token

    def loss(coef: float) -> Tensor:
        return reduce_loss(policy + coef * kl, MASK, count=MASK.sum())

    mean = kl[MASK].mean()
    torch.testing.assert_close((loss(0.7) - loss(0.2)) / 0.5, mean, rtol=1e-10, atol=0)
    placed = [place_rewards(rewards, MASK, kl=kl, kl_coef=coef) for coef in (0.2, 0.7)]
    torch.testing.assert_close((placed[1] - placed[0]) / 0.5, -kl, rtol=1e-10, atol=1e-12)
    untouched = place_rewards(rewards, MASK)
    torch.testing.assert_close(untouched.sum(), rewards[MASK.any(1)].sum())


# ---------------------------------------------------------------- rewards and GAE


def test_i27_reward_sits_on_the_last_counted_token_and_nowhere_else() -> None:
    placed = place_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), MASK)
    assert placed.nonzero().tolist() == [[0, 4], [1, 5], [2, 1]]
    assert placed[placed != 0].tolist() == [1.0, 2.0, 3.0]


POISONS = (float("nan"), float("inf"), -float("inf"), 1e6, -1e6)


def _poisoned(inputs: Mapping[str, Tensor], mask: Tensor, poison: float) -> dict[str, Tensor]:
    return {name: torch.where(mask, x, poison) for name, x in inputs.items()}


@pytest.mark.parametrize("poison", POISONS)
def test_i28_gae_does_not_run_through_masked_values(poison: float) -> None:
    inputs = _inputs()
    clean = gae(inputs["logprobs"], inputs["old"], MASK, gamma=0.9, lam=0.8)
    bad = _poisoned(inputs, MASK, poison)
    dirty = gae(bad["logprobs"], bad["old"], MASK, gamma=0.9, lam=0.8)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", sorted(set(TOKEN_LOSSES) - {"kl-full"}))  # see the next test
def test_i29_poisoned_padding_changes_no_loss_gradient_or_metric(
    name: str, mode: Any, poison: float
) -> None:
    inputs, count = _inputs(), _global_count(MASK, mode)
    clean = _loss_and_gradient(TOKEN_LOSSES[name], inputs, MASK, mode, count)
    bad = _poisoned(inputs, MASK, poison)
    dirty = _loss_and_gradient(TOKEN_LOSSES[name], bad, MASK, mode, count)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    assert clean[0] != 0 and not dirty[1][~MASK].any()
    if not name.endswith("-bare"):
        assert torch.equal(clean[2].per_token, dirty[2].per_token)
        assert not dirty[2].per_token[~MASK].any()
    for key, metric in clean[2].metrics.items():
        assert metric.value() == dirty[2].metrics[key].value()


@pytest.mark.parametrize("poison", POISONS)
def test_i29_poisoned_padding_does_not_reach_the_full_kl(poison: float) -> None:
    results = []
    for value in (0.0, poison):
        generator = torch.Generator().manual_seed(2)
        logp, logq = (torch.randn(4, 6, 7, generator=generator).log_softmax(-1) for _ in range(2))
        logp = torch.where(MASK[..., None], logp, value).requires_grad_()
        kl = kl_full(logp, torch.where(MASK[..., None], logq, value), mask=MASK)
        reduce_loss(kl, MASK, count=MASK.sum()).backward()
        assert logp.grad is not None
        results.append((kl.detach(), logp.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("poison", POISONS)
def test_i29_poisoned_padding_changes_no_advantage(poison: float) -> None:
    inputs = _inputs()
    bad = _poisoned(inputs, MASK, poison)
    for shift in (True, False):
        clean = whiten(inputs["old"], MASK, shift_mean=shift)
        assert torch.equal(clean, whiten(bad["old"], MASK, shift_mean=shift))
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rewards_bad = torch.where(MASK.any(1), rewards, poison)
    clean = place_rewards(rewards, MASK, kl=inputs["old"], kl_coef=0.1)
    assert torch.equal(clean, place_rewards(rewards_bad, MASK, kl=bad["old"], kl_coef=0.1))


@settings(max_examples=40, deadline=None)
@given(
    mask=st.lists(st.booleans(), min_size=1, max_size=12),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
def test_i30_gae_on_the_compressed_subsequence_is_the_masked_one(
    mask: list[bool], gamma: float, lam: float
) -> None:
    kept = torch.tensor([mask])
    rewards, values = torch.randn(2, 1, len(mask))
    masked = gae(rewards, values, kept, gamma=gamma, lam=lam)
    short, full = (rewards[kept][None], values[kept][None]), torch.ones(1, sum(mask))
    compressed = gae(*short, full.bool(), gamma=gamma, lam=lam)
    for left, right in zip(masked, compressed, strict=True):
        assert torch.equal(left[kept], right[0])


# ---------------------------------------------------------------- whitening and groups


@pytest.mark.parametrize("shift_mean", [True, False])
def test_i31_masked_mean_and_variance(shift_mean: bool) -> None:
    x = 3 * torch.randn(4, 6, dtype=torch.float64) + 5
    kept = whiten(x, MASK, shift_mean=shift_mean)[MASK]
    expected = 0.0 if shift_mean else x[MASK].mean().item()
    assert kept.mean().item() == pytest.approx(expected, abs=1e-12)
    assert kept.var(unbiased=False).item() == pytest.approx(1, abs=1e-8)


class TwoRanks:
    """Sums tensors of two threads, as an all-reduce over two processes does."""

    def __init__(self) -> None:
        self.parts: dict[int, Tensor] = {}
        self.barrier = threading.Barrier(2, timeout=20)

    def reducer(self, rank: int) -> Callable[[Tensor], Tensor]:
        def all_reduce(sums: Tensor) -> Tensor:
            self.parts[rank] = sums
            self.barrier.wait()
            total = self.parts[0] + self.parts[1]
            self.barrier.wait()
            return total

        return all_reduce


@pytest.mark.parametrize("cut", [1, 3])
def test_i31_whitening_is_the_same_on_one_rank_and_on_two(cut: int) -> None:
    """With unequal token counts; cut 3 leaves the second rank a row without any."""
    x = torch.randn(4, 6) + 2
    ranks, results = TwoRanks(), {}

    def work(rank: int, rows: slice) -> None:
        results[rank] = whiten(x[rows], MASK[rows], reduce_sums=ranks.reducer(rank))

    threads = [
        threading.Thread(target=work, args=(rank, rows))
        for rank, rows in enumerate((slice(0, cut), slice(cut, 4)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    together = torch.cat([results[0], results[1]])
    torch.testing.assert_close(together, whiten(x, MASK), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e6])
def test_i32_a_constant_group_gives_zero(scale: Any, value: float) -> None:
    rewards, groups = torch.full((8,), value), torch.zeros(8, dtype=torch.long)
    assert not group_relative(rewards, groups, scale=scale).any()
    assert not leave_one_out(rewards, groups).any()


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_i32_near_ties_are_not_amplified(scale: Any) -> None:
    rewards = 0.5 + 1e-6 * torch.randn(8)
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    assert not group_relative(rewards, groups, scale=scale).any()
    # a real difference just past the rule is not lost, and not larger than unit size
    spread = torch.tensor([0.0, 4 * MIN_STD])
    assert 0.5 < group_relative(spread, torch.zeros(2), scale=scale)[1] < 1


@settings(max_examples=40, deadline=None)
@given(
    order=st.permutations(range(9)),
    rewards=st.lists(
        st.one_of(st.integers(-4, 4).map(lambda n: n / 4), st.just(float("nan"))),
        min_size=9,
        max_size=9,
    ),
)
def test_i33_permuting_rows_permutes_advantages(order: list[int], rewards: list[float]) -> None:
    groups = torch.tensor([0, 0, 0, 0, 5, 5, 5, 2, 2])
    values, shuffle = torch.tensor(rewards, dtype=torch.float64), torch.tensor(order)
    scaled: tuple[Any, ...] = ("group", "batch", "none")
    functions: list[Callable[[Tensor, Tensor], Tensor]] = [leave_one_out]
    functions += [lambda r, g, s=s: group_relative(r, g, scale=s) for s in scaled]
    for function in functions:
        straight, shuffled = (
            function(values, groups),
            function(values[shuffle], groups[shuffle]),
        )
        torch.testing.assert_close(straight[shuffle], shuffled, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- values


def test_i40_value_clipping_equals_unclipped_when_old_is_new() -> None:
    inputs = _inputs()
    values, returns = inputs["logprobs"].requires_grad_(), inputs["advantages"]
    gradients = []
    for clip in (0.1, None):
        loss = clipped_value_loss(values, values, returns, MASK, clip=clip)
        gradients.append(torch.autograd.grad(loss.per_token.sum(), values)[0])
        expected = torch.where(MASK, 0.5 * (values - returns).square(), 0.0)
        assert torch.equal(loss.per_token, expected)
    # at the tie both branches have the same slope
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-7)


def test_i40_value_clipping_by_hand_outside_the_range() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    values = torch.tensor([[2.0, 2.0]], requires_grad=True)
    loss = clipped_value_loss(
        values, torch.zeros(1, 2), torch.tensor([[2.0, -1.0]]), mask, clip=0.5
    )
    # right on target but moved too far: (0.5 - 2)^2 / 2; off target: the unclipped 3^2 / 2
    assert loss.per_token.tolist() == [[1.125, 4.5]]
    loss.per_token.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[0.0, 3.0]]
