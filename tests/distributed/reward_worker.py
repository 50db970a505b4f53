"""One process of a distributed test of reward models: trains every case into a folder.

Usage: python reward_worker.py FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from alignment.config.load import load_recipe
from alignment.config.schema import Recipe
from alignment.trainers.run import train

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "pairs": (
        "reward_model",
        ("algorithm.pairs_per_step=5", "algorithm.center_coef=0.1", "checkpoint.every=1"),
    ),
    "one-pair": ("reward_model", ("algorithm.pairs_per_step=1",)),
    "steps": ("process_reward_model", ("algorithm.samples_per_step=5",)),
}
"""Name to (method, settings); what a step draws cannot be shared out evenly."""

# Adam turns rounding noise in a gradient of zero into a step of full size; a larger epsilon does
# not, so that what is left to see is a real difference.
COMMON = ("algorithm.steps=3", "optim.eps=1e-3", "expect=[]", "run.name=it")


def recipe_of(name: str, folder: Path) -> Recipe:
    """A case's recipe, its run kept in `folder`."""
    method, settings = CASES[name]
    recipe = load_recipe(f"tiny/{method}", [*COMMON, *settings, f"run.dir={folder}"])
    assert isinstance(recipe, Recipe)
    return recipe


def train_all(folder: Path) -> None:
    """Train every case into `folder/NAME/it`."""
    torch.set_num_threads(1)
    for name in CASES:
        train(recipe_of(name, folder / name))


if __name__ == "__main__":
    train_all(Path(sys.argv[1]))
