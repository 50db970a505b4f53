"""Attention over packed samples: each completion meets its prompt and itself, and nothing else.

A block mask over a packed row computes every score and throws most away; cutting the row into
padded ones computes padding. Here the row is cut at its seams instead, into pieces of whole prompts
and completions. A piece attends to itself, and to the prompt of its completions where that stands
in an earlier piece. So the cost is about that of the samples, whatever stands beside them, and a
prompt's keys and values are those of all its completions, in the backward pass too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from alignment.modeling import attention_cpu
from alignment.modeling.seams import Seams
from alignment.types import AlignmentError

NAME = "alignment_packed"


class SeamsLost(AlignmentError):
    """The model's layers do not hand `seams` on to attention."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    seams: Seams | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one row of packed units.

    Args:
        query: `[1, H, L, D]`.
        key, value: `[1, H_kv, L, D]`.
        attention_mask: `[1, 1, L, W]`; column c of a token's row says whether it may look at key c
            of its piece: the carried prompt's first, then the piece's own. Bool on a GPU, else
            added to the scores.
        seams: where the row is cut.

    Returns:
        `[1, L, H, D]`, and None for the attention weights.

    Raises:
        SeamsLost: `seams` did not come through.
    """
    if seams is None:
        raise SeamsLost(f"{type(module).__name__} is not told where packed rows are cut")
    if not dropout and attention_cpu.is_faster(query, value):
        mask = attention_mask
        return attention_cpu.attention(query, key, value, mask, seams, scale=scaling), None
    # Split rather than sliced: the backward pass of a split is one concatenation.
    lengths = [piece.length for piece in seams]
    queries, keys, values, masks = (
        torch.split(x, lengths, dim=2) for x in (query, key, value, attention_mask)
    )
    n_shared = query.shape[1] // key.shape[1]
    out = []
    for i, piece in enumerate(seams):
        k, v = keys[i], values[i]
        if piece.prompt is not None:
            home, n = piece.prompt
            k = torch.cat((keys[home][:, :, :n], k), dim=2)
            v = torch.cat((values[home][:, :, :n], v), dim=2)
        mask = masks[i][..., : k.shape[2]]
        # On a GPU no fast kernel takes both a mask and heads that share keys.
        shares = n_shared > 1 and (piece.causal or query.device.type == "cpu")
        if n_shared > 1 and not shares:
            k, v = k.repeat_interleave(n_shared, dim=1), v.repeat_interleave(n_shared, dim=1)
        out.append(
            nn.functional.scaled_dot_product_attention(
                queries[i],
                k,
                v,
                attn_mask=None if piece.causal else mask,
                is_causal=piece.causal,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=shares,
            )
        )
    # Kernels give [1, piece, H, D], seen as [1, H, piece, D]; like this they are copied once.
    return torch.cat([x.transpose(1, 2) for x in out], dim=1), None


AttentionInterface.register(NAME, packed_attention)


def is_exchangeable(causal_lm: Any, config: Any) -> bool:
    """Whether another attention function may stand in for the model's own: it runs torch's plain
    scaled-dot-product attention through transformers' attention interface."""
    supports = getattr(causal_lm, "_supports_attention_backend", False)
    return bool(supports and config._attn_implementation == "sdpa")


@contextmanager
def attention_as(config: Any, name: str) -> Iterator[None]:
    """Run the model of this config with the attention function of that name."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def recomputed_alike(
    config: Any,
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """For activation checkpointing (`context_fn`): the backward pass, which computes layers again,
    runs them with the attention function of the forward pass."""
    return lambda: (nullcontext(), attention_as(config, config._attn_implementation))
