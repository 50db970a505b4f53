"""Attention in bfloat16 on a CPU: torch's forward pass, and a backward pass of matrix products.

torch's backward pass on a CPU divides its work by the heads that hold keys: three of them keep two
cores busy for three quarters of the time. It also multiplies in small blocks. Here the backward
pass is five batched matrix products (Dao et al., 2022, appendix B.4, without the tiling), which
take half as long at the lengths of a piece. The `[H, L, S]` tensors in between live for one call.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Below so many scores a head, the calls cost more than the products; above the other number, their
# tensors take too much memory.
_FEWEST_SCORES = 96 * 96
_MOST_SCORES = 1024 * 1024

# The backward pass computes p * e^2.5. Logarithms of p are rounded to bfloat16, the finer the
# nearer to 0: this puts the middle of what hundreds of keys share there. (2.5 is a bfloat16 number,
# and e^2.5 all but one, so that p = 1 is not rounded either.)
_LIFT = 2.5

# Elsewhere (a CPU without AVX-512 or its like) the products would be the slower way.
_MULTIPLIES_FAST = torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_faster(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` is to be used for `[1, H, L, D]` queries and `[1, H_kv, S, D]` keys and
    values (which have another `D` in some models; those are left to torch)."""
    return (
        _MULTIPLIES_FAST
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and torch.is_grad_enabled()
        and query.requires_grad
        and query.shape[-1] == value.shape[-1]
        and _FEWEST_SCORES <= query.shape[2] * key.shape[2] <= _MOST_SCORES
    )


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *, causal: bool, scale: float | None
) -> Tensor:
    """`softmax(scale * query @ key^T + bias) @ value`, `[1, H, L, D]`.

    Args:
        query: `[1, H, L, D]`, bfloat16 like the rest.
        key, value: `[1, H_kv, S, D]`; `H` is a multiple of `H_kv`.
        bias: `[1, 1, L, S]`, 0 where a query may look, else -inf.
        causal: whether the bias is the causal one, which the forward pass need not read.
        scale: by default `D^-0.5`.
    """
    function: Any = _Attention
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = function.apply(query, key, value, bias, causal, scale)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor,
        causal: bool,
        scale: float,
    ) -> Tensor:
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=None if causal else bias, scale=scale
        )
        ctx.save_for_backward(query, key, value, bias, out, logsumexp)
        ctx.scale = scale
        attended: Tensor = out
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, out, logsumexp = ctx.saved_tensors
        scale, (_, n_heads, length, _), n_kv = ctx.scale, query.shape, key.shape[1]
        # Queries of the heads that share keys stand one below the other, so that a product sums
        # over them: [H_kv, H / H_kv * L, D].
        q, g, k, v = _fold(query, n_kv), _fold(grad_out, n_kv), key[0], value[0]
        delta = (grad_out.float() * out).sum(-1)
        # log p = scale * (q k - logsumexp / scale), rounded only where it is small.
        lowered = (logsumexp - _LIFT) / scale
        p = torch.baddbmm(
            q.new_empty(()),
            _beside(q, _fold(lowered[..., None], n_kv)),
            _with_ones(k).transpose(1, 2),
            beta=0,
            alpha=scale,
        )
        p.view(1, n_heads, length, -1).add_(bias)
        p.exp_()
        grad_value = torch.bmm(p.transpose(1, 2), g)
        # dS = p (dP - delta), where dP = dO V^T.
        grad_scores = torch.bmm(
            _beside(g, _fold(delta[..., None], n_kv)), _with_ones(v).transpose(1, 2)
        ).mul_(p)
        grad_query = torch.bmm(grad_scores, k)
        grad_key = torch.bmm(grad_scores.transpose(1, 2), q)
        unlift = math.exp(-_LIFT)
        grad_query.mul_(scale * unlift)
        grad_key.mul_(scale * unlift)
        grad_value.mul_(unlift)
        return grad_query.view_as(query), grad_key[None], grad_value[None], None, None, None


def _fold(x: Tensor, n_kv: int) -> Tensor:
    """`[1, H, L, D]` as `[H_kv, H / H_kv * L, D]`."""
    return x.reshape(n_kv, -1, x.shape[-1])


def _beside(rows: Tensor, subtracted: Tensor) -> Tensor:
    """Rows with two more columns, which take a float32 number a row off a product with
    `_with_ones`: inside it, before the product is rounded."""
    high = -subtracted.to(rows.dtype)
    low = (-subtracted - high).to(rows.dtype)
    return torch.cat((rows, high, low), dim=-1)


def _with_ones(rows: Tensor) -> Tensor:
    return torch.cat((rows, rows.new_ones(*rows.shape[:2], 2)), dim=-1)
