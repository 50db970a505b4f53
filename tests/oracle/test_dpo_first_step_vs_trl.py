"""The loss and gradient of our DPO trainer's first step against trl's, on one batch.

Theirs is a whole `DPOTrainer` with its own collator and model forward; only the token ids are ours.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import catch_gradients, parts_of
from torch import Tensor

from alignment.modeling.catalog import fetch
from alignment.trainers.dpo import DPOTrainer

pytest.importorskip("trl")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig as TrlConfig
from trl import DPOTrainer as TrlTrainer

N_PAIRS = 6
BETA = 0.3

# our loss, trl's settings
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid": ("{kind: sigmoid, beta: 0.3}", {}),
    "ipo_norm": ("{kind: ipo_norm, beta: 0.3}", {"loss_types": ["ipo"]}),
    "exo": ("{kind: exo, beta: 0.3}", {"loss_types": ["exo_pair"], "label_smoothing": 1e-3}),
    "aot": ("{kind: aot, beta: 0.3}", {"loss_types": ["aot"]}),
    "apo_down": ("{kind: apo_down, beta: 0.3}", {"loss_types": ["apo_down"]}),
    "length-desensitized": ("{kind: sigmoid, beta: 0.3, desensitize: 0.4}", {"ld_alpha": 0.4}),
    # forward_kl takes the exponential of the sums, and their rounding with it
    "js": (
        "{kind: sigmoid, beta: 0.3, divergence: js}",
        {"f_divergence_type": "js_divergence"},
    ),
    "weighted sum": (
        "{kind: {sigmoid: 0.8, sppo: 0.2}, beta: 0.3}",
        {"loss_types": ["sigmoid", "sppo_hard"], "loss_weights": [0.8, 0.2]},
    ),
}


@pytest.fixture(scope="module")
def tuned() -> dict[str, Tensor]:
    """The tiny model's weights after some training, as it were."""
    model: Any = AutoModelForCausalLM.from_pretrained(fetch("tiny-random"))
    generator = torch.Generator().manual_seed(8)
    return {
        name: p.detach() + 0.02 * torch.randn(p.shape, generator=generator)
        for name, p in model.named_parameters()
    }


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """trl's trainer on the tiny model; its own data set is never drawn from."""
    path = fetch("tiny-random")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    settings = TrlConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        beta=BETA,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
    )
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    return TrlTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(path),
    )


def load_weights(model: Any, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def theirs(
    trainer: Any, examples: list[dict[str, list[int]]], tuned: dict[str, Tensor], **settings: Any
) -> tuple[float, dict[str, Tensor]]:
    load_weights(trainer.model, tuned)
    defaults = {
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0] * len(settings.get("loss_types", [""])),
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
    }
    for name, value in {**defaults, **settings}.items():
        assert hasattr(trainer, name), name
        setattr(trainer, name, value)
    trainer.model.eval()  # the tiny model has no dropout
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    loss.backward()
    return float(loss.detach()), {
        name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None
    }


# Away from the start, log-ratios are differences of sums of some 100 nats, and the losses pass on
# the rounding of those.
TOLERANCES = {"at the start": 1e-5, "after some training": 1e-4}


@pytest.mark.parametrize("where", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_first_step_loss_and_gradient(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trl_trainer: Any,
    tuned: dict[str, Tensor],
    case: str,
    where: str,
) -> None:
    loss, settings = CASES[case]
    tolerance = TOLERANCES[where]
    context = parts_of(
        "dpo",
        tmp_path,
        f"algorithm={{type: dpo, steps: 1, pairs_per_step: {N_PAIRS}, loss: {loss}}}",
        "data={type: arithmetic_pairs, operation: mixed, operands: 3, high: 99, size: 9}",
        "optim.micro_batch_tokens=200",
        "optim.max_grad_norm=1e9",
    )
    weights = {name: p.detach().clone() for name, p in context.policy.model.named_parameters()}
    if where == "after some training":
        weights = tuned
        load_weights(context.policy.model, tuned)  # the reference is another copy
    gradients = catch_gradients(monkeypatch)
    trainer = DPOTrainer(context)
    metrics = trainer.step(1).metrics.result()

    rows = [row for _, row in type(context.order)(9, seed=0).take(N_PAIRS)]
    pairs = context.train.pairs
    examples = [
        {
            "prompt_ids": list(pairs.chosen[row].prompt_ids),
            "chosen_ids": list(pairs.chosen[row].completion_ids),
            "rejected_ids": list(pairs.rejected[row].completion_ids),
        }
        for row in rows
    ]
    assert len({len(one["chosen_ids"]) for one in examples}) > 1  # there is padding
    expected, their_gradient = theirs(trl_trainer, examples, weights, **settings)
    assert metrics["loss"] == pytest.approx(expected, abs=tolerance, rel=tolerance)
    (ours,) = gradients
    assert ours.keys() == their_gradient.keys()
    size = torch.cat([g.flatten() for g in their_gradient.values()]).norm()
    assert size > 1e-3
    for name, gradient in their_gradient.items():
        error = float((ours[name] - gradient).norm() / size)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def test_the_changed_policy_is_another_one_than_the_reference(
    tmp_path: Path, tuned: dict[str, Tensor]
) -> None:
    """The cases after some training do not compare ln 2 with ln 2."""
    model = parts_of("dpo", tmp_path).policy.model
    assert not any(torch.equal(p, tuned[name]) for name, p in model.named_parameters())
