"""Another number format for a model's weights, and for nothing else."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def cast_parameters(model: M, dtype: torch.dtype) -> M:
    """`model` with its parameters in `dtype`, in place; tied ones stay tied.

    Buffers stay as they are, where `nn.Module.to` would round them. RoPE's inverse frequencies are
    float32 whatever a model is loaded in; rounded to bfloat16, they are off by up to 2^-8 of their
    value, which makes a radian within some hundreds of tokens.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return model
