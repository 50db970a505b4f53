"""What an evaluation task may use of a run, and what it is.

All that a task needs comes through `TaskContext`, so that it evaluates a checkpoint in training and
a model on disk alike. A task asks for what it needs and says so where that is absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from alignment.config.methods.base import DataForm
from alignment.types import (
    Completion,
    PairBatch,
    Prompt,
    RewardedCompletion,
    Sample,
    SamplingParams,
    SteppedSample,
    UserInputError,
)
from evals.results import EvalResult

if TYPE_CHECKING:  # a task's options are checked before torch is imported
    from alignment.rollout.engine import RolloutEngine


class TokenScores(Protocol):
    """What the scorer says about samples: per sample, one entry per completion token.

    logprobs:       log-probability of the token, in nats.
    greedy_correct: whether the token is the model's most likely one.
    """

    @property
    def logprobs(self) -> Sequence[Sequence[float]]: ...

    @property
    def greedy_correct(self) -> Sequence[Sequence[bool]]: ...


class TaskContext(Protocol):
    """What a task may use.

    engine:   samples from the model under evaluation.
    prompts:  held-out prompts of the run's data.
    samples:  held-out supervised samples; may be empty.
    grade:    the run's rewards.
    sampling: the run's sampling parameters; `n`, `seed` and `step` are the task's to set.
    seed:     the evaluation seed, the same at every step of a run and for every model compared.
    score:    log-probabilities of given samples under the model.
    reference_score: the same under the reference the model is held to (in a pipeline, one and the
              same for every model compared); None where there is none.
    pairs:    held-out preference pairs; None where the data has none.
    pair_scores: scores of the chosen and of the rejected side of each pair: the head of a reward
              model, or what the loss of a policy ranks by (`alignment.losses.preference_score`).
              None where the model ranks nothing.
    pair_scores_are_logits: whether sigmoid(chosen - rejected) is the model's probability of the
              preference: of a reward model, and of a policy whose loss fits it.
    steps:    held-out completions with labelled steps; may be empty.
    step_scores: per sample one logit for each labelled step, sigmoid(logit) being the probability
              that the step is good. None where the model scores no steps.
    why_not:  for a form of data that the held-out rows cannot be brought into (pairs, say), what is
              wrong with them.
    """

    @property
    def engine(self) -> RolloutEngine: ...

    @property
    def prompts(self) -> Sequence[Prompt]: ...

    @property
    def samples(self) -> Sequence[Sample]: ...

    @property
    def grade(
        self,
    ) -> Callable[[Sequence[tuple[Prompt, Completion]]], list[RewardedCompletion]]: ...

    @property
    def sampling(self) -> SamplingParams: ...

    @property
    def seed(self) -> int: ...

    @property
    def score(self) -> Callable[[Sequence[Sample]], TokenScores]: ...

    @property
    def reference_score(self) -> Callable[[Sequence[Sample]], TokenScores] | None: ...

    @property
    def pairs(self) -> PairBatch | None: ...

    @property
    def pair_scores(self) -> Callable[[PairBatch], tuple[list[float], list[float]]] | None: ...

    @property
    def pair_scores_are_logits(self) -> bool: ...

    @property
    def steps(self) -> Sequence[SteppedSample]: ...

    @property
    def step_scores(self) -> Callable[[Sequence[SteppedSample]], list[list[float]]] | None: ...

    @property
    def why_not(self) -> Mapping[DataForm, str]: ...


class Task(Protocol):
    """An evaluation: a context in, a result out; the model is left as it was.

    A task may have a method `check_needs(*, rewards, held_out, reference, ranks_alone)`, which a
    pipeline asks before its stages run: the names of the rewards that it will have, the number of
    held-out rows, whether there will be a reference, and whether the policies rank completions
    without one. It raises UserInputError where `run` would for that.
    """

    def run(self, context: TaskContext) -> EvalResult: ...


def nothing_held_out(context: TaskContext, form: DataForm, message: str) -> UserInputError:
    """`message`, that a task's data is not there, with what is wrong with the held-out rows."""
    why = context.why_not.get(form)
    return UserInputError(message if why is None else f"{message}. Of the held-out rows: {why}")
