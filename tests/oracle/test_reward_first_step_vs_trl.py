"""The reward model's first step against trl's: the loss, and the gradient of every weight.

trl's loss method is called unbound, on transformers' own classifier with the weights that ours
starts from, and on rows padded by trl's collator: nothing of ours is in the oracle.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification
from trl_stand_ins import accelerator, metrics

from alignment.config.load import load_recipe
from alignment.config.schema import Recipe
from alignment.distributed import Distributed
from alignment.modeling.optimizer import MasterWeightOptimizer
from alignment.modeling.scalar import save_scalar_model
from alignment.runs.events import EventLog
from alignment.trainers.reward import RewardModelTrainer
from alignment.trainers.setup import assemble, load_parts

pytest.importorskip("trl")

from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

CASES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "centred": ("algorithm.center_coef=0.01",),
    "small micro-batches": ("optim.micro_batch_tokens=100",),
}


def their_step(folder: Path, pairs: list[tuple[Any, Any]], center: float) -> tuple[Tensor, Any]:
    """(loss, the model with its gradients)."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).train()
    collate = DataCollatorForPreference(pad_token_id=model.config.pad_token_id)
    inputs = collate(
        [
            {
                "chosen_ids": [*chosen.prompt_ids, *chosen.completion_ids],
                "rejected_ids": [*rejected.prompt_ids, *rejected.completion_ids],
            }
            for chosen, rejected in pairs
        ]
    )
    trainer = SimpleNamespace(
        model=model,
        args=SimpleNamespace(center_rewards_coefficient=center or None),
        accelerator=accelerator(),
        _metrics=metrics(),
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss = RewardTrainer.compute_loss(trainer, model, inputs)
    loss.backward()
    return loss, model


@pytest.mark.parametrize("case", CASES)
def test_the_first_step_is_trls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    settings = ["algorithm.center_coef=0", *CASES[case], "optim.max_grad_norm=1e9"]
    recipe = load_recipe("tiny/reward_model", settings)
    assert isinstance(recipe, Recipe)
    events = EventLog(tmp_path / "events.jsonl")
    context = assemble(load_parts(recipe), Distributed(), events, cache=tmp_path)
    save_scalar_model(context.scalar_model, context.tokenizer, tmp_path / "start")
    ours: dict[str, Tensor] = {}

    def keep(self: MasterWeightOptimizer) -> float:
        ours.update(zip(self._parameters, (g.clone() for g in self.gradients), strict=True))
        return 0.0

    monkeypatch.setattr(MasterWeightOptimizer, "step", keep)
    result = RewardModelTrainer(context).step(1)
    pairs = context.train.pairs
    # The rows of the step, once more: a fresh order draws the same.
    order = type(context.order)(len(pairs), seed=recipe.run.seed)
    rows = [row for _, row in order.take(12)]
    drawn = [(pairs.chosen[row], pairs.rejected[row]) for row in rows]
    loss, model = their_step(tmp_path / "start", drawn, recipe.algorithm.center_coef)
    assert result.metrics.result()["loss"] == pytest.approx(loss.item(), abs=1e-6)
    theirs = {name: p.grad for name, p in model.named_parameters()}
    renamed = {
        name.replace("decoder.", "model.").replace("head.", "score."): gradient
        for name, gradient in ours.items()
    }
    assert renamed.keys() == theirs.keys()
    size = torch.cat([gradient.flatten() for gradient in theirs.values()]).norm()
    for name, gradient in theirs.items():
        torch.testing.assert_close(renamed[name], gradient, rtol=1e-5, atol=1e-5)
        assert (renamed[name] - gradient).norm() < 1e-5 * size, name
