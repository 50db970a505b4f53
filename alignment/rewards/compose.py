"""Several rewards as one: the weighted sum, what each part said, and the share that could not be
scored."""

from __future__ import annotations

import copy
import inspect
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from alignment import registry
from alignment.activity import doing
from alignment.config.options import validate_options
from alignment.rewards.protocol import FunctionReward, Item, Reward, RewardError, run_reward
from alignment.types import (
    AlignmentError,
    Completion,
    Outcome,
    Prompt,
    RewardedCompletion,
    Score,
    UserInputError,
)

FAILURES: tuple[Outcome, ...] = tuple(outcome for outcome in Outcome if outcome.is_failure)


@dataclass(frozen=True, slots=True)
class NamedReward:
    """One part of the sum. A part of weight 0 is computed and recorded, but does not count."""

    name: str
    weight: float
    reward: Reward

    @property
    def counts(self) -> bool:
        return self.weight != 0.0


class RewardSpec(NamedTuple):
    """A reward as a recipe states it: registered name or "module:attribute", and its options."""

    type: str
    weight: float = 1.0
    name: str | None = None
    options: Mapping[str, Any] = MappingProxyType({})


class CompositeReward:
    """The weighted sum of its parts: `reward = sum_i weight_i * score_i`.

    * A part that does not apply to a completion (None) is left out of the sum.
    * Where a part with a weight failed (timeout, crash), the reward is None, and the outcome is
      that failure: a failed grader is never a score.
    * Otherwise the outcome is that of the first part, in the order given, that has a verdict
      other than `scored`; it is `scored` where no part has one.

    Raises:
        UserInputError: no parts, two parts of one name, a weight that is not finite, or no
            part with a weight.
    """

    def __init__(self, parts: Sequence[NamedReward]) -> None:
        _check_parts(parts)
        self.parts = tuple(parts)

    @property
    def has_verifier(self) -> bool:
        """True where a part with a weight tells right from wrong."""
        return any(
            part.counts and getattr(part.reward, "is_verifier", False) for part in self.parts
        )

    def grade(self, items: Sequence[Item]) -> list[RewardedCompletion]:
        """One `RewardedCompletion` per item, in order.

        Raises:
            RewardError: a reward is programmed wrongly, or no part that counts applies to an item.
        """
        columns = [_graded_by(part, items) for part in self.parts]
        rows = zip(*columns, strict=True)
        return [self._combine(item, row) for item, row in zip(items, rows, strict=True)]

    def bind(self, tokenizer: Any, policy_style: str | None = None) -> None:
        """Tell the parts that ask for it (method `bind`) how the policy's tokens read.

        Args:
            tokenizer: the policy's.
            policy_style: `chat` where its rows are rendered with the chat template, `plain` where
                they are not; None is not known. A part is told whose `bind` names it.

        Raises:
            UserInputError: a part cannot score what this tokenizer's policy writes.
        """
        for part in self.parts:
            bind = getattr(part.reward, "bind", None)
            if callable(bind):
                if "policy_style" in inspect.signature(bind).parameters:
                    bind(tokenizer, policy_style=policy_style)
                else:
                    bind(tokenizer)

    def close(self) -> None:
        """Let go of what the parts hold, such as worker processes."""
        for part in self.parts:
            close = getattr(part.reward, "close", None)
            if callable(close):
                close()

    def state_dict(self) -> dict[str, Any]:
        """What parts keep between batches: name -> state, of those that have `state_dict` and
        `load_state_dict`."""
        return {name: keeper.state_dict() for name, keeper in self._keepers()}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Give the parts back what `state_dict` told of them.

        Raises:
            AlignmentError: other parts than these keep a state, or one does not take its own.
        """
        keepers = dict(self._keepers())
        if keepers.keys() != states.keys():
            raise AlignmentError(
                f"a state was saved of the rewards {sorted(states) or 'none'}, and those that keep "
                f"one are {sorted(keepers) or 'none'}; go on with the rewards that the run had"
            )
        for name, keeper in keepers.items():
            try:
                keeper.load_state_dict(states[name])
            except Exception as error:
                raise AlignmentError(
                    f"reward {name!r} does not take back the state that it gave: "
                    f"{type(error).__name__}: {error}; mend its load_state_dict"
                ) from error

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Whatever is graded inside, parts keep the state that they had before."""
        before = copy.deepcopy(self.state_dict())
        try:
            yield
        finally:
            self.load_state_dict(before)

    def _keepers(self) -> Iterator[tuple[str, Any]]:
        for part in self.parts:
            keeper = (
                part.reward.function if isinstance(part.reward, FunctionReward) else part.reward
            )
            methods = (getattr(keeper, name, None) for name in ("state_dict", "load_state_dict"))
            if all(map(callable, methods)):
                yield part.name, keeper

    def _combine(self, item: Item, scores: Sequence[Score | None]) -> RewardedCompletion:
        prompt, completion = item
        given = [(p, s) for p, s in zip(self.parts, scores, strict=True) if s is not None]
        counting = [(part, score) for part, score in given if part.counts]
        if not counting:
            raise RewardError(_nothing_applies(self.parts, prompt, completion))
        failure = next((score for _, score in counting if score.outcome.is_failure), None)
        return RewardedCompletion(
            prompt=prompt,
            completion=completion,
            reward=None if failure else _weighted_sum(counting),
            outcome=failure.outcome if failure else _verdict([score for _, score in given]),
            parts={part.name: score for part, score in given},
        )


