"""PPO: its settings, its scores, its KL controller, and its critic."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import (
    LORA,
    SHARED,
    last_state,
    made_up,
    recipe_of,
    run,
    shift,
    trainer_of,
)
from tiny_runs import metrics_of
from torch import Tensor
from transformers import AutoModel

from alignment.modeling.load import load_tokenizer
from alignment.modeling.scalar import load_scalar_model, save_scalar_model
from alignment.runs.metrics import MetricSums
from alignment.trainers.experience import training_samples
from alignment.types import UserInputError

REPOSITORY = Path(__file__).parents[2]
NAN = float("nan")
ADAPTIVE = "algorithm.kl={coef: 0.1, placement: reward, controller: adaptive, %s}"


# -- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["algorithm.updates_per_step=3"], "3 updates do not divide 4 prompts"),
        (["algorithm.critic.warmup_steps=2"], "the run has 2 steps, so the policy would never"),
        (["algorithm.critic={kind: shared, lr: 1e-3}"], "applies to kind: separate only"),
        (["algorithm.critic={kind: shared, warmup_steps: 1}"], "applies to kind: separate only"),
        (["algorithm.critic={coef: 0.5}"], "applies to kind: shared only"),
        (
            ["algorithm.missing_eos_score=-1.0", "algorithm.missing_eos_penalty=1.0"],
            "missing_eos_score replaces the score it would be subtracted from",
        ),
        (["model.reference=none"], "a KL penalty needs a reference"),
        (["rewards=[]"], "rewards"),
    ],
)
def test_settings_that_could_not_work_are_refused(
    tmp_path: Path, settings: list[str], said: str
) -> None:
    with pytest.raises(UserInputError) as refused:
        recipe_of(tmp_path, *settings)
    assert said in " ".join(str(refused.value).split())


def test_the_arithmetic_is_printed(tmp_path: Path) -> None:
    config: Any = recipe_of(tmp_path).algorithm
    (line,) = config.describe_counts()
    assert "4 prompts x 2 completions = 8 samples a step" in line
    assert "2 x 2 updates of 4 = 4 updates" in line


# -- scores -----------------------------------------------------------------------------------

GRADES = (1.0, 4.0, None, 2.0, 5.0)
CUT_OFF = (1, 2)


def scores_of(folder: Path, *settings: str) -> tuple[Tensor, dict[str, float]]:
    trainer = trainer_of(folder, *settings)
    metrics = MetricSums()
    scores = trainer.scores(made_up(trainer, GRADES, (3,) * 5, CUT_OFF), metrics)
    return scores, metrics.result()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), [1.0, 4.0, NAN, 2.0, 5.0]),
        (("algorithm.missing_eos_penalty=1.5",), [1.0, 2.5, NAN, 2.0, 5.0]),
        (("algorithm.missing_eos_score=-1.0",), [1.0, -1.0, NAN, 2.0, 5.0]),
        (("algorithm.clip_rewards=3.0",), [1.0, 3.0, NAN, 2.0, 3.0]),
        (
            # after clipping: whatever the bound, it is a penalty of that size
            ("algorithm.clip_rewards=3.0", "algorithm.missing_eos_penalty=1.5"),
            [1.0, 1.5, NAN, 2.0, 3.0],
        ),
        # mean 3, deviation sqrt((4 + 1 + 1 + 4) / 4)
        (("algorithm.normalize_rewards=true",), [-1.264911, 0.632456, NAN, -0.632456, 1.264911]),
        (
            (
                "algorithm.normalize_rewards=true",
                "algorithm.clip_rewards=1.0",
                "algorithm.missing_eos_score=-1.0",
            ),
            [-1.0, -1.0, NAN, -0.632456, 1.0],
        ),
    ],
)
def test_scores_by_hand(tmp_path: Path, settings: tuple[str, ...], expected: list[float]) -> None:
    scores, metrics = scores_of(tmp_path, *settings)
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=0.0, atol=2e-6, equal_nan=True)
    assert metrics["reward/mean"] == 3.0  # as graded, the failed one left out
    counted = [score for score in expected if score == score]
    assert metrics["objective/score"] == pytest.approx(sum(counted) / 4, abs=1e-6)


def test_scores_are_normalized_by_all_that_were_seen(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "algorithm.normalize_rewards=true")
    trainer.scores(made_up(trainer, GRADES, (3,) * 5), MetricSums())
    scores = trainer.scores(made_up(trainer, (9.0, None), (3, 3)), MetricSums())
    # 1, 4, 2, 5 and 9: mean 4.2, squares around it 10.24 + 0.04 + 4.84 + 0.64 + 23.04
    assert float(scores[0]) == pytest.approx(4.8 / (38.8 / 5) ** 0.5, rel=1e-6)
    assert bool(scores[1].isnan())


def test_missing_ends_are_penalised_in_a_run(tmp_path: Path) -> None:
    short = "rollout.max_new_tokens=1"  # a random model all but never ends at once
    (record,) = metrics_of(
        run(tmp_path, short, "algorithm.missing_eos_score=-1.0", "algorithm.steps=1")
    )
    assert record["completion/cut_off"] == 1.0
    assert record["objective/score"] == -1.0
    assert record["reward/mean"] > 0.0


# -- the KL controller ------------------------------------------------------------------------


def test_the_controller_is_given_the_kl_of_the_rollout(tmp_path: Path) -> None:
    """coef (1 + clip(kl / target - 1, -0.2, 0.2) samples / horizon), with what step 2 sampled."""
    settings = ADAPTIVE % "target: 0.5, horizon: 40"
    records = metrics_of(run(tmp_path, settings, "algorithm.steps=4", "optim.lr=1e-2"))
    coef = 0.1
    errors = []
    for record in records:
        errors.append(max(-0.2, min(0.2, record["kl/sequence"] / 0.5 - 1)))
        coef *= 1 + errors[-1] * 8 / 40
        assert record["kl/coef"] == pytest.approx(coef, rel=1e-6)
    assert errors[0] == -0.2  # the first rollout is the reference's
    assert len(set(errors)) > 1


def test_in_the_critics_warm_up_the_policy_and_the_coefficient_stand_still(tmp_path: Path) -> None:
    settings = ADAPTIVE % "target: 5.0, horizon: 40"
    trainer = trainer_of(tmp_path, settings, "algorithm.critic.warmup_steps=2", "algorithm.steps=3")
    critic: Any = trainer.context.critic

    def weights(model: torch.nn.Module) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in model.parameters()]

    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    policy, before = weights(trainer.policy.model), weights(critic.model)
    for step in (1, 2):
        metrics = trainer.step(step).metrics.result()
        assert same(weights(trainer.policy.model), policy)
        assert not same(weights(critic.model), before)
        assert "loss" not in metrics and metrics["critic/loss"] > 0.0
        assert metrics["kl/sequence"] == 0.0
        assert trainer.kl.state_dict() == {"coef": 0.1}
    trainer.step(3)
    assert not same(weights(trainer.policy.model), policy)
    assert trainer.kl.state_dict()["coef"] < 0.1
    assert trainer.update.policy_version == 4
    assert trainer.update_critic is not None and trainer.update_critic.policy_version == 12


def test_a_long_warm_up_is_not_an_idle_run(tmp_path: Path) -> None:
    """Completions that are all cut off are a reason to learn nothing; here the critic does."""
    settings = ("rollout.max_new_tokens=2", "limits.idle_steps=1", "algorithm.steps=4")
    assert len(metrics_of(run(tmp_path, *settings, "algorithm.critic.warmup_steps=3"))) == 4


# -- the critic -------------------------------------------------------------------------------


def reward_model(folder: Path) -> Path:
    """A reward model of the tiny model's architecture, with its tokenizer."""
    model = load_scalar_model("tiny-random", seed=3)
    shift(model, 0.02, 4)
    save_scalar_model(model, load_tokenizer("tiny-random"), folder)
    return folder


