"""Invariants of the trainers, on whole runs of the tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    events_of,
    metrics_of,
    recipe_of,
    rollouts_of,
    run,
    steps_of,
    weights_of,
)
from torch import Tensor

from alignment.distributed import Distributed
from alignment.losses import TokenLoss, sft_loss
from alignment.modeling.scorer import Scores
from alignment.runs.directory import RunDirectory
from alignment.runs.events import EventLog
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import TrainingContext
from alignment.trainers.experience import Experience, training_samples
from alignment.trainers.group_relative import POLICY_LOSSES
from alignment.trainers.grpo import GRPOTrainer
from alignment.trainers.kl import KLTerm
from alignment.trainers.setup import Loaded, assemble, load_parts
from alignment.types import AlignmentError

SEVERAL_UPDATES = ("algorithm.updates_per_step=2", "algorithm.epochs_per_step=2")
LORA = ("model.lora={rank: 4}",)


@dataclass(frozen=True)
class Ratio:
    """How far a micro-batch's log-probabilities are from those it is compared with."""

    largest: float
    clip_fraction: float
    approx_kl: float


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch) -> list[Ratio]:
    """What the policy loss is given, one entry a micro-batch, in order."""
    seen: list[Ratio] = []
    clip = POLICY_LOSSES["clip"]

    def watched(own: Tensor, old: Tensor, *rest: Any) -> TokenLoss:
        loss = clip(own, old, *rest)
        mask = rest[1]
        clipped = sum(loss.metrics[f"clip_fraction/{side}"].value() for side in ("low", "high"))
        largest = (own.detach() - old).exp().sub(1).abs()[mask].max()
        seen.append(Ratio(float(largest), clipped, loss.metrics["approx_kl"].value()))
        return loss

    monkeypatch.setitem(POLICY_LOSSES, "clip", watched)
    return seen


def assembled(
    folder: Path, *overrides: str, change: Callable[[Loaded], None] = lambda loaded: None
) -> TrainingContext:
    """The parts of a GRPO run; `change` may alter what was loaded before it is put together."""
    loaded = load_parts(recipe_of("grpo", folder, *overrides))
    change(loaded)
    return assemble(loaded, Distributed(), EventLog(folder / "events.jsonl"), cache=folder)


# -- ratios -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_i13_first_minibatch_ratio_is_one(tmp_path: Path, ratios: list[Ratio], dtype: str) -> None:
    run("grpo", tmp_path, *SEVERAL_UPDATES, f"model.dtype={dtype}", "algorithm.steps=3")
    per_step = [ratios[i : i + 4] for i in range(0, len(ratios), 4)]
    assert len(per_step) == 3
    for first, *later in per_step:
        assert first.largest < 1e-5
        assert first.clip_fraction == 0.0
        assert first.approx_kl == 0.0
        assert max(update.largest for update in later) > 1e-3


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_i10_temperature_is_in_the_logprobs(
    tmp_path: Path, ratios: list[Ratio], temperature: float
) -> None:
    directory = run("grpo", tmp_path, *SEVERAL_UPDATES, f"rollout.temperature={temperature}")
    assert ratios[0].largest < 1e-5
    assert ratios[4].largest < 1e-5  # the first of the second step
    for record in metrics_of(directory):
        assert record["engine/logprob_gap_max"] < 1e-4


def test_i12_no_dropout_is_active_in_reinforcement_learning(
    tmp_path: Path, ratios: list[Ratio]
) -> None:
    run("grpo", tmp_path, *SEVERAL_UPDATES, "model.lora={rank: 4, dropout: 0.5}")
    assert ratios[0].largest < 1e-5
    assert ratios[4].largest < 1e-5


