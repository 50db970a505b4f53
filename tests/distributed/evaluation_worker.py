"""One process of a distributed test: trains a run whose evaluation after its last step fails.

Usage: python evaluation_worker.py FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import preference_runs

from alignment.types import AlignmentError

SETTINGS = (
    "eval={at_start: false, tasks: [{type: preference}]}",
    "data.held_out=0",
    "checkpoint={every: 0}",
)
"""There is no pair to evaluate on."""

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    try:
        preference_runs.run("dpo", Path(sys.argv[1]), *SETTINGS)
    except AlignmentError as error:
        sys.stdout.write(f"failed: {error}\n")
