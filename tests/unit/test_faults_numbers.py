"""NaN and infinities in losses, gradients, logits, log-probabilities and rewards.

Losses and gradients: see also `test_i42_*` in tests/invariants/test_trainer_invariants.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_models import tiny_model
from tiny_runs import events_of, metrics_of, weights_of

from alignment.modeling.finite import NonFiniteError, first_nonfinite, require_finite
from alignment.modeling.logits import transform_logits
from alignment.modeling.policy import PolicyWithReference
from alignment.modeling.reference import make_reference
from alignment.rollout.hf import HFEngine
from alignment.rollout.native import NativeEngine
from alignment.runs.checkpoint import list_checkpoints
from alignment.runs.directory import RunDirectory
from alignment.trainers.preference import reference_logprobs
from alignment.trainers.update import Updater
from alignment.types import AlignmentError, Prompt, Sample, SamplingParams

NO_TASKS = "eval={tasks: []}"
PROMPTS = [Prompt((5, 6), "", 3), Prompt((7,), "", 4)]
PARAMS = SamplingParams(max_new_tokens=6, n=2, seed=1, step=9)


class Letters:
    eos_token_id = 2

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


# -- losses and gradients ---------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    one = weights_of(tiny_runs.run("sft", tmp_path / "one", "algorithm.steps=1", NO_TASKS))
    gradient = Updater._gradient
    calls: list[int] = []

    def spoiled(self: Updater, *arguments: Any) -> float:
        loss = gradient(self, *arguments)
        calls.append(1)
        if len(calls) == 2:
            self._optimizer.gradients[-1].view(-1)[0] = value
        return loss

    monkeypatch.setattr(Updater, "_gradient", spoiled)
    directory = tiny_runs.run("sft", tmp_path / "two", "algorithm.steps=2", NO_TASKS)
    assert [record["optim/skipped_updates"] for record in metrics_of(directory)] == [0.0, 1.0]
    for name, weight in weights_of(directory).items():
        assert torch.equal(weight, one[name])
    (event,) = events_of(directory, "nonfinite")
    assert event["step"] == 2
    assert f"gradient norm {'nan' if math.isnan(value) else 'inf'}" in event["message"]


# -- logits, while sampling -------------------------------------------------------------------


def all_logits(model: Any, value: float) -> None:
    model.lm_head.weight.data.fill_(value)


def one_logit(model: Any, value: float) -> None:
    """Of a token that need not be drawn."""
    model.lm_head.weight.data[-1] = value


@pytest.mark.parametrize("make", [NativeEngine, HFEngine], ids=["native", "hf"])
@pytest.mark.parametrize("spoil", [all_logits, one_logit])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "transform", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str
)
def test_sampling_from_logits_that_are_not_finite_is_an_error(
    make: Any, spoil: Callable[..., None], value: float, transform: dict[str, Any]
) -> None:
    model = tiny_model("llama")
    spoil(model, value)
    options = {"max_new_tokens": 6, "n": 2, "step": 9, **transform}
    with pytest.raises(NonFiniteError) as caught:
        make(model, Letters()).generate(PROMPTS, SamplingParams(**options))
    message = str(caught.value)
    assert message.startswith("step 9, sampling: the logits for token 0 of sample 0 of prompt ")
    assert "its weights are not finite, lm_head.weight first" in message
    assert "--resume DIR" in message


@pytest.mark.parametrize("make", [NativeEngine, HFEngine], ids=["native", "hf"])
def test_logits_that_overflow_later_name_the_token(make: Any) -> None:
    """Weights are finite here; the logits of the fourth token are not."""
    model = tiny_model("llama")
    calls: list[int] = []

    def spoil(module: Any, arguments: Any, logits: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return torch.full_like(logits, math.inf) if len(calls) == 4 else logits

    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match=r"token 3 of sample 0 of prompt 3 .* overflow on the"):
        make(model, Letters(), stop_token_ids=()).generate(PROMPTS[:1], PARAMS)


@pytest.mark.parametrize("engine", ["native", "hf"])
def test_a_run_whose_policy_broke_stops_with_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """The weights turn into NaN behind the optimizer's back, after step 2."""
    step = Updater._step
    calls: list[int] = []

    def spoil(self: Updater, *arguments: Any) -> None:
        step(self, *arguments)
        calls.append(1)
        if len(calls) == 3:
            next(iter(self._model.parameters())).data.fill_(math.nan)

    settings = ("checkpoint.every=1", "algorithm.steps=5", NO_TASKS, f"rollout.engine={engine}")
    with monkeypatch.context() as patch:
        patch.setattr(Updater, "_step", spoil)
        with pytest.raises(NonFiniteError, match=r"step 4, sampling: .*embed_tokens.weight first"):
            tiny_runs.run("grpo", tmp_path, *settings)
    directory = RunDirectory.open(tmp_path / "grpo")
    (event,) = events_of(directory, "nonfinite")
    assert (event["step"], event["phase"]) == (4, "sampling")
    assert [event["type"] for event in events_of(directory, "error")] == ["NonFiniteError"]
    assert list_checkpoints(directory.checkpoints_dir)[-1][0] == 3


