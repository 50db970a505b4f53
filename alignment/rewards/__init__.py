"""Rewards: the protocol, their composition, and shaping by length and ending."""

from alignment.rewards.compose import (
    CompositeReward,
    NamedReward,
    RewardSpec,
    build_rewards,
    check_unscorable,
    unscorable_share,
)
from alignment.rewards.protocol import FunctionReward, Item, Reward, RewardError, run_reward

__all__ = [
    "CompositeReward",
    "FunctionReward",
    "Item",
    "NamedReward",
    "Reward",
    "RewardError",
    "RewardSpec",
    "build_rewards",
    "check_unscorable",
    "run_reward",
    "unscorable_share",
]
