"""Preference losses and their gradients against trl's own trainers.

trl's loss methods are called unbound, on a stand-in `self` that holds just the attributes they
read, and a stand-in model that returns given log-probabilities: nothing of ours is in the oracle.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trl_stand_ins import accelerator, metrics

from alignment.losses import (
    DIVERGENCE_KINDS,
    PREFERENCE_KINDS,
    SequenceLoss,
    desensitized_sums,
    kto_kl,
    kto_loss,
    preference_loss,
)

pytest.importorskip("trl")

from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
PAIRS = 3
LENGTHS = torch.tensor([4, 2, 6, 3, 5, 1])  # chosen, then rejected
COMPLETION_MASK = (torch.arange(8)[None] > 0) & (torch.arange(8)[None] <= LENGTHS[:, None])
MASK = COMPLETION_MASK[:, 1:]
BETA = 0.2

# our name, trl's, and the smoothing it is compared at
DPO_KINDS = [
    ("sigmoid", "sigmoid", 0.0),
    ("sigmoid_norm", "sigmoid_norm", 0.0),
    ("hinge", "hinge", 0.0),
    ("ipo_norm", "ipo", 0.0),
    ("exo", "exo_pair", 0.01),
    ("nca", "nca_pair", 0.0),
    ("robust", "robust", 0.1),
    ("bco", "bco_pair", 0.0),
    ("sppo", "sppo_hard", 0.0),
    ("aot", "aot", 0.1),
    ("aot_unpaired", "aot_unpaired", 0.1),
    ("apo_zero", "apo_zero", 0.0),
    ("apo_down", "apo_down", 0.0),
    ("discopop", "discopop", 0.0),
]


def pair_logprobs() -> tuple[Tensor, Tensor]:
    """Log-probabilities per token `[2 * PAIRS, 7]`, of the policy and of the reference."""
    generator = torch.Generator().manual_seed(6)
    per_token = -2 * torch.rand(2 * PAIRS, 7, generator=generator) * MASK
    ref = per_token + 0.7 * torch.randn(2 * PAIRS, 7, generator=generator) * MASK
    return per_token, ref


def outputs(per_token: Tensor) -> SimpleNamespace:
    zeros = torch.zeros(per_token.shape)
    return SimpleNamespace(
        log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )


class Unused(nn.Module):
    """What trl asks about its model; its outputs come from elsewhere."""

    is_gradient_checkpointing = False


def trl_dpo(weights: dict[str, float], **options: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    per_token, ref = pair_logprobs()
    per_token.requires_grad_()
    logged = metrics()
    defaults = {
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "label_smoothing": 0.0,
    }
    trainer = SimpleNamespace(
        model=Unused(),
        ref_model=lambda **_: outputs(ref),
        accelerator=accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        beta=BETA,
        loss_types=list(weights),
        loss_weights=list(weights.values()),
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        _metrics=logged,
        _total_train_tokens=0,
        _tp_size=1,
        **{**defaults, **options},
    )
    inputs = {
        "input_ids": torch.zeros(2 * PAIRS, 8, dtype=torch.long),
        "attention_mask": torch.ones(2 * PAIRS, 8, dtype=torch.long),
        "completion_mask": COMPLETION_MASK,
    }
    loss = DPOTrainer._compute_loss(
        trainer, lambda **_: outputs(per_token), inputs, return_outputs=False
    )
    loss.backward()
    assert per_token.grad is not None
    return loss.detach(), per_token.grad * MASK, logged["train"]


class Ours:
    """The inputs of our losses, from the same log-probabilities per token."""

    def __init__(self, ld_alpha: float | None = None) -> None:
        self.per_token, ref = pair_logprobs()
        self.per_token.requires_grad_()
        if ld_alpha is None:
            sums, ref_sums = (torch.where(MASK, x, 0.0).sum(1) for x in (self.per_token, ref))
        else:
            public = torch.minimum(LENGTHS[:PAIRS], LENGTHS[PAIRS:]).repeat(2)
            sums = desensitized_sums(self.per_token, MASK, public, ld_alpha)
            ref_sums = desensitized_sums(ref, MASK, public, ld_alpha)
        self.logps = (sums[:PAIRS], sums[PAIRS:], ref_sums[:PAIRS], ref_sums[PAIRS:])
        self.lengths = {"chosen_lengths": LENGTHS[:PAIRS], "rejected_lengths": LENGTHS[PAIRS:]}

    def check(self, loss: SequenceLoss, theirs: Tensor, their_gradient: Tensor) -> None:
        ours = loss.per_sequence.sum() / PAIRS
        ours.backward()
        torch.testing.assert_close(ours.detach(), theirs, **TOLERANCE)
        torch.testing.assert_close(self.per_token.grad, their_gradient, **TOLERANCE)


def check_rewards(loss: SequenceLoss, logged: dict[str, Any]) -> None:
    names = {"chosen": "chosen", "rejected": "rejected", "margin": "margins"}
    for name, their_name in {**names, "accuracy": "accuracies"}.items():
        value = loss.metrics[f"reward/{name}"].value()
        assert value == pytest.approx(logged[f"rewards/{their_name}"][0], abs=1e-6)
    for name in ("chosen", "rejected"):
        value = loss.metrics[f"logps/{name}"].value()
        assert value == pytest.approx(logged[f"logps/{name}"][0], abs=1e-6)


# ---------------------------------------------------------------- pairs


@pytest.mark.parametrize(("kind", "loss_type", "smoothing"), DPO_KINDS)
def test_preference_kinds(kind: str, loss_type: str, smoothing: float) -> None:
    theirs, gradient, logged = trl_dpo({loss_type: 1.0}, label_smoothing=smoothing)
    ours = Ours()
    loss = preference_loss(
        *ours.logps, kind=kind, beta=BETA, label_smoothing=smoothing, **ours.lengths
    )
    ours.check(loss, theirs, gradient)
    check_rewards(loss, logged)


DIVERGENCES = {
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js": {"f_divergence_type": "js_divergence"},
    # the paper's alpha is 1 less trl's
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
}
DIVERGING = [row for row in DPO_KINDS if row[0] in DIVERGENCE_KINDS]


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@pytest.mark.parametrize(("kind", "loss_type", "smoothing"), DIVERGING)
def test_divergences(kind: str, loss_type: str, smoothing: float, divergence: str) -> None:
    theirs, gradient, logged = trl_dpo(
        {loss_type: 1.0}, label_smoothing=smoothing, **DIVERGENCES[divergence]
    )
    ours = Ours()
    loss = preference_loss(
        *ours.logps,
        kind=kind,
        beta=BETA,
        label_smoothing=smoothing,
        divergence=divergence,
        alpha=0.3,
        **ours.lengths,
    )
    ours.check(loss, theirs, gradient)
    check_rewards(loss, logged)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("kind", "loss_type"), [("sigmoid", "sigmoid"), ("ipo_norm", "ipo")])
def test_length_desensitized(kind: str, loss_type: str, alpha: float) -> None:
    theirs, gradient, logged = trl_dpo({loss_type: 1.0}, ld_alpha=alpha)
    ours = Ours(ld_alpha=alpha)
    loss = preference_loss(*ours.logps, kind=kind, beta=BETA, **ours.lengths)
    ours.check(loss, theirs, gradient)
    check_rewards(loss, logged)


def test_sft_term_is_a_mean_over_tokens_in_trl_and_over_pairs_here() -> None:
    """trl divides every chosen sum by the batch's mean length; given that length, so do we."""
    theirs, gradient, _ = trl_dpo({"sigmoid": 1.0, "sft": 0.7})
    ours = Ours()
    mean = LENGTHS[:PAIRS].float().mean().expand(PAIRS)
    loss = preference_loss(
        *ours.logps,
        kind="sigmoid",
        beta=BETA,
        nll_coef=0.7,
        chosen_lengths=mean,
        rejected_lengths=mean,
    )
    ours.check(loss, theirs, gradient)


