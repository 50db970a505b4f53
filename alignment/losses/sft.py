"""Supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from alignment.losses.inputs import check_shapes, masked
from alignment.losses.types import Mean, TokenLoss


def sft_loss(logprobs: Tensor, mask: Tensor) -> TokenLoss:
    """Negative log-likelihood of the completion: `-logprobs`, in nats per token.

    Args:
        logprobs: `[B, T]`, log p(token t).
        mask: `[B, T]`, True = counts.

    Metrics: `nll` (mean over tokens; its exponential is the perplexity).
    """
    check_shapes(logprobs.shape, mask=mask)
    per_token = -masked(logprobs, mask)
    return TokenLoss(per_token, {"nll": Mean.of(per_token, mask)})
