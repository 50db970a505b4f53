"""What a trainer works with, built once from a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from alignment.config.schema import Recipe
from alignment.data.order import DataOrder
from alignment.distributed import Distributed
from alignment.modeling.optimizer import MasterWeightOptimizer
from alignment.modeling.policy import PolicyWithReference
from alignment.rewards.compose import CompositeReward
from alignment.rollout.engine import RolloutEngine
from alignment.runs.events import EventLog
from alignment.runs.metrics import MetricSums
from alignment.types import Prompt, Rollout, Sample


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step hands to the loop: its metrics on this rank, and what it sampled."""

    metrics: MetricSums
    rollout: Rollout | None = None
    advantages: Sequence[float | None] | None = None


class Trainer(Protocol):
    """One method. A step takes its data, makes its updates, and leaves nothing half-consumed."""

    total_steps: int

    def step(self, step: int) -> StepResult:
        """Run step `step` (1-based)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The method's own state (controllers, normalisers, data order)."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class TrainingContext:
    """The parts a trainer is put together from.

    prompts, samples: the training data in the form the method needs; the other is empty.
    held_out_prompts, held_out_samples: likewise, never trained on.
    rewards: None where the method has none.
    """

    recipe: Recipe
    distributed: Distributed
    events: EventLog
    tokenizer: Any
    policy: PolicyWithReference
    optimizer: MasterWeightOptimizer
    engine: RolloutEngine
    rewards: CompositeReward | None
    prompts: Sequence[Prompt]
    samples: Sequence[Sample]
    held_out_prompts: Sequence[Prompt]
    held_out_samples: Sequence[Sample]
    order: DataOrder
