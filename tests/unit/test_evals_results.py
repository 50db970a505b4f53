"""Records and their metrics, saving, tasks and comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from alignment.config.methods.base import DataForm
from alignment.types import (
    AlignmentError,
    Completion,
    Outcome,
    Prompt,
    RewardedCompletion,
    Sample,
    SamplingParams,
    Score,
    StopReason,
    UserInputError,
)
from evals.compare import Comparison, compare, render_text
from evals.report import comparison_html
from evals.results import EvalRecord, EvalResult
from evals.summary import summarize_graded
from evals.tasks import TokenScores, held_out_loss, verifiable


def record(
    problem: int | str,
    sample: int,
    outcome: Outcome,
    reward: float | None = None,
    *,
    stop: StopReason | None = StopReason.STOP,
    tokens: int = 5,
) -> EvalRecord:
    text = "\u2028 é \ud800 \x00 </script>"
    return EvalRecord(problem, sample, outcome, reward, f"p{problem}", text, tokens, stop)


C, W, U = Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSEABLE
TIMEOUT, CRASH, SCORED = Outcome.TIMEOUT, Outcome.CRASH, Outcome.SCORED


def result_of(rows: Sequence[Sequence[Outcome]]) -> EvalResult:
    records = tuple(
        record(problem, sample, outcome, None if outcome.is_failure else float(outcome is C))
        for problem, row in enumerate(rows)
        for sample, outcome in enumerate(row)
    )
    metrics, intervals = summarize_graded(records)
    return EvalResult("verifiable", records, metrics, intervals)


def test_metrics_by_hand_and_i47_failed_graders_are_not_wrong() -> None:
    records = (
        record(0, 0, C, 1.0),
        record(0, 1, W, 0.0, stop=StopReason.LENGTH, tokens=11),
        record(1, 0, C, 1.0),
        record(1, 1, TIMEOUT),
        record(2, 0, U, -0.5),
        record(2, 1, CRASH),
    )
    metrics, intervals = summarize_graded(records, ks=(1, 2))
    assert metrics["accuracy"] == pytest.approx((0.5 + 1.0 + 0.0) / 3, abs=1e-12)
    assert metrics["pass@1"] == pytest.approx(metrics["accuracy"], abs=1e-12)
    assert metrics["pass@2"] == 1.0  # problem 0 alone has two graded samples
    assert metrics["reward"] == pytest.approx((0.5 + 1.0 - 0.5) / 3, abs=1e-12)
    assert metrics["cut_off"] == pytest.approx(1 / 6, abs=1e-12)
    assert metrics["length"] == pytest.approx((8 + 5 + 5) / 3, abs=1e-12)
    assert (metrics["unscorable/timeout"], metrics["unscorable/crash"]) == (1.0, 1.0)
    assert metrics["outcome/correct"] == pytest.approx(1 / 3, abs=1e-12)
    assert (metrics["problems"], metrics["samples"]) == (3.0, 6.0)
    assert intervals["accuracy"][0] < metrics["accuracy"] < intervals["accuracy"][1]
    graded = [one for one in records if not one.outcome.is_failure]
    assert summarize_graded(graded)[0]["accuracy"] == metrics["accuracy"]


def test_scored_outcomes_have_a_reward_and_no_accuracy() -> None:
    metrics, _ = summarize_graded([record(0, 0, SCORED, 0.2), record(1, 0, SCORED, 0.4)])
    assert "accuracy" not in metrics
    assert metrics["reward"] == pytest.approx(0.3, abs=1e-12)


def test_everything_unscorable_leaves_no_accuracy() -> None:
    metrics, intervals = summarize_graded([record(0, 0, CRASH), record(1, 0, CRASH)])
    assert "accuracy" not in metrics and "reward" not in metrics
    assert metrics["unscorable/crash"] == 2.0
    assert all(map(math.isfinite, metrics.values())) and "accuracy" not in intervals


def test_a_reward_that_is_not_finite_is_refused() -> None:
    with pytest.raises(AlignmentError, match="problem 3, sample 1"):
        record(3, 1, C, math.nan)


def test_saved_result_loads_back_equal(tmp_path: Path) -> None:
    result = result_of([[C, W], [TIMEOUT, C]])
    path = tmp_path / "evals" / "model-1.5b"
    result.save(path)
    result.save(path.with_name("model-1.5b.json"))
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "model-1.5b.json",
        "model-1.5b.jsonl",
    ]
    loaded = EvalResult.load(path)
    assert loaded == result
    assert EvalResult.load(path.with_name("model-1.5b.jsonl")) == result
    strings = replace(result, records=(record("a/1", 0, C, 1.0),))
    strings.save(tmp_path / "strings")
    assert EvalResult.load(tmp_path / "strings").records[0].problem_id == "a/1"


def test_torn_or_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "task"
    result_of([[C]]).save(path)
    lines = (tmp_path / "task.jsonl").read_bytes()
    (tmp_path / "task.jsonl").write_bytes(lines[:-5])
    with pytest.raises(UserInputError, match="do not match their summary"):
        EvalResult.load(path)
    (tmp_path / "task.json").write_text("[]")
    with pytest.raises(UserInputError, match="not a readable evaluation"):
        EvalResult.load(path)
    with pytest.raises(UserInputError, match="not a readable evaluation"):
        EvalResult.load(tmp_path / "missing")


class FakeEngine:
    """Echoes what it was asked; prompt-major order as the contract says."""

    def __init__(self, *, shuffled: bool = False) -> None:
        self.params: SamplingParams | None = None
        self.shuffled = shuffled

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        self.params = params
        completions = [
            Completion(p.index, i, (7, 2), (-0.5, -0.1), StopReason.STOP, 3, f"{p.index}:{i}")
            for p in prompts
            for i in range(params.n)
        ]
        return completions[::-1] if self.shuffled else completions

    def weights_updated(self, policy_version: int) -> None:
        raise AssertionError("an evaluation does not change weights")


@dataclass(frozen=True)
class Scores:
    logprobs: Sequence[Sequence[float]]
    greedy_correct: Sequence[Sequence[bool]]


def grade(pairs: Sequence[tuple[Prompt, Completion]]) -> list[RewardedCompletion]:
    """Even sample indices are correct."""
    outcomes = [C if completion.sample_index % 2 == 0 else W for _, completion in pairs]
    return [
        RewardedCompletion(prompt, completion, float(o is C), o, {"math": Score(float(o is C), o)})
        for (prompt, completion), o in zip(pairs, outcomes, strict=True)
    ]


def no_scores(samples: Sequence[Sample]) -> TokenScores:
    raise AssertionError("this task scores nothing")


SAMPLING = SamplingParams(64, n=2, temperature=0.7, seed=99, step=1234)


@dataclass(frozen=True)
class Context:
    engine: FakeEngine = field(default_factory=FakeEngine)
    prompts: Sequence[Prompt] = tuple(Prompt((1,), f"q{i}", 10 + i, {}) for i in range(3))
    samples: Sequence[Sample] = ()
    grade: Callable[[Sequence[tuple[Prompt, Completion]]], list[RewardedCompletion]] = grade
    sampling: SamplingParams = SAMPLING
    seed: int = 5
    score: Callable[[Sequence[Sample]], TokenScores] = no_scores
    why_not: Mapping[DataForm, str] = field(default_factory=dict)


def test_verifiable_samples_with_the_evaluations_own_counters() -> None:
    context = Context()
    result = verifiable(samples=4, ks=[1, 2], prompts=2).run(context)
    assert context.engine.params == SamplingParams(64, n=4, temperature=0.7, seed=5, step=0)
    assert result.metrics["accuracy"] == pytest.approx(0.5, abs=1e-12)
    assert result.metrics["pass@2"] == pytest.approx(1 - 1 / 6, abs=1e-12)
    assert [r.problem_id for r in result.records] == [10] * 4 + [11] * 4
    overridden = Context()
    verifiable(samples=1, temperature=0.0, max_new_tokens=7).run(overridden)
    assert overridden.engine.params == SamplingParams(7, n=1, temperature=0.0, seed=5, step=0)


def test_verifiable_refuses_an_engine_out_of_order_and_missing_prompts() -> None:
    with pytest.raises(AlignmentError, match="prompt-major"):
        verifiable(samples=2).run(Context(engine=FakeEngine(shuffled=True)))
    with pytest.raises(UserInputError, match="no held-out prompts"):
        verifiable().run(Context(prompts=()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: verifiable(samples=0), "samples is 0"),
        (lambda: verifiable(samples=4, ks=[8]), "pass@8"),
        (lambda: verifiable(temperature=0.0), "temperature 0"),
        (lambda: verifiable(temperature=-1.0), "temperature is -1"),
        (lambda: verifiable(prompts=0), "prompts is 0"),
        (lambda: held_out_loss(samples=0), "samples is 0"),
    ],
)
def test_contradicting_options_are_named(make: Callable[[], object], words: str) -> None:
    with pytest.raises(UserInputError, match=words):
        make()


def test_held_out_loss_is_the_global_token_mean() -> None:
    samples = (
        Sample((1,), (5, 6, 2), (True, True, True)),
        Sample((1,), (5, 2), (False, True)),
        Sample((1,), (5,), (False,)),  # nothing to predict: in no record
    )
    scores = Scores(
        [[-1.0, -2.0, -3.0], [math.nan, -4.0], [math.nan]],
        [[True, False, True], [True, False], [True]],
    )
    result = held_out_loss().run(Context(samples=samples, score=lambda given: scores))
    assert result.metrics["loss"] == pytest.approx(10 / 4, abs=1e-12)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(2.5), abs=1e-9)
    assert result.metrics["token_accuracy"] == pytest.approx(2 / 4, abs=1e-12)
    assert result.metrics["tokens"] == 4.0
    assert [(r.reward, r.n_tokens) for r in result.records] == [(-2.0, 3), (-4.0, 1)]
    with pytest.raises(UserInputError, match="no held-out samples"):
        held_out_loss().run(Context(samples=samples[2:]))


def test_losses_compare_by_token_weight() -> None:
    sample = Sample((1,), (5, 6, 2), (True, True, True))
    short = Sample((1,), (2,), (True,))

    def losses(a: float, b: float) -> EvalResult:
        scores = Scores([[-a] * 3, [-b]], [[True] * 3, [True]])
        return held_out_loss().run(Context(samples=(sample, short), score=lambda given: scores))

    comparison = compare({"base": losses(2.0, 4.0), "sft": losses(1.0, 4.0)})
    assert comparison.metric == "loss"
    assert comparison.changes[0].difference == pytest.approx(-3 / 4, abs=1e-12)
    values = [model.value for model in comparison.models]
    assert comparison.changes[0].difference == pytest.approx(values[1] - values[0], abs=1e-12)


def test_comparison_by_hand() -> None:
    base = result_of([[W], [W], [W], [W], [C], [W]])
    sft = result_of([[C], [C], [W], [W], [C], [W]])
    rl = result_of([[C], [C], [C], [C], [C], [W]])
    comparison = compare({"base": base, "sft": sft, "rl": rl})
    assert [(c.first, c.second) for c in comparison.changes] == [
        ("base", "sft"),
        ("sft", "rl"),
        ("base", "rl"),
    ]
    # One sided 2^-2, 2^-2 and 2^-4, doubled; Holm: 3 * 0.125, then 0.5 * 2, then the maximum.
    assert [c.p_value for c in comparison.changes] == pytest.approx([0.5, 0.5, 0.125], abs=1e-12)
    assert [c.p_holm for c in comparison.changes] == pytest.approx([1.0, 1.0, 0.375], abs=1e-12)
    assert [m.value for m in comparison.models] == pytest.approx([1 / 6, 3 / 6, 5 / 6], abs=1e-12)
    assert comparison.changes[2].difference == pytest.approx(4 / 6, abs=1e-12)


def test_a_model_compared_with_itself_shows_no_difference() -> None:
    result = result_of([[C, W], [W, W], [C, C]])
    change = compare({"a": result, "b": result}).changes[0]
    assert (change.difference, change.low, change.high, change.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_unscorable_problems_leave_the_pairs_and_are_noted() -> None:
    first = result_of([[TIMEOUT], [C], [W]])
    second = result_of([[C], [C], [C]])
    comparison = compare({"first": first, "second": second})
    assert comparison.changes[0].problems == 2
    assert comparison.models[0].unscorable == 1
    assert any("grader failed on 33%" in note for note in comparison.notes)


def test_other_problems_under_the_same_id_are_noted() -> None:
    first = result_of([[C], [W]])
    other = replace(
        first, records=tuple(replace(one, prompt_text="another") for one in first.records)
    )
    assert any("another prompt text" in note for note in compare({"a": first, "b": other}).notes)
    longer = result_of([[C], [W], [C]])
    assert any("1 problems belong" in note for note in compare({"a": first, "b": longer}).notes)


def test_what_cannot_be_compared_is_named() -> None:
    graded, scored = result_of([[C]]), result_of([[SCORED]])
    with pytest.raises(UserInputError, match="nothing to compare"):
        compare({})
    with pytest.raises(UserInputError, match="different tasks"):
        compare({"a": graded, "b": replace(graded, task="other")})
    no_reward = replace(graded, metrics={"accuracy": 1.0})
    no_accuracy = replace(scored, metrics={"reward": 0.0})
    with pytest.raises(UserInputError, match="in common"):
        compare({"a": no_reward, "b": no_accuracy})
    elsewhere = replace(graded, records=(replace(graded.records[0], problem_id=77),))
    with pytest.raises(UserInputError, match="no scored problem in common"):
        compare({"a": graded, "b": elsewhere})


def test_comparison_tables_and_file(tmp_path: Path) -> None:
    comparison = compare({"<base>": result_of([[C], [W]]), "rl": result_of([[C], [C]])})
    path = tmp_path / "comparison.json"
    comparison.save(path)
    assert Comparison.load(path) == comparison
    assert json.loads(path.read_text())["metric"] == "accuracy"
    lines = render_text(comparison).splitlines()
    assert lines[0] == "verifiable: accuracy, 95% intervals"
    assert lines[2].split()[:2] == ["<base>", "0.500"]
    assert lines[1].index("accuracy") + len("accuracy") == lines[2].index("0.500") + len("0.500")
    assert "<base> -> rl" in render_text(comparison)
    page = comparison_html(comparison)
    assert "&lt;base&gt;" in page and "<base>" not in page
    path.write_text("{}")
    with pytest.raises(UserInputError, match="not a readable comparison"):
        Comparison.load(path)