@pytest.mark.parametrize(
    ("weights", "their_weights", "options", "their_options"),
    [
        (
            {"sigmoid": 0.8, "bco": 0.2, "nll": 1.0},
            {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0},
            {},
            {},
        ),
        (
            {"robust": 0.5, "apo_down": 2.0, "aot": 0.3, "ipo_norm": 0.1},
            {"robust": 0.5, "apo_down": 2.0, "aot": 0.3, "ipo": 0.1},
            {"label_smoothing": 0.1},
            {"label_smoothing": 0.1},
        ),
        (
            {"hinge": 0.6, "sigmoid": 0.4},
            {"hinge": 0.6, "sigmoid": 0.4},
            {"divergence": "js"},
            {"f_divergence_type": "js_divergence"},
        ),
    ],
)
def test_weighted_sums(
    weights: dict[str, float],
    their_weights: dict[str, float],
    options: dict[str, Any],
    their_options: dict[str, Any],
) -> None:
    theirs, gradient, logged = trl_dpo(their_weights, **their_options)
    ours = Ours()
    lengths = ours.lengths
    if "nll" in weights:  # as trl averages it, see above
        mean = LENGTHS[:PAIRS].float().mean().expand(PAIRS)
        lengths = {"chosen_lengths": mean, "rejected_lengths": mean}
    loss = preference_loss(*ours.logps, kind=weights, beta=BETA, **options, **lengths)
    ours.check(loss, theirs, gradient)
    check_rewards(loss, logged)


# ---------------------------------------------------------------- CPO, SimPO, ORPO

CPO_KINDS = [
    ("simpo", "simpo", 0.0),
    ("simpo", "simpo", 0.1),
    ("cpo", "sigmoid", 0.0),
    ("cpo", "sigmoid", 0.1),
    ("sigmoid", "sigmoid", 0.1),
    ("ipo", "ipo", 0.0),
]


