"""The reward `judge` against a local server."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
from chat_server import Behaviour, error, free_port, raw, says, serving, slow

from alignment import registry
from alignment.config.options import build
from alignment.rewards.compose import RewardSpec, build_rewards, unscorable_share
from alignment.rewards.protocol import Item
from alignment.types import Completion, Outcome, Prompt, Score, StopReason, UserInputError
from reward_models.judge import JudgeReward, parse_grade


def item(text: str, **row: Any) -> Item:
    completion = Completion(0, 0, (1,), (0.0,), StopReason.STOP, 0, text)
    return Prompt((1,), "<user>rendered<assistant>", 0, row), completion


def graded(url: str, *items: Item, **options: Any) -> list[Score]:
    judge = JudgeReward(base_url=url, model="m", retries=0, **options)
    try:
        return judge(items or [item("text")])
    finally:
        judge.close()


def shown(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def test_the_grade_is_the_reward() -> None:
    def longer_is_better(handler: Any, request: dict[str, Any]) -> None:
        answer = shown(request).split("[Answer]\n")[1].split("\n")[0]
        says(str(len(answer)))(handler, request)

    with serving(longer_is_better) as server:
        scores = graded(server.url, item("one"), item("seven77"), item("four"))
    assert [score.value for score in scores] == [3.0, 7.0, 4.0]
    assert {score.outcome for score in scores} == {Outcome.SCORED}
    assert scores[1].detail == "judge: 7"


@pytest.mark.parametrize(
    ("row", "conversation"),
    [
        ({"question": "Why?"}, "User: Why?"),
        ({"prompt": [{"role": "user", "content": "Who?"}]}, "User: Who?"),
        (
            {
                "messages": [
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "U"},
                    {"role": "assistant", "content": "the demonstration"},
                ]
            },
            "System: S\nUser: U",
        ),
        ({"answer": "3"}, "<user>rendered<assistant>"),
    ],
)
def test_the_judge_sees_rubric_question_answer_and_scale(
    row: dict[str, Any], conversation: str
) -> None:
    with serving(says("2")) as server:
        graded(server.url, item(" an answer\n", **row), rubric="is {brief}", scale=(0.5, 5.0))
    (body,) = server.bodies
    text = shown(body)
    assert "[What a good answer is like]\nis {brief}\n" in text
    assert f"[Conversation]\n{conversation}\n\n[Answer]\nan answer\n\n" in text
    assert "from 0.5 (worst) to 5 (best)" in text
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.0, 0, 16)


@pytest.mark.parametrize(
    ("behaviour", "outcome", "said"),
    [
        (slow(6.0, says("5")), Outcome.TIMEOUT, "judge, timeout: m at http"),
        (error(500, "oops"), Outcome.CRASH, "judge, unavailable: m at http"),
        (error(400, "no"), Outcome.CRASH, "HTTP 400: no"),
        (raw(b"<html>"), Outcome.CRASH, "judge, garbage"),
        (says("5", "length"), Outcome.CRASH, "judge, cut_off"),
        (says("Very good!"), Outcome.CRASH, "no grade from 1 to 10 in 'Very good!'"),
        (says("11"), Outcome.CRASH, "no grade from 1 to 10 in '11'"),
        (says(""), Outcome.CRASH, "no grade"),
    ],
)
def test_i47_a_judge_that_fails_is_no_grade(
    behaviour: Behaviour, outcome: Outcome, said: str
) -> None:
    with serving(behaviour) as server:
        (score,) = graded(server.url, timeout_seconds=0.2 if "timeout" in said else 5.0)
    assert (score.value, score.outcome) == (None, outcome)
    assert said in score.detail


def test_i47_an_unreachable_judge_is_counted_as_unscorable() -> None:
    options = {"base_url": f"http://127.0.0.1:{free_port()}/v1", "model": "m", "retries": 0}
    rewards = build_rewards([RewardSpec("judge", options=options)])
    found = rewards.grade([item("a"), item("b")])
    rewards.close()
    assert [one.reward for one in found] == [None, None]
    assert unscorable_share(found)[Outcome.CRASH] == 1.0


def test_equal_answers_get_one_grade() -> None:
    with serving(says("3"), says("9")) as server:
        first, second = graded(server.url, item("same"), item("same"))
    assert first == second
    assert len(server.bodies) == 1


def test_a_cached_grade_makes_no_request(tmp_path: Path) -> None:
    with serving(says("3"), says("9")) as server:
        once = graded(server.url, cache=tmp_path / "grades")
        assert graded(server.url, cache=tmp_path / "grades") == once
        assert graded(server.url, cache=tmp_path / "grades", rubric="other")[0].value == 9.0
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("7", 7.0),
        (" **7.5** \n", 7.5),
        ("7/10", 7.0),
        ("10 / 10.", 10.0),
        ("Score: 7", 7.0),
        ("It is short.\nScore: 7/10", 7.0),
        ("rating 2", 2.0),
        ("", None),
        ("seven", None),
        ("0", None),
        ("-3", None),
        ("10.1", None),
        ("7/5", None),
        ("7 or 8", None),
        ("7-8", None),
        ("score7", None),
        ("7 out of 10", None),
        ("Between\n7", None),
        ("7\nbecause", None),
        ("nan", None),
        (".5", None),
        ("**.5**", None),
        ("Score: .5", None),
        ("7.", 7.0),
        ("(7.)", 7.0),
    ],
)
def test_a_grade_is_read_strictly(text: str, grade: float | None) -> None:
    assert parse_grade(text, (1.0, 10.0)) == grade


@pytest.mark.parametrize(
    "text", ["0.5", ".5", " **.5** ", "Score: .5", ".5/10.", "It is bad.\nGrade: .5"]
)
def test_a_leading_point_belongs_to_the_number(text: str) -> None:
    assert parse_grade(text, (0.0, 10.0)) == 0.5


def test_grades_may_be_negative() -> None:
    assert parse_grade("-.5", (-5.0, 5.0)) == -0.5
    assert parse_grade("-3", (-5.0, 5.0)) == -3.0


def test_the_token_limit_has_the_name_that_the_server_takes() -> None:
    with serving(says("3")) as server:
        graded(server.url, token_limit_key="max_completion_tokens", max_new_tokens=2000)
    assert server.bodies[0]["max_completion_tokens"] == 2000
    assert "max_tokens" not in server.bodies[0]


def test_a_key_in_place_of_its_variable_is_refused_without_showing_it() -> None:
    options = {"base_url": "http://x/v1", "model": "m", "api_key_variable": "sk-proj-1234"}
    with pytest.raises(UserInputError, match="name of an environment variable") as refused:
        build("reward", "judge", options)
    assert "sk-proj" not in "".join(traceback.format_exception(refused.value))
    with pytest.raises(UserInputError, match="name of an environment variable") as refused:
        JudgeReward(base_url="http://x/v1", model="m", api_key_variable="sk-proj-1234")
    assert "sk-proj" not in str(refused.value)


def test_it_is_registered_and_takes_a_recipes_options(tmp_path: Path) -> None:
    assert registry.get("reward", "judge") is JudgeReward
    options = {
        "base_url": "http://x/v1",
        "model": "m",
        "scale": [1, 5],
        "cache": str(tmp_path / "c"),
    }
    build("reward", "judge", options).close()
    with pytest.raises(UserInputError, match="unknown key; did you mean 'rubric'"):
        build("reward", "judge", {**options, "rubrik": "x"})


def test_a_scale_upside_down_is_refused() -> None:
    with pytest.raises(UserInputError, match="scale goes from 10 to 1"):
        JudgeReward(base_url="http://x", model="m", scale=(10.0, 1.0))
