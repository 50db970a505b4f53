"""The rewards that need no computer algebra, and the parsing that all of them share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import pytest
import reasoning_gym

from alignment.rewards.protocol import Item
from alignment.types import Completion, Outcome, Prompt, Score, StopReason, UserInputError
from reward_models.answers import (
    Extraction,
    Thinking,
    answer_tag,
    final_answer,
    has_boxed,
    last_boxed,
    split_thinking,
    thinking_opened,
)
from reward_models.exact import ExactReward, NumberReward
from reward_models.format import FormatReward, Style
from reward_models.length import Kind, LengthReward, OverlongReward, Unit
from reward_models.numbers import plain_number
from reward_models.reasoning_gym import ReasoningGymReward
from reward_models.reasoning_gym_worker import safe_eval, safe_parse_expr
from reward_models.regex import RegexReward
from reward_models.sentiment import SentimentReward
from reward_models.verifier import is_verifier, verifier


def make_item(text: str, prompt: str = "p", tokens: int = 3, **row: Any) -> Item:
    completion = Completion(5, 0, (1,) * tokens, (0.0,) * tokens, StopReason.STOP, 0, text)
    return Prompt((1,), prompt, 5, row), completion


def score(reward: Callable[[Sequence[Item]], Sequence[Score]], text: str, **more: Any) -> Score:
    return reward([make_item(text, **more)])[0]


# --- where the answer is -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("so \\boxed{5}.", "5"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed {7}", "7"),
        ("\\fbox{x}", "x"),
        ("first \\boxed{1}, and after a long while \\boxed{2}", "2"),
        ("\\boxed{3} or \\boxed{4}", "3, 4"),
        ("$\\boxed{3}$, $\\boxed{4}$ and $\\boxed{5}$", "3, 4, 5"),
        ("\\boxed{3}, \\boxed{3}", "3"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{1} then \\boxed{2", None),
        ("nothing", None),
    ],
)
def test_last_boxed(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed
    assert has_boxed(text) == (boxed is not None)


def test_a_flood_of_unclosed_boxes_takes_linear_time() -> None:
    assert last_boxed("\\boxed{" * 20_000) is None
    assert last_boxed("\\boxed{1}" + " " * 50_000 + "x\\boxed{2}") == "2"


@pytest.mark.parametrize(
    ("place", "text", "answer"),
    [
        ("answer_tag", "<answer>1</answer> <answer> 2 </answer>", "2"),
        ("answer_tag", "<answer>1", None),
        ("hash", "work\n#### 18\nmore", "18"),
        ("hash", "#### 1,000", "1,000"),
        ("answer_line", "The answer is 5. I hope it is correct.", "5"),
        ("answer_line", "Answer: 3.5", "3.5"),
        ("answer_line", "**Answer:** 7", "7"),
        ("answer_line", "the answer is 5, because 2 + 3 makes it", "5"),
        ("answer_line", "The answer is 3, or 4", "3, or 4"),
        ("answer_line", "no idea", None),
        ("last_number", "3 + 4 = 7.", "7"),
        ("last_number", "from 10 to -2.5 degrees", "-2.5"),
        ("last_number", "it is 1,234,567 in all", "1,234,567"),
        ("last_number", "either 3 or 4", "3 or 4"),
        ("last_number", "10-5", "5"),
        ("last_number", "about 50%", "50%"),
        ("last_number", "none", None),
        ("last_line", "a\n b \n\n", "b"),
        ("all", " x ", "x"),
    ],
)
def test_each_place_an_answer_can_be(place: Extraction, text: str, answer: str | None) -> None:
    assert final_answer(text, [place]) == answer


def test_places_are_tried_in_order_and_empty_ones_skipped() -> None:
    text = "\\boxed{ } <answer>2</answer> #### 3"
    assert final_answer(text, ["boxed", "answer_tag", "hash"]) == "2"
    assert final_answer(text, ["hash", "answer_tag"]) == "3"


def test_an_answer_inside_the_thinking_does_not_count() -> None:
    assert final_answer("<think>\\boxed{1}</think> none", ["boxed"]) is None
    assert final_answer("<think>\\boxed{1}</think> \\boxed{2}", ["boxed"]) == "2"
    assert final_answer("<think>\\boxed{1}", ["boxed"]) is None
    assert final_answer("\\boxed{1}", ["boxed"], thinking_opened=True) is None
    assert final_answer("hm </think> \\boxed{2}", ["boxed"], thinking_opened=True) == "2"
    assert thinking_opened("<|assistant|><think>\n")
    assert not thinking_opened("what is <think> for?")


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>a</think>b", False, Thinking("a", "b", True)),
        (" <think>a</think>b", False, Thinking("a", "b", True)),
        ("a</think>b", True, Thinking("a", "b", True)),
        ("a</think>b", False, Thinking("a", "b", False)),
        ("x<think>a</think>b", False, Thinking("a", "b", False)),
        ("<think>a<think>b</think>c", False, Thinking("a<think>b", "c", False)),
        ("<think>a</think>b</think>c", False, Thinking("a</think>b", "c", False)),
        ("<think>a", False, Thinking("a", None, False)),
        ("<think>a</think>b<think>c", False, Thinking("a</think>b<think>c", None, False)),
        ("plain", False, Thinking("", "plain", False)),
    ],
)
def test_split_thinking(text: str, opened: bool, expected: Thinking) -> None:
    assert split_thinking(text, opened=opened) == expected


def test_answer_tag_ignores_stray_tags() -> None:
    assert answer_tag("</answer><answer>x") is None


# --- plain numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", "5"),
        ("-5", "-5"),
        ("\u22125", "-5"),
        ("+5.0", "5"),
        (".5", "1/2"),
        ("1,234,567.5", "2469135/2"),
        ("1{,}000", "1000"),
        ("1\\,000", "1000"),
        ("$\\$5.00$", "5"),
        ("50%", "1/2"),
        ("50\\%", "1/2"),
        ("50 percent", "1/2"),
        ("\\frac{1}{2}", "1/2"),
        ("-\\dfrac12", "-1/2"),
        ("1\\frac{1}{2}", "3/2"),
        ("1 1/2", "3/2"),
        ("3 \\times 10^{-2}", "3/100"),
        ("1e-05", "1/100000"),
        ("5\\text{ cm}", "5"),
        ("5\\text{m}^2", "5"),
        ("5 apples", "5"),
        ("5cm", "5"),
        ("2.5 million dollars", "2500000"),
        ("90^\\circ", "90"),
        ("x = 5", "5"),
        ("3 + 4 = 7", "7"),
        ("\\left(5\\right)", "5"),
        ("\\mathbf{5}", "5"),
        ("\\text{5 cm}", "5"),
        ("**5**", "5"),
    ],
)
def test_plain_numbers_are_read_exactly(text: str, value: str) -> None:
    number = plain_number(text)
    assert number is not None
    assert number.value == Fraction(value)
    assert number.canonical


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "five", "3+4", "2^{10}", "5!", "--5", "3 x", "3xy", "3 or 4", "3 and 4"),
        *("3, 4", "1/0", "\\frac{1}{0}", "x > 5", "5 \\pi", "\\sqrt{4}", "2 dozen", "5 sin"),
        *("1,23", "\\sum_{k=1}^{10}k", "\\binom{5}{2}", "1e9999", "(1, 2)", "3 half", "9" * 300),
    ],
)
def test_anything_else_is_no_plain_number(text: str) -> None:
    assert plain_number(text) is None


@pytest.mark.parametrize("text", ["6/2", "2/4", "\\frac{6}{2}", "5/1", "1 4/2", "1 2/4"])
def test_fractions_out_of_lowest_terms_are_marked(text: str) -> None:
    number = plain_number(text)
    assert number is not None and not number.canonical


# --- number, exact -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "text", "outcome"),
    [
        (12, "7 + 5 = 12", Outcome.CORRECT),
        (12, "The answer is 12.", Outcome.CORRECT),
        (12, "\\boxed{12.0}", Outcome.CORRECT),
        ("12", "13", Outcome.WRONG),
        (12, "24/2", Outcome.WRONG),
        (12, "I do not know", Outcome.UNPARSEABLE),
        (12, "\\boxed{7+5}", Outcome.UNPARSEABLE),
        ("so it is\n#### 1,200", "1200", Outcome.CORRECT),
        (0.1, "0.10", Outcome.CORRECT),
        (True, "1", None),
        ("twelve", "12", None),
        ("", "12", None),
    ],
)
def test_number_reward(gold: Any, text: str, outcome: Outcome | None) -> None:
    if outcome is None:
        with pytest.raises(UserInputError, match=r"prompt 5.*'answer'"):
            score(NumberReward(), text, answer=gold)
        return
    given = score(NumberReward(), text, answer=gold)
    assert (given.outcome, given.value) == (outcome, float(outcome is Outcome.CORRECT))


def test_exact_reward() -> None:
    reward = ExactReward(ignore_case=True)
    assert score(reward, "hm\n New  York ", answer="new york").outcome is Outcome.CORRECT
    assert score(ExactReward(), "new york", answer="New York").outcome is Outcome.WRONG
    assert score(reward, "<think>", answer="x").outcome is Outcome.UNPARSEABLE
    with pytest.raises(UserInputError, match=r"'solution'.*columns: answer"):
        score(ExactReward(answer_column="solution"), "a", answer="x")


def test_verifier_marks() -> None:
    @verifier
    def own(completions: list[str]) -> list[float]:
        return [1.0]

    marked = [NumberReward(), ExactReward(), ReasoningGymReward(), own]
    assert all(is_verifier(reward) for reward in marked)
    assert not is_verifier(FormatReward())


# --- form, length, pattern, sentiment ------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "text", "prompt", "value"),
    [
        ("think", "<think>a</think>b", "p", 1.0),
        ("think", "a</think>b", "<think>", 1.0),
        ("think", "<think> </think>b", "p", 0.0),
        ("think", "<think>a</think> ", "p", 0.0),
        ("think", "<think>a<think>b</think>c", "p", 0.0),
        ("think", "<think>a", "p", 0.0),
        ("think", "b", "p", 0.0),
        ("think_answer", "<think>a</think> <answer>b</answer>", "p", 1.0),
        ("think_answer", "<think>a</think> so <answer>b</answer>", "p", 0.0),
        ("think_answer", "<think>a</think><answer>b</answer><answer>c</answer>", "p", 0.0),
        ("think_answer", "<answer>b</answer>", "p", 0.0),
        ("answer", "so <answer>b</answer>", "p", 1.0),
        ("answer", "<answer> </answer>", "p", 0.0),
        ("answer", "<think><answer>b</answer></think>", "p", 0.0),
        ("boxed", "is \\boxed{1}", "p", 1.0),
        ("boxed", "is \\boxed{1", "p", 0.0),
        ("boxed", "is \\boxed{}", "p", 0.0),
    ],
)
def test_format_reward(style: Style, text: str, prompt: str, value: float) -> None:
    given = score(FormatReward(style=style), text, prompt=prompt)
    assert (given.value, given.outcome) == (value, Outcome.SCORED)


@pytest.mark.parametrize(
    ("kind", "unit", "count", "value"),
    [
        ("at_most", "words", 3, 1.0),
        ("at_most", "words", 2, 0.0),
        ("at_least", "words", 3, 1.0),
        ("at_least", "tokens", 8, 0.0),
        ("target", "tokens", 14, 0.5),
        ("target", "characters", 11, 1.0),
    ],
)
def test_length_reward(kind: Kind, unit: Unit, count: int, value: float) -> None:
    reward = LengthReward(kind=kind, unit=unit, count=count)
    assert score(reward, "one two six", tokens=7).value == value
    assert score(reward, "  ").value == 0.0


def test_length_rewards_refuse_what_makes_no_sense() -> None:
    with pytest.raises(UserInputError, match="at least 1"):
        LengthReward(count=0)
    with pytest.raises(UserInputError, match="buffer"):
        OverlongReward(max_length=10, buffer=11)


def test_overlong_reward_counts_tokens() -> None:
    reward = OverlongReward(max_length=10, buffer=4)
    assert [score(reward, "x", tokens=n).value for n in (6, 7, 10, 12)] == [0.0, -0.25, -1.0, -1.0]


def test_regex_reward_and_a_pattern_that_explodes() -> None:
    reward = RegexReward(pattern=r"^(a+)+!$", timeout_seconds=0.5)
    scores = reward([make_item("aaa!"), make_item("a" * 64), make_item("b")])
    reward.close()
    assert [s.outcome for s in scores] == [Outcome.SCORED, Outcome.TIMEOUT, Outcome.SCORED]
    assert [s.value for s in scores] == [1.0, None, 0.0]


def test_regex_reward_options() -> None:
    reward = RegexReward(pattern="[A-Z]", negate=True)
    assert [s.value for s in reward([make_item("ab"), make_item("aB")])] == [1.0, 0.0]
    reward.close()
    whole = RegexReward(pattern="A.B", mode="fullmatch", ignore_case=True)
    assert [s.value for s in whole([make_item("a\nb"), make_item("a\nbc")])] == [1.0, 0.0]
    whole.close()
    with pytest.raises(UserInputError, match="not a regular expression"):
        RegexReward(pattern="(")


def test_sentiment_reward_has_the_published_value_and_sign() -> None:
    # The first example of VADER's own documentation.
    text = "VADER is smart, handsome, and funny."
    assert score(SentimentReward(), text).value == 0.8316
    assert score(SentimentReward(sign=-1.0), text).value == -0.8316
    assert score(SentimentReward(), "").value == 0.0


# --- reasoning-gym -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gym() -> Any:
    reward = ReasoningGymReward(workers=1, timeout_seconds=1.0)
    yield reward
    reward.close()


def gym_row(task: str, prefix: str = "", **options: Any) -> dict[str, Any]:
    entry = reasoning_gym.create_dataset(task, seed=1, size=1, **options)[0]
    return {f"{prefix}task": task, f"{prefix}entry": entry, f"{prefix}options": options}


def test_reasoning_gym_scores_with_the_tasks_own_checker(gym: ReasoningGymReward) -> None:
    row = gym_row("leg_counting", max_animals=3)
    right = row["entry"]["answer"]
    texts = (f"<answer>{right}</answer>", right, "<answer>-1</answer>", "<think>never ends")
    given = gym([make_item(text, **row) for text in texts])
    correct, wrong = Outcome.CORRECT, Outcome.WRONG
    assert [s.outcome for s in given] == [correct, correct, wrong, Outcome.UNPARSEABLE]
    assert [s.value for s in given] == [1.0, 1.0, 0.0, 0.0]


def test_reasoning_gym_accepts_another_right_answer(gym: ReasoningGymReward) -> None:
    row = gym_row("countdown", "reasoning_gym_")
    expression = row["reasoning_gym_entry"]["metadata"]["expression"]
    assert score(gym, f"<answer>({expression})</answer>", **row).outcome is Outcome.CORRECT
    assert score(gym, "<answer>1</answer>", **row).value == 0.05


def test_reasoning_gym_partial_credit_can_be_off() -> None:
    reward = ReasoningGymReward(workers=1, partial_credit=False)
    row = gym_row("countdown")
    assert score(reward, "<answer>1</answer>", **row) == Score(0.0, Outcome.WRONG, "countdown: '1'")
    reward.close()


def test_reasoning_gym_computation_without_end_costs_one_sample(gym: ReasoningGymReward) -> None:
    row = gym_row("countdown")
    texts = ("<answer>9**9**9**9</answer>", "<answer>1</answer>")
    given = gym([make_item(text, **row) for text in texts])
    assert [s.outcome for s in given] == [Outcome.TIMEOUT, Outcome.WRONG]


@pytest.mark.parametrize("task", ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens"])
def test_reasoning_gym_answers_are_not_evaluated(gym: ReasoningGymReward, task: str) -> None:
    # With Python's eval this would end the worker, and the outcome would be `crash`.
    attack = "<answer>__import__('os')._exit(3)</answer>"
    given = score(gym, attack, **gym_row(task))
    assert (given.outcome, given.value) == (Outcome.WRONG, 0.0)


def test_reasoning_gym_literals_still_count(gym: ReasoningGymReward) -> None:
    row = gym_row("string_insertion")
    answer = list(row["entry"]["answer"])
    assert score(gym, f"<answer>{answer}</answer>", **row).value == 0.1


@pytest.mark.parametrize(
    "text",
    [
        "open('x')",
        "().__class__",
        "[x for x in [1]]",
        "a",
        "(1).real",
        "[1][0]",
        "lambda: 1",
        "f'{1}'",
    ],
)
def test_safe_eval_refuses_everything_but_literals(text: str) -> None:
    with pytest.raises(ValueError, match="not allowed"):
        safe_eval(text)


def test_safe_eval_reads_literals_and_arithmetic() -> None:
    assert safe_eval(" [['a', 1], (2.5, -3), {'k': None}]") == [["a", 1], (2.5, -3), {"k": None}]
    assert safe_eval("(0x10 + 3) << 1") == 38


@pytest.mark.parametrize(
    "text",
    [
        *("exec(chr(1))", "open(x)", "x.real", "(1).real", "x . y", "'a'", "[1]", "x_1", "__a"),
        *("x{1}", "x;y", "x: 1", "x@y", "S('1')", "a\\b", "1. real"),
    ],
)
def test_safe_parse_expr_refuses_what_could_run(text: str) -> None:
    with pytest.raises(ValueError, match="may use numbers"):
        safe_parse_expr(text)


def test_safe_parse_expr_reads_expressions() -> None:
    assert str(safe_parse_expr("2*x + sqrt(16) - 3*pi")) == "2*x - 3*pi + 4"
    assert float(safe_parse_expr("1.5*2")) == 3.0


def test_reasoning_gym_refuses_other_rows(gym: ReasoningGymReward) -> None:
    with pytest.raises(UserInputError, match=r"prompt 5.*not a reasoning-gym entry.*answer"):
        score(gym, "x", answer="1")
    with pytest.raises(UserInputError, match=r"cannot be scored.*no_such_task"):
        score(gym, "x", task="no_such_task", entry={"answer": "1"}, options={})


# --- imports -------------------------------------------------------------------------------------


def test_no_reward_module_imports_what_is_heavy() -> None:
    modules = ["math", "exact", "format", "length", "regex", "sentiment", "reasoning_gym", "pool"]
    program = (
        "import sys, importlib, alignment.rewards.compose\n"
        f"for name in {modules!r}: importlib.import_module('reward_models.' + name)\n"
        "heavy = {'torch', 'transformers', 'sympy', 'math_verify', 'numpy', 'vaderSentiment'}\n"
        "print(sorted(heavy & set(sys.modules)), 'reasoning_gym' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.split("\n")[0] == "[] False", run.stderr
