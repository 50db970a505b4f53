"""Steps of our trainers against trl's trainers: loss and gradient of the same batch, in fp32.

Both sides start from the same folder (model, tokenizer) and the same rows of text: ours by a
recipe, trl by its own tokenization, collator and `compute_loss`. Ours goes through several
micro-batches with shared prompts, trl's through one padded batch. At the second step trl's model is
given the weights that ours has come to; so the reference differs from the policy there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from alignment.config.load import load_recipe
from alignment.modeling.optimizer import MasterWeightOptimizer
from alignment.modeling.tiny import byte_tokenizer
from alignment.runs.metrics import read_metrics
from alignment.trainers.run import train

pytest.importorskip("trl")

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

STEPS = 2
TOLERANCE = 1e-5

# Beginnings of our parameters' names, and trl's in their place.
POLICY_NAMES = {"model.model.": "model.", "model.lm_head.": "lm_head."}
REWARD_MODEL_NAMES = {"decoder.": "model.", "head.": "score."}

DEMONSTRATIONS = [
    {"prompt": "two and two", "completion": " is four"},
    {"prompt": "the sea", "completion": " was calm, and nobody spoke for a long while"},
    {"prompt": "name a colour", "completion": " green"},
    {"prompt": "name a colour", "completion": " a deep and restless blue"},
    {"prompt": "why is bread soft inside and hard outside", "completion": " heat"},
]
PREFERENCES = [
    {"prompt": "two and two", "chosen": " is four", "rejected": " is five, or so I heard"},
    {"prompt": "name a colour", "chosen": " a deep and restless blue", "rejected": " no"},
    {"prompt": "name a colour", "chosen": " green", "rejected": " I would rather not"},
    {"prompt": "why is bread soft inside and hard outside", "chosen": " heat", "rejected": " it"},
]


@dataclass(frozen=True)
class Step:
    """One update: the weights before it, and the loss and its gradient by parameter name."""

    weights: dict[str, Tensor]
    loss: float
    gradients: dict[str, Tensor]


@pytest.fixture
def policy_folder(tmp_path: Path) -> Path:
    tokenizer = byte_tokenizer()
    options = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model("llama", pad_token_id=tokenizer.pad_token_id, **options)
    folder = tmp_path / "policy"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def reward_model_folder(policy_folder: Path) -> Path:
    config = AutoConfig.from_pretrained(policy_folder, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    folder = policy_folder.parent / "reward_model"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def our_steps(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    rows: list[dict[str, str]],
    algorithm: dict[str, Any],
    **sections: Any,
) -> list[Step]:
    """Train a recipe, and catch each step's gradient before it is clipped and used."""
    caught: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    clip = MasterWeightOptimizer.clip_

    def catch(self: MasterWeightOptimizer, max_norm: float | None) -> float:
        names = list(self._parameters)
        weights = {name: p.detach().clone() for name, p in self._parameters.items()}
        gradients = [g.clone() for g in self.gradients]
        caught.append((weights, dict(zip(names, gradients, strict=True))))
        return clip(self, max_norm)

    monkeypatch.setattr(MasterWeightOptimizer, "clip_", catch)
    data = folder.parent / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder.parent / "recipe.yaml"
    recipe = {
        "run": {"name": "run", "dir": str(folder.parent)},
        "model": {"path": str(folder), "dtype": "float32", **sections},
        "data": {"type": "file", "path": str(data), "style": "plain"},
        "algorithm": {"steps": STEPS, **algorithm},
        "optim": {"lr": 3e-3, "schedule": "constant", "micro_batch_tokens": 100},
    }
    path.write_text(json.dumps(recipe))
    metrics = [row for row in read_metrics(train(load_recipe(path)).metrics) if row["step"] > 0]
    assert len(metrics) == len(caught) == STEPS
    return [
        Step(weights, row["loss"], gradients)
        for row, (weights, gradients) in zip(metrics, caught, strict=True)
    ]


