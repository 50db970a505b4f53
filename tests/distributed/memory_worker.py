"""One process of a distributed test: rank 1 runs out of memory, once in each run.

Usage: python memory_worker.py FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny_runs

from alignment.modeling.policy import PolicyWithReference

METHODS = ("sft", "grpo")
SETTINGS = (
    "algorithm.steps=2",
    "optim.eps=1e-3",
    "optim.micro_batch_tokens=100",
    "eval={tasks: []}",
)


def train_all(folder: Path) -> None:
    """Train both methods into `folder/METHOD`."""
    torch.set_num_threads(1)
    for method in METHODS:
        tiny_runs.run(method, folder, *SETTINGS)


def out_of_memory_in_first_pass() -> None:
    """The first forward pass with gradients of each model fails with the allocator's error."""
    original = PolicyWithReference.forward

    def forward(self: PolicyWithReference, *arguments: Any, **options: Any) -> Any:
        scores = original(self, *arguments, **options)
        if torch.is_grad_enabled() and self.cap.tokens is None:
            torch.empty(2**45)
        return scores

    PolicyWithReference.forward = forward  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        out_of_memory_in_first_pass()
    train_all(Path(sys.argv[1]))
