"""One process of PPO's distributed test: trains every case of `CASES` into the folder it is given.

Usage: python ppo_rank_worker.py FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import ppo_runs

CASES: dict[str, tuple[str, ...]] = {
    "everything": (
        "algorithm.prompts_per_step=6",
        "algorithm.updates_per_step=3",
        "algorithm.steps=3",
        "algorithm.kl={coef: 0.1, placement: reward, controller: adaptive, target: 1, horizon: 50}",
        "algorithm.normalize_rewards=true",
        "algorithm.whiten_rewards=true",
        "algorithm.missing_eos_penalty=0.3",
        "algorithm.critic={normalize: true, warmup_steps: 1}",
        "rollout={max_new_tokens: 40, temperature: 1.7}",
        "checkpoint.every=1",
    ),
    "shared": (
        "algorithm.critic={kind: shared}",
        "algorithm.prompts_per_step=5",
        "algorithm.updates_per_step=1",
        "algorithm.entropy_coef=0.01",
        "rollout={max_new_tokens: 40, temperature: 1.7}",
    ),
    "one-prompt": ("algorithm.prompts_per_step=1", "algorithm.updates_per_step=1"),
    "failures": (
        "algorithm.samples_per_prompt=6",
        "rewards=[{type: 'tiny_runs:FailsOn', samples: [4]}]",
        "algorithm.normalize_rewards=true",
    ),
    "early-stop": (
        "algorithm.prompts_per_step=6",
        "algorithm.updates_per_step=3",
        "algorithm.epochs_per_step=3",
        "algorithm.stop_kl=2e-4",
    ),
}
"""Name to settings. Lengths differ, so the ranks hold unequal numbers of tokens."""

# Adam turns rounding noise in a gradient of zero into a step of full size; a larger epsilon does
# not, so that what is left to see is a real difference.
COMMON = ("optim.eps=1e-3", "limits.unscorable=0.5")


def train_all(folder: Path) -> None:
    """Train every case into `folder/NAME/ppo`."""
    torch.set_num_threads(1)
    for name, settings in CASES.items():
        ppo_runs.run(folder / name, *COMMON, *settings)


if __name__ == "__main__":
    train_all(Path(sys.argv[1]))
