"""Constitutional AI, its supervised stage as a maker of data: answers, critiques, revisions.

Bai et al. 2022, "Constitutional AI: Harmlessness from AI Feedback", section 3.1. A step samples
answers, has them criticised and revised by principles drawn at random, and hands the loop rows;
nothing is trained. What the revisions teach is for later stages: SFT reads `prompt` and
`completion`, DPO and reward models read `prompt`, `chosen` and `rejected` of the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignment.config.methods.feedback import ConstitutionalConfig
from alignment.data.prompts import prompt_column
from alignment.feedback.chat_model import derived_seed
from alignment.feedback.revision import Response, Revision, critique_and_revise
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import StepResult, TrainingContext
from alignment.trainers.feedback import (
    AnswerSource,
    Rules,
    is_blank,
    is_cut_off,
    make_chat_model,
    record_answers,
    settle,
)
from alignment.trainers.update import timed
from alignment.types import RewardedCompletion

Row = dict[str, Any]

REASONS = ("blank", "cut_off", "failed", "unchanged")
"""Why an answer gives no row: it is blank, it was cut off, its critique or revision failed (a blank
revision is a failure), or the last revision is what it was."""

_REVISING = 1  # what the chat model is asked for, as a counter of its random numbers


class ConstitutionalMaker:
    """One step: prompts, first answers, critiques and revisions, rows."""

    def __init__(self, context: TrainingContext) -> None:
        config = context.recipe.algorithm
        assert isinstance(config, ConstitutionalConfig) and context.recipe.rollout is not None
        self.config = config
        self.context = context
        self.chat_model = make_chat_model(context, config.judge)
        self.rules = Rules.load(context, config.constitution, self.chat_model)
        self.answers = AnswerSource(context, config, samples=config.samples_per_prompt)
        self.total_steps = self.answers.total_steps
        judge, rollout = config.judge, context.recipe.rollout
        self.max_new_tokens = judge.max_new_tokens or rollout.max_new_tokens
        self.temperature = rollout.temperature if judge.temperature is None else judge.temperature

    def step(self, step: int) -> StepResult:
        metrics = MetricSums()
        rollout = self.answers.sample(step, metrics)
        record_answers(rollout.items, metrics)
        keep = self.config.keep_cut_off
        unfit = [why_unfit(item, keep_cut_off=keep) for item in rollout.items]
        asked = [item for item, reason in zip(rollout.items, unfit, strict=True) if not reason]
        with timed(metrics, "revise"):
            revisions = self.revise(step, asked)
        unusable = [why_left_out(revision) for revision in revisions]
        what = f"revisions by {self.chat_model.name}"
        left_out = [*filter(None, unfit), *unusable]
        settle(self.context, step, revisions, left_out, REASONS, metrics, what)
        rows = []
        for item, revision, reason in zip(asked, revisions, unusable, strict=True):
            if not reason:
                row = row_of(item, revision)
                record_lengths(row, metrics)
                rows.append((item.prompt.index, row))
        return StepResult(metrics, rollout, rows=rows)

    def revise(self, step: int, items: Sequence[RewardedCompletion]) -> list[Revision]:
        """What the chat model makes of each answer.

        The principle of an answer is drawn by its number, so that it depends neither on the other
        answers nor on the number of ranks.
        """
        per_prompt = self.config.samples_per_prompt
        return critique_and_revise(
            self.chat_model,
            self.rules.constitution,
            [
                Response(
                    item.prompt.index * per_prompt + item.completion.sample_index,
                    self.answers.conversation(item.prompt),
                    item.completion.text,
                )
                for item in items
            ],
            rounds=self.config.rounds,
            seed=derived_seed(self.context.recipe.run.seed, step, _REVISING),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.context.order.state_dict(), "constitution": self.rules.hash}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rules.check_same(state["constitution"])
        self.context.order.load_state_dict(state["order"])


def why_unfit(item: RewardedCompletion, *, keep_cut_off: bool) -> str:
    """One of `REASONS`, or "" for an answer that is worth revising."""
    if is_blank(item):
        return "blank"
    return "cut_off" if is_cut_off(item) and not keep_cut_off else ""


def why_left_out(revision: Revision) -> str:
    """One of `REASONS`, or "" for a revision that gives a row."""
    if revision.final is None:
        return "failed"
    return "unchanged" if revision.final.strip() == revision.response.strip() else ""


def row_of(item: RewardedCompletion, revision: Revision) -> Row:
    """A demonstration and a preference in one, and how it came about."""
    return {
        "prompt": prompt_column(item.prompt.row),
        "completion": revision.final,
        "chosen": revision.final,
        "rejected": revision.response.strip(),  # as revisions are: white space is no difference
        "initial": revision.response,
        "principles": [step.principle for step in revision.steps],
        "critiques": [step.critique for step in revision.steps],
    }


def record_lengths(row: Row, metrics: MetricSums) -> None:
    """Words of both sides: whether the revisions just get longer or shorter."""
    metrics.add("made/words_chosen", len(row["chosen"].split()))
    metrics.add("made/words_rejected", len(row["rejected"].split()))
