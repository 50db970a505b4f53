"""RAFT: which completions are imitated, and that nothing else is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_make_data import item
from tiny_runs import even_tokens

from alignment.config.load import load_recipe
from alignment.config.methods.raft import RAFTConfig
from alignment.config.schema import Recipe
from alignment.distributed import Distributed
from alignment.runs.events import EventLog
from alignment.runs.metrics import MetricSums
from alignment.trainers.raft import RAFTTrainer
from alignment.trainers.run import train
from alignment.trainers.setup import assemble, load_parts


def raft(**options: Any) -> RAFTConfig:
    return RAFTConfig(type="raft", steps=1, prompts_per_step=1, group_size=4, **options)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, ["b"]),
        ({"keep": 3}, ["b", "d", "a"]),
        ({"keep": 3, "minimum": 1.0}, ["b", "d"]),
        ({"minimum": 3.0}, []),
    ],
)
def test_the_best_of_a_group_are_imitated(options: dict[str, Any], kept: list[str]) -> None:
    group = [item("a", 0.5), item("b", 2.0), item("c", None), item("d", 2.0)]
    trainer: Any = SimpleNamespace(config=raft(**options))
    best = RAFTTrainer.best_of(trainer, group)
    assert [one.completion.text for one in best] == kept


def trainer_of(folder: Path, *overrides: str) -> RAFTTrainer:
    recipe = load_recipe(
        "tiny/raft",
        [
            f"run.dir={folder}",
            "rewards=[{type: 'tiny_runs:even_tokens'}]",
            "algorithm.prompts_per_step=3",
            "algorithm.group_size=4",
            "algorithm.keep=1",
            "optim.max_grad_norm=1e9",
            *overrides,
        ],
    )
    assert isinstance(recipe, Recipe)
    events = EventLog(folder / "events.jsonl")
    context = assemble(load_parts(recipe), Distributed(), events, cache=folder)
    return RAFTTrainer(context)


@pytest.mark.parametrize("budget", [4096, 40])
def test_the_gradient_is_that_of_the_best_completions_alone(tmp_path: Path, budget: int) -> None:
    """Against transformers' own forward pass over each of them, one by one."""
    trainer = trainer_of(tmp_path, f"optim.micro_batch_tokens={budget}")
    seen: list[list[torch.Tensor]] = []
    optimizer: Any = trainer.context.trained.optimizer

    def step() -> float:
        seen.append([gradient.clone() for gradient in optimizer.gradients])
        optimizer.drop_gradients()
        return 0.0

    optimizer.step = step
    rollout = trainer.step(1).rollout
    assert rollout is not None
    groups = [rollout.items[i : i + 4] for i in range(0, 12, 4)]
    model: Any = trainer.policy.model
    total, n_tokens = torch.zeros(()), 0
    for group in groups:
        rewards = even_tokens([one.completion.token_ids for one in group])
        best = group[rewards.index(max(rewards))]
        ids = torch.tensor([[*best.prompt.token_ids, *best.completion.token_ids]])
        n = len(best.completion.token_ids)
        log_p = model(ids, use_cache=False).logits[0].log_softmax(-1)[-n - 1 : -1]
        total = total - log_p[torch.arange(n), ids[0, -n:]].sum()
        n_tokens += n
    expected = torch.autograd.grad(total / n_tokens, list(model.parameters()))
    for got, by_hand in zip(seen[0], expected, strict=True):
        assert torch.allclose(got, by_hand, atol=2e-6)


def test_a_step_without_a_good_completion_changes_nothing(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "algorithm.minimum=2.0")
    before = [p.detach().clone() for p in trainer.policy.model.parameters()]
    result = trainer.step(1)
    assert all(
        torch.equal(a, b) for a, b in zip(before, trainer.policy.model.parameters(), strict=True)
    )
    assert result.metrics.result()["raft/kept_share"] == 0.0


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, monkeypatch: Any) -> None:
    settings = ("algorithm.steps=4", "algorithm.epochs_per_step=2", "expect=[]")

    def recipe(folder: str) -> Recipe:
        loaded = load_recipe(
            "tiny/raft", [f"run.dir={tmp_path / folder}", "checkpoint.every=1", *settings]
        )
        assert isinstance(loaded, Recipe)
        return loaded

    whole = train(recipe("whole"))
    collect = RAFTTrainer.collect

    def fails_in_step_three(self: Any, step: int, metrics: MetricSums) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return collect(self, step, metrics)

    monkeypatch.setattr(RAFTTrainer, "collect", fails_in_step_three)
    with pytest.raises(KeyboardInterrupt):
        train(recipe("again"))
    monkeypatch.setattr(RAFTTrainer, "collect", collect)
    resumed = train(recipe("again"))
    weights = [run.model_dir / "model.safetensors" for run in (whole, resumed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
