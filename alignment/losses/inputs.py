"""What every loss does to its inputs first: check shapes, upcast, and blank what is masked out.

Blanking happens on the inputs, before any arithmetic. Multiplying a result by the mask is not
enough: 0 * NaN is NaN, and so is the gradient 0 * inf of an overflowing `exp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from alignment.registry import unknown_name
from alignment.types import AlignmentError, UserInputError

V = TypeVar("V")


def upcast(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it came in float64. Losses never compute in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def masked(x: Tensor, mask: Tensor, fill: float = 0.0) -> Tensor:
    """`upcast(x)` where `mask` is True, else `fill`: no value and no gradient crosses the mask."""
    return torch.where(mask.bool(), upcast(x), fill)


def check_shapes(expected: torch.Size, **tensors: Tensor) -> None:
    """Refuse what would broadcast: a `[B]` tensor against `[B, T]` is right only by luck.

    Raises:
        AlignmentError: a tensor of another shape than `expected`, by name.
    """
    for name, tensor in tensors.items():
        if tensor.shape != expected:
            raise AlignmentError(
                f"{name} has shape {tuple(tensor.shape)} where {tuple(expected)} is needed; "
                "give every tensor of a loss the same shape"
            )


def choose(table: Mapping[str, V], what: str, name: str) -> V:
    """The variant called `name`.

    Raises:
        UserInputError: no such variant; names the nearest one and all there are.
    """
    if name not in table:
        raise UserInputError(unknown_name(what, name, sorted(table)))
    return table[name]
