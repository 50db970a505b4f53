"""Preferences from a language model in place of people: the labels of RLAIF, as a maker of data.

Bai et al. 2022, "Constitutional AI: Harmlessness from AI Feedback", section 4.1; Lee et al. 2023,
"RLAIF". A step samples pairs of answers, has each pair compared in both orders by a principle drawn
at random, and hands the loop rows; nothing is trained. How far the judge agrees with itself, and
with the recipe's rewards where there are some, is measured along the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.config.methods.feedback import AIFeedbackConfig
from alignment.data.prompts import prompt_column
from alignment.feedback.agreement import AgreementStats, agreement
from alignment.feedback.chat_model import Failure, derived_seed
from alignment.feedback.constitution import Principle
from alignment.feedback.judging import Comparison, Judgement, Preference, Verdict, judge_pairs
from alignment.rollout.collect import Collected
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import StepResult, TrainingContext
from alignment.trainers.experience import shaped_rewards
from alignment.trainers.feedback import (
    AnswerSource,
    Rules,
    is_blank,
    is_cut_off,
    make_chat_model,
    record_answers,
    settle,
)
from alignment.trainers.monitor import RolloutMonitor
from alignment.trainers.update import timed
from alignment.types import RewardedCompletion, Rollout

Row = dict[str, Any]

REASONS = ("blank", "cut_off", "same", "failed", "inconsistent", "tie")
"""Why a pair gives no row: an answer is blank or was cut off, both are the same, the judge failed,
it went by the order, or it saw too little difference."""

_JUDGING = 2  # what the chat model is asked for, as a counter of its random numbers
_VERDICT_TOKENS = 16

_Counted = tuple[str, Verdict | None, Verdict | None, Preference | None, bool, Preference | None]
"""What statistics look at: failure, verdicts in both orders, preferred, consistent, gold label."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt.

    number: among all pairs of the run; what is drawn at random for it depends on it.
    """

    number: int
    first: RewardedCompletion
    second: RewardedCompletion

    @property
    def gold(self) -> Preference | None:
        """The better answer by the rewards; None where they say nothing."""
        one, other = self.first.reward, self.second.reward
        if one is None or other is None or one == other:
            return None
        return "first" if one > other else "second"


class AIFeedbackMaker:
    """One step: prompts, pairs of answers, verdicts in both orders, rows."""

    def __init__(self, context: TrainingContext) -> None:
        config = context.recipe.algorithm
        assert isinstance(config, AIFeedbackConfig) and context.recipe.rollout is not None
        self.config = config
        self.context = context
        self.chat_model = make_chat_model(context, config.judge)
        self.rules = Rules.load(context, config.constitution, self.chat_model)
        self.answers = AnswerSource(
            context,
            config,
            samples=2 * config.pairs_per_prompt,
            grade=context.rewards.grade if context.rewards is not None else None,
        )
        self.total_steps = self.answers.total_steps
        self.monitor = RolloutMonitor(context)
        self.so_far: Counter[_Counted] = Counter()

    def step(self, step: int) -> StepResult:
        metrics = MetricSums()
        rollout = self.answers.sample(step, metrics)
        self.measure(rollout, metrics)
        pairs = list(pairs_of(rollout))
        unfit = [why_unfit(pair, keep_cut_off=self.config.keep_cut_off) for pair in pairs]
        asked = [pair for pair, reason in zip(pairs, unfit, strict=True) if not reason]
        principles = [
            self.rules.constitution.draw(self.context.recipe.run.seed, pair.number)
            for pair in asked
        ]
        with timed(metrics, "judge"):
            judgements = self.judge(step, asked, principles)
        undecided = [self.why_left_out(judgement) for judgement in judgements]
        what = f"verdicts of {self.chat_model.name}"
        left_out = [*filter(None, unfit), *undecided]
        settle(self.context, step, judgements, left_out, REASONS, metrics, what)
        self.count(step, judgements, [pair.gold for pair in asked], metrics)
        rows = []
        for pair, judgement, principle, reason in zip(
            asked, judgements, principles, undecided, strict=True
        ):
            if reason:
                continue
            rows.append((pair.first.prompt.index, row_of(pair, judgement, principle)))
            if pair.gold is not None:
                metrics.add("made/gold_agreement", judgement.preferred == pair.gold)
        return StepResult(metrics, rollout, rows=rows)

    def measure(self, rollout: Rollout, metrics: MetricSums) -> None:
        """The answers, and their rewards where there are some.

        Raises:
            AlignmentError: more answers than allowed could not be scored.
        """
        if self.context.rewards is None:
            record_answers(rollout.items, metrics)
            return
        self.monitor.sampled(Collected(rollout, rollout.items, n_rounds=1), metrics)
        assert self.context.recipe.rollout is not None
        limit = self.context.recipe.rollout.max_new_tokens
        self.monitor.rewards(rollout, shaped_rewards(rollout, max_new_tokens=limit), metrics)

    def judge(
        self, step: int, pairs: Sequence[Pair], principles: Sequence[Principle]
    ) -> list[Judgement]:
        """What the chat model makes of each pair."""
        config = self.config.judge
        return judge_pairs(
            self.chat_model,
            [
                Comparison(
                    self.answers.conversation(pair.first.prompt),
                    pair.first.completion.text,
                    pair.second.completion.text,
                )
                for pair in pairs
            ],
            principle=[principle.preference for principle in principles],
            seed=derived_seed(self.context.recipe.run.seed, step, _JUDGING),
            max_new_tokens=config.max_new_tokens or _VERDICT_TOKENS,
            temperature=config.temperature or 0.0,
            verdict=self.config.verdict,
        )

    def why_left_out(self, judgement: Judgement) -> str:
        """One of `REASONS`, or "" for a judgement that gives a row."""
        if judgement.failure:
            return "failed"
        if self.config.require_consistent and not judgement.consistent:
            return "inconsistent"
        margin = judgement.margin
        if judgement.preferred is None or (
            margin is not None and abs(margin) <= self.config.min_margin
        ):
            return "tie"
        return ""

    def count(
        self,
        step: int,
        judgements: Sequence[Judgement],
        gold: Sequence[Preference | None],
        metrics: MetricSums,
    ) -> None:
        """Agreement in this step, and so far, over all ranks."""
        verdicts: list[_Counted] = [
            (j.failure.value, *j.verdicts, j.preferred, j.consistent, label)
            for j, label in zip(judgements, gold, strict=True)
        ]
        now = Counter(self.context.distributed.gather(verdicts))
        self.so_far += now
        if not self.context.distributed.is_main:
            return
        record_agreement(statistics(now), "judge/", metrics)
        total = statistics(self.so_far)
        record_agreement(total, "judge/total/", metrics)
        if step == self.total_steps:
            self.context.events.write("agreement", f"the judge in all: {told(total)}", step=step)

    def state_dict(self) -> dict[str, Any]:
        return {
            "order": self.context.order.state_dict(),
            "monitor": self.monitor.state_dict(),
            "constitution": self.rules.hash,
            "verdicts": [[*verdict, n] for verdict, n in sorted(self.so_far.items(), key=repr)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rules.check_same(state["constitution"])
        self.context.order.load_state_dict(state["order"])
        self.monitor.load_state_dict(state["monitor"])
        self.so_far = Counter({tuple(row[:-1]): row[-1] for row in state["verdicts"]})


def pairs_of(rollout: Rollout) -> Iterator[Pair]:
    """Neighbouring answers of each prompt: the first with the second, the third with the fourth."""
    per_prompt = rollout.group_size // 2
    for place in range(0, len(rollout.items), 2):
        first, second = rollout.items[place : place + 2]
        number = first.prompt.index * per_prompt + first.completion.sample_index // 2
        yield Pair(number, first, second)


def why_unfit(pair: Pair, *, keep_cut_off: bool) -> str:
    """Why the judge need not be asked, or "" where it is."""
    answers = (pair.first, pair.second)
    if any(map(is_blank, answers)):
        return "blank"
    if any(map(is_cut_off, answers)) and not keep_cut_off:
        return "cut_off"
    one, other = (answer.completion.text.strip() for answer in answers)
    return "same" if one == other else ""


def row_of(pair: Pair, judgement: Judgement, principle: Principle) -> Row:
    """A preference, and how it came about."""
    chosen, rejected = pair.first, pair.second
    if judgement.preferred == "second":
        chosen, rejected = rejected, chosen
    row: Row = {
        "prompt": prompt_column(pair.first.prompt.row),
        "chosen": chosen.completion.text,
        "rejected": rejected.completion.text,
        "principle": principle.name,
    }
    if judgement.margin is not None:
        row["judge_margin"] = abs(judgement.margin)
    if chosen.parts or rejected.parts:
        row |= {"reward_chosen": chosen.reward, "reward_rejected": rejected.reward}
    return row


def statistics(verdicts: Counter[_Counted]) -> AgreementStats:
    """Agreement statistics of counted verdicts."""
    judgements: list[Judgement] = []
    gold: list[Preference | None] = []
    for (failure, one, other, preferred, consistent, label), n in verdicts.items():
        judgement = Judgement(preferred, consistent, Failure(failure), (one, other))
        judgements += [judgement] * n
        gold += [label] * n
    return agreement(judgements, gold)


def record_agreement(stats: AgreementStats, prefix: str, metrics: MetricSums) -> None:
    """Statistics as metrics; one that is not defined is left out."""
    for name, value in _shares(stats).items():
        if value is not None:
            metrics.add(prefix + name, value)
    metrics.add_count(f"{prefix}comparisons", stats.n)


def told(stats: AgreementStats) -> str:
    """Statistics in words."""
    shares = [
        f"{name.replace('_', ' ')} {value:.2f}"
        for name, value in _shares(stats).items()
        if value is not None
    ]
    return ", ".join([f"{stats.n} comparisons", *shares])


def _shares(stats: AgreementStats) -> dict[str, float | None]:
    return {
        "swap_consistency": stats.swap_consistency,
        "first_bias": stats.first_bias,
        "second_bias": stats.second_bias,
        "tie_share": stats.tie_share,
        "kappa": stats.kappa,
        "usable": stats.n_usable / stats.n if stats.n else None,
        "gold_agreement": stats.gold_agreement,
    }
