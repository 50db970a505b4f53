"""One process of a distributed test: trains every case of `CASES` into the folder it is given.

Usage: python preference_worker.py FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import preference_runs

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "dpo-coupled": (
        "dpo",
        (
            "algorithm={type: dpo, steps: 3, pairs_per_step: 5, "
            "loss: {kind: {aot: 1.0, bco: 0.5}, bco_decay: 0.5}}",
            "optim.micro_batch_tokens=120",
            "checkpoint.every=1",
        ),
    ),
    "dpo-precomputed": (
        "dpo",
        ("algorithm.pairs_per_step=5", "model.reference=precomputed"),
    ),
    "dpo-one-pair": ("dpo", ("algorithm.pairs_per_step=1",)),
    "kto": ("kto", ("algorithm.samples_per_step=7", "algorithm.steps=3")),
    "online-dpo": (
        "online_dpo",
        (
            "algorithm.prompts_per_step=6",
            "algorithm.updates_per_step=2",
            "algorithm.pairs=random_pair",
            "model.reference={mode: synced, every: 2}",
            "algorithm.steps=3",
        ),
    ),
}
"""Name to (method, settings)."""

# Adam turns rounding noise in a gradient of zero into a step of full size; a larger epsilon does
# not, so that what is left to see is a real difference.
COMMON = ("optim.eps=1e-3",)


def train_all(folder: Path) -> None:
    """Train every case into `folder/NAME/METHOD`, with a cache of its own."""
    torch.set_num_threads(1)
    with preference_runs.own_cache(folder / "cache"):
        for name, (method, settings) in CASES.items():
            preference_runs.run(method, folder / name, *COMMON, *settings)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    train_all(Path(sys.argv[1]))
