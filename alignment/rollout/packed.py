"""Faster bfloat16 matrix products on a CPU, for the duration of one rollout.

oneDNN multiplies with weights in a blocked layout. Given plain weights it rearranges them again at
every call, which for the few rows of a decoding step costs more than the product. Here each weight
is rearranged once per rollout. Nothing outlives the rollout, so no update can go unseen, and the
modules get their own `forward` back even if the rollout fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alignment.modeling.linear_cpu import Linear

# The rearranged weights are a second copy of the model: past this size that is not taken for
# granted, and a CPU is no place for sampling anyway.
_LARGEST_BYTES = 2 << 30
_SMALLEST_WEIGHT = 1 << 14  # numbers; below, the call itself is what costs


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Let the model's bfloat16 linear layers on the CPU use rearranged weights."""
    layers: list[Any] = [module for module in model.modules() if _packable(module)]
    if sum(layer.weight.nbytes for layer in layers) > _LARGEST_BYTES or not _available():
        layers = []
    try:
        for layer in layers:
            layer.forward = _packed_forward(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _packable(module: nn.Module) -> bool:
    """An ordinary linear layer, with no `forward` that someone else hung on it."""
    return (
        type(module) in (nn.Linear, Linear)
        and "forward" not in vars(module)
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.bfloat16
        and module.weight.numel() >= _SMALLEST_WEIGHT
    )


def _available() -> bool:
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    backend: Any = torch.backends.mkldnn
    known = backend.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
    return known and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _packed_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
    multiply = torch.ops.mkldnn._linear_pointwise

    def forward(x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16:
            return nn.functional.linear(x, layer.weight, layer.bias)
        output: Tensor = multiply(x, weight, layer.bias, "none", [], "")
        return output

    return forward
