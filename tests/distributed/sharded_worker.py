"""One process of the test of sharded weights: trains every case of `CASES` under FSDP2.

Usage: python sharded_worker.py FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. What
lies in FOLDER/resumed already is gone on with: runs in folders whose name begins with `replicated`
by ranks that each have all weights.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import ppo_runs
import preference_runs
import tiny_runs
from tiny_models import tiny_model

from alignment.config.load import load_recipe
from alignment.config.schema import Recipe
from alignment.distributed import Distributed, Sharded
from alignment.modeling.policy import PolicyWithReference
from alignment.modeling.shards import first_elements, held, own_part, whole
from alignment.runs.directory import RunDirectory
from alignment.runs.outputs import FINISHED
from alignment.trainers.run import train
from alignment.trainers.setup import make_shards

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What `accelerate launch` sets for a configuration of FSDP2."""

_SMALL = "optim.micro_batch_tokens=70"  # several micro-batches, not the same number on each rank
_ADAPTER = "model.lora={rank: 4}"
_UNEVALUATED = ("eval={tasks: []}",)
_ONE_STEP = (*_UNEVALUATED, "algorithm.steps=1")

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sft": (
        "sft",
        (
            "data.high=12",
            "algorithm.samples_per_step=5",
            "model.gradient_checkpointing=true",
            "eval.at_start=false",
            _SMALL,
        ),
    ),
    "sft-one-sample": ("sft", ("algorithm.samples_per_step=1", *_ONE_STEP)),
    "sft-nan": ("sft", _UNEVALUATED),
    "grpo": (
        "grpo",
        (
            "algorithm.prompts_per_step=4",
            "algorithm.group_size=2",
            "algorithm.updates_per_step=2",
            "algorithm.kl={coef: 0.1, controller: adaptive, target: 0.01, horizon: 200}",
            "model.reference={mode: synced, every: 1, mix: 0.5}",
            "rollout.max_new_tokens=6",
            "eval={every: 2, tasks: [{type: verifiable, samples: 1, prompts: 1}]}",
            "checkpoint.every=1",
        ),
    ),
    "grpo-adapter": (
        "grpo",
        (
            "algorithm.prompts_per_step=1",
            "algorithm.epochs_per_step=2",
            "algorithm.kl.coef=0.1",
            _ADAPTER,
            "model.reference=adapter_off",
            "rollout.max_new_tokens=4",
            *_ONE_STEP,
        ),
    ),
    "grpo-exact-kl": (
        "grpo",
        (
            "algorithm.prompts_per_step=3",
            "algorithm.group_size=2",
            "algorithm.epochs_per_step=2",
            "algorithm.kl={coef: 0.1, estimator: full}",
            "model.reference=frozen_copy",
            "algorithm.entropy_coef=0.01",
            "rollout.max_new_tokens=4",
            *_ONE_STEP,
            _SMALL,
        ),
    ),
    "ppo": (
        "ppo",
        (
            "algorithm.prompts_per_step=3",
            "algorithm.updates_per_step=1",
            "algorithm.critic={normalize: true, warmup_steps: 1}",
            "model.reference=frozen_copy",
            "rollout={engine: hf, max_new_tokens: 4}",
            *_UNEVALUATED,
        ),
    ),
    "ppo-shared": (
        "ppo",
        (
            "algorithm.critic={kind: shared}",
            "algorithm.prompts_per_step=1",
            "algorithm.updates_per_step=1",
            "model.reference=frozen_copy",
            "rollout.max_new_tokens=4",
            *_ONE_STEP,
        ),
    ),
    "dpo": (
        "dpo",
        (
            "algorithm={type: dpo, steps: 2, pairs_per_step: 5, "
            "loss: {kind: {aot: 1.0, bco: 0.5}, bco_decay: 0.5}}",
            "model.reference={mode: synced, every: 2}",
            "optim.micro_batch_tokens=120",
            *_UNEVALUATED,
        ),
    ),
    "dpo-precomputed": (
        "dpo",
        ("algorithm.pairs_per_step=1", "model.reference=precomputed", *_ONE_STEP),
    ),
    "reward": (
        "reward_model",
        ("algorithm.steps=2", "algorithm.pairs_per_step=5", "eval.at_start=false", _SMALL),
    ),
    "reward-adapter": (
        "reward_model",
        ("algorithm.pairs_per_step=1", _ADAPTER, *_ONE_STEP),
    ),
}
"""Name to (method, settings)."""

