"""Running evaluation tasks: during training, and on a finished run or any model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment.activity import doing
from alignment.config.methods.base import DataForm, compares_with_reference, needs_of
from alignment.config.model import ModelConfig, ReferenceConfig
from alignment.config.options import resolve, validate_options
from alignment.config.schema import Recipe, TaskConfig
from alignment.data.text_form import fixed_style, require_text_form
from alignment.distributed import Distributed
from alignment.modeling.backbone import Backbone
from alignment.modeling.catalog import resolve as resolve_model
from alignment.modeling.finite import require_finite, require_finite_scores
from alignment.modeling.heads import ScalarModel
from alignment.modeling.load import load_causal_lm, load_tokenizer, tokenizer_hash
from alignment.modeling.policy import PolicyWithReference
from alignment.modeling.reference import Fixed, OtherModel
from alignment.modeling.scorer import choose_layout
from alignment.rollout.engine import RolloutEngine
from alignment.runs.events import EventLog
from alignment.trainers.context import TrainingContext
from alignment.trainers.pair_scores import pair_scores, scores_are_logits
from alignment.trainers.precomputed import precomputed_logprobs
from alignment.trainers.preference import interleaved, reference_logprobs
from alignment.trainers.sampling import sampling_params
from alignment.trainers.setup import assemble, in_process, load_parts
from alignment.types import (
    STEP_SEPARATOR,
    AlignmentError,
    Completion,
    PairBatch,
    Prompt,
    RewardedCompletion,
    Sample,
    SamplingParams,
    SteppedSample,
    UserInputError,
)

ReferenceLogprobs = Mapping[Sample, Tensor]
"""Sample -> `[completion length]` log-probabilities under the reference."""

PairScores = tuple[list[float], list[float]]
"""Of the chosen sides and of the rejected ones."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Per sample, one entry per completion token: log-probability, and whether it is the argmax."""

    logprobs: list[list[float]]
    greedy_correct: list[list[bool]]


@dataclass(frozen=True, slots=True)
class EvalContext:
    """What a task may use; the protocol it satisfies is the tasks'."""

    engine: RolloutEngine
    prompts: Sequence[Prompt]
    samples: Sequence[Sample]
    grade: Callable[[Sequence[tuple[Prompt, Completion]]], list[RewardedCompletion]]
    sampling: SamplingParams
    seed: int
    score: Callable[[Sequence[Sample]], TokenScores]
    reference_score: Callable[[Sequence[Sample]], TokenScores] | None
    pairs: PairBatch | None
    pair_scores: Callable[[PairBatch], PairScores] | None
    pair_scores_are_logits: bool
    steps: Sequence[SteppedSample]
    step_scores: Callable[[Sequence[SteppedSample]], list[list[float]]] | None
    why_not: Mapping[DataForm, str]


@dataclass(frozen=True, slots=True)
class Evaluator:
    """The tasks of a recipe, run on the current policy; results are saved in the run directory.

    precomputed: what the reference says of the held-out pairs, where it was scored beforehand.
    """

    context: TrainingContext
    directory: Path
    precomputed: ReferenceLogprobs | None = None

    def run(self, step: int) -> dict[str, float]:
        """Evaluate, save `<task>-step-NNNNNN`, and return `eval/<task>/<metric>`."""
        metrics, failure = self.attempt(step)
        if failure is not None:
            raise failure
        return metrics

    @doing("evaluation")
    def attempt(self, step: int) -> tuple[dict[str, float], Exception | None]:
        """`run`, with what it failed by on rank 0 as a value, on which all ranks may then agree.

        What fails while ranks work together (weights that are gathered, or sent to a server) is
        raised: the others would wait for this one. Evaluation draws no random number that training
        uses: sampling is counter-based; and rewards keep nothing of it. Rank 0 evaluates alone;
        sharded weights are whole for that long.
        """
        tasks = self.context.recipe.eval.tasks
        if not tasks:
            return {}, None
        model = self.context.trained.model
        scalar = isinstance(model, ScalarModel)
        rewards = self.context.rewards
        if self.context.sampler is not None:
            self.context.sampler.weights_updated(step)
        with (
            model.gathered() if scalar else self.context.policy.gathered(reference=True),
            nullcontext() if rewards is None else rewards.unchanged(),
        ):
            if not self.context.distributed.is_main:
                return {}, None
            try:
                return self._run(step), None
            except Exception as error:
                return {}, error

    def _run(self, step: int) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for config in self.context.recipe.eval.tasks:
            name = config.name or config.type
            view = eval_context(self.context, precomputed=self.precomputed)
            result = make_task(config).run(view)
            result.save(self.directory / f"{name}-step-{step:06d}.json")
            metrics |= {f"eval/{name}/{key}": value for key, value in result.metrics.items()}
        return metrics


