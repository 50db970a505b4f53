"""Attention of a packed row in bfloat16 on a CPU: torch's forward pass, our backward pass.

torch's backward pass on a CPU divides its work by the heads that hold keys: three of them keep two
cores busy for three quarters of the time. It also multiplies in small blocks. Here the backward
pass of a piece is five batched matrix products (Dao et al., 2022, appendix B.4, without the
tiling), which take half as long. What does not depend on the cuts is computed once for the row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignment.modeling.seams import Place, Seams, places

# Scores a head that are held at once: the queries of a longer piece take turns.
_MOST_SCORES = 1024 * 1024

# The backward pass computes p * e^2.5. Logarithms of p are rounded to bfloat16, the finer the
# nearer to 0: this puts the middle of what hundreds of keys share there. (2.5 is a bfloat16 number,
# and e^2.5 all but one, so that p = 1 is not rounded either.)
_LIFT = 2.5

# Elsewhere (a CPU without AVX-512 or its like) the products would be the slower way.
MULTIPLIES_FAST = torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_faster(query: Tensor, value: Tensor) -> bool:
    """Whether `attention` is to be used for `[1, H, L, D]` queries and `[1, H_kv, L, D]` values
    (which have another `D` in some models; those are left to torch)."""
    return (
        MULTIPLIES_FAST
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and torch.is_grad_enabled()
        and query.requires_grad
        and query.shape[-1] == value.shape[-1]
    )


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, seams: Seams, *, scale: float | None
) -> Tensor:
    """`softmax(scale * query @ key^T + bias) @ value` of each piece, `[1, L, H, D]`.

    Args:
        query: `[1, H, L, D]`, bfloat16 like the rest.
        key, value: `[1, H_kv, L, D]`; `H` is a multiple of `H_kv`.
        bias: `[1, 1, L, W]`, 0 where a query may look at a key of its piece, else -inf. No query
            looks at what comes after it.
        seams: where the row is cut.
        scale: by default `D^-0.5`.
    """
    function: Any = _Attention
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = function.apply(query, key, value, bias, seams, scale)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor,
        seams: Seams,
        scale: float,
    ) -> Tensor:
        n_rows, n_heads, length, dim = query.shape
        out = query.new_empty(n_rows, length, n_heads, dim)
        logsumexp = query.new_empty(n_rows, n_heads, length, dtype=torch.float32)
        for place in places(seams):
            rows = slice(place.start, place.end)
            n_keys = place.n_carried + place.end - place.start
            attended, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, rows],
                place.keys(key, n_keys),
                place.keys(value, n_keys),
                0.0,
                place.causal,
                attn_mask=None if place.causal else bias[:, :, rows, :n_keys],
                scale=scale,
            )
            out[:, rows] = attended.transpose(1, 2)
            logsumexp[:, :, rows] = sums
        ctx.save_for_backward(query, key, value, bias, out, logsumexp)
        ctx.seams, ctx.scale = seams, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, out, logsumexp = ctx.saved_tensors
        scale, n_kv, dim = ctx.scale, key.shape[1], query.shape[-1]
        n_shared = query.shape[1] // n_kv
        delta = (grad_out.float() * out).sum(-1).transpose(1, 2)
        # log p = scale * (q k - logsumexp / scale), rounded only where it is small.
        lowered, delta = _in_two((logsumexp - _LIFT) / scale), _in_two(delta)
        grad_out = grad_out.transpose(1, 2)
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros_like(key, dtype=torch.float32)
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        blocks = [block for place in places(ctx.seams) for block in _blocks(place)]
        # What all blocks are multiplied in stays in the processor's caches.
        most = n_kv * n_shared * max((end - start) * n for _, start, end, n in blocks)
        scratch = query.new_empty(2, most)
        for place, start, end, n_keys in blocks:
            shape = (n_kv, n_shared * (end - start), n_keys)
            p, grad_scores = (x[: math.prod(shape)].view(shape) for x in scratch)
            by_head = p.view(1, -1, end - start, n_keys)
            k, v = (_with_ones(place.keys(x, n_keys)[0]) for x in (key, value))
            q, g = (
                _fold(rows[:, :, start:end], subtracted[:, :, start:end], n_kv)
                for rows, subtracted in ((query, lowered), (grad_out, delta))
            )
            torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale, out=p)
            by_head.add_(bias[:, :, start:end, :n_keys]).exp_()
            # dS = p (dP - delta), where dP = dO V^T.
            torch.bmm(g, v.transpose(1, 2), out=grad_scores).mul_(p)
            of_queries = torch.bmm(grad_scores, k[..., :dim])
            grad_query[:, :, start:end] = of_queries.view(1, -1, end - start, dim)
            place.add_to_keys(grad_key[0], torch.bmm(grad_scores.transpose(1, 2), q[..., :dim]))
            place.add_to_keys(grad_value[0], torch.bmm(p.transpose(1, 2), g[..., :dim]))
        unlift = math.exp(-_LIFT)
        grad_query.mul_(scale * unlift)
        grad_key = grad_key.mul_(scale * unlift).to(key.dtype)
        grad_value = grad_value.mul_(unlift).to(value.dtype)
        return grad_query, grad_key, grad_value, None, None, None


def _blocks(place: Place) -> list[tuple[Place, int, int, int]]:
    """Queries of a piece that are multiplied at once: start, end, and how many keys they need."""
    size = max(_MOST_SCORES // (place.n_carried + place.end - place.start), 1)
    starts = range(place.start, place.end, size)
    ends = [min(start + size, place.end) for start in starts]
    return [
        (place, start, end, place.n_carried + end - place.start)
        for start, end in zip(starts, ends, strict=True)
    ]


def _in_two(subtracted: Tensor) -> Tensor:
    """float32 numbers `[...]` as two columns `[..., 2]` of bfloat16 that add up to minus them."""
    high = -subtracted.to(torch.bfloat16)
    return torch.stack((high, (-subtracted - high).to(torch.bfloat16)), dim=-1)


def _fold(rows: Tensor, subtracted: Tensor, n_kv: int) -> Tensor:
    """`[1, H, L, D]` as `[H_kv, H / H_kv * L, D + 2]`: queries of the heads that share keys stand
    one below the other, so that a product sums over them. The two columns take a float32 number a
    row off a product with `_with_ones`: inside it, before the product is rounded."""
    return torch.cat((rows, subtracted), dim=-1).view(n_kv, -1, rows.shape[-1] + 2)


def _with_ones(rows: Tensor) -> Tensor:
    return torch.cat((rows, rows.new_ones(*rows.shape[:-1], 2)), dim=-1)
