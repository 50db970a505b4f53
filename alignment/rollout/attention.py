"""Attention of rows that share keys: a group's queries meet one copy of its prompt.

In decoding, each row brings one query. Taken row by row, eight samples of a prompt read its keys
and values eight times, and that reading is the cost. Here all queries of a group, and all query
heads that share a key head, are queries of one batch element, so every key is read once. A mask
keeps siblings apart. It is one call of torch's scaled-dot-product attention.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from alignment.modeling.attention import attention_as, is_exchangeable

NAME = "alignment_grouped"


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where R running rows stand in a rectangle of `groups` times `width` places.

    place:  `[R]`, the place of each row.
    filler: `[groups * width]`, for each place a row to fill it with: its own, or any row where
            the place is empty.

    Both are None where the rows fill the rectangle in order.
    """

    groups: int
    width: int
    place: Tensor | None
    filler: Tensor | None

    def spread(self, rows: Tensor) -> Tensor:
        """`[R, ...]` to `[groups * width, ...]`."""
        return rows if self.filler is None else rows.index_select(0, self.filler)

    def collect(self, places: Tensor) -> Tensor:
        """`[groups * width, ...]` to `[R, ...]`."""
        return places if self.place is None else places.index_select(0, self.place)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    rows: RowLayout,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of the queries of R rows, one token each, over their groups' keys.

    Args:
        query: `[1, H, R, D]`.
        key, value: `[groups, H_kv, K, D]`, the groups' tokens.
        attention_mask: additive, `[groups, 1, (H / H_kv) * width, K]`, head-major.
        rows: which row belongs where.

    Returns:
        `[1, R, H, D]`, and None for the attention weights.
    """
    heads, kv_heads, dim = query.shape[1], key.shape[1], value.shape[-1]
    shared = heads // kv_heads
    rectangle = (rows.groups, rows.width, kv_heads, shared)
    packed = rows.spread(query[0].transpose(0, 1)).view(*rectangle, -1).permute(0, 2, 3, 1, 4)
    output = nn.functional.scaled_dot_product_attention(
        packed.reshape(rows.groups, kv_heads, shared * rows.width, -1),
        key,
        value,
        attn_mask=attention_mask.to(query.dtype),
        scale=scaling,
    )
    output = output.view(rows.groups, kv_heads, shared, rows.width, dim).permute(0, 3, 1, 2, 4)
    return rows.collect(output.reshape(-1, heads, dim))[None], None


AttentionInterface.register(NAME, grouped_attention)


def heads_per_key(causal_lm: Any, config: Any) -> int | None:
    """H / H_kv where `grouped_attention` may stand in for the model's own attention, else None.

    It may where the model runs torch's plain scaled-dot-product attention through transformers'
    attention interface, with the same ratio in every layer.
    """
    ratios = {
        int(getattr(module, "num_key_value_groups", 1))
        for module in causal_lm.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal")
    }
    return ratios.pop() if is_exchangeable(causal_lm, config) and len(ratios) == 1 else None


def grouped(config: Any) -> AbstractContextManager[None]:
    """Run the model of this config with `grouped_attention`."""
    return attention_as(config, NAME)


def repeat_for_heads(mask: Tensor | dict[str, Tensor], shared: int) -> Tensor | dict[str, Tensor]:
    """A mask `[G, 1, W, K]`, or each of a dict, repeated to `[G, 1, shared * W, K]`."""
    if isinstance(mask, dict):
        return {kind: one.repeat(1, 1, shared, 1) for kind, one in mask.items()}
    return mask.repeat(1, 1, shared, 1)