@pytest.mark.parametrize(("kind", "loss_type", "smoothing"), CPO_KINDS)
def test_cpo_trainer(kind: str, loss_type: str, smoothing: float) -> None:
    """CPO's trainer has the conservative sigmoid and IPO on sums, which DPO's has not; given
    log-ratios in the place of log-probabilities, they are ours."""
    ours = Ours()
    chosen, rejected, ref_chosen, ref_rejected = ours.logps
    loss = preference_loss(
        *ours.logps,
        kind=kind,
        beta=0.4,
        label_smoothing=smoothing,
        nll_coef=0.0,  # trl adds it elsewhere
        **ours.lengths,
    )
    given = [chosen, rejected]
    if kind == "simpo":
        given = [chosen / LENGTHS[:PAIRS], rejected / LENGTHS[PAIRS:]]
    elif kind != "cpo":
        given = [chosen - ref_chosen, rejected - ref_rejected]
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=0.4,
        simpo_gamma=0.5,
        label_smoothing=smoothing,
        loss_type=loss_type,
        accelerator=accelerator(),
    )
    theirs, chosen_rewards, _ = CPOTrainer.cpo_loss(trainer, *given)
    (gradient,) = torch.autograd.grad(theirs.mean(), ours.per_token, retain_graph=True)
    ours.check(loss, theirs.mean().detach(), gradient)
    assert loss.metrics["reward/chosen"].value() == pytest.approx(chosen_rewards.mean().item())


def test_orpo() -> None:
    ours = Ours()
    chosen, rejected, *_ = ours.logps
    means = (chosen / LENGTHS[:PAIRS], rejected / LENGTHS[PAIRS:])
    trainer = SimpleNamespace(beta=0.1, accelerator=accelerator())
    theirs, *_ = ORPOTrainer.odds_ratio_loss(trainer, *means)
    expected = (-means[0] - theirs).mean()  # trl's sign: NLL less the returned value
    (gradient,) = torch.autograd.grad(expected, ours.per_token, retain_graph=True)
    loss = preference_loss(chosen, rejected, None, None, kind="orpo", beta=0.1, **ours.lengths)
    ours.check(loss, expected.detach(), gradient)


def test_every_kind_is_compared() -> None:
    compared = {row[0] for row in DPO_KINDS} | {row[0] for row in CPO_KINDS} | {"orpo"}
    assert compared == set(PREFERENCE_KINDS)


# ---------------------------------------------------------------- unpaired

DESIRABLE = torch.tensor([True, False, True, True, False, True])


def trl_kto(loss_type: str, mismatched: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    per_token, ref = pair_logprobs()
    per_token.requires_grad_()
    logged = metrics()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=loss_type == "kto",
        _compute_kl_logps=lambda model, batch: mismatched[0] if loss_type == "kto" else None,
        beta=BETA,
        loss_type=loss_type,
        desirable_weight=1.5,
        undesirable_weight=0.8,
        _metrics=logged,
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros(2 * PAIRS, 8, dtype=torch.long),
        "attention_mask": torch.ones(2 * PAIRS, 8, dtype=torch.long),
        "completion_mask": COMPLETION_MASK,
        "label": DESIRABLE,
        "ref_logps": ref.sum(1),
        "ref_KL_logps": mismatched[1],
    }
    loss = KTOTrainer._compute_loss(
        trainer, lambda **_: outputs(per_token), inputs, return_outputs=False
    )
    loss.backward()
    assert per_token.grad is not None
    return loss.detach(), per_token.grad * MASK, logged["train"]


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("drift", [0.9, -0.9])  # below 0 the reference point is clamped
def test_kto(loss_type: str, drift: float) -> None:
    ref_mismatched = torch.tensor([-30.0, -21.5, -44.0, -28.0, -35.0, -19.0])
    noise = torch.tensor([0.5, -0.4, 0.1, 0.6, -0.5, -0.1])
    mismatched = torch.stack([ref_mismatched + drift + noise, ref_mismatched])
    theirs, gradient, logged = trl_kto(loss_type, mismatched)
    per_token, ref = pair_logprobs()
    per_token.requires_grad_()
    kl = kto_kl(*mismatched) if loss_type == "kto" else 0.0
    loss = kto_loss(
        torch.where(MASK, per_token, 0.0).sum(1),
        ref.sum(1),
        DESIRABLE,
        kl,
        beta=BETA,
        desirable_weight=1.5,
        undesirable_weight=0.8,
    )
    ours = loss.per_sequence.mean()
    ours.backward()
    torch.testing.assert_close(ours.detach(), theirs, **TOLERANCE)
    torch.testing.assert_close(per_token.grad, gradient, **TOLERANCE)
    assert loss.metrics["kl"].value() == pytest.approx(logged["kl"][0], abs=1e-6)
    for name, their_name in {"desirable": "chosen", "undesirable": "rejected"}.items():
        for what, theirs_what in {"reward": "rewards", "logps": "logps"}.items():
            value = loss.metrics[f"{what}/{name}"].value()
            assert value == pytest.approx(logged[f"{theirs_what}/{their_name}"][0], abs=1e-6)
