"""Losses as pure functions of tensors and floats; see each module for formulas and sources."""

from alignment.losses.kl import (
    AdaptiveKLController,
    FixedKLController,
    KLController,
    KLEstimator,
    kl_estimate,
    kl_full,
)
from alignment.losses.policy import RatioLevel, cispo_loss, ppo_clip_loss
from alignment.losses.preference import (
    PREFERENCE_KINDS,
    REFERENCE_FREE_KINDS,
    preference_loss,
)
from alignment.losses.reduce import ReductionMode, loss_count, reduce_loss
from alignment.losses.reward import bradley_terry_loss
from alignment.losses.sft import sft_loss
from alignment.losses.types import Max, Mean, Metric, SequenceLoss, TokenLoss, merge_metrics
from alignment.losses.value import clipped_value_loss

__all__ = [
    "PREFERENCE_KINDS",
    "REFERENCE_FREE_KINDS",
    "AdaptiveKLController",
    "FixedKLController",
    "KLController",
    "KLEstimator",
    "Max",
    "Mean",
    "Metric",
    "RatioLevel",
    "ReductionMode",
    "SequenceLoss",
    "TokenLoss",
    "bradley_terry_loss",
    "cispo_loss",
    "clipped_value_loss",
    "kl_estimate",
    "kl_full",
    "loss_count",
    "merge_metrics",
    "ppo_clip_loss",
    "preference_loss",
    "reduce_loss",
    "sft_loss",
]