def test_i12_dropout_is_active_in_supervised_updates_only(tmp_path: Path) -> None:
    lora = "model.lora={rank: 4, dropout: 0.5}"
    task = "eval={every: 1, tasks: [{type: held_out_loss}]}"
    dropped = run("sft", tmp_path / "a", lora, task, "optim.lr=1e-9")
    plain = run("sft", tmp_path / "b", *LORA, task, "optim.lr=1e-9")
    # lora_B starts at zero, so the loss is the same; its gradient passes through the dropout.
    norms = [metrics_of(r)[0]["optim/grad_norm"] for r in (dropped, plain)]
    assert abs(norms[0] - norms[1]) > 0.05
    losses = [metrics_of(r)[0]["eval/held_out_loss/loss"] for r in (dropped, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


# -- reference and KL -------------------------------------------------------------------------

REFERENCES = {
    "full, frozen copy": ("model.reference=frozen_copy",),
    "full, synced": ("model.reference={mode: synced, every: 100}",),
    "fresh LoRA, adapter off": LORA,
}
ESTIMATORS = {
    "k2": ("algorithm.kl={coef: 0.1, estimator: k2}",),
    "k3": ("algorithm.kl={coef: 0.1, estimator: k3}",),
    "full": ("algorithm.kl={coef: 0.1, estimator: full}",),
    "k1 in the reward": ("algorithm.kl={coef: 0.1, placement: reward}",),
}


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_i19_kl_of_the_first_step_is_zero(tmp_path: Path, reference: str, estimator: str) -> None:
    settings = (*REFERENCES[reference], *ESTIMATORS[estimator], "optim.lr=1e-2")
    first, _, third = metrics_of(run("grpo", tmp_path, *settings, "algorithm.steps=3"))
    assert first["kl/mean"] == 0.0
    assert first["kl/sequence"] == 0.0
    assert abs(third["kl/mean"]) > 1e-6
    if estimator != "k1 in the reward":  # an estimate of one sample may be negative
        assert third["kl/mean"] > 0.0


@pytest.mark.parametrize("reference", REFERENCES)
def test_i19_reference_is_the_policy_as_handed_over(tmp_path: Path, reference: str) -> None:
    def tune(loaded: Loaded) -> None:
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)

    context = assembled(tmp_path, *REFERENCES[reference], change=tune)
    trainer = GRPOTrainer(context)
    assert trainer.step(1).metrics.result()["kl/mean"] == 0.0
    assert trainer.step(2).metrics.result()["kl/mean"] > 0.0


def test_i19_a_synced_reference_is_where_the_policy_is(tmp_path: Path) -> None:
    settings = ("model.reference={mode: synced, every: 2}", "algorithm.steps=4")
    kl = [record["kl/mean"] for record in metrics_of(run("grpo", tmp_path, *settings))]
    assert kl[0] == kl[2] == 0.0  # measured before the step's updates: copied after step 2
    assert kl[1] != 0.0 and kl[3] != 0.0


@pytest.mark.parametrize("reference", REFERENCES)
def test_i21_the_first_step_moves_the_policy_and_not_the_reference(
    tmp_path: Path, reference: str
) -> None:
    context = assembled(tmp_path, *REFERENCES[reference])
    trainer = GRPOTrainer(context)
    samples = training_samples(trainer.collect(1, MetricSums()), mask_truncated=False)

    def scores(of_reference: bool) -> Tensor:
        return torch.cat(context.policy.logprobs(samples, 4096, of_reference=of_reference))

    before = scores(False), scores(True)
    metrics = trainer.step(1).metrics.result()
    assert metrics["optim/moved_share"] >= 0.5  # a fresh adapter's second half moves first
    assert not torch.equal(scores(False), before[0])
    assert torch.equal(scores(True), before[1])


def _kl_parts(folder: Path, placement: str, coef: float) -> tuple[Tensor, Tensor, Tensor]:
    """(penalty in the reward, term in the loss, its gradient) of two made-up completions."""
    own = torch.tensor([[-1.0, -2.0, -0.5], [-0.3, -0.7, 0.0]], requires_grad=True)
    reference = [torch.tensor([-1.2, -1.5, -0.9]), torch.tensor([-0.2, -1.0])]
    old = [torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-0.3, -0.7])]
    mask = torch.tensor([[True, True, True], [True, True, False]])
    kl = f"algorithm.kl={{coef: {coef}, placement: {placement}}}"
    config: Any = recipe_of("grpo", folder, kl).algorithm
    term = KLTerm(config.kl, samples_per_step=8, has_reference=True)
    experience = Experience([None, None], [], old, reference)  # type: ignore[list-item]
    scores = Scores(own, mask, None, None, None, None, None, 5)
    in_loss = term.loss(scores, experience, 0, [0, 1], MetricSums())
    total = torch.where(mask, in_loss, 0.0).sum()
    gradient = torch.autograd.grad(total, own, allow_unused=True)[0] if total.requires_grad else own
    return term.penalty(experience), torch.where(mask, in_loss, 0.0).detach(), gradient


