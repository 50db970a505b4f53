"""The reward protocol, the function adapter, composition and shaping."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from alignment import registry
from alignment.rewards.compose import (
    CompositeReward,
    NamedReward,
    RewardSpec,
    build_rewards,
    check_unscorable,
    unscorable_share,
)
from alignment.rewards.protocol import FunctionReward, Item, RewardError, run_reward
from alignment.rewards.shaping import (
    length_shortfall,
    soft_overlong_penalty,
)
from alignment.types import (
    AlignmentError,
    Completion,
    Outcome,
    Prompt,
    RewardedCompletion,
    Score,
    StopReason,
    UserInputError,
)


def make_item(text: str, index: int = 0, sample: int = 0, **row: Any) -> Item:
    prompt = Prompt((1, 2), f"prompt {index}", index, row)
    ids = tuple(range(len(text)))
    completion = Completion(index, sample, ids, (0.0,) * len(ids), StopReason.STOP, 0, text)
    return prompt, completion


def values(scores: Sequence[Score | None]) -> list[float | None]:
    return [score.value if score is not None else None for score in scores]


def outcomes(scores: Sequence[Score | None]) -> list[Outcome | None]:
    return [score.outcome if score is not None else None for score in scores]


def text_lengths(prompts: list[str], completions: list[str], scale: float = 1.0) -> list[float]:
    return [scale * len(text) for text in completions]


class Constant:
    """A reward class: the options are those of its constructor."""

    def __init__(self, *, value: float = 1.0, verdict: str = "scored") -> None:
        self.score = Score(value, Outcome(verdict))
        self.closed = False

    def __call__(self, items: Sequence[Item]) -> list[Score]:
        return [self.score] * len(items)

    def close(self) -> None:
        self.closed = True


class NotCallable:
    pass


# --- functions in trl's convention -----------------------------------------------------------


def test_function_gets_texts_columns_ids_and_options() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts, completions=completions)
        return [1.0, 2.0]

    items = [make_item("ab", 0, answer="4", kind="x"), make_item("c", 1, answer="5")]
    assert values(FunctionReward("r", reward, {"scale": 3})(items)) == [1.0, 2.0]
    assert seen == {
        "prompts": ["prompt 0", "prompt 1"],
        "completions": ["ab", "c"],
        "completion_ids": [[0, 1], [0]],
        "answer": ["4", "5"],
        "kind": ["x", None],
        "scale": 3,
    }


def test_function_without_kwargs_gets_only_what_it_names() -> None:
    items = [make_item("abc", answer="4")]
    assert values(FunctionReward("r", text_lengths, {"scale": 2.0})(items)) == [6.0]


def test_function_with_a_missing_column_is_told_the_columns_there_are() -> None:
    def reward(completions: list[str], solution: list[str]) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"'r'.*prompt 7.*'solution'.*answer"):
        FunctionReward("r", reward, {})([make_item("a", 7, answer="4")])


def test_unknown_option_of_a_function_is_refused_when_built() -> None:
    with pytest.raises(RewardError, match="'r' has no option 'scal'"):
        FunctionReward("r", text_lengths, {"scal": 2.0})


def test_something_not_callable_is_refused() -> None:
    with pytest.raises(RewardError, match="'r' is int, which cannot be called"):
        FunctionReward("r", 3, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [0, 1, 3])
def test_wrong_count_is_a_programming_error(length: int) -> None:
    reward = FunctionReward("r", lambda completions: [0.0] * length, {})
    with pytest.raises(RewardError, match=f"'r' returned {length} scores for 2 completions"):
        reward([make_item("a"), make_item("b")])


@pytest.mark.parametrize("returned", [None, 1.0, "ab"])
def test_returning_no_list_is_a_programming_error(returned: Any) -> None:
    reward = FunctionReward("r", lambda completions: returned, {})
    with pytest.raises(RewardError, match="where a list of scores was expected"):
        reward([make_item("a"), make_item("b")])


def test_a_score_of_the_wrong_type_names_the_sample() -> None:
    reward = FunctionReward("r", lambda completions: [1.0, "good"], {})
    with pytest.raises(RewardError, match=r"'r' returned 'good' .str. for sample 4 of prompt 9"):
        reward([make_item("a"), make_item("b", 9, 4)])


@pytest.mark.parametrize(
    "returned", [np.array([1.0, 0.5]), [np.float32(1.0), np.float64(0.5)], (1, 0.5), [True, 0.5]]
)
def test_arrays_tuples_and_numpy_scalars_are_numbers(returned: Any) -> None:
    reward = FunctionReward("r", lambda completions: returned, {})
    scores = reward([make_item("a"), make_item("b")])
    assert values(scores) == [1.0, 0.5]
    assert all(type(score.value) is float for score in scores if score)


def test_scores_and_none_pass_through() -> None:
    score = Score(0.0, Outcome.WRONG, "why")
    reward = FunctionReward("r", lambda completions: [score, None], {})
    assert reward([make_item("a"), make_item("b")]) == [score, None]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, Score(math.nan)])
def test_not_finite_is_a_crash_of_that_sample_only(bad: Any) -> None:
    reward = FunctionReward("r", lambda completions: [bad, 1.0], {})
    scores = reward([make_item("a"), make_item("b")])
    assert outcomes(scores) == [Outcome.CRASH, Outcome.SCORED]
    assert values(scores) == [None, 1.0]
    assert scores[0] is not None and "returned" in scores[0].detail


def test_an_exception_costs_only_the_samples_that_raise_it() -> None:
    def reward(completions: list[str]) -> list[float]:
        return [1.0 / len(text) for text in completions]

    scores = FunctionReward("r", reward, {})([make_item("ab"), make_item(""), make_item("abcd")])
    assert values(scores) == [0.5, None, 0.25]
    assert scores[1] is not None and scores[1].outcome is Outcome.CRASH
    assert scores[1].detail.startswith("reward 'r' raised ZeroDivisionError: ")


def test_a_class_based_reward_is_under_the_same_rules() -> None:
    class Fails:
        def __call__(self, items: Sequence[Item]) -> list[Score]:
            if any(completion.text == "bad" for _, completion in items):
                raise RuntimeError("boom")
            return [Score(1.0)] * len(items)

    scores = run_reward("r", Fails(), [make_item("good"), make_item("bad")])
    assert outcomes(scores) == [Outcome.SCORED, Outcome.CRASH]


def test_the_users_mistake_is_not_taken_for_a_crash() -> None:
    def reward(items: Sequence[Item]) -> list[Score]:
        raise UserInputError("no such column")

    with pytest.raises(UserInputError, match="no such column"):
        run_reward("r", reward, [make_item("a"), make_item("b")])


def test_no_items_call_nothing() -> None:
    assert FunctionReward("r", lambda completions: 1 / 0, {})([]) == []


# --- composition -------------------------------------------------------------------------------


def part(name: str, weight: float, *scores: Score | None) -> NamedReward:
    return NamedReward(name, weight, lambda items: list(scores))


def grade(*parts: NamedReward) -> RewardedCompletion:
    return CompositeReward(parts).grade([make_item("a", 3, 1)])[0]


def test_weighted_sum_keeps_the_parts() -> None:
    graded = grade(part("a", 2.0, Score(0.5)), part("b", -1.0, Score(0.25)))
    assert graded.reward == 0.75
    assert graded.parts == {"a": Score(0.5), "b": Score(0.25)}
    assert graded.outcome is Outcome.SCORED
    assert (graded.prompt.index, graded.completion.sample_index) == (3, 1)


def test_a_part_that_does_not_apply_is_left_out() -> None:
    graded = grade(part("a", 1.0, None), part("b", 2.0, Score(3.0)))
    assert graded.reward == 6.0
    assert set(graded.parts) == {"b"}


def test_weight_zero_is_recorded_and_does_not_count() -> None:
    graded = grade(part("a", 1.0, Score(1.0)), part("b", 0.0, Score(None, Outcome.CRASH)))
    assert graded.reward == 1.0
    assert graded.outcome is Outcome.SCORED
    assert graded.parts["b"].outcome is Outcome.CRASH


def test_outcome_is_the_first_verdict_in_order() -> None:
    wrong, correct = Score(0.0, Outcome.WRONG), Score(1.0, Outcome.CORRECT)
    assert grade(part("f", 1, Score(1.0)), part("v", 1, wrong)).outcome is Outcome.WRONG
    parts = (part("v", 1, correct), part("f", 1, Score(1.0)), part("w", 1, wrong))
    assert grade(*parts).outcome is Outcome.CORRECT


def test_no_part_applies_is_an_error_naming_the_sample() -> None:
    with pytest.raises(RewardError, match="no reward applies to sample 1 of prompt 3: 'a'"):
        grade(part("a", 1.0, None), part("b", 0.0, Score(1.0)))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "no reward has a weight"),
        ([part("a", 0.0)], "no reward has a weight"),
        ([part("a", 1.0), part("a", 2.0)], "2 rewards are called 'a'"),
        ([part("a", math.nan)], "'a' has weight nan"),
    ],
)
def test_parts_that_make_no_sum_are_refused(parts: list[NamedReward], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        CompositeReward(parts)


def test_build_from_names_classes_and_functions() -> None:
    composite = build_rewards(
        [
            RewardSpec("test_rewards:text_lengths", 0.5, "length", {"scale": 2.0}),
            RewardSpec("test_rewards:Constant", 1.0, "constant", {"value": 3.0}),
            ("format", 1.0, None, {"style": "boxed"}),
        ]
    )
    graded = composite.grade([make_item("\\boxed{1}")])[0]
    assert [p.name for p in composite.parts] == ["length", "constant", "format"]
    assert graded.reward == 0.5 * 2.0 * 9 + 3.0 + 1.0
    composite.close()
    assert composite.parts[1].reward.closed  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (RewardSpec("maths"), "unknown reward 'maths'; did you mean 'math'"),
        (RewardSpec("test_rewards:Constan"), "did you mean 'Constant'"),
        (RewardSpec("test_rewards:Constant", options={"valu": 1.0}), "valu"),
        (RewardSpec("test_rewards:Constant", options={"value": "high"}), "value"),
        (RewardSpec("test_rewards:NotCallable"), "has no __call__"),
        (RewardSpec("format", options={"style": "boxd"}), "boxd"),
    ],
)
def test_build_refuses_what_does_not_exist(spec: RewardSpec, message: str) -> None:
    with pytest.raises(UserInputError, match=re.escape(message)):
        build_rewards([spec])


def test_has_verifier_asks_the_parts_that_count() -> None:
    assert build_rewards([RewardSpec("number")]).has_verifier
    assert not build_rewards([RewardSpec("format")]).has_verifier
    assert not build_rewards([RewardSpec("format"), RewardSpec("number", 0.0)]).has_verifier


def test_every_built_in_reward_is_registered() -> None:
    built_in = {"math", "number", "exact", "reasoning_gym", "format", "length", "overlong"}
    assert built_in | {"regex", "sentiment"} <= set(registry.names("reward"))


# --- the share that cannot be scored --------------------------------------------------------------


def rewarded(*scores: Score) -> list[RewardedCompletion]:
    composite = CompositeReward([part("check", 1.0, *scores)])
    return composite.grade([make_item("a", index) for index in range(len(scores))])


def test_unscorable_share_is_by_class() -> None:
    timeout, crash = Score(None, Outcome.TIMEOUT), Score(None, Outcome.CRASH)
    items = rewarded(timeout, crash, timeout, Score(0.0, Outcome.UNPARSEABLE), Score(1.0))
    assert unscorable_share(items) == {Outcome.TIMEOUT: 0.4, Outcome.CRASH: 0.2}
    assert unscorable_share([]) == {Outcome.TIMEOUT: 0.0, Outcome.CRASH: 0.0}


def test_check_unscorable_names_class_reward_count_and_example() -> None:
    crash = Score(None, Outcome.CRASH, "ValueError: no model")
    items = rewarded(Score(1.0), crash, crash, Score(0.0))
    check_unscorable(items, limit=0.5)
    with pytest.raises(AlignmentError) as caught:
        check_unscorable(items)
    message = str(caught.value)
    assert "50% of 4" in message and "limit of 20%" in message
    assert "crash in reward 'check': 2" in message
    assert "prompt 1, sample 0" in message and "ValueError: no model" in message
    assert not isinstance(caught.value, UserInputError)


# --- shaping -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "expected"),
    # max_length 100, buffer 20: free up to 80, then (80 - length) / 20, and -1 from 100
    [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0), (500, -1.0)],
)
def test_soft_overlong_penalty_by_hand(length: int, expected: float) -> None:
    assert soft_overlong_penalty(length, max_length=100, buffer=20) == pytest.approx(expected)


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_overlong_buffer_must_fit(buffer: int) -> None:
    with pytest.raises(UserInputError, match="buffer"):
        soft_overlong_penalty(1, max_length=100, buffer=buffer)


def test_length_shortfall_by_hand() -> None:
    assert [length_shortfall(n, target=4) for n in (0, 1, 4, 6, 8, 20)] == [
        0.0,
        0.25,
        1.0,
        0.5,
        0.0,
        0.0,
    ]
