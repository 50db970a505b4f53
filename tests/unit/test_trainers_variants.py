"""Every variant of group-relative training runs, learns, and does the one thing it is for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES
from tiny_runs import metrics_of, recipe_of, rollouts_of, run, weights_of
from transformers import AutoConfig, AutoModelForCausalLM

from alignment.config.load import dump_recipe, parse_recipe
from alignment.modeling.catalog import fetch
from alignment.modeling.tiny import byte_tokenizer
from alignment.trainers.experience import minibatch_slices
from alignment.types import UserInputError

VARIANTS: dict[str, tuple[str, ...]] = {
    "grpo": (),
    "dr. grpo": ("algorithm.advantage.scale=none", "algorithm.reduction=constant"),
    "constant divisor": ("algorithm.reduction=constant", "algorithm.constant_divisor=3"),
    "batch scale": ("algorithm.advantage.scale=batch",),
    "rloo": ("algorithm.advantage.baseline=leave_one_out",),
    "dapo": (
        "algorithm.loss.clip_high=0.28",
        "algorithm.dynamic_sampling=refill",
        "algorithm.overlong={buffer: 4}",
    ),
    "gspo": (
        "algorithm.loss={ratio_level: sequence, clip_low: 3e-4, clip_high: 4e-4}",
        "algorithm.reduction=sequence",
        "algorithm.updates_per_step=2",
    ),
    "cispo": ("algorithm.loss.type=cispo", "algorithm.updates_per_step=2"),
    "dual clip": ("algorithm.loss.dual_clip=3.0", "algorithm.updates_per_step=2"),
    "entropy bonus": ("algorithm.entropy_coef=0.01",),
    "skip": ("algorithm.dynamic_sampling=skip",),
    "truncated masked": ("algorithm.truncated=mask", "rollout.max_new_tokens=150"),
    "truncated penalized": ("algorithm.truncated=penalize", "algorithm.truncation_penalty=0.5"),
    "kl in the loss": ("algorithm.kl.coef=0.1", "algorithm.updates_per_step=2"),
    "kl in the reward": ("algorithm.kl={coef: 0.1, placement: reward}",),
    "full kl": ("algorithm.kl={coef: 0.1, estimator: full}", "algorithm.updates_per_step=2"),
    "adaptive kl": ("algorithm.kl={coef: 0.1, controller: adaptive, target: 0.1, horizon: 100}",),
    "no reference": ("model.reference=none",),
    "lora": ("model.lora={rank: 4}",),
    "gradient checkpointing": ("model.gradient_checkpointing=true",),
    "bfloat16": ("model.dtype=bfloat16",),
    "bfloat16 without masters": ("model.dtype=bfloat16", "model.master_dtype=none"),
    "eager attention": ("model.attention=eager",),
    "transformers' engine": ("rollout.engine=hf",),
    "two rewards": (
        "rewards=[{type: 'tiny_runs:even_tokens'}, {type: length, count: 3, weight: 0.1}]",
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_learns(tmp_path: Path, variant: str) -> None:
    directory = run("grpo", tmp_path, *VARIANTS[variant])
    start = run_start()
    records = metrics_of(directory)
    assert len(records) == 2
    for record in records:
        assert math.isfinite(record["loss"])
        assert record["optim/grad_norm"] > 0.0
        assert record["optim/skipped_updates"] == 0.0
    end = weights_of(directory)
    assert any(not torch.equal(start[name], end[name].float()) for name in start)


def run_start() -> dict[str, torch.Tensor]:
    """The weights that a run starts from."""
    model: Any = AutoModelForCausalLM.from_pretrained(fetch("tiny-random"))
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts with the byte tokenizer."""
    folder = tmp_path_factory.mktemp("mixture")
    tokenizer = byte_tokenizer()
    options = FAMILIES["qwen3_moe"] | {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model("qwen3_moe", **options))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_the_router_loss_acts(tmp_path: Path, mixture: Path, method: str) -> None:
    off, on = (
        run(method, tmp_path / str(coef), f"model.path={mixture}", f"model.router_aux_coef={coef}")
        for coef in (0.0, 0.5)
    )
    first_off, first_on = metrics_of(off)[0], metrics_of(on)[0]
    assert "router_loss" not in first_off
    # E * sum f P is 1 * k = 2 where experts share evenly, and at least about that
    assert 1.8 < first_on["router_loss"] < 4.0
    assert first_on["loss"] - first_off["loss"] == pytest.approx(
        0.5 * first_on["router_loss"], abs=1e-4
    )
    before, after = weights_of(off), weights_of(on)
    gates = [name for name in before if name.endswith("mlp.gate.weight")]
    assert gates
    assert all(not torch.equal(before[name], after[name]) for name in gates)


# -- dynamic sampling -------------------------------------------------------------------------

# One or two tokens, two samples: about half of the groups have no spread.
FLAT = ("algorithm.group_size=2", "rollout.max_new_tokens=1", "algorithm.steps=4")


def test_skipping_keeps_only_groups_with_spread(tmp_path: Path) -> None:
    directory = run("grpo", tmp_path, *FLAT, "algorithm.dynamic_sampling=skip")
    records, rollouts = metrics_of(directory), rollouts_of(directory)
    assert any(record["groups/with_spread"] < 1.0 for record in records)
    for record, sampled in zip(records, rollouts, strict=True):
        rows = [row for row in sampled if row["kept"]]
        assert record["rollout/rounds"] == 1
        assert len(sampled) == 2 * 4
        assert len(rows) == 2 * round(4 * record["groups/with_spread"])
        for first, second in zip(rows[::2], rows[1::2], strict=True):
            assert first["prompt_index"] == second["prompt_index"]
            assert first["reward"] != second["reward"]


