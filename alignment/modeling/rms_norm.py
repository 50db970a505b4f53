"""RMSNorm in bfloat16 on a CPU, with a backward pass that is one of torch's kernels.

transformers writes RMSNorm as eight element-wise operations in float32. On a CPU their backward
pass takes four times as long as the one of LayerNorm, a single kernel that it can be had from.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension (Zhang and Sennrich, 2019).

    Rounded where transformers does it: `x / sqrt(...)` first, then its product with the weight.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor
        function: Any = _RMSNorm
        dtypes = (hidden_states.dtype, self.weight.dtype)
        if hidden_states.device.type == "cpu" and dtypes == (torch.bfloat16, torch.bfloat16):
            out = function.apply(hidden_states, self.weight, self.variance_epsilon)
        else:
            wide = hidden_states.float()
            scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
            out = self.weight * (wide * scale).to(hidden_states.dtype)
        return out

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


@torch.no_grad()
def replace_rms_norms(model: nn.Module) -> None:
    """Put `RMSNorm` where a bfloat16 model on a CPU has modules that compute just that.

    They are told by what they are made of and by what they compute; the weights stay the same
    objects, under the same names.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            replacement = _replacement(child)
            if replacement is not None:
                setattr(parent, name, replacement.train(child.training))


def _replacement(module: nn.Module) -> RMSNorm | None:
    eps, weight = getattr(module, "variance_epsilon", None), getattr(module, "weight", None)
    if eps is None or not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return None
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return None
    # A norm with more state, or one that also takes a gate, is another one.
    if set(module.state_dict()) != {"weight"} or len(signature(module.forward).parameters) != 1:
        return None
    replacement = RMSNorm(weight, eps)
    return replacement if _computes_alike(module, replacement) else None


def _computes_alike(one: nn.Module, other: RMSNorm) -> bool:
    """Whether two modules agree to the last bit or two of bfloat16, at a large scale and where eps
    counts."""
    shape = (8, other.weight.shape[0])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    scales = torch.logspace(-3, 2, 8, dtype=torch.bfloat16)[:, None]
    return torch.allclose(one(x * scales), other(x * scales), rtol=2**-6, atol=0.0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        n = x.shape[-1]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        mean_square = norm.square_().div_(n)
        # With a token as a channel, BatchNorm's kernel divides by the root.
        variance = mean_square.flatten()
        out, _, _ = torch.native_batch_norm(
            x.reshape(1, -1, n), None, None, torch.zeros_like(variance), variance, False, 0.0, eps
        )
        ctx.save_for_backward(x, weight, mean_square.add_(eps).rsqrt_())
        return out.view(x.shape).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        n = x.shape[-1]
        # With a mean of 0, LayerNorm's is RMSNorm's, less the mean that it takes off.
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_out,
            x,
            [n],
            torch.zeros_like(scale),
            scale,
            weight.float(),
            None,
            [True, False, False],
        )
        grad_x.add_((grad_out @ weight)[..., None] * (scale / n).to(x.dtype))
        grad_weight = None
        if ctx.needs_input_grad[1]:  # sum over tokens of grad_out * x * scale, as a product
            grad_weight = scale.to(x.dtype).flatten() @ (grad_out * x).reshape(-1, n)
        return grad_x, grad_weight, None
