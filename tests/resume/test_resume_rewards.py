"""Rewards that keep something from one batch to the next: what they keep is part of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_resume import Interrupted, assert_same_run, fail_when
from tiny_runs import even_tokens, rollouts_of, run, weights_of

from alignment.rewards.compose import CompositeReward, NamedReward
from alignment.rewards.protocol import FunctionReward
from alignment.runs.checkpoint import list_checkpoints, load_checkpoint
from alignment.runs.directory import RunDirectory
from alignment.runs.state_tree import encode_tree
from alignment.trainers.grpo import GRPOTrainer
from alignment.trainers.replay import replay
from alignment.trainers.reward_state import restore_reward_states, reward_states
from alignment.types import AlignmentError, Completion, Prompt, Score


class AboveMean:
    """By how much the share of even tokens is above its mean over all batches so far."""

    def __init__(self) -> None:
        self.mean = torch.zeros(2, dtype=torch.float64)
        self.seen: list[int] = []

    def __call__(self, items: Sequence[tuple[Prompt, Completion]], /) -> list[Score]:
        values = even_tokens([completion.token_ids for _, completion in items])
        self.seen.append(len(values))
        self.mean += (sum(values) / len(values) - self.mean) / len(self.seen)
        return [Score(max(value - float(self.mean[0]), 0.0)) for value in values]

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean, self.seen = state["mean"].clone(), list(state["seen"])


class Forgetful(AboveMean):
    """It takes back another state than it gave."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = list(state["seen"])


class Unwilling(AboveMean):
    """It takes back no state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise KeyError("mean")


class Stateless(AboveMean):
    """The same rewards, and nothing to save."""

    state_dict = None  # type: ignore[assignment]


class Secretive(AboveMean):
    """What it keeps no checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]:
        return {"mean": {1, 2}}


def settings(reward: str = "AboveMean") -> tuple[str, ...]:
    return (
        "algorithm.steps=5",
        "algorithm.advantage.scale=none",
        f"rewards=[{{type: 'test_resume_rewards:{reward}', name: above}}]",
        "checkpoint={every: 1, keep: 5}",
        "eval={}",
    )


def interrupted(folder: Path, *overrides: str, step: int = 4) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fail_when(patch, GRPOTrainer, "step", step)
        with pytest.raises(Interrupted):
            run("grpo", folder, *overrides)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return run("grpo", tmp_path_factory.mktemp("whole"), *settings())


def test_i45_a_reward_with_a_state_goes_on_where_it_was(
    tmp_path: Path, whole: RunDirectory
) -> None:
    interrupted(tmp_path, *settings())
    resumed = run("grpo", tmp_path, *settings())
    assert_same_run(resumed, whole)
    _, last = list_checkpoints(resumed.checkpoints_dir)[-1]
    (state,) = load_checkpoint(last)["rewards"]
    assert state["above"]["seen"] == [16] * 5


def test_a_reward_without_the_methods_begins_again(tmp_path: Path, whole: RunDirectory) -> None:
    """So the run above says something: the state has an effect."""
    interrupted(tmp_path, *settings("Stateless"))
    resumed = run("grpo", tmp_path, *settings("Stateless"))
    assert rollouts_of(resumed)[:3] == rollouts_of(whole)[:3]
    assert rollouts_of(resumed)[3] != rollouts_of(whole)[3]
    _, last = list_checkpoints(resumed.checkpoints_dir)[-1]
    assert "rewards" not in load_checkpoint(last)


def test_i43_an_evaluation_leaves_what_rewards_keep(tmp_path: Path, whole: RunDirectory) -> None:
    task = "eval={every: 2, tasks: [{type: verifiable, samples: 1, prompts: 2}]}"
    evaluated = run("grpo", tmp_path, *settings(), task)
    assert list(evaluated.evals_dir.glob("*"))
    assert rollouts_of(evaluated) == rollouts_of(whole)
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(evaluated)[name], weight)


def test_a_step_is_replayed_without_the_reward(whole: RunDirectory) -> None:
    assert replay(whole.path, 4).differing == ()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("Forgetful", r"cannot be restored exactly: .*'rewards\.0\.above\.mean'"),
        ("Unwilling", r"reward 'above' does not take back the state that it gave: KeyError"),
        ("Stateless", r"of the rewards \['above'\], and those that keep one are none"),
    ],
)
def test_a_state_is_restored_strictly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reward: str, message: str
) -> None:
    interrupted(tmp_path, *settings())
    monkeypatch.setitem(globals(), "AboveMean", globals()[reward])
    with pytest.raises(AlignmentError, match=message):
        run("grpo", tmp_path, *settings())


def test_a_state_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(AlignmentError, match=r"'rewards\.0\.above\.mean' is a builtins\.set"):
        run("grpo", tmp_path, *settings("Secretive"))


# -- several ranks ----------------------------------------------------------------------------


def above(mean: float, seen: int) -> CompositeReward:
    """A reward that has seen so many batches."""
    reward = AboveMean()
    reward.mean += mean
    reward.seen += [4] * seen
    return CompositeReward([NamedReward("above", 1.0, reward)])


def ranks(rewards: Sequence[CompositeReward]) -> list[Any]:
    """One rank for each of the rewards; they gather what each would hand over."""

    def gather(items: Sequence[Any]) -> list[Any]:
        trees = [encode_tree(one.state_dict()) for one in rewards]
        assert items[0][0] in [tree.document for tree in trees]
        return [(tree.document, tree.tensors) for tree in trees]

    size = len(rewards)
    return [SimpleNamespace(world_size=size, rank=rank, gather=gather) for rank in range(size)]


def means(rewards: Sequence[CompositeReward]) -> list[float]:
    return [float(one.state_dict()["above"]["mean"][0]) for one in rewards]


def test_ranks_that_differ_each_get_their_own_back() -> None:
    rewards = [above(0.25, 3), above(0.75, 3)]
    saved = [reward_states(*pair)["rewards"] for pair in zip(rewards, ranks(rewards), strict=True)]
    assert [len(states) for states in saved] == [2, 2]
    again = [above(0.0, 0), above(0.0, 0)]
    for own, rank in zip(again, ranks(again), strict=True):
        restore_reward_states(own, rank, saved[0])
    assert means(again) == [0.25, 0.75]
    with pytest.raises(AlignmentError, match="go on with 2 processes"):
        restore_reward_states(again[0], ranks(again[:1])[0], saved[0])


def test_ranks_that_are_alike_are_saved_once_for_any_number_of_them() -> None:
    rewards = [above(0.5, 2), above(0.5, 2)]
    states = reward_states(rewards[0], ranks(rewards)[0])["rewards"]
    assert len(states) == 1
    again = [above(0.0, 0) for _ in range(3)]
    for own, rank in zip(again, ranks(again), strict=True):
        restore_reward_states(own, rank, states)
    assert means(again) == [0.5] * 3


def test_a_function_may_keep_a_state_too() -> None:
    """An object that is called as trl calls functions."""
    rank = ranks([above(0.0, 0)])[0]

    def reward(completions: Sequence[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    plain = CompositeReward([NamedReward("f", 1.0, FunctionReward("f", reward, {}))])
    assert reward_states(plain, rank) == reward_states(None, rank) == {}
    kept = {"count": 3}
    reward.state_dict = lambda: dict(kept)  # type: ignore[attr-defined]
    reward.load_state_dict = kept.update  # type: ignore[attr-defined]
    saved = reward_states(plain, rank)
    assert saved == {"rewards": [{"f": {"count": 3}}]}
    kept["count"] = 0
    restore_reward_states(plain, rank, saved["rewards"])
    assert kept == {"count": 3}
