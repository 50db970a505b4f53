"""Settings of a recipe reach what they are for: none of them could be ignored in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import metrics_of, recipe_of, rollouts_of, run
from torch import nn

from alignment.distributed import Distributed
from alignment.modeling.optimizer import MasterWeightOptimizer
from alignment.rollout.native import NativeEngine
from alignment.runs.events import EventLog
from alignment.trainers.context import TrainingContext
from alignment.trainers.setup import assemble, load_parts
from alignment.trainers.sft import SFTTrainer


def context_of(method: str, folder: Path, *overrides: str) -> TrainingContext:
    """The parts of a run, put together and not run."""
    loaded = load_parts(recipe_of(method, folder, *overrides))
    return assemble(loaded, Distributed(), EventLog(folder / "events.jsonl"), cache=folder)


# -- algorithm --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_on", "tokens"),
    # One token a byte, and the end of the turn: "ab" and "cdefg" are 3 and 6.
    [("assistant", 9), ("completion", 6)],
)
def test_loss_on_says_which_turns_are_learned(tmp_path: Path, loss_on: str, tokens: int) -> None:
    turns = [("user", "one?"), ("assistant", "ab"), ("user", "two?"), ("assistant", "cdefg")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    directory = run(
        "sft",
        tmp_path,
        f"data={{type: file, path: '{path}'}}",
        "eval.tasks=[]",
        "algorithm.steps=1",
        "algorithm.samples_per_step=1",
        f"algorithm.loss_on={loss_on}",
    )
    (record,) = metrics_of(directory)
    assert record["sft/loss_tokens"] == tokens


# -- optim ------------------------------------------------------------------------------------


def test_the_optimizer_is_the_one_described(tmp_path: Path) -> None:
    settings = ("optim.betas=[0.8, 0.95]", "optim.eps=1e-6", "optim.weight_decay=0.03")
    optimizer: Any = context_of("sft", tmp_path, *settings, "optim.lr=2e-4").trained.optimizer
    (group,) = optimizer._adamw.param_groups
    options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
    assert options == {"lr": 2e-4, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.03}


# Warm-up over two updates: 1/3 and 2/3 of 3e-3. Then, at 0, 1/4, 1/2 and 3/4 of the decay, a share
# of the remaining 0.9: cosine 1, (2 + sqrt 2) / 4, 1/2, (2 - sqrt 2) / 4; linear 1, 3/4, 1/2, 1/4.
RATES = {
    "cosine": [1e-3, 2e-3, 3e-3, 2.604594e-3, 1.65e-3, 6.954058e-4],
    "linear": [1e-3, 2e-3, 3e-3, 2.325e-3, 1.65e-3, 9.75e-4],
    "constant": [1e-3, 2e-3, 3e-3, 3e-3, 3e-3, 3e-3],
}


@pytest.mark.parametrize("schedule", RATES)
def test_the_learning_rate_follows_the_schedule(tmp_path: Path, schedule: str) -> None:
    settings = (f"optim.schedule={schedule}", "optim.warmup_steps=2", "optim.min_lr_ratio=0.1")
    context = context_of("sft", tmp_path, *settings, "optim.lr=3e-3", "algorithm.steps=6")
    trainer = SFTTrainer(context)
    rates = []
    for step in range(1, 7):
        rates.append(trainer.step(step).metrics.result()["optim/lr"])
        optimizer: Any = context.trained.optimizer
        assert optimizer._adamw.param_groups[0]["lr"] == rates[-1]
    assert rates == pytest.approx(RATES[schedule], rel=1e-6)


def test_gradients_are_scaled_down_to_the_norm_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[float] = []
    step = MasterWeightOptimizer.step

    def watched(self: MasterWeightOptimizer) -> float:
        reached.append(float(torch.cat([g.flatten() for g in self.gradients]).norm()))
        return step(self)

    monkeypatch.setattr(MasterWeightOptimizer, "step", watched)
    trainer = SFTTrainer(context_of("sft", tmp_path, "optim.max_grad_norm=0.1"))
    assert trainer.step(1).metrics.result()["optim/grad_norm"] > 0.2
    assert reached == pytest.approx([0.1], rel=1e-4)


# -- model ------------------------------------------------------------------------------------


def test_adapters_are_as_described(tmp_path: Path) -> None:
    lora = "model.lora={rank: 4, alpha: 5, target_modules: [q_proj, down_proj]}"
    model: Any = context_of("sft", tmp_path, lora).policy.model
    (config,) = model.peft_config.values()
    assert (config.r, config.lora_alpha) == (4, 5)
    assert set(config.target_modules) == {"q_proj", "down_proj"}
    adapted: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if hasattr(module, "lora_A")
    }
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "down_proj"}
    assert {module.scaling["default"] for module in adapted.values()} == {5 / 4}


# -- rollout ----------------------------------------------------------------------------------


def test_completions_end_at_the_texts_that_stop_them(tmp_path: Path) -> None:
    stops = " abcdefghij"
    stop_ids = set(stops.encode())  # one token a byte
    directory = run(
        "grpo",
        tmp_path,
        f"rollout.stop={json.dumps(list(stops))}",
        "rollout.max_new_tokens=24",
        "algorithm.steps=1",
    )
    (rows,) = rollouts_of(directory)
    for row in rows:
        assert not stop_ids.intersection(row["completion_ids"][:-1])
    stopped = [row for row in rows if row["completion_ids"][-1] in stop_ids]
    assert {row["stop_reason"] for row in stopped} == {"stop"}


def test_the_engine_has_the_limits_of_the_recipe(tmp_path: Path) -> None:
    limits = ("rollout.max_rows=7", "rollout.kv_tokens=300")
    engine = context_of("grpo", tmp_path, *limits).engine
    assert isinstance(engine, NativeEngine)
    assert (engine.max_rows, engine._kv_tokens) == (7, 300)
