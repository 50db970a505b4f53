"""A recipe's rollout section as sampling parameters."""

from __future__ import annotations

from alignment.config.schema import RolloutConfig
from alignment.types import SamplingParams


def sampling_params(config: RolloutConfig, *, n: int, seed: int, step: int) -> SamplingParams:
    """How `n` completions a prompt are drawn at a step of a run."""
    return SamplingParams(
        max_new_tokens=config.max_new_tokens,
        n=n,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        stop=tuple(config.stop),
        seed=seed,
        step=step,
    )
