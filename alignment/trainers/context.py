"""What a trainer works with, built once from a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from alignment.config.methods.base import DataForm
from alignment.config.schema import Recipe
from alignment.data.order import DataOrder
from alignment.distributed import Distributed
from alignment.modeling.heads import ScalarModel
from alignment.modeling.optimizer import Optimizer
from alignment.modeling.policy import PolicyWithReference
from alignment.rewards.compose import CompositeReward
from alignment.rollout.collect import Complete
from alignment.rollout.engine import RolloutEngine
from alignment.runs.events import EventLog
from alignment.runs.metrics import MetricSums
from alignment.types import (
    AlignmentError,
    LabelledSample,
    PairBatch,
    Prompt,
    Rollout,
    Sample,
    SteppedSample,
)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step hands to the loop: its metrics on this rank, and what it sampled.

    rows: what the step adds to the data set that the run makes (`data.jsonl`), where it makes one,
          each with the index of its prompt, by which the rows of all ranks are put in order.
    """

    metrics: MetricSums
    rollout: Rollout | None = None
    advantages: Sequence[float | None] | None = None
    rows: Sequence[tuple[int, Mapping[str, Any]]] = ()


class Trainer(Protocol):
    """One method. A step takes its data, makes its updates, and leaves nothing half-consumed.

    A trainer that keeps something beside the model has a method `extra_files(folder)`, called once
    the model is saved there.
    """

    total_steps: int

    def step(self, step: int) -> StepResult:
        """Run step `step` (1-based)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The method's own state (controllers, normalisers, data order)."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class TokenizedData:
    """Rows in the forms that methods and tasks take; a form that the rows do not have is empty.

    why_not: for such a form, what is wrong with the rows.
    """

    prompts: Sequence[Prompt] = ()
    samples: Sequence[Sample] = ()
    pairs: PairBatch = field(default_factory=lambda: PairBatch((), ()))
    labelled: Sequence[LabelledSample] = ()
    steps: Sequence[SteppedSample] = ()
    why_not: Mapping[DataForm, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trained:
    """A model and the optimizer that moves it; no optimizer where the method only makes data."""

    model: PolicyWithReference | ScalarModel
    optimizer: Optimizer | None


@dataclass(frozen=True, slots=True)
class TrainingContext:
    """The parts a trainer is put together from.

    trained:   what the recipe's model section names: a policy, or a model with a scalar head.
    critic:    PPO's separate critic; None for every other method.
    rewards:   None where the recipe lists none.
    train:     the training data in the form the method needs.
    held_out:  data never trained on, in every form its rows have.
    order:     draws the rows of the training data.
    cache:     folder of the run for what can be had again (the replies of a judge).
    recorded:  the completions of another run, in place of the engine's and the rewards'.
    """

    recipe: Recipe
    distributed: Distributed
    events: EventLog
    tokenizer: Any
    trained: Trained
    critic: Trained | None
    sampler: RolloutEngine | None
    rewards: CompositeReward | None
    train: TokenizedData
    held_out: TokenizedData
    order: DataOrder
    fingerprint: str
    cache: Path
    recorded: Complete | None = None

    @property
    def policy(self) -> PolicyWithReference:
        """The policy.

        Raises:
            AlignmentError: the method trains a model with a scalar head.
        """
        if not isinstance(self.trained.model, PolicyWithReference):
            raise AlignmentError("this run trains a model with a scalar head; it has no policy")
        return self.trained.model

    @property
    def scalar_model(self) -> ScalarModel:
        """The reward model in training.

        Raises:
            AlignmentError: the method trains a policy.
        """
        if not isinstance(self.trained.model, ScalarModel):
            raise AlignmentError("this run trains a policy; it has no scalar head of its own")
        return self.trained.model

    @property
    def engine(self) -> RolloutEngine:
        """The rollout engine on the policy.

        Raises:
            AlignmentError: there is no policy to sample from.
        """
        if self.sampler is None:
            raise AlignmentError("this run trains a model with a scalar head; nothing is sampled")
        return self.sampler
