"""Stand-ins for what trl's loss methods read from their trainer."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def accelerator() -> SimpleNamespace:
    def same(x: Tensor, **_: Any) -> Tensor:
        return x

    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        gather=same,
        gather_for_metrics=same,
        reduce=same,
        sync_gradients=True,
    )


def metrics() -> dict[str, dict[str, list[Any]]]:
    return defaultdict(lambda: defaultdict(list))