def test_i18_kl_acts_in_the_reward_or_in_the_loss(tmp_path: Path) -> None:
    penalty, in_loss, _ = _kl_parts(tmp_path, "reward", 0.5)
    # k1: the sum of own - reference, by hand
    torch.testing.assert_close(penalty, 0.5 * torch.tensor([0.2 - 0.5 + 0.4, -0.1 + 0.3]))
    assert not in_loss.any()
    penalty, in_loss, gradient = _kl_parts(tmp_path, "loss", 0.5)
    assert not penalty.any()
    # k3 of x = reference - own: exp(x) - x - 1, whose derivative in own is 1 - exp(x)
    x = torch.tensor([[-0.2, 0.5, -0.4], [0.1, -0.3, 0.0]])
    torch.testing.assert_close(in_loss, 0.5 * (x.exp() - x - 1))
    torch.testing.assert_close(gradient, 0.5 * (1 - x.exp()))


def test_i18_kl_is_linear_in_its_coefficient(tmp_path: Path) -> None:
    for placement in ("reward", "loss"):
        once, thrice = (_kl_parts(tmp_path, placement, coef) for coef in (0.5, 1.5))
        torch.testing.assert_close(thrice[0], 3 * once[0])
        torch.testing.assert_close(thrice[1], 3 * once[1])


# -- non-finite numbers -----------------------------------------------------------------------


def _planted(loss: TokenLoss, kind: str) -> TokenLoss:
    """A loss that is NaN, or that is finite with a gradient of NaN."""
    if kind == "loss":
        return replace(loss, per_token=loss.per_token * math.nan)
    # sqrt has no derivative at 0; the zero before it makes 0 * inf
    return replace(loss, per_token=loss.per_token + (loss.per_token * 0.0).sqrt())


