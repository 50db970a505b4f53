"""Invariants 41 (unscorable samples are counted and limited) and 47 (a failure is no score)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from alignment.rewards.compose import (
    CompositeReward,
    NamedReward,
    RewardSpec,
    build_rewards,
    check_unscorable,
    unscorable_share,
)
from alignment.rewards.protocol import FunctionReward, Item, RewardError
from alignment.types import AlignmentError, Completion, Outcome, Prompt, Score, StopReason


def make_item(text: str, index: int, answer: str = "2\\sqrt{3}") -> Item:
    completion = Completion(index, 0, (1,), (0.0,), StopReason.STOP, 0, text)
    return Prompt((1,), "p", index, {"answer": answer}), completion


def test_i47_a_graders_failure_is_no_score_whatever_fails() -> None:
    """Raising, NaN, a hang and a dead worker each leave the sample without a reward."""

    def own(completions: list[str]) -> list[float]:
        if "raise" in completions:
            raise RuntimeError("boom")
        return [float("nan") if text == "nan" else 1.0 for text in completions]

    composite = CompositeReward([NamedReward("own", 1.0, FunctionReward("own", own, {}))])
    graded = composite.grade([make_item(text, 0) for text in ("good", "raise", "nan")])
    assert [item.reward for item in graded] == [1.0, None, None]
    assert [item.outcome for item in graded] == [Outcome.SCORED, Outcome.CRASH, Outcome.CRASH]


def test_i47_a_hung_checker_masks_its_sample_and_no_other() -> None:
    composite = build_rewards(
        [
            RewardSpec("math", 1.0, None, {"timeout_seconds": 0.5, "workers": 1}),
            RewardSpec("format", 0.5, None, {"style": "boxed"}),
        ]
    )
    texts = ("\\boxed{\\sqrt{12}}", "\\boxed{9^{9^{9^{9^9}}}}", "\\boxed{1}", "none")
    graded = composite.grade([make_item(text, index) for index, text in enumerate(texts)])
    composite.close()
    assert [item.reward for item in graded] == [1.5, None, 0.5, 0.0]
    assert [item.outcome for item in graded] == [
        Outcome.CORRECT,
        Outcome.TIMEOUT,
        Outcome.WRONG,
        Outcome.UNPARSEABLE,
    ]
    # The parts that did work are still recorded.
    assert graded[1].parts["format"] == Score(1.0)
    assert unscorable_share(graded) == {Outcome.TIMEOUT: 0.25, Outcome.CRASH: 0.0}


@pytest.mark.parametrize("failing", [0, 1])
def test_i47_one_failed_part_is_enough_in_any_position(failing: int) -> None:
    def fails(items: Sequence[Item]) -> list[Score]:
        raise OSError("the judge is down")

    def works(items: Sequence[Item]) -> list[Score]:
        return [Score(1.0, Outcome.CORRECT)] * len(items)

    rewards = [works, works]
    rewards[failing] = fails
    parts = [NamedReward(name, 1.0, reward) for name, reward in zip("ab", rewards, strict=True)]
    graded = CompositeReward(parts).grade([make_item("x", 0)])[0]
    assert graded.reward is None
    assert graded.outcome is Outcome.CRASH and graded.outcome.is_failure


def test_i47_a_programming_error_stops_instead_of_scoring_zero() -> None:
    short = FunctionReward("short", lambda completions: [1.0], {})
    composite = CompositeReward([NamedReward("short", 1.0, short)])
    with pytest.raises(RewardError):
        composite.grade([make_item("a", 0), make_item("b", 1)])


@pytest.mark.parametrize(("failed", "stops"), [(0, False), (2, False), (3, True), (10, True)])
def test_i41_unscorable_samples_over_the_limit_stop_the_run(failed: int, stops: bool) -> None:
    def reward(items: Sequence[Item]) -> list[Score]:
        bad = Score(None, Outcome.TIMEOUT, "no verdict within 5 s")
        return [bad if prompt.index < failed else Score(0.0) for prompt, _ in items]

    graded = CompositeReward([NamedReward("math", 1.0, reward)]).grade(
        [make_item("x", index) for index in range(10)]
    )
    assert unscorable_share(graded)[Outcome.TIMEOUT] == failed / 10
    if stops:
        with pytest.raises(AlignmentError, match=rf"timeout in reward 'math': {failed}\b"):
            check_unscorable(graded)
    else:
        check_unscorable(graded)