def build_rewards(
    specs: Sequence[RewardSpec | tuple[str, float, str | None, Mapping[str, Any]]],
) -> CompositeReward:
    """Build each reward named in a recipe, and their weighted sum.

    `type` is a registered name or "module:attribute". A class is called with the options and must
    give a `Reward`; any other callable is taken as a function in trl's convention, to which the
    options go as keyword arguments. `name` (by default the type) is what metrics and records call
    the part.

    Raises:
        UserInputError: an unknown name, an option that the reward does not have, or what
            `CompositeReward` refuses.
    """
    return CompositeReward([_build(RewardSpec(*spec)) for spec in specs])


def unscorable_share(rewarded: Sequence[RewardedCompletion]) -> dict[Outcome, float]:
    """For each way in which a grader can fail, the share of completions left without a reward."""
    count = Counter(item.outcome for item in rewarded if item.reward is None)
    return {outcome: count[outcome] / max(len(rewarded), 1) for outcome in FAILURES}


def check_unscorable(
    rewarded: Sequence[RewardedCompletion], limit: float = 0.2, *, among: int | None = None
) -> None:
    """Stop where more than a share `limit` of the completions could not be scored.

    Args:
        rewarded: all completions, or only those that failed, with `among`.
        limit: the share allowed.
        among: how many completions there are where `rewarded` leaves some out.

    Raises:
        AlignmentError: naming the classes, the rewards, how many, an example and the remedy.
    """
    n_all = len(rewarded) if among is None else among
    share = sum(item.reward is None for item in rewarded) / max(n_all, 1)
    if share <= limit:
        return
    raise AlignmentError(
        f"{share:.0%} of {n_all} completions could not be scored, over the limit of "
        f"{limit:.0%} {described_failures(rewarded)}. Correct the reward (a crash), give it a "
        "longer time limit (a timeout), or raise the allowed share of unscorable samples"
    )


def described_failures(rewarded: Sequence[RewardedCompletion]) -> str:
    """Which rewards failed how often, in which way, and the first sample of them; at least one of
    the completions has no reward."""
    failures = Counter(
        (name, score.outcome) for item in rewarded for name, score in _failed_parts(item)
    )
    listed = ", ".join(
        f"{outcome.value} in reward {name!r}: {count}"
        for (name, outcome), count in failures.most_common()
    )
    example = next(item for item in rewarded if item.reward is None)
    name, score = _failed_parts(example)[0]
    return (
        f"({listed}). Example, prompt {example.prompt.index}, sample "
        f"{example.completion.sample_index}, reward {name!r}: {score.detail or 'no detail'}"
    )


def _build(spec: RewardSpec) -> NamedReward:
    name = spec.name or spec.type
    if ":" in spec.type:
        target = registry.load_target(spec.type, f"reward {name!r}:")
    else:
        target = registry.get("reward", spec.type)
    if not inspect.isclass(target):
        return NamedReward(name, spec.weight, FunctionReward(name, target, spec.options))
    options = validate_options(target, spec.options, where=f"options of reward {name!r}")
    reward = target(**options)
    if not callable(reward):
        raise RewardError(
            f"reward {name!r}: {target.__name__} has no __call__(items); a reward class scores a "
            "sequence of (prompt, completion) pairs when it is called"
        )
    return NamedReward(name, spec.weight, reward)


def _graded_by(part: NamedReward, items: Sequence[Item]) -> list[Score | None]:
    with doing("grading", f"reward {part.name!r} on {_named(items)}"):
        return run_reward(part.name, part.reward, items)


def _named(items: Sequence[Item]) -> str:
    """Which samples these are, for a message."""
    if len(items) == 1:
        ((prompt, completion),) = items
        return f"sample {completion.sample_index} of prompt {prompt.index}"
    numbers = [prompt.index for prompt, _ in items]
    span = f"prompts {min(numbers)} to {max(numbers)}" if numbers else "no prompts"
    return f"{len(items)} samples of {span}"


def _check_parts(parts: Sequence[NamedReward]) -> None:
    if not any(part.counts for part in parts):
        raise UserInputError(
            "no reward has a weight other than 0; give `rewards` at least one that counts"
        )
    for name, count in Counter(part.name for part in parts).items():
        if count > 1:
            raise UserInputError(f"{count} rewards are called {name!r}; give each its own `name`")
    for part in parts:
        if not math.isfinite(part.weight):
            raise UserInputError(
                f"reward {part.name!r} has weight {part.weight}; a weight is a finite number"
            )


def _weighted_sum(counting: Sequence[tuple[NamedReward, Score]]) -> float:
    return math.fsum(part.weight * (score.value or 0.0) for part, score in counting)


def _verdict(scores: Sequence[Score]) -> Outcome:
    verdicts = (s.outcome for s in scores if not s.outcome.is_failure)
    return next((outcome for outcome in verdicts if outcome is not Outcome.SCORED), Outcome.SCORED)


def _failed_parts(item: RewardedCompletion) -> list[tuple[str, Score]]:
    return [(name, score) for name, score in item.parts.items() if score.outcome.is_failure]


def _nothing_applies(parts: Sequence[NamedReward], prompt: Prompt, completion: Completion) -> str:
    names = ", ".join(repr(part.name) for part in parts if part.counts)
    place = f" ({prompt.place})" if prompt.place else ""
    return (
        f"no reward applies to sample {completion.sample_index} of prompt {prompt.index}{place}: "
        f"{names} returned None; drop such rows, or add a reward that scores them"
    )