@pytest.mark.parametrize("normalize", [False, True])
def test_a_critic_from_a_reward_model_starts_with_its_scores(
    tmp_path: Path, normalize: bool
) -> None:
    """Read at the states that tokens are chosen in: the prompt's last, and all but the last."""
    path = reward_model(tmp_path / "rm")
    trainer = trainer_of(
        tmp_path, f"algorithm.critic={{path: '{path}', normalize: {str(normalize).lower()}}}"
    )
    rollout = made_up(trainer, (0.0, 1.0, 0.5), (1, 7, 4))
    samples = training_samples(rollout, mask_truncated=False)
    values = trainer.critic.values(samples, [slice(0, 2), slice(2, 3)])
    decoder: Any = AutoModel.from_pretrained(path).double()
    head = load_scalar_model(path).head.weight.double()
    for item, row in zip(rollout.items, values, strict=True):
        prompt, completion = item.prompt.token_ids, item.completion.token_ids
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *completion]])
            hidden = decoder(ids, use_cache=False).last_hidden_state[0]
            expected = (hidden @ head[0])[len(prompt) - 1 : -1]
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(row.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_new_critic_starts_at_zero(tmp_path: Path) -> None:
    for name, settings in (("separate", ()), ("shared", SHARED)):
        trainer = trainer_of(tmp_path / name, *settings)
        samples = training_samples(made_up(trainer, (1.0,), (5,)), mask_truncated=False)
        (values,) = trainer.critic.values(samples, [slice(0, 1)])
        assert not values.any()


def test_a_critic_that_reads_other_tokens_is_refused(tmp_path: Path) -> None:
    path = reward_model(tmp_path / "rm")
    tokenizer: Any = load_tokenizer("tiny-random")
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(path)
    with pytest.raises(UserInputError, match=r"algorithm\.critic\.path: .* another tokenizer"):
        trainer_of(tmp_path, f"algorithm.critic={{path: '{path}'}}")


SCALED = {
    "separate": ("algorithm.critic={normalize: true, lr: 1e-2}",),
    "shared": ("algorithm.critic={kind: shared, normalize: true}", "optim.lr=1e-2"),
    "shared, LoRA": (*LORA, "algorithm.critic={kind: shared, normalize: true}", "optim.lr=1e-2"),
}


@pytest.mark.parametrize("case", SCALED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_moving_scale_changes_no_prediction(tmp_path: Path, dtype: str, case: str) -> None:
    """PopArt: returns around 300, while the scale starts at 1."""
    trainer = trainer_of(
        tmp_path,
        *SCALED[case],
        f"model.dtype={dtype}",
        "rewards=[{type: 'ppo_runs:far_from_zero'}]",
    )
    trainer.step(1)
    samples = training_samples(made_up(trainer, (1.0,) * 3, (2, 9, 5)), mask_truncated=False)
    before = torch.cat(trainer.critic.values(samples, [slice(0, 3)]))
    scale = trainer.critic.scale
    assert 250 < scale < 350  # that of the first step's returns, before it learned from them
    assert before.abs().max() > 1.0
    trainer.critic.rescale(torch.full((400,), -1000.0), MetricSums())
    assert trainer.critic.scale > 1.5 * scale
    after = torch.cat(trainer.critic.values(samples, [slice(0, 3)]))
    # bfloat16 rounds the head's weights once; the masters behind them are exact.
    within = 1e-5 if dtype == "float32" else 1e-2
    assert float((after - before).norm() / before.norm()) < within


def test_a_scaled_critic_learns_returns_of_any_size(tmp_path: Path) -> None:
    far = "rewards=[{type: 'ppo_runs:far_from_zero'}]"

    def error(folder: str, critic: str) -> float:
        settings = (far, f"algorithm.critic={critic}", "algorithm.kl.coef=0.0")
        records = metrics_of(run(tmp_path / folder, *settings, "algorithm.steps=5"))
        scale = records[-1].get("critic/scale", 1.0)
        return float(scale * records[-1]["critic/value/squared_error"] ** 0.5)

    off = error("off", "{lr: 3e-3, clip: null}")
    on = error("on", "{lr: 3e-3, clip: null, normalize: true}")
    assert on < 0.7 * off


def test_explained_variance_by_hand(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)

    def measured(values: list[float], returns: list[float]) -> float | None:
        metrics = MetricSums()
        trainer.critic.measure(torch.tensor(values), torch.tensor(returns), metrics)
        return metrics.result().get("critic/explained_variance")

    assert measured([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1.0
    assert measured([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]) == pytest.approx(0.0)
    # errors 1, 1, -2 of variance 2, returns of variance 2 / 3
    assert measured([0.0, 1.0, 5.0], [1.0, 2.0, 3.0]) == pytest.approx(-2.0)
    assert measured([0.0, 1.0], [2.0, 2.0]) is None  # nothing to explain
    assert measured([], []) is None


def test_the_checkpoint_holds_the_critic(tmp_path: Path) -> None:
    state = last_state(run(tmp_path, "algorithm.critic={normalize: true}"))
    assert set(state) == {"step", "model", "critic", "reference", "trainer"}
    assert "head.weight" in state["critic"]["weights"]
    assert state["trainer"]["critic"]["scale"] > 0.0
    assert state["trainer"]["critic"]["returns"]["count"] > 0.0


def test_a_trainer_restored_has_all_of_the_state(tmp_path: Path) -> None:
    settings = (
        ADAPTIVE % "target: 5.0, horizon: 40",
        "algorithm.normalize_rewards=true",
        "algorithm.critic={normalize: true}",
        "limits.logprob_gap=1e-12",  # so that the monitor has seen one step over the limit
    )
    old, new = (trainer_of(tmp_path / name, *settings) for name in ("old", "new"))
    old.step(1)
    state, fresh = old.state_dict(), new.state_dict()
    assert state.keys() == fresh.keys()
    assert all(state[part] != fresh[part] for part in state)
    for trained in ("trained", "critic"):  # the optimizers' own state goes first
        theirs, ours = (getattr(trainer.context, trained).optimizer for trainer in (old, new))
        ours.load_state_dict(theirs.state_dict())
    new.load_state_dict(state)
    assert new.state_dict() == state


# -- the page that describes all this ---------------------------------------------------------


def test_every_test_that_docs_ppo_names_exists() -> None:
    page = (REPOSITORY / "docs" / "ppo.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    defined = {
        name
        for path in (REPOSITORY / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), re.M)
    }
    assert len(named) > 30
    assert not named - defined


def test_every_function_that_docs_ppo_names_exists() -> None:
    page = (REPOSITORY / "docs" / "ppo.md").read_text(encoding="utf-8")
    places = set(re.findall(r"`([\w/]+\.py):([\w.]+)`", page))
    assert len(places) > 15
    for file, name in places:
        text = (REPOSITORY / "alignment" / file).read_text(encoding="utf-8")
        last = name.split(".")[-1]
        assert re.search(rf"^\s*(def|class) {last}\b|^    {last}: ", text, re.M), (file, name)