# -- log-probabilities, while scoring ---------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("transform", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.2}], ids=str)
def test_a_cut_distribution_does_not_hide_a_logit_that_is_not_finite(
    value: float, transform: dict[str, Any]
) -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, value], [1.0, 2.0, 3.0, -math.inf]])
    params = SamplingParams(max_new_tokens=1, **transform)
    logprobs = transform_logits(logits, params, keep=torch.tensor([2, 2])).log_softmax(-1)
    assert math.isnan(logprobs[0, 2])
    assert math.isfinite(logprobs[1, 2])


SAMPLES = [Sample((3, 4), (5, 6, 7), (True,) * 3), Sample((3, 4), (8, 9), (True,) * 2)]


def test_scoring_with_a_broken_model_is_an_error() -> None:
    model = tiny_model("llama")
    policy = PolicyWithReference(model, make_reference(model, "frozen_copy"))
    assert len(policy.logprobs(SAMPLES, 64)) == 2
    model.model.norm.weight.data.fill_(math.nan)
    message = r"a log-probability of the policy is not finite.*model.norm.weight first"
    with pytest.raises(NonFiniteError, match=message):
        policy.logprobs(SAMPLES, 64)
    assert len(policy.logprobs(SAMPLES, 64, of_reference=True)) == 2
    assert len(reference_logprobs(policy, SAMPLES, 64)) == 2


def test_scoring_with_a_broken_reference_is_an_error() -> None:
    model = tiny_model("llama")
    reference: Any = make_reference(model, "frozen_copy")
    policy = PolicyWithReference(model, reference)
    with reference.backbone() as backbone:
        backbone.causal_lm.lm_head.weight.data.fill_(math.inf)
    for scored in (
        lambda: policy.logprobs(SAMPLES, 64, of_reference=True),
        lambda: reference_logprobs(policy, SAMPLES, 64),
    ):
        with pytest.raises(NonFiniteError, match="a log-probability of the reference is not"):
            scored()


def test_the_first_bad_number_is_named() -> None:
    rows = [torch.zeros(3), torch.tensor([0.0, -1.0, -math.inf, math.nan])]
    with pytest.raises(NonFiniteError, match="first at token 2 of completion 1 of 2"):
        require_finite(rows, tiny_model("llama"), "a log-probability of the policy")
    require_finite([], tiny_model("llama"), "nothing")
    assert first_nonfinite(tiny_model("llama")) is None


# -- rewards ----------------------------------------------------------------------------------


def sometimes_nan(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """NaN for one completion of sixteen, infinite for another."""
    scores = [float(ids[0] % 7) for ids in completion_ids]
    scores[3], scores[9] = math.nan, math.inf
    return scores


def test_a_reward_that_is_not_finite_is_a_crash_of_that_sample(tmp_path: Path) -> None:
    rewards = "rewards=[{type: 'test_faults_numbers:sometimes_nan'}]"
    directory = tiny_runs.run("grpo", tmp_path, rewards, NO_TASKS)
    for record in metrics_of(directory):
        assert record["unscorable/crash"] == record["outcome/crash"] == 2 / 16
        assert math.isfinite(record["loss"])
    first, second = events_of(directory, "unscorable")
    assert (first["step"], second["step"], first["completions"]) == (1, 2, 2)
    assert (
        "2 of 16 completions could not be scored and are left out of the loss" in first["message"]
    )
    assert "prompt 0, sample 3" in first["message"] and "returned nan" in first["message"]


def test_too_many_rewards_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    rewards = "rewards=[{type: 'test_faults_numbers:sometimes_nan'}]"
    with pytest.raises(AlignmentError, match=r"12% of 16 .* over the limit of 10% \(crash in"):
        tiny_runs.run("grpo", tmp_path, rewards, NO_TASKS, "limits.unscorable=0.1")
    directory = RunDirectory.open(tmp_path / "grpo")
    assert len(events_of(directory, "unscorable")) == len(events_of(directory, "error")) == 1
