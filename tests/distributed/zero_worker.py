"""One process of the test of DeepSpeed's ZeRO: trains cases under both stages.

Usage: python zero_worker.py FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. What
lies in FOLDER/resumed already is gone on with.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import sharded_worker
from sharded_worker import COMMON, cut_off, inside, tiny_runs
from tiny_models import tiny_model

from alignment.config.schema import Recipe
from alignment.distributed import Distributed
from alignment.modeling import scorer
from alignment.modeling.optimizer import AdamWOptions
from alignment.modeling.policy import PolicyWithReference
from alignment.modeling.reference import trainable
from alignment.modeling.shards import held, own_part
from alignment.trainers.run import train
from alignment.trainers.setup import make_shards
from alignment.types import Sample

# Ranks differ in how often they read logits, too.
_FEW = 4

_ONE_STEP = ("algorithm.steps=1", "eval={tasks: []}")

_OWN: dict[str, tuple[str, tuple[str, ...]]] = {
    # The reference has other weights in the same model, its head included.
    "grpo-synced-exact-kl": (
        "grpo",
        (
            "algorithm.prompts_per_step=3",
            "algorithm.group_size=2",
            "algorithm.epochs_per_step=2",
            "algorithm.kl={coef: 0.1, estimator: full}",
            "model.reference={mode: synced, every: 1, mix: 0.5}",
            "rollout.max_new_tokens=6",
            *_ONE_STEP,
        ),
    ),
    "sft-masters": ("sft", ("model.dtype=bfloat16", "eval={tasks: []}")),
}

CASES = {
    "2": ("sft", "grpo", "grpo-adapter", "sft-masters", "sft-nan"),
    "3": (
        "sft",
        "grpo",
        "grpo-adapter",
        "grpo-exact-kl",
        "grpo-synced-exact-kl",
        "ppo",
        "sft-masters",
        "sft-nan",
    ),
}
"""By stage, in part those of `sharded_worker`."""


def recipe_of(name: str) -> Recipe:
    if name not in _OWN:
        return sharded_worker.recipe_of(name)
    method, settings = _OWN[name]
    return tiny_runs.recipe_of(method, Path(), *COMMON, *settings)


def method_of(name: str) -> str:
    return (_OWN | sharded_worker.CASES)[name][0]


def train_all(folder: Path, cases: Sequence[str], *, shards: Any, poisons: bool) -> None:
    """Train cases as `sharded_worker.train_all` does."""
    recipes = {name: recipe_of(name) for name in cases}
    sharded_worker.train_all(folder, recipes, shards=shards, poisons=poisons)


def go_on(name: str, folder: Path) -> None:
    """Go on with a case's run in a folder."""
    with inside(folder):
        train(recipe_of(name))


def zero(stage: str) -> dict[str, str]:
    """What `accelerate launch` sets for a configuration of DeepSpeed."""
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}


def kept(ranks: Distributed) -> dict[str, int]:
    """How many numbers there are, and how many this rank keeps of them once a pass is over."""
    policy = PolicyWithReference(tiny_model().bfloat16(), None)
    n = sum(p.numel() for p in policy.parameters())
    policy.shard(make_shards(ranks))
    optimizer = policy.shards.own_optimizer(
        trainable(policy), AdamWOptions(1e-3), master_dtype=torch.float32
    )
    policy.shards.backward(policy([Sample((1, 2), (3, 4), (True, True))]).logprobs.sum())
    return {
        "all": n,
        "whole weights": sum(p.numel() for p in policy.parameters()),
        "weights": sum(own_part(held(p)).numel() for p in policy.parameters()),
        "masters": sum(own_part(m).numel() for m in optimizer.state_dict()["masters"].values()),
        "gradients": sum(g.numel() for g in optimizer.gradients),
    }


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    scorer.CHUNK = _FEW
    target = Path(sys.argv[1])
    resumed = target / "resumed"
    for stage, cases in CASES.items():
        os.environ.update(zero(stage))
        ranks = Distributed()
        numbers = ranks.gather([kept(ranks)])
        gc.freeze()  # DeepSpeed collects garbage for each model, and would look at all of torch
        if ranks.is_main:
            (target / f"kept-{stage}.json").write_text(json.dumps(numbers))
        shards = sys.modules["alignment.modeling.zero"].ZeroShards
        train_all(target / stage, cases, shards=shards, poisons=ranks.rank == 1)
        if ranks.is_main:
            cut_off(target / stage / "grpo" / "grpo", resumed / f"two-to-two-{stage}", after=1)
        ranks.barrier()
        go_on("grpo", resumed / f"two-to-two-{stage}")
    go_on("grpo", resumed / "one-to-two")
