"""DPO: its section of a recipe, every kind of loss, its references, and what is wrong with it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from preference_runs import made_up_pairs, parts_of, recipe_of, run
from tiny_runs import events_of, metrics_of, steps_of
from torch import Tensor
from transformers import AutoTokenizer

from alignment import losses
from alignment.config import cautions, dump_recipe, parse_recipe
from alignment.config.counts import describe_counts
from alignment.config.methods import preference as section
from alignment.config.methods.preference import PreferenceLossConfig
from alignment.config.schema import Recipe
from alignment.data.arithmetic_pairs import arithmetic_pairs
from alignment.losses import preference_kinds
from alignment.modeling.policy import PolicyWithReference
from alignment.modeling.tiny import build_tiny
from alignment.trainers import precomputed
from alignment.trainers.dpo import DPOTrainer
from alignment.trainers.preference import interleaved, remedies
from alignment.types import AlignmentError, PairBatch, UserInputError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own for reference log-probabilities."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(precomputed, "cache_directory", lambda: folder)
    return folder


# -- the section ------------------------------------------------------------------------------


def test_the_recipe_layer_knows_the_kinds_as_the_losses_do() -> None:
    stated = {
        name: (k.smooths, k.diverges, k.couples, k.needs_reference, k.nll_coef)
        for name, k in section.KINDS.items()
    }
    theirs = {
        name: (k.smooths, k.diverges, k.couples, k.needs_reference, k.nll_coef)
        for name, k in preference_kinds.KINDS.items()
    }
    assert stated == theirs
    assert list(stated) == list(theirs)
    divergences = get_args(PreferenceLossConfig.model_fields["divergence"].annotation)
    assert divergences == losses.DIVERGENCES
    assert section.NLL == "nll"


@pytest.mark.parametrize("kind", section.KINDS)
def test_a_kind_takes_its_defaults_and_survives_the_round_trip(tmp_path: Path, kind: str) -> None:
    recipe = recipe_of("dpo", tmp_path, f"algorithm.loss={{kind: {kind}}}")
    assert parse_recipe(dump_recipe(recipe)) == recipe
    algorithm: Any = recipe.algorithm
    loss = algorithm.loss
    assert loss.beta == (2.0 if kind == "simpo" else 0.1)
    assert (loss.simpo_gamma is None) == (kind != "simpo")
    assert (loss.discopop_tau is None) == (kind != "discopop")
    assert (loss.bco_decay is None) == (kind != "bco")


@pytest.mark.parametrize(
    ("kind", "beta"),
    [
        ("{simpo: 1.0, nll: 0.5}", 2.0),
        ("{simpo: 0.7}", 2.0),
        ("{sigmoid: 1.0, nll: 0.5}", 0.1),
        ("{simpo: 1.0, cpo: 0.5}, beta: 0.1", 0.1),
    ],
)
def test_simpo_keeps_its_beta_in_a_sum(tmp_path: Path, kind: str, beta: float) -> None:
    recipe = recipe_of("dpo", tmp_path, f"algorithm.loss={{kind: {kind}}}")
    algorithm: Any = recipe.algorithm
    assert algorithm.loss.beta == beta
    assert parse_recipe(dump_recipe(recipe)) == recipe


REFUSED = {
    "{kind: {simpo: 1.0, cpo: 0.5}}": "simpo's default is 2, that of the others 0.1; give it",
    "{kind: sigmod}": "unknown preference loss 'sigmod'; did you mean 'sigmoid'?",
    "{kind: {sigmoid: 1.0, hing: 0.5}}": "unknown preference loss 'hing'; did you mean 'hinge'?",
    "{kind: nll}": "unknown preference loss 'nll'",
    "{kind: {nll: 1.0}}": "names no preference loss",
    "{kind: {}}": "names no preference loss",
    "{kind: {sigmoid: 0.0}}": "a number greater than 0",
    "{kind: ipo, label_smoothing: 0.1}": "label_smoothing: applies to sigmoid, sigmoid_norm",
    "{kind: exo, label_smoothing: 0.0}": "exo needs it above 0",
    "{kind: nca, divergence: js}": "divergence: applies to sigmoid, sigmoid_norm, robust, ipo",
    "{kind: {sigmoid: 1.0, bco: 1.0}, divergence: js}": "divergence: applies to",
    "{kind: sigmoid, alpha: 0.3}": "alpha: applies to divergence: alpha only",
    "{kind: sigmoid, simpo_gamma: 0.3}": "simpo_gamma: applies to kind: simpo only",
    "{kind: sigmoid, discopop_tau: 0.3}": "discopop_tau: applies to kind: discopop only",
    "{kind: sigmoid, bco_decay: 0.3}": "bco_decay: applies to kind: bco only",
    "{kind: {sigmoid: 1.0}, nll_coef: 0.3}": "name nll with its weight among the kinds",
    "{kind: simpo, desensitize: 0.3}": "desensitize: applies to kinds with a reference",
    "{kind: sigmoid, nll_coef: 1.0, desensitize: 0.3}": "without a likelihood term",
    "{kind: sigmoid, label_smoothing: 0.5}": "a number less than 0.5",
    "{kind: sigmoid, beta: 0}": "a number greater than 0",
}


@pytest.mark.parametrize("loss", REFUSED)
def test_options_that_do_not_apply_are_refused(tmp_path: Path, loss: str) -> None:
    with pytest.raises(UserInputError, match=r"algorithm\.loss") as refused:
        recipe_of("dpo", tmp_path, f"algorithm.loss={loss}")
    assert REFUSED[loss] in str(refused.value)


def test_steps_or_epochs(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="give either steps or epochs; found both"):
        recipe_of("dpo", tmp_path, "algorithm.epochs=2")
    epochs = recipe_of("dpo", tmp_path, "algorithm={type: dpo, epochs: 2, pairs_per_step: 4}")
    assert describe_counts(epochs)[0] == ("4 pairs a step, 1 update a step; 2 passes over the data")
    steps = recipe_of("dpo", tmp_path, "algorithm.steps=3")
    assert describe_counts(steps)[0] == "4 pairs a step, 1 update a step; 3 steps = 12 pairs"


@pytest.mark.parametrize("kind", ["simpo", "cpo", "orpo"])
def test_without_a_reference_none_is_the_default_and_another_is_cautioned(
    tmp_path: Path, kind: str
) -> None:
    loss = f"algorithm.loss={{kind: {kind}}}"
    text = dump_recipe(recipe_of("dpo", tmp_path, loss))
    assert cautions(one_run(text.replace("mode: frozen_copy", "mode: none"))) == []
    (caution,) = cautions(one_run(text))
    assert "frozen_copy is never scored; use none" in caution
    unsaid = one_run(
        "run: {name: a}\nmodel: {path: tiny-random}\ndata: {type: arithmetic_pairs}\n"
        f"algorithm: {{type: dpo, steps: 1, loss: {{kind: {kind}}}}}\noptim: {{lr: 1.0e-3}}\n"
    )
    assert unsaid.model.reference.mode == "none"


def one_run(text: str) -> Recipe:
    recipe = parse_recipe(text)
    assert isinstance(recipe, Recipe)
    return recipe


def test_robust_without_smoothing_is_cautioned(tmp_path: Path) -> None:
    for kind in ("robust", "{robust: 1.0, nll: 0.5}"):
        (caution,) = cautions(recipe_of("dpo", tmp_path, f"algorithm.loss={{kind: {kind}}}"))
        assert "label_smoothing: 0 makes robust the plain sigmoid" in caution
        smoothed = f"algorithm.loss={{kind: {kind}, label_smoothing: 0.1}}"
        assert cautions(recipe_of("dpo", tmp_path, smoothed)) == []


def test_with_a_reference_none_is_refused(tmp_path: Path) -> None:
    mixed = "algorithm.loss={kind: {orpo: 1.0, sigmoid: 1.0}}"
    with pytest.raises(UserInputError, match=r"model\.reference: dpo compares with a reference"):
        recipe_of("dpo", tmp_path, mixed, "model.reference=none")


def test_online_methods_and_kto_refuse_precomputed(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="precomputed is for offline methods; online_dpo"):
        recipe_of("online_dpo", tmp_path, "model.reference=precomputed")
    with pytest.raises(UserInputError, match="precomputed is for preference pairs; kto"):
        recipe_of("kto", tmp_path, "model.reference=precomputed")


# -- every kind learns ------------------------------------------------------------------------

LEARNS = {
    **{kind: f"{{kind: {kind}}}" for kind in section.KINDS},
    "cDPO": "{kind: sigmoid, label_smoothing: 0.1}",
    "RPO": "{kind: sigmoid, nll_coef: 0.5}",
    "LD-DPO": "{kind: sigmoid, desensitize: 0.5}",
    "f-DPO": "{kind: sigmoid, divergence: alpha, alpha: 0.3}",
    "MPO": "{kind: {sigmoid: 0.8, bco: 0.2, nll: 1.0}}",
}


@pytest.mark.parametrize("name", LEARNS)
def test_a_loss_falls_and_prefers_the_chosen(tmp_path: Path, name: str) -> None:
    context = parts_of(
        "dpo",
        tmp_path,
        f"algorithm={{type: dpo, steps: 8, pairs_per_step: 6, loss: {LEARNS[name]}}}",
    )
    pairs = made_up_pairs(6)
    order = type(context.order)(6, seed=0, shuffle=False)
    context = replace(context, train=replace(context.train, pairs=pairs), order=order)
    trainer = DPOTrainer(context)
    records = [trainer.step(step).metrics.result() for step in range(1, 9)]
    assert all(math.isfinite(record["loss"]) for record in records)
    assert records[0]["optim/grad_norm"] > 0
    assert records[-1]["loss"] < records[0]["loss"]
    if name != "discopop":  # its slope at the start is inverted
        assert records[-1]["dpo/reward/margin"] > records[0]["dpo/reward/margin"]


# -- references -------------------------------------------------------------------------------


def reference_events(folder: Path) -> list[str]:
    text = (folder / "events.jsonl").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if '"kind": "reference"' in line]


def test_precomputed_numbers_are_those_of_a_frozen_copy(tmp_path: Path) -> None:
    settings = ("algorithm.steps=4", "optim.lr=1e-2")
    frozen = steps_of(run("dpo", tmp_path / "a", *settings))
    once = steps_of(run("dpo", tmp_path / "b", *settings, "model.reference=precomputed"))
    for one, other in zip(frozen, once, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["dpo/reward/margin"] == pytest.approx(one["dpo/reward/margin"], abs=1e-4)
    assert abs(frozen[-1]["dpo/reward/margin"]) > 0.01


def test_precomputed_leaves_no_reference_in_memory(tmp_path: Path) -> None:
    context = parts_of("dpo", tmp_path, "model.reference=precomputed")
    trainer = DPOTrainer(context)
    assert context.policy.reference is None
    assert trainer.precomputed is not None
    samples = interleaved(context.train.pairs.chosen, context.train.pairs.rejected)
    alone = context.policy.logprobs(samples, 1)
    assert len(alone) == len(trainer.precomputed)
    for one, other in zip(alone, trainer.precomputed, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_a_second_run_reads_what_the_first_scored(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = "model.reference=precomputed"
    first = run("dpo", tmp_path / "a", setting)
    (file,) = (cache / "reference_logprobs").iterdir()
    (event,) = events_of(first, "reference")
    assert "scored in" in event["message"] and str(file) in event["message"]
    with monkeypatch.context() as patch:
        patch.setattr(precomputed, "logprobs_of", lambda *_: pytest.fail("scored again"))
        second = run("dpo", tmp_path / "b", setting, "algorithm.loss={kind: ipo, beta: 0.4}")
        third = run("dpo", tmp_path / "c", setting)
    (event,) = events_of(second, "reference")
    assert event["message"].endswith(f"read from {file}")
    assert steps_of(third) == steps_of(first)


@pytest.mark.parametrize("damage", ["cut short", "one bit", "other tensors", "empty"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, cache: Path, damage: str) -> None:
    setting = "model.reference=precomputed"
    first = run("dpo", tmp_path / "a", setting)
    (file,) = (cache / "reference_logprobs").iterdir()
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[-3] ^= 1
    worse: dict[str, bytes] = {
        "cut short": good[:-7],
        "one bit": bytes(flipped),
        "other tensors": good.replace(b'"logprobs"', b'"logprogs"'),
        "empty": b"",
    }
    file.write_bytes(worse[damage])
    second = run("dpo", tmp_path / "b", setting)
    (warning,) = events_of(second, "warning")
    assert "is damaged" in warning["message"]
    assert file.read_bytes() == good
    assert steps_of(second) == steps_of(first)


@pytest.mark.parametrize(
    "other",
    [
        "data.high=3",
        "data.system='be brief'",
        "data.max_tokens=43",
        "model.dtype=bfloat16",
        "optim.micro_batch_tokens=512",
        "data.held_out=6",
    ],
)
def test_what_the_numbers_depend_on_is_in_the_name(tmp_path: Path, other: str) -> None:
    def name(*overrides: str) -> str:
        context = parts_of("dpo", tmp_path, "model.reference=precomputed", *overrides)
        samples = interleaved(context.train.pairs.chosen, context.train.pairs.rejected)
        return precomputed.cache_file(context, samples).name

    assert name() == name("algorithm.loss.beta=0.4", "optim.lr=1e-5", "run.seed=3")
    assert name() != name(other)


def test_what_else_the_model_computes_with_is_in_the_name(tmp_path: Path) -> None:
    """The weights are the same; the log-probabilities are not."""

    def name(model: Path, *overrides: str) -> str:
        settings = ("model.reference=precomputed", f"model.path={model}", *overrides)
        context = parts_of("dpo", tmp_path, *settings)
        samples = interleaved(context.train.pairs.chosen, context.train.pairs.rejected)
        return precomputed.cache_file(context, samples).name

    plain = build_tiny(tmp_path / "plain", seed=1)
    copy = build_tiny(tmp_path / "copy", seed=1)
    other = build_tiny(tmp_path / "other", seed=1)
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (other / "config.json").write_text(json.dumps(config))
    assert name(plain) == name(copy) != name(other)


def test_weights_and_tokenizer_are_in_the_name(tmp_path: Path) -> None:
    """One at a time: the tokens of the data stay as they are."""

    def name(model: Path) -> str:
        settings = ("model.reference=precomputed", f"model.path={model}")
        context = parts_of("dpo", tmp_path, *settings)
        samples = interleaved(context.train.pairs.chosen, context.train.pairs.rejected)
        return precomputed.cache_file(context, samples).name

    plain = build_tiny(tmp_path / "plain", seed=1)
    weights = build_tiny(tmp_path / "weights", seed=2)
    tokenizer = build_tiny(tmp_path / "tokenizer", seed=1)
    other = AutoTokenizer.from_pretrained(tokenizer)
    other.pad_token = other.decode([5])
    other.save_pretrained(tokenizer)
    assert len({name(model) for model in (plain, weights, tokenizer)}) == 3


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file in the way")
    with pytest.raises(AlignmentError, match=r"cannot create the folder .*reference_logprobs"):
        DPOTrainer(parts_of("dpo", tmp_path, "model.reference=precomputed"))


@pytest.mark.parametrize("kind", ["simpo", "cpo", "orpo"])
def test_a_loss_without_a_reference_scores_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def never(self: PolicyWithReference, *_: Any) -> Any:
        pytest.fail("a reference was scored")

    loss = f"algorithm.loss={{kind: {kind}}}"
    for mode in ("frozen_copy", "precomputed", "none"):
        context = parts_of("dpo", tmp_path, loss, f"model.reference={mode}")
        if context.policy.reference is not None:
            monkeypatch.setattr(context.policy.reference, "backbone", never)
        trainer = DPOTrainer(context)
        assert trainer.precomputed is None
        metrics = trainer.step(1).metrics.result()
        assert "dpo/log_ratio/chosen" not in metrics
        assert metrics["dpo/reward/chosen"] < 0.0  # of the policy alone


def test_a_synced_reference_follows(tmp_path: Path) -> None:
    settings = ("algorithm.steps=4", "optim.lr=1e-2")
    directory = run("dpo", tmp_path, *settings, "model.reference={mode: synced, every: 2}")
    ratios = [abs(record["dpo/reward/chosen"]) for record in metrics_of(directory)]
    # It is where the policy is after steps 2 and 4.
    assert ratios[0] == ratios[2] == 0.0
    assert ratios[1] > 0.0 and ratios[3] > 0.0


# -- what a run says --------------------------------------------------------------------------


FAST_DPO = ("algorithm.steps=30", "algorithm.pairs_per_step=4", "optim.lr=1e-2")


def test_likelihood_displacement_is_reported_once(tmp_path: Path) -> None:
    directory = run("dpo", tmp_path, *FAST_DPO, "algorithm.loss={kind: sigmoid, beta: 0.02}")
    ratios = [record["dpo/log_ratio/chosen"] for record in metrics_of(directory)]
    below = [step for step, ratio in enumerate(ratios, start=1) if ratio < -0.5]
    assert len(below) > 1
    (event,) = events_of(directory, "diagnosis")
    assert event["step"] == below[0]
    assert "likelihood displacement" in event["message"]


def test_displacement_on_purpose_is_not_reported(tmp_path: Path) -> None:
    """apo_down takes both sides down."""
    directory = run("dpo", tmp_path, *FAST_DPO, "algorithm.loss={kind: apo_down, beta: 0.02}")
    assert min(record["dpo/log_ratio/chosen"] for record in metrics_of(directory)) < -0.5
    assert not events_of(directory, "diagnosis")


@pytest.mark.parametrize(
    ("loss", "likelihood"),
    [
        ("{kind: sigmoid}", "add algorithm.loss.nll_coef"),
        ("{kind: sigmoid, nll_coef: 0.1}", "raise algorithm.loss.nll_coef"),
        ("{kind: {sigmoid: 1.0, orpo: 0.5}}", "add algorithm.loss.kind.nll"),
        ("{kind: {sigmoid: 1.0, nll: 0.5}}", "raise algorithm.loss.kind.nll"),
        ("{kind: sigmoid, desensitize: 0.5}", ""),
    ],
)
def test_the_remedies_are_what_the_recipe_can_take(
    tmp_path: Path, loss: str, likelihood: str
) -> None:
    given = f"algorithm.loss={loss}"
    algorithm: Any = recipe_of("dpo", tmp_path, given).algorithm
    found = remedies(algorithm.loss)
    assert found[:2] == ["lower optim.lr", "raise algorithm.loss.beta"]
    assert found[2:] == [likelihood][: bool(likelihood)]
    options = [advice.split()[1] for advice in found]
    recipe_of("dpo", tmp_path, given, *(f"{option}=0.9" for option in options))  # is accepted


def test_an_ordinary_run_reports_no_displacement(tmp_path: Path) -> None:
    assert not events_of(run("dpo", tmp_path), "diagnosis")


@pytest.mark.parametrize("loss", ["{kind: sigmoid, desensitize: 0.5}", "{kind: aot}"])
def test_chosen_and_rejected_are_logged_apart(tmp_path: Path, loss: str) -> None:
    """The log-probabilities of whole completions, whatever sums the loss looks at."""
    context = parts_of("dpo", tmp_path, "algorithm.pairs_per_step=21", f"algorithm.loss={loss}")
    pairs = context.train.pairs
    metrics = DPOTrainer(context).step(1).metrics.result()

    def mean_of(samples: Any) -> float:
        rows: list[Tensor] = context.policy.logprobs(samples, 1, of_reference=True)
        return sum(float(row.sum()) for row in rows) / len(rows)

    assert len(pairs) == 21
    assert metrics["dpo/logps/chosen"] == pytest.approx(mean_of(pairs.chosen), rel=1e-5)
    assert metrics["dpo/logps/rejected"] == pytest.approx(mean_of(pairs.rejected), rel=1e-5)
    assert mean_of(pairs.chosen) != pytest.approx(mean_of(pairs.rejected), rel=1e-3)


def test_no_pairs_are_refused(tmp_path: Path) -> None:
    context = parts_of("dpo", tmp_path)
    empty = replace(context, train=replace(context.train, pairs=PairBatch((), ())))
    with pytest.raises(UserInputError, match="there is no preference pair to learn from"):
        DPOTrainer(empty)


def test_data_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="needs 'chosen' and 'rejected'"):
        parts_of("dpo", tmp_path, "data={type: arithmetic, low: 1, high: 3}")


def test_epochs_are_passes_over_the_pairs(tmp_path: Path) -> None:
    algorithm = "algorithm={type: dpo, epochs: 2, pairs_per_step: 4}"
    assert DPOTrainer(parts_of("dpo", tmp_path, algorithm)).total_steps == 11  # 42 / 4


# -- the data ---------------------------------------------------------------------------------


def test_arithmetic_pairs_are_right_and_wrong() -> None:
    rows = arithmetic_pairs(operation="mixed", operands=3, low=-5, high=9, size=50, error=3)
    assert rows == arithmetic_pairs(operation="mixed", operands=3, low=-5, high=9, size=50, error=3)
    for row in rows:
        right, wrong = (int(row[side].split()[-1]) for side in ("chosen", "rejected"))
        assert right == int(row["answer"]) == eval(row["expression"])
        assert 1 <= abs(wrong - right) <= 3
        assert row["prompt"] == f"What is {row['expression']}?"
    with pytest.raises(UserInputError, match="error is 0"):
        arithmetic_pairs(error=0)