# Adam turns rounding noise in a gradient of zero into a step of full size; a larger epsilon does
# not, so that what is left to see is a real difference.
COMMON = ("optim.eps=1e-3",)


def recipe_of(name: str) -> Recipe:
    """A case's recipe; its run is made in the working directory, so that it can be moved."""
    method, settings = CASES[name]
    here, settings = Path(), (*COMMON, *settings)
    if method == "reward_model":
        common = ("run.name=reward_model", "expect=[]", "run.dir=.")
        recipe = load_recipe(f"tiny/{method}", [*common, *settings])
        assert isinstance(recipe, Recipe)
        return recipe
    if method == "ppo":
        return ppo_runs.recipe_of(here, *settings)
    if method == "dpo":
        return preference_runs.recipe_of(method, here, *settings)
    return tiny_runs.recipe_of(method, here, *settings)


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """With another working directory."""
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def train_all(folder: Path, recipes: Mapping[str, Recipe], *, shards: Any, poisons: bool) -> None:
    """Train each case's recipe into `folder/NAME/METHOD`, with a cache of its own.

    Args:
        shards: the class of the model's.
        poisons: whether it is this rank whose first gradient is NaN in `sft-nan`.
    """
    torch.set_num_threads(1)
    for name, recipe in recipes.items():
        with (
            preference_runs.own_cache(folder / "cache"),
            inside(folder / name),
            tiny_runs.one_nan(shards, poisons and name == "sft-nan"),
        ):
            train(recipe)


def go_on(name: str, folder: Path) -> None:
    """Go on with a case's run in a folder."""
    with inside(folder):
        train(recipe_of(name))


def cut_off(run: Path, folder: Path, after: int) -> None:
    """A copy of a run as it was after a step, had it been killed later."""
    copied = folder / run.name
    shutil.copytree(run, copied)
    (copied / FINISHED).unlink()
    directory = RunDirectory.open(copied)
    shutil.rmtree(directory.model_dir)
    for path in directory.checkpoints_dir.iterdir():
        if int(path.name.rpartition("-")[2]) > after:
            shutil.rmtree(path)


def numbers_in_parts() -> DTensor:
    """0 to 34 in rows of 7, of which each rank keeps a part; not all as many."""
    mesh = init_device_mesh("cpu", (Distributed().world_size,))
    return distribute_tensor(torch.arange(35.0).reshape(5, 7), mesh, [Shard(0)])


def first_of_parts(n: int) -> list[float]:
    """The first `n` of the numbers in parts: each rank's share of them, one after the other."""
    return Distributed().gather(first_elements(numbers_in_parts(), n).tolist())


def kept(ranks: Distributed) -> dict[str, Any]:
    """How many numbers there are, and how many of them this rank holds before, inside and after
    gathering; by which exchanges it gets a copy of all; and a tensor of uneven parts."""
    policy = PolicyWithReference(tiny_model(), None)
    n = sum(p.numel() for p in policy.parameters())
    policy.shard(make_shards(ranks))

    def own() -> int:
        return sum(own_part(held(p)).numel() for p in policy.parameters())

    before = own()
    with policy.shards.gathered():
        inside = own()
        gathered = list(policy.parameters())
    left = sum(p.untyped_storage().nbytes() for p in gathered)
    with CommDebugMode() as exchanged:
        policy.whole_model(keep=ranks.is_main)
    return {
        "all": n,
        "before": before,
        "inside": inside,
        "after": own(),
        "left": left,
        "exchanges": [str(kind) for kind in exchanged.get_comm_counts()],
        "uneven": whole(numbers_in_parts()).tolist(),
    }


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.update(FSDP2)
    target = Path(sys.argv[1])
    ranks = Distributed()
    found = {n: first_of_parts(n) for n in (3, 21, 30, 99)}
    numbers = ranks.gather([kept(ranks)])
    if ranks.is_main:
        (target / "first.json").write_text(json.dumps(found))
        (target / "kept.json").write_text(json.dumps(numbers))
    train_all(
        target, {name: recipe_of(name) for name in CASES}, shards=Sharded, poisons=ranks.rank == 1
    )
    go_on("grpo", target / "resumed" / "one-to-two")
    if ranks.is_main:
        for where in ("two-to-two", "replicated"):
            cut_off(target / "grpo" / "grpo", target / "resumed" / where, after=1)
    ranks.barrier()
    go_on("grpo", target / "resumed" / "two-to-two")
    del os.environ["ACCELERATE_USE_FSDP"]
    go_on("grpo", target / "resumed" / "replicated")
