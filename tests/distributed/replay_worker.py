"""One process of a distributed test: trains, makes a step again, and trains on what was recorded.

Usage: python replay_worker.py FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import replay_runs

from alignment.trainers.replay import replay

UNEVEN = ("algorithm.prompts_per_step=3", "optim.eps=1e-3")
"""One rank has two groups of a round, the other one; rounding noise does not become a step."""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    done = replay_runs.run("refill", folder / "made", *UNEVEN)
    again = replay(done.path, 5, sample=4)
    assert (again.start, again.differing) == (4, ()), again.differing
    assert again.sample is not None and again.sample.same
    with pytest.MonkeyPatch.context() as patch:
        replay_runs.forbid(patch)
        assert replay(done.path, 4).differing == ()
        replay_runs.run("refill", folder / "again", *UNEVEN, rollouts_from=done.path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
