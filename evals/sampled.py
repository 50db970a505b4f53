"""What the tasks that sample have in common: sampling, grading and the records of it."""

from __future__ import annotations

from collections.abc import Sequence

from alignment.types import (
    AlignmentError,
    Completion,
    Prompt,
    RewardedCompletion,
    SamplingParams,
    UserInputError,
)
from evals.context import TaskContext
from evals.results import EvalRecord


def sample_and_grade(
    context: TaskContext, prompts: Sequence[Prompt], params: SamplingParams
) -> list[RewardedCompletion]:
    """Completions of the prompts in prompt-major order, with the verdicts of the run's rewards.

    Raises:
        AlignmentError: the engine or the rewards broke their contract.
    """
    completions = context.engine.generate(prompts, params)
    graded = context.grade(_pair(prompts, completions, params.n))
    if len(graded) != len(completions):
        raise AlignmentError(
            f"{len(completions)} completions were graded and {len(graded)} grades came back"
        )
    return graded


def graded_record(item: RewardedCompletion) -> EvalRecord:
    """The record of one graded completion."""
    return EvalRecord(
        problem_id=item.prompt.index,
        sample_index=item.completion.sample_index,
        outcome=item.outcome,
        reward=item.reward,
        prompt_text=item.prompt.text,
        completion_text=item.completion.text,
        n_tokens=len(item.completion.token_ids),
        stop_reason=item.completion.stop_reason,
    )


def _pair(
    prompts: Sequence[Prompt], completions: Sequence[Completion], n: int
) -> list[tuple[Prompt, Completion]]:
    """Each completion with its prompt, checked against the engine's contract."""
    if len(completions) != n * len(prompts):
        raise AlignmentError(
            f"the engine returned {len(completions)} completions for {len(prompts)} prompts with "
            f"{n} samples each"
        )
    pairs = [(prompts[i // n], completion) for i, completion in enumerate(completions)]
    for prompt, completion in pairs:
        if prompt.index != completion.prompt_index:
            raise AlignmentError(
                f"the engine returned a completion of prompt {completion.prompt_index} in the "
                f"place of prompt {prompt.index}; completions must be in prompt-major order"
            )
    return pairs


def require_prompts(task: str, held_out: int, why: str | None = None) -> None:
    """Refuse to evaluate on no prompts.

    Args:
        held_out: how many there are.
        why: what is wrong with the held-out rows, where that is known.

    Raises:
        UserInputError: none.
    """
    if not held_out:
        message = f"task '{task}' has no held-out prompts; give the run's data a held-out part"
        raise UserInputError(message if why is None else f"{message}. Of the held-out rows: {why}")


def require_rewards(task: str, rewards: Sequence[str]) -> None:
    """Refuse to evaluate with a recipe that grades nothing.

    Raises:
        UserInputError: there are no rewards.
    """
    if not rewards:
        raise UserInputError(
            f"task '{task}' grades completions, and there are no rewards to grade them by; give "
            "the run some, or in a pipeline any stage with a policy"
        )
