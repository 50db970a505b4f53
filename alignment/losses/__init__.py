"""Losses as pure functions of tensors and floats; see each module for formulas and sources."""

from alignment.losses.coupled import sequence_weights
from alignment.losses.desensitized import desensitized_sums
from alignment.losses.divergences import DIVERGENCES, divergence_score
from alignment.losses.kl import (
    AdaptiveKLController,
    FixedKLController,
    KLController,
    KLEstimator,
    kl_estimate,
    kl_full,
)
from alignment.losses.kto import bco_loss, kto_kl, kto_loss
from alignment.losses.policy import RatioLevel, cispo_loss, ppo_clip_loss
from alignment.losses.preference import preference_loss
from alignment.losses.preference_kinds import (
    COUPLED_KINDS,
    DIVERGENCE_KINDS,
    PREFERENCE_KINDS,
    REFERENCE_FREE_KINDS,
    SMOOTHED_KINDS,
)
from alignment.losses.preference_scores import LOGISTIC_KINDS, preference_score
from alignment.losses.reduce import ReductionMode, loss_count, reduce_loss
from alignment.losses.reward import bradley_terry_loss, process_reward_loss
from alignment.losses.sft import sft_loss
from alignment.losses.types import Max, Mean, Metric, SequenceLoss, TokenLoss, merge_metrics
from alignment.losses.value import clipped_value_loss

__all__ = [
    "COUPLED_KINDS",
    "DIVERGENCES",
    "DIVERGENCE_KINDS",
    "LOGISTIC_KINDS",
    "PREFERENCE_KINDS",
    "REFERENCE_FREE_KINDS",
    "SMOOTHED_KINDS",
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
    "bco_loss",
    "bradley_terry_loss",
    "cispo_loss",
    "clipped_value_loss",
    "desensitized_sums",
    "divergence_score",
    "kl_estimate",
    "kl_full",
    "kto_kl",
    "kto_loss",
    "loss_count",
    "merge_metrics",
    "ppo_clip_loss",
    "preference_loss",
    "preference_score",
    "process_reward_loss",
    "reduce_loss",
    "sequence_weights",
    "sft_loss",
]
