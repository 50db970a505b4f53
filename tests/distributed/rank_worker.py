"""One process of a distributed test: trains every case of `CASES` into the folder it is given.

Usage: python rank_worker.py FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny_runs

from alignment.modeling.shards import Whole
from alignment.types import AlignmentError

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sft": ("sft", ("data.high=12", "algorithm.samples_per_step=5", "algorithm.steps=4")),
    "sft-one-sample": ("sft", ("algorithm.samples_per_step=1", "algorithm.steps=2")),
    "sft-nan": ("sft", ("eval={tasks: []}",)),
    "sft-sequence": ("sft", ("data.high=12", "algorithm.reduction=sequence")),
    "grpo": (
        "grpo",
        (
            "algorithm.prompts_per_step=6",
            "algorithm.updates_per_step=2",
            "algorithm.epochs_per_step=2",
            "algorithm.steps=3",
            "algorithm.kl={coef: 0.1, controller: adaptive, target: 0.01, horizon: 200}",
            "algorithm.entropy_coef=0.01",
            "eval={every: 2, tasks: [{type: verifiable, samples: 2, prompts: 2}]}",
            "checkpoint.every=1",
        ),
    ),
    "grpo-batch-scale": (
        "grpo",
        ("algorithm.advantage.scale=batch", "algorithm.reduction=sequence", "algorithm.steps=2"),
    ),
    "grpo-one-prompt": ("grpo", ("algorithm.prompts_per_step=1", "algorithm.steps=2")),
    "grpo-refill": (
        "grpo",
        (
            "algorithm.prompts_per_step=4",
            "algorithm.updates_per_step=2",
            "algorithm.dynamic_sampling=refill",
            "algorithm.group_size=2",
            "rollout.max_new_tokens=2",
            "algorithm.steps=3",
        ),
    ),
    "grpo-failures": (
        "grpo",
        ("algorithm.group_size=6", "rewards=[{type: 'tiny_runs:FailsOn', samples: [4]}]"),
    ),
    # In turn one rank and the other has no scores: its micro-batches are all masked.
    "grpo-masked-rank": (
        "grpo",
        (
            "algorithm.prompts_per_step=2",
            "rewards=[{type: 'tiny_runs:FailsForPrompts', prompts: [0, 3]}]",
            "limits.unscorable=1.0",
            "optim.micro_batch_tokens=20",
        ),
    ),
}
"""Name to (method, settings)."""

# Adam turns rounding noise in a gradient of zero into a step of full size; a larger epsilon does
# not, so that what is left to see is a real difference.
COMMON = ("optim.eps=1e-3",)


FAILING = (
    "algorithm.prompts_per_step=2",
    "rewards=[{type: 'tiny_runs:FailsForPrompts', prompts: [1]}]",
)
"""Half of the completions cannot be scored: none of one rank's, all of the other's."""


def train_all(folder: Path, *, poisons: bool) -> None:
    """Train every case into `folder/NAME/METHOD`.

    Args:
        poisons: whether it is this rank whose first gradient is NaN in `sft-nan`.
    """
    torch.set_num_threads(1)
    for name, (method, settings) in CASES.items():
        with tiny_runs.one_nan(Whole, poisons and name == "sft-nan"):
            tiny_runs.run(method, folder / name, *COMMON, *settings)


def error_of(folder: Path) -> str:
    """What the run that fails says."""
    try:
        tiny_runs.run("grpo", folder / "failing", *FAILING)
    except AlignmentError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    target = Path(sys.argv[1])
    train_all(target, poisons=os.environ["RANK"] == "1")
    (target / f"error-{os.environ['RANK']}.txt").write_text(error_of(target))