@pytest.fixture(params=["loss", "gradient"])
def plant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Call it with the numbers of the loss calls (from 1) that are to go wrong."""

    def planting(calls: range) -> None:
        count = 0

        def wrap(original: Callable[..., TokenLoss]) -> Callable[..., TokenLoss]:
            def wrapped(*arguments: Any) -> TokenLoss:
                nonlocal count
                count += 1
                loss = original(*arguments)
                return _planted(loss, request.param) if count in calls else loss

            return wrapped

        monkeypatch.setitem(POLICY_LOSSES, "clip", wrap(POLICY_LOSSES["clip"]))
        monkeypatch.setattr("alignment.trainers.sft.sft_loss", wrap(sft_loss))

    yield planting


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_i42_a_nan_skips_the_update(tmp_path: Path, plant: Any, method: str) -> None:
    one_step = weights_of(run(method, tmp_path / "a", "algorithm.steps=1"))
    plant(range(2, 3))
    directory = run(method, tmp_path / "b", "algorithm.steps=2")
    two_steps = weights_of(directory)
    assert all(torch.equal(two_steps[name], one_step[name]) for name in one_step)
    first, second = metrics_of(directory)
    assert first["optim/skipped_updates"] == 0.0
    assert second["optim/skipped_updates"] == 1.0
    assert "loss" not in second
    (event,) = events_of(directory, "nonfinite")
    assert event["step"] == 2


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_i42_too_many_skipped_updates_stop_the_run(tmp_path: Path, plant: Any, method: str) -> None:
    plant(range(3, 99))
    with pytest.raises(AlignmentError, match=r"not finite in 3 updates in a row .* at step 5"):
        run(method, tmp_path, "algorithm.steps=9", "limits.nonfinite_steps=3")
    assert len(metrics_of(RunDirectory.open(tmp_path / method))) == 4


def test_i42_an_adaptive_controller_sits_out_a_skipped_step(tmp_path: Path, plant: Any) -> None:
    plant(range(1, 2))
    kl = "algorithm.kl={coef: 0.1, controller: adaptive, target: 1.0, horizon: 100}"
    assert len(metrics_of(run("grpo", tmp_path, kl))) == 2


# -- evaluation and rollouts leave training alone ---------------------------------------------

EVALUATED = {
    "sft with dropout": ("sft", ("model.lora={rank: 4, dropout: 0.3}",), "held_out_loss"),
    "sft": ("sft", (), "held_out_loss"),
    "grpo": ("grpo", (), "verifiable"),
    "grpo, transformers' engine": ("grpo", ("rollout.engine=hf",), "verifiable"),
}


@pytest.mark.parametrize("case", EVALUATED)
def test_i43_evaluation_changes_no_weight(tmp_path: Path, case: str) -> None:
    method, settings, task = EVALUATED[case]
    steps = "algorithm.steps=3"
    tasks = f"eval={{every: 1, tasks: [{{type: {task}}}, {{type: {task}, name: again}}]}}"
    evaluated = run(method, tmp_path / "on", *settings, steps, tasks)
    bare = run(method, tmp_path / "off", *settings, steps, "eval={at_start: false, tasks: []}")
    assert len(list(evaluated.evals_dir.glob("*.json"))) == 8
    weights = weights_of(evaluated), weights_of(bare)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert steps_of(evaluated) == steps_of(bare)


@pytest.mark.parametrize("settings", [(), LORA], ids=["full", "lora"])
def test_i44_a_rollout_leaves_the_model_as_it_was(
    tmp_path: Path, settings: tuple[str, ...]
) -> None:
    context = assembled(tmp_path, "model.dtype=bfloat16", "rollout.max_new_tokens=20", *settings)
    trainer = GRPOTrainer(context)
    trainer.step(1)

    def state() -> dict[str, Any]:
        model: Any = context.policy.model
        return {
            "dtypes": {n: p.dtype for n, p in model.named_parameters()},
            "identities": {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()},
            "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
            "gradients": {n: p.grad is None for n, p in model.named_parameters()},
            "modes": {n: m.training for n, m in model.named_modules()},
            "classes": {n: type(m) for n, m in model.named_modules()},
            "attention": model.config._attn_implementation,
            "cache": model.config.use_cache,
        }

    def tensors() -> dict[str, Tensor]:
        optimizer = context.trained.optimizer.state_dict()
        moments = {
            f"{name}.{key}": value.clone()
            for name, parts in optimizer["moments"].items()
            for key, value in parts.items()
        }
        masters = {f"{name}.master": m.clone() for name, m in optimizer["masters"].items()}
        weights = {n: p.detach().clone() for n, p in context.policy.model.named_parameters()}
        return moments | masters | weights

    before, values = state(), tensors()
    trainer.collect(2, MetricSums())
    assert state() == before
    after = tensors()
    assert values.keys() == after.keys()
    assert any(name.endswith(".master") for name in after)
    assert all(torch.equal(values[name], after[name]) for name in values)


# -- graders that fail ------------------------------------------------------------------------

FAILS = "rewards=[{{type: 'tiny_runs:FailsOn', samples: {samples}}}]"


def test_i47_a_crash_of_the_grader_masks_its_sample(tmp_path: Path) -> None:
    directory = run("grpo", tmp_path, "algorithm.group_size=8", FAILS.format(samples=[2]))
    for record, rows in zip(metrics_of(directory), rollouts_of(directory), strict=True):
        assert record["outcome/crash"] == record["unscorable/crash"] == 1 / 8
        for row in rows:
            failed = row["sample_index"] == 2
            assert (row["reward"] is None) == failed
            assert (row["outcome"] == "crash") == failed
            if failed:
                assert row["advantage"] == 0.0
        scored = [row["reward"] for row in rows if row["reward"] is not None]
        assert record["reward/mean"] == pytest.approx(sum(scored) / len(scored), abs=1e-6)
        groups = [rows[i : i + 8] for i in range(0, len(rows), 8)]
        for group in groups:  # the baseline is the mean of the scored ones
            assert sum(row["advantage"] for row in group) == pytest.approx(0.0, abs=1e-5)


def test_i47_too_many_crashes_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(AlignmentError, match=r"25% of 16 completions could not be scored") as no:
        run("grpo", tmp_path, FAILS.format(samples=[2]))
    assert "crash in reward 'tiny_runs:FailsOn': 4" in str(no.value)
    assert "the grader fell over" in str(no.value)