def make_evaluator(context: TrainingContext, directory: Path) -> Evaluator:
    """The evaluator of a run whose policy is still as it was handed over.

    A reference that is scored beforehand scores the held-out pairs here; every rank calls this.
    """
    recipe, pairs = context.recipe, context.held_out.pairs
    precomputed = None
    if (
        recipe.model.reference.mode == "precomputed"
        and compares_with_reference(recipe.algorithm)
        and recipe.eval.tasks
        and len(pairs)
    ):
        samples = interleaved(pairs.chosen, pairs.rejected)
        scored = precomputed_logprobs(context, samples)
        precomputed = dict(zip(samples, scored, strict=True))
    return Evaluator(context, directory, precomputed)


def make_task(config: TaskConfig) -> Any:
    """The task of a recipe's entry."""
    factory = resolve("task", config.type)
    return factory(**validate_options(factory, config.options))


def eval_context(
    context: TrainingContext,
    *,
    precomputed: ReferenceLogprobs | None = None,
    algorithm: Any = None,
) -> EvalContext:
    """What tasks see of a run.

    Args:
        precomputed: log-probabilities of the held-out pairs under a reference that is not there.
        algorithm: section of the method that the policy learned by; the recipe's by default.
    """
    recipe = context.recipe
    if recipe.rollout is None:
        sampling = SamplingParams(max_new_tokens=1)
    else:
        sampling = sampling_params(recipe.rollout, n=1, seed=recipe.run.seed, step=0)
    if isinstance(context.trained.model, ScalarModel):
        scoring = _scoring_of_scalar(context)
    else:
        scoring = _scoring_of_policy(context, algorithm or recipe.algorithm, precomputed)
    held_out = context.held_out
    return EvalContext(
        engine=context.sampler or _NoEngine(),
        prompts=held_out.prompts,
        samples=held_out.samples,
        grade=context.rewards.grade if context.rewards is not None else _no_rewards,
        sampling=sampling,
        seed=recipe.run.seed,
        pairs=held_out.pairs if len(held_out.pairs) else None,
        steps=held_out.steps,
        why_not=held_out.why_not,
        **scoring,
    )


def token_scores(
    policy: PolicyWithReference,
    samples: Sequence[Sample],
    token_budget: int,
    *,
    of_reference: bool = False,
) -> TokenScores:
    """Log-probabilities and greedy hits of given samples under the policy, or its reference."""
    logprobs: list[list[float]] = [[] for _ in samples]
    greedy: list[list[bool]] = [[] for _ in samples]
    for scores, batch in policy.score_all(
        samples, token_budget, of_reference=of_reference, greedy=True
    ):
        assert scores.greedy is not None
        for row, i in enumerate(batch):
            length = len(samples[i].completion_ids)
            logprobs[i] = scores.logprobs[row, :length].tolist()
            greedy[i] = scores.greedy[row, :length].tolist()
    return TokenScores(logprobs, greedy)


def _scoring_of_policy(
    context: TrainingContext, algorithm: Any, precomputed: ReferenceLogprobs | None
) -> dict[str, Any]:
    policy, budget = context.policy, context.recipe.optim.micro_batch_tokens
    compares = compares_with_reference(algorithm)
    has_reference = policy.reference is not None

    def reference_of(samples: Sequence[Sample]) -> list[Tensor] | None:
        if not compares:
            return None
        if precomputed is None:
            return reference_logprobs(policy, samples, budget)
        unknown = sum(sample not in precomputed for sample in samples)
        if unknown:
            raise AlignmentError(
                f"{unknown} of {len(samples)} completions are none of the held-out pairs, which "
                "are all that the reference was scored on beforehand"
            )
        return [precomputed[sample] for sample in samples]

    def score_pairs(pairs: PairBatch) -> PairScores:
        samples = interleaved(pairs.chosen, pairs.rejected)
        logprobs = policy.logprobs(samples, budget, together=2)
        return pair_scores(algorithm, samples, logprobs, reference_of(samples))

    ranks = has_reference or precomputed is not None or not compares
    return {
        "score": lambda samples: token_scores(policy, samples, budget),
        "reference_score": (
            (lambda samples: token_scores(policy, samples, budget, of_reference=True))
            if has_reference
            else None
        ),
        "pair_scores": score_pairs if ranks else None,
        "pair_scores_are_logits": scores_are_logits(algorithm),
        "step_scores": None,
    }


def _scoring_of_scalar(context: TrainingContext) -> dict[str, Any]:
    model, budget = context.scalar_model, context.recipe.optim.micro_batch_tokens

    def step_scores(stepped: Sequence[SteppedSample]) -> list[list[float]]:
        samples = [one.sample for one in stepped]
        rows = model.values(samples, budget, reads="after")
        require_finite(rows, model, "a step's value")
        return [
            row[torch.tensor(sample.loss_mask)].tolist()
            for row, sample in zip(rows, samples, strict=True)
        ]

    def score_pairs(pairs: PairBatch) -> PairScores:
        scores = model.scores(interleaved(pairs.chosen, pairs.rejected), budget)
        require_finite_scores(scores, model)
        return scores[::2], scores[1::2]

    return {
        "score": _no_policy,
        "reference_score": None,
        "pair_scores": score_pairs,
        "pair_scores_are_logits": True,
        "step_scores": step_scores,
    }


