"""`align reward test`: what is graded, and what the rewards are shown of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from alignment.cli import app
from alignment.modeling.catalog import fetch
from alignment.modeling.load import load_tokenizer
from alignment.trainers.reward_trial import try_rewards
from alignment.types import Completion, Outcome, Prompt, Score, StopReason

RECIPE = """\
run: {name: trial}
model: {path: tiny-random}
data: {type: file, path: rows.jsonl, system: Be brief.}
algorithm: {type: grpo, steps: 1, prompts_per_step: 2, group_size: 2}
rollout: {max_new_tokens: 4}
rewards:
  - {type: "test_reward_command:characters", weight: 0.5}
  - {type: "test_reward_command:Picky", name: picky, weight: 2.0}
optim: {lr: 1e-4}
"""
DATA: list[dict[str, Any]] = [
    {"prompt": "first", "completion": "four", "answer": "4"},
    {"prompt": "second", "completion": "seventh", "answer": "7"},
    {"prompt": "third", "completion": "dreadful", "answer": "8"},
]


def characters(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


class Picky:
    """Right where the completion's length is the row's answer; cannot read "dreadful"."""

    is_verifier = True

    def __call__(self, items: Sequence[tuple[Prompt, Completion]], /) -> list[Score]:
        return [self._score(prompt, completion) for prompt, completion in items]

    def _score(self, prompt: Prompt, completion: Completion) -> Score:
        if completion.text == "dreadful":
            return Score(None, Outcome.CRASH, "no\nway")
        right = str(len(completion.text)) == prompt.row["answer"]
        return Score(float(right), Outcome.CORRECT if right else Outcome.WRONG)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    data(DATA)


def data(rows: list[dict[str, Any]]) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def reward_test(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["reward", "test", "recipe.yaml", *arguments])


def test_the_datas_completions_are_graded() -> None:
    output = reward_test("--rows", "3").output
    blocks = [[line.split() for line in block.splitlines()] for block in output.split("\n\n")]
    assert [block[0] for block in blocks] == [[f"rows.jsonl:{line}"] for line in (1, 2, 3)]
    assert blocks[0][2:] == [
        ["completion", "four"],
        ["reward", "4", "correct"],  # 0.5 * 4 characters + 2 * 1
        ["test_reward_command:characters", "4", "scored"],
        ["picky", "1", "correct"],
    ]
    assert blocks[1][3] == ["reward", "5.5", "correct"]
    assert blocks[2][3:6] == [
        ["reward", "none", "crash"],
        ["test_reward_command:characters", "8", "scored"],
        ["picky", "none", "crash", "no\\nway"],
    ]


def test_rewards_see_what_a_policy_would_have_written() -> None:
    ((name, item),) = try_rewards("recipe.yaml")
    tokenizer = load_tokenizer(fetch("tiny-random"))
    system = {"role": "system", "content": "Be brief."}
    turns = [system, {"role": "user", "content": "first"}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert (name, item.prompt.text) == ("rows.jsonl:1", rendered)
    assert item.prompt.token_ids == tuple(tokenizer(rendered).input_ids)
    assert item.prompt.row == DATA[0]
    assert item.completion.token_ids == tuple(tokenizer("four<|im_end|>").input_ids)
    assert (item.completion.text, item.completion.stop_reason) == ("four", StopReason.STOP)


def test_a_text_of_ones_own_answers_a_row() -> None:
    output = reward_test("--completion", "1234567").output
    assert output.splitlines()[0] == "rows.jsonl:1"
    assert "\n\n" not in output
    assert output.splitlines()[3].split() == ["reward", "3.5", "wrong"]
    both = reward_test("--completion", "1234567", "--rows", "2").output.split("\n\n")
    assert both[1].splitlines()[3].split() == ["reward", "5.5", "correct"]


def test_a_prompt_of_ones_own_stands_in_place_of_a_row() -> None:
    Path("recipe.yaml").write_text(RECIPE.replace('  - {type: "test_reward_command:Picky"', "  # "))
    result = reward_test("--prompt", "why?", "--completion", "because")
    assert result.exit_code == 0, result.output
    assert "the prompt given" in result.output and "user\\nwhy?" in result.output
    assert result.output.splitlines()[3].split() == ["reward", "3.5", "scored"]
    for arguments, words in (
        (["--prompt", "why?"], "a prompt without a completion"),
        (["--prompt", "p", "--completion", "c", "--rows", "2"], "leave --rows out"),
    ):
        refused = reward_test(*arguments)
        assert refused.exit_code == 2
        assert words in refused.output


def test_both_sides_of_a_preference_and_the_end_of_a_talk_are_graded() -> None:
    user, said = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
    data(
        [
            {"prompt": "p", "chosen": "yes", "rejected": "dreadful", "answer": "3"},
            {"messages": [user, said, user, said], "answer": "5"},
        ]
    )
    graded = dict(try_rewards("recipe.yaml", rows=2))
    assert {name: item.reward for name, item in graded.items()} == {
        "rows.jsonl:1, chosen": 3.5,
        "rows.jsonl:1, rejected": None,
        "rows.jsonl:2": 4.5,
    }
    assert graded["rows.jsonl:2"].prompt.text.count("hi<|im_end|>") == 2
    assert len({item.prompt.index for item in graded.values()}) == 3
    (_, item), *_ = try_rewards("recipe.yaml", completion="abc")
    assert (item.reward, item.completion.text) == (3.5, "abc")


def test_what_cannot_be_graded_is_refused() -> None:
    data([{"prompt": "p", "answer_is": "a"}])
    result = reward_test()
    assert result.exit_code == 2
    assert "rows.jsonl:1" in result.output and "'prompt' with 'completion'" in result.output
    for name, words in (("tiny/sft", "has no rewards"), ("tiny/rlhf", "is a pipeline")):
        result = CliRunner().invoke(app, ["reward", "test", name])
        assert result.exit_code == 2
        assert words in result.output


def test_a_runs_own_recipe_is_used() -> None:
    Path("run").mkdir()
    Path("recipe.yaml").rename("run/recipe.yaml")
    result = CliRunner().invoke(app, ["reward", "test", "run", "--rows", "1"])
    assert result.exit_code == 0, result.output
    assert "picky" in result.output
