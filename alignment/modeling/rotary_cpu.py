"""Rotary position embeddings in bfloat16 on a CPU: transformers' numbers, bit by bit, in less time.

transformers turns half of each head about with slices, a negation and a concatenation, whose
backward passes fill tensors with zeros and add them up. Here each half is computed where it ends
up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_NAME = "apply_rotary_pos_emb"


class Rotary:
    """Stands in for a modeling file's `apply_rotary_pos_emb`, which is still called for whatever is
    not in bfloat16 on a CPU, and where only a part of each head is turned."""

    def __init__(self, theirs: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.theirs = theirs

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys `[B, H, L, D]`, turned by angles of cosines and sines `[B, L, D]`."""
        if not all(_is_ours(x, width=q.shape[-1]) for x in (q, k, cos, sin)):
            return self.theirs(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        function: Any = _Rotary
        return function.apply(q, cos, sin), function.apply(k, cos, sin)


def replace_rotary(model: nn.Module) -> None:
    """Put `Rotary` into the modeling files of a model, where their own function computes just that.

    It is told by what it computes. The change is one to transformers' module, and so to all models
    of that architecture in the process; none can tell but by the time it takes.
    """
    for module in {sys.modules[type(part).__module__] for part in model.modules()}:
        theirs = getattr(module, _NAME, None)
        if theirs is not None and not isinstance(theirs, Rotary) and _computes_alike(theirs):
            setattr(module, _NAME, Rotary(theirs))


def _is_ours(x: Tensor, width: int) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[-1] == width


def _computes_alike(theirs: Callable[..., Any]) -> bool:
    """Whether a function takes the same and gives the same bits."""
    if _parameters(theirs) != _parameters(Rotary(theirs)):
        return False
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5, 8), (2, 2, 5, 8), (2, 5, 8), (2, 5, 8))
    q, k, cos, sin = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    try:
        right = theirs(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False  # it takes something else
    return all(
        torch.equal(a, b) for a, b in zip(Rotary(theirs)(q, k, cos, sin), right, strict=True)
    )


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(p.name, p.default) for p in signature(function).parameters.values()]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        first, second = sin[..., :half], sin[..., half:]
        out = x * cos
        out[..., :half] -= x[..., half:] * first
        out[..., half:] += x[..., :half] * second
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = grad_out.shape[-1] // 2
        first, second = sin[..., :half], sin[..., half:]
        grad = grad_out * cos
        grad[..., :half] += grad_out[..., half:] * second
        grad[..., half:] -= grad_out[..., :half] * first
        return grad, None, None