class _NoEngine:
    """In place of an engine where there is no policy."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        raise UserInputError(_NO_POLICY)

    def weights_updated(self, version: int) -> None:
        raise UserInputError(_NO_POLICY)


_NO_POLICY = (
    "the task samples or scores text, but this run trains a model with a scalar head, which does "
    "neither; use a task that scores pairs or steps (preference, process)"
)


def _no_policy(_: Sequence[Sample]) -> TokenScores:
    raise UserInputError(_NO_POLICY)


def _no_rewards(_: Sequence[tuple[Prompt, Completion]]) -> list[RewardedCompletion]:
    raise UserInputError(
        "the task grades completions, but the run's recipe has no rewards; evaluate the run with "
        "a recipe that has some: align eval RUN --task TASK --recipe RECIPE"
    )


def evaluate_model(
    recipe: Recipe,
    model: ModelConfig,
    tasks: Sequence[TaskConfig],
    *,
    seed: int,
    reference: ModelConfig | None = None,
    algorithm: Any = None,
) -> dict[str, Any]:
    """Run tasks on any model, with a recipe's held-out data, rewards and sampling.

    Args:
        recipe: where data, rewards and sampling come from; its own model is replaced.
        model: section of the recipe that names the model: its path, revision and chat template, and
            whether its code may be run. Number format and attention are those of `recipe`.
        seed: of the samples; the same seed gives every model the same random numbers.
        reference: section that names the model which the policy is compared with; None for none.
        algorithm: section of the method that the model was trained by, whose loss says what its
            score of a completion is; the recipe's by default.

    Returns:
        task name -> result.

    Raises:
        UserInputError: a model or the data cannot be used, or the reference has another tokenizer.
    """
    of_model = {key: getattr(model, key) for key in _OF_A_MODEL}
    settings = recipe.model.model_copy(
        update={**of_model, "lora": None, "reference": ReferenceConfig(mode="none")}
    )
    # Another model than a server has, or one that is in training there.
    recipe = recipe.model_copy(update={"model": settings, "rollout": in_process(recipe.rollout)})
    if getattr(recipe.algorithm, "critic", None) is not None:
        without_critic = recipe.algorithm.model_copy(update={"critic": None})
        recipe = recipe.model_copy(update={"algorithm": without_critic})
    loaded = load_parts(recipe)
    if needs_of(recipe.algorithm).model == "scalar":
        separator = getattr(recipe.algorithm, "separator", STEP_SEPARATOR)
        style = fixed_style(recipe.data.style, loaded.tokenizer)
        require_text_form(Path(resolve_model(model.path)), style, separator)
    with tempfile.TemporaryDirectory() as cache:
        context = assemble(
            loaded, Distributed(), EventLog(os.devnull), cache=Path(cache), for_training=False
        )
        try:
            if reference is not None:
                context.policy.reference = _load_reference(reference, context)
            if context.sampler is not None:
                context.sampler.weights_updated(0)
            view = replace(eval_context(context, algorithm=algorithm), seed=seed)
            return {task.name or task.type: make_task(task).run(view) for task in tasks}
        finally:
            if context.rewards is not None:
                context.rewards.close()


# Settings of the model section that belong to the model it names.
_OF_A_MODEL = ("path", "revision", "chat_template", "trust_remote_code")


def made_by(section: ModelConfig, path: str) -> ModelConfig:
    """The section for a model that a run with `section` has made: tokenizer and chat template were
    saved with it, in the folder `path`."""
    return section.model_copy(update={"path": path, "revision": None, "chat_template": None})


def _load_reference(section: ModelConfig, context: TrainingContext) -> Fixed:
    source: dict[str, Any] = {
        "trust_remote_code": section.trust_remote_code,
        "revision": section.revision,
    }
    tokenizer = load_tokenizer(section.path, **source)
    if tokenizer_hash(tokenizer) != tokenizer_hash(context.tokenizer):
        raise UserInputError(
            f"the reference {section.path} has another tokenizer than the model "
            f"{context.recipe.model.path}, so their log-probabilities are not of the same tokens; "
            "name a reference with the same tokenizer, such as the model that it was trained from"
        )
    config = context.recipe.model
    model = load_causal_lm(section.path, dtype=config.dtype, attention=config.attention, **source)
    backbone = Backbone(model.to(context.policy.device).requires_grad_(False))
    choose_layout(backbone)
    return Fixed("frozen_copy", OtherModel(backbone))