def test_refilling_draws_until_the_step_is_full(tmp_path: Path) -> None:
    directory = run(
        "grpo", tmp_path, *FLAT, "algorithm.dynamic_sampling=refill", "algorithm.max_refills=9"
    )
    records, rollouts = metrics_of(directory), rollouts_of(directory)
    assert max(record["rollout/rounds"] for record in records) > 1
    drawn: list[int] = []
    for record, sampled in zip(records, rollouts, strict=True):
        rows = [row for row in sampled if row["kept"]]
        assert len(rows) == 8
        assert record["groups/with_spread"] == pytest.approx(8 / len(sampled))
        assert all(a["reward"] != b["reward"] for a, b in zip(rows[::2], rows[1::2], strict=True))
        drawn += [row["prompt_index"] for row in rows[::2]]
    assert drawn == sorted(set(drawn))  # no prompt twice, and in the order of the draws
    everything = [row["prompt_index"] for rows in rollouts for row in rows[::2]]
    assert sorted(everything) == list(range(len(everything)))


def test_a_step_whose_groups_are_all_skipped_changes_nothing(tmp_path: Path) -> None:
    constant = "rewards=[{type: 'tiny_runs:constant'}]"
    directory = run("grpo", tmp_path, constant, "algorithm.dynamic_sampling=skip")
    for record in metrics_of(directory):
        assert "loss" not in record
        assert record["groups/with_spread"] == 0.0
    start, end = run_start(), weights_of(directory)
    assert all(torch.equal(start[name], end[name]) for name in start)


# -- long completions -------------------------------------------------------------------------


def test_masked_truncation_leaves_cut_off_completions_out_of_the_loss(tmp_path: Path) -> None:
    """With every completion cut off there is no loss, though the rewards differ."""
    cut = ("algorithm.truncated=mask", "rollout.max_new_tokens=2")
    for record in metrics_of(run("grpo", tmp_path, *cut)):
        assert record["completion/cut_off"] == 1.0
        assert record["groups/with_spread"] > 0.0
        assert "loss" not in record


def test_a_truncation_penalty_is_subtracted_from_the_reward(tmp_path: Path) -> None:
    settings = ("algorithm.truncated=penalize", "algorithm.truncation_penalty=0.5")
    directory = run("grpo", tmp_path, *settings, "algorithm.steps=1")
    (record,), (rows,) = metrics_of(directory), rollouts_of(directory)
    expected = [row["reward"] - 0.5 * (row["stop_reason"] == "length") for row in rows]
    assert record["reward/mean"] == pytest.approx(sum(expected) / len(rows), abs=1e-6)


def test_the_overlong_penalty_grows_over_the_buffer(tmp_path: Path) -> None:
    settings = ("algorithm.overlong={buffer: 4, penalty: 2.0}", "rollout.max_new_tokens=100")
    directory = run("grpo", tmp_path, *settings, "algorithm.steps=1", "algorithm.group_size=8")
    (record,), (rows,) = metrics_of(directory), rollouts_of(directory)
    penalties = {97: 0.5, 98: 1.0, 99: 1.5, 100: 2.0}
    expected = [row["reward"] - penalties.get(len(row["completion_ids"]), 0.0) for row in rows]
    assert len({len(row["completion_ids"]) for row in rows}) > 1
    assert record["reward/mean"] == pytest.approx(sum(expected) / len(rows), abs=1e-6)


# -- minibatches and defaults -----------------------------------------------------------------


def test_minibatches_do_not_depend_on_who_holds_a_group() -> None:
    everyones = [3, 4, 5, 7, 8, 9]  # 6 was dropped
    assert minibatch_slices(everyones, everyones, 2, 10) == [slice(0, 30), slice(30, 60)]
    # parts {3, 4, 5} and {7, 8, 9}
    assert minibatch_slices([3, 5, 8], everyones, 2, 10) == [slice(0, 20), slice(20, 30)]
    assert minibatch_slices([4, 7, 9], everyones, 2, 10) == [slice(0, 10), slice(10, 30)]
    assert minibatch_slices([], everyones, 2, 10) == [slice(0, 0), slice(0, 0)]
    # fewer groups than parts: some parts are empty, and none is lost
    assert minibatch_slices([2], [2], 3, 4)[-1] == slice(0, 4)
    assert minibatch_slices([], [], 3, 4) == [slice(0, 0)]


def test_leave_one_out_is_not_scaled_by_default(tmp_path: Path) -> None:
    recipe = recipe_of("grpo", tmp_path, "algorithm.advantage.baseline=leave_one_out")
    algorithm: Any = recipe.algorithm
    assert algorithm.advantage.scale == "none"
    assert parse_recipe(dump_recipe(recipe)) == recipe
    default: Any = recipe_of("grpo", tmp_path).algorithm
    assert default.advantage.scale == "group"
    with pytest.raises(UserInputError, match=r"leave_one_out .* is not scaled"):
        recipe_of("grpo", tmp_path, "algorithm.advantage={baseline: leave_one_out, scale: group}")


def test_full_kl_in_the_reward_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"algorithm\.kl\.estimator"):
        recipe_of("grpo", tmp_path, "algorithm.kl={coef: 0.1, placement: reward, estimator: full}")
