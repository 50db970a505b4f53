"""Attention over packed samples: each completion meets its prompt and itself, and nothing else.

A block mask over a packed row computes every score and throws most away; cutting the row into
padded ones computes padding. Here the row is cut at its seams instead. The prompt and the first
completion of a unit are one causal sequence; every further completion brings its queries to the
prompt's keys and its own. So the cost is that of the samples, whatever stands beside them, and a
prompt's keys and values are those of all its completions, in the backward pass too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from alignment.types import AlignmentError

NAME = "alignment_packed"


class SeamsLost(AlignmentError):
    """The model's layers do not hand `seams` on to attention."""


@dataclass(frozen=True, slots=True)
class Seams:
    """Where a packed row is cut.

    units:    for each unit in order the tokens of its prompt, then of each of its completions.
    windowed: whether some layer looks back less far than the longest sample is, so that being
              causal does not say all.
    """

    units: Sequence[tuple[int, ...]]
    windowed: bool

    @property
    def pieces(self) -> list[int]:
        """Tokens of each piece of the row: prompt and first completion together, the others."""
        return [n for prompt, first, *others in self.units for n in (prompt + first, *others)]


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
        attention_mask: bool `[1, 1, L, W]`; column c of a token's row says whether it may look at
            position c of its own sample (prompt and completion).
        seams: where the row is cut.

    Returns:
        `[1, L, H, D]`, and None for the attention weights.

    Raises:
        SeamsLost: `seams` did not come through.
    """
    if seams is None:
        raise SeamsLost(f"{type(module).__name__} is not told where packed rows are cut")

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    # Split rather than sliced: the backward pass of a split is one concatenation.
    pieces = [torch.split(x, seams.pieces, dim=2) for x in (query, key, value, attention_mask)]
    rows = zip(*pieces, strict=True)
    out: list[Tensor] = []
    for prompt, first, *others in seams.units:
        q, k, v, mask = next(rows)
        out.append(attend(q, k, v, mask[..., : prompt + first] if seams.windowed else None))
        prompt_k, prompt_v = k[:, :, :prompt], v[:, :, :prompt]
        for length in others:
            q, k, v, mask = next(rows)
            k, v = torch.cat((prompt_k, k), dim=2), torch.cat((prompt_v, v), dim=2)
            if length:  # a completion of one token, which nothing is read after, brings no query
                out.append(attend(q, k, v, mask[..., : prompt + length]))
    return torch.cat(out, dim=2).transpose(1, 2), None


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
