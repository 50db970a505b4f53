"""Linear layers in bfloat16 on a CPU, with a faster gradient of their weights.

That gradient is the product of two tensors of tokens, the first one transposed. A CPU's kernels
multiply half as fast where they have to transpose it themselves, so the narrower of the two is
transposed before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alignment.modeling.attention_cpu import MULTIPLIES_FAST

# Below, transposing costs more than it saves: of a weight's numbers; of the tokens, where inputs
# are transposed (and with them the gradient back again), and where only gradients of outputs are.
_FEWEST_WEIGHTS = 2**19
_FEWEST_TOKENS, _FEWEST_TOKENS_NARROWING = 2048, 512

# Rows of so many tokens are transposed at a time: what stays in a processor's cache.
_BLOCK = 256


class Linear(nn.Linear):
    """`nn.Linear`, whose weight gradient takes less time; of the same numbers up to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        # Autocast hands over another dtype than the weight's.
        n_tokens = input.numel() // self.in_features
        if input.dtype != self.weight.dtype or not self._takes_long(n_tokens):
            return super().forward(input)
        function: Any = _Linear
        out: Tensor = function.apply(input, self.weight, self.bias)
        return out

    def _takes_long(self, n_tokens: int) -> bool:
        narrows = self.out_features < self.in_features
        return (
            self.weight.requires_grad
            and torch.is_grad_enabled()
            and self.weight.dtype == torch.bfloat16
            and self.weight.device.type == "cpu"
            and self.in_features * self.out_features >= _FEWEST_WEIGHTS
            and n_tokens >= (_FEWEST_TOKENS_NARROWING if narrows else _FEWEST_TOKENS)
        )


def replace_linears(model: nn.Module) -> None:
    """Have the linear layers of a bfloat16 model on a CPU be `Linear`, in place."""
    if not MULTIPLIES_FAST:
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            module.__class__ = Linear  # the weights, their names and hooks stay


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        inputs, grads = x.reshape(-1, x.shape[-1]), grad_out.reshape(-1, grad_out.shape[-1])
        grad_x = (grads @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_bias = grads.sum(0) if ctx.needs_input_grad[2] else None
        if grads.shape[1] <= inputs.shape[1]:
            return grad_x, _transposed(grads) @ inputs, grad_bias
        return grad_x, _transposed(_transposed(inputs) @ grads), grad_bias


def _transposed(x: Tensor) -> Tensor:
    """`[N, D]` as `[D, N]`, in a row."""
    out = x.new_empty(x.shape[::-1])
    for columns, rows in zip(torch.split(out, _BLOCK, dim=1), torch.split(x, _BLOCK), strict=True):
        columns.copy_(rows.t())
    return out