def trl_settings(folder: Path, n_rows: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder.parent / "trl"),
        "per_device_train_batch_size": n_rows,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "model_init_kwargs": {"dtype": "float32"},
    }


def assert_equals_trl(ours: list[Step], trainer: Any, renamed: dict[str, str]) -> None:
    """trl's loss and gradient, at the weights of each of our steps, are ours.

    The gradient of each parameter may differ by 1e-5 of its largest entry.
    """
    (batch,) = _batches(trainer)
    model = trainer.model.train()
    for step in ours:
        named = {_rename(name, renamed): tensor for name, tensor in step.weights.items()}
        missing, unexpected = model.load_state_dict(named, strict=False)
        assert not missing and not unexpected
        model.zero_grad()
        loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
        assert step.loss == pytest.approx(loss.item(), rel=TOLERANCE)
        theirs = {name: p.grad for name, p in model.named_parameters()}
        mine = {_rename(name, renamed): tensor for name, tensor in step.gradients.items()}
        assert mine.keys() == theirs.keys()
        for name, gradient in theirs.items():
            largest = gradient.abs().max().item()
            assert largest > 0, name
            torch.testing.assert_close(
                mine[name], gradient, rtol=0, atol=TOLERANCE * largest, msg=lambda m, n=name: n + m
            )


def _batches(trainer: Any) -> Iterator[Any]:
    return iter([trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()])


def _rename(name: str, renamed: dict[str, str]) -> str:
    for old, new in renamed.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def test_sft_steps_equal_trls(monkeypatch: pytest.MonkeyPatch, policy_folder: Path) -> None:
    algorithm = {"type": "sft", "samples_per_step": len(DEMONSTRATIONS)}
    ours = our_steps(monkeypatch, policy_folder, DEMONSTRATIONS, algorithm)
    trainer = SFTTrainer(
        model=str(policy_folder),
        args=SFTConfig(**trl_settings(policy_folder, len(DEMONSTRATIONS))),
        train_dataset=Dataset.from_list(DEMONSTRATIONS),
    )
    assert_equals_trl(ours, trainer, POLICY_NAMES)


@pytest.mark.parametrize("kind", [["sigmoid"], ["ipo"]])
def test_dpo_steps_equal_trls(
    monkeypatch: pytest.MonkeyPatch, policy_folder: Path, kind: list[str]
) -> None:
    own_names = {"ipo": "ipo_norm"}  # what trl calls ipo averages over tokens
    algorithm = {
        "type": "dpo",
        "pairs_per_step": len(PREFERENCES),
        "loss": {"kind": own_names.get(kind[0], kind[0]), "beta": 0.3},
    }
    reference = {"reference": "frozen_copy"}
    ours = our_steps(monkeypatch, policy_folder, PREFERENCES, algorithm, **reference)
    settings = trl_settings(policy_folder, len(PREFERENCES))
    trainer = DPOTrainer(
        model=str(policy_folder),
        args=DPOConfig(**settings, loss_type=kind, beta=0.3),
        train_dataset=Dataset.from_list(PREFERENCES),
    )
    assert_equals_trl(ours, trainer, POLICY_NAMES)


@pytest.mark.parametrize("center", [0.0, 0.1])
def test_reward_model_steps_equal_trls(
    monkeypatch: pytest.MonkeyPatch, reward_model_folder: Path, center: float
) -> None:
    algorithm = {
        "type": "reward_model",
        "pairs_per_step": len(PREFERENCES),
        "center_coef": center,
    }
    ours = our_steps(monkeypatch, reward_model_folder, PREFERENCES, algorithm)
    settings = trl_settings(reward_model_folder, len(PREFERENCES))
    trainer = RewardTrainer(
        model=str(reward_model_folder),
        args=RewardConfig(**settings, center_rewards_coefficient=center or None),
        train_dataset=Dataset.from_list(PREFERENCES),
    )
    assert_equals_trl(ours, trainer, REWARD_MODEL_NAMES)
