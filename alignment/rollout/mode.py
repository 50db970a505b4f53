"""The state a model samples in, and its exact restoration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def sampling_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout) without gradients; afterwards every module's flag is as it was.

    The flags are restored one by one, because a model in training may hold modules that were put
    in eval mode on purpose. `no_grad` rather than `inference_mode`: buffers that a model makes on
    the way must stay usable in training.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training
