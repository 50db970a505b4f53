"""PPO on the tiny model, for tests: whole runs, and a trainer to call step by step."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import even_tokens
from torch import Tensor

from alignment.config.load import load_recipe
from alignment.config.schema import Recipe
from alignment.distributed import Distributed
from alignment.modeling.optimizer import MasterWeightOptimizer
from alignment.runs.checkpoint import list_checkpoints, load_checkpoint
from alignment.runs.directory import RunDirectory
from alignment.runs.events import EventLog
from alignment.runs.metrics import MetricSums
from alignment.trainers.experience import Experience
from alignment.trainers.minibatches import Targets
from alignment.trainers.ppo import PPOTrainer
from alignment.trainers.run import train
from alignment.trainers.setup import Loaded, assemble, load_parts
from alignment.types import (
    Completion,
    Outcome,
    Prompt,
    RewardedCompletion,
    Rollout,
    StopReason,
)

PPO = (
    "run.name=ppo",
    "data={type: arithmetic, operation: add, operands: 2, low: 1, high: 9, held_out: 8}",
    "algorithm.steps=2",
    "algorithm.prompts_per_step=4",
    "algorithm.samples_per_prompt=2",
    "algorithm.epochs_per_step=2",
    "algorithm.updates_per_step=2",
    "algorithm.kl={coef: 0.05, placement: reward}",
    "rollout.max_new_tokens=8",
    "rewards=[{type: 'tiny_runs:even_tokens'}]",
    "optim.lr=3e-3",
    "optim.schedule=constant",
    "expect=[]",
)
SHARED = ("algorithm.critic={kind: shared}",)
LORA = ("model.lora={rank: 4}",)
CRITICS = {"separate": (), "shared": SHARED}

GRADES = (0.9, 0.2, None, 0.6, 0.4, 0.1)
LENGTHS = (1, 12, 4, 5, 3, 9)
FAILED = 2
MADE_UP = (
    "algorithm.prompts_per_step=6",
    "algorithm.samples_per_prompt=1",
    "algorithm.epochs_per_step=1",
    "algorithm.updates_per_step=1",
    "optim.max_grad_norm=1e9",
    "limits.logprob_gap=99",
)
"""Settings of a step on a made-up rollout (`updates_of`): one update of each model, unclipped."""


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    """The tiny recipe, a few steps long, kept in `folder`."""
    recipe = load_recipe("tiny/ppo", [*PPO, f"run.dir={folder}", *overrides])
    assert isinstance(recipe, Recipe)
    return recipe


def run(folder: Path, *overrides: str) -> RunDirectory:
    """Train to the end."""
    return train(recipe_of(folder, *overrides))


def trainer_of(
    folder: Path, *overrides: str, change: Callable[[Loaded], None] = lambda loaded: None
) -> PPOTrainer:
    """A trainer whose steps are called by hand; `change` may alter what was loaded."""
    loaded = load_parts(recipe_of(folder, *overrides))
    change(loaded)
    context = assemble(loaded, Distributed(), EventLog(folder / "events.jsonl"), cache=folder)
    return PPOTrainer(context)


def last_state(run: RunDirectory) -> dict[str, Any]:
    """What the last checkpoint of a run holds."""
    _, path = list_checkpoints(run.checkpoints_dir)[-1]
    state: dict[str, Any] = load_checkpoint(path)
    return state


def shift(model: torch.nn.Module, scale: float, seed: int) -> None:
    """Move every trained weight a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype), alpha=scale)


def made_up(
    trainer: PPOTrainer,
    grades: Sequence[float | None],
    lengths: Sequence[int],
    cut_off: Sequence[int] = (),
    *,
    group_size: int = 1,
) -> Rollout:
    """A rollout of completions drawn at random, with these grades; None is a failed grader.

    Args:
        cut_off: which completions have no end.
    """
    draw = random.Random(3)
    items = []
    for i, (grade, length) in enumerate(zip(grades, lengths, strict=True)):
        group, member = divmod(i, group_size)
        prompt: Prompt = replace(trainer.context.train.prompts[group], index=group)
        ids = tuple(draw.randrange(256) for _ in range(length))
        stop = StopReason.LENGTH if i in cut_off else StopReason.STOP
        completion = Completion(group, member, ids, (-5.5,) * length, stop, 0, "")
        outcome = Outcome.CRASH if grade is None else Outcome.SCORED
        items.append(RewardedCompletion(prompt, completion, grade, outcome, {}))
    return Rollout(tuple(items), group_size=group_size, step=1)


def keep_gradients(patch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The gradients that reach an optimizer, one entry an update; the weights stand still."""
    seen: list[dict[str, Tensor]] = []

    def keep(self: MasterWeightOptimizer) -> float:
        names = list(self._parameters)
        seen.append(dict(zip(names, (g.clone() for g in self.gradients), strict=True)))
        self.drop_gradients()
        return 0.0

    patch.setattr(MasterWeightOptimizer, "step", keep)
    return seen


def updates_of(
    trainer: PPOTrainer,
    rollout: Rollout,
    made: list[dict[str, Tensor]],
    spoil: Callable[[Targets], Targets] = lambda targets: targets,
) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
    """Metrics and gradients of a step on a made-up rollout; `spoil` may change what it reads."""
    learn = trainer.learn
    made.clear()

    def spoilt(rollout: Rollout, own: Experience, targets: Targets, metrics: MetricSums) -> None:
        learn(rollout, own, spoil(targets), metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "collect", lambda step, metrics: rollout)
        patch.setattr(trainer, "learn", spoilt)
        metrics = trainer.step(1).metrics.result()
    return {k: v for k, v in metrics.items() if not k.startswith("time/")}, list(made)


def moved_trainer(folder: Path, *settings: str) -> PPOTrainer:
    """Policy, reference and critic apart from one another, a critic that predicts something."""
    trainer = trainer_of(folder, *MADE_UP, *settings)
    shift(trainer.policy.model, 0.02, 0)
    critic = trainer.context.critic
    critics: Any = trainer.policy.value_head if critic is None else critic.model
    shift(critics, 0.05, 1)
    return trainer


def assert_same_gradient(
    got: dict[str, Tensor], expected: dict[str, Tensor], within: float
) -> None:
    """Each tensor, against the length of the whole gradient."""
    assert got.keys() == expected.keys()
    size = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert size > 1e-4
    for name, gradient in expected.items():
        error = float((got[name].double() - gradient).norm() / size)
        assert error < within, f"{name}: relative error {error:.1e}"


def far_from_zero(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Rewards far from 0, and of another scale than 1."""
    return [300.0 + 50.0 * share for share in even_tokens(completion_ids)]
