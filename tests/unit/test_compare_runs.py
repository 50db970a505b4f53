"""`align compare`: two runs' evaluations, paired by hand, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from alignment.cli import app
from alignment.types import Outcome, StopReason
from evals.results import EvalRecord, EvalResult


def records(
    solved: Sequence[bool], prompts: Sequence[str], stop: StopReason | None, n_tokens: int = 3
) -> tuple[EvalRecord, ...]:
    return tuple(
        EvalRecord(
            problem_id=number,
            sample_index=0,
            outcome=Outcome.CORRECT if right else Outcome.WRONG,
            reward=float(right),
            prompt_text=prompt,
            completion_text="",
            n_tokens=n_tokens,
            stop_reason=stop,
        )
        for number, (right, prompt) in enumerate(zip(solved, prompts, strict=True))
    )


def evaluated(
    run: Path,
    solved: Sequence[bool],
    *,
    name: str = "verifiable",
    step: int = 4,
    prompts: Sequence[str] | None = None,
    stop: StopReason | None = StopReason.STOP,
    n_tokens: int = 3,
) -> Path:
    """A run folder with one evaluation in it."""
    run.mkdir(exist_ok=True)
    (run / "recipe.yaml").write_text("run: {name: x}\n")
    rows = records(solved, prompts or [f"q{i}" for i in range(len(solved))], stop, n_tokens)
    metrics = {"accuracy": sum(solved) / len(solved)}
    EvalResult("verifiable", rows, metrics).save(run / "evals" / f"{name}-step-{step:06d}")
    return run


def compare(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_difference_is_that_of_the_pairs() -> None:
    # Of six problems the second run gains four and loses one. Under coin flips of the five that
    # changed, |sum| >= 3 has probability (C(5,4) + C(5,5)) * 2 / 32 = 12 / 32.
    before, after = Path("before"), Path("after")
    evaluated(before, [True, False, False, False, False, True], step=9)
    evaluated(before, [False] * 6, step=2)  # an earlier one does not count
    evaluated(after, [False, True, True, True, True, True])
    result = compare(before, after)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[2].split()[:4] == ["before,", "step", "9", "0.333"]
    change = lines[-1].split()
    assert change[:8] == ["before,", "step", "9", "->", "after,", "step", "4", "+0.500"]
    assert float(change[8]) < 0.5 < float(change[10])
    assert change[11] == "0.375"


def test_every_task_in_both_is_compared_unless_some_are_named() -> None:
    one, other = Path("one"), Path("other")
    for run in (one, other):
        evaluated(run, [True, False], name="easy")
        evaluated(run, [False, False], name="hard")
    evaluated(one, [True], name="alone")
    output = compare(one, other).output
    assert [line.split(":")[0] for line in output.splitlines() if "intervals" in line] == [
        "easy",
        "hard",
    ]
    assert "easy" not in compare(one, other, "--task", "hard").output
    refused = compare(one, other, "--task", "alone")
    assert refused.exit_code == 2
    assert "no evaluation 'alone' in both runs" in refused.output
    assert "one has alone, easy, hard; other has easy, hard" in refused.output


def test_a_run_compares_with_itself() -> None:
    run = evaluated(Path("run"), [True, False, True])
    result = compare(run, run)
    assert result.exit_code == 0, result.output
    assert "+0.000" in result.output and "1.000" in result.output


def test_other_problems_are_refused_with_the_reason() -> None:
    run = evaluated(Path("run"), [True, False])
    result = compare(run, evaluated(Path("more"), [True, False, True]))
    assert result.exit_code == 2
    assert "different problems" in result.output
    assert "1 problems are in one of them only (2 and 3 in all)" in result.output
    result = compare(run, evaluated(Path("else"), [True, False], prompts=["q0", "other"]))
    assert result.exit_code == 2
    assert "1 of 2 problems read otherwise" in result.output


def test_texts_that_were_scored_are_told_apart_by_their_lengths() -> None:
    nothing = ["", ""]
    run = evaluated(Path("run"), [True, False], prompts=nothing, stop=None)
    same = evaluated(Path("same"), [False, True], prompts=nothing, stop=None)
    other = evaluated(Path("other"), [False, True], prompts=nothing, stop=None, n_tokens=4)
    assert compare(run, same).exit_code == 0
    assert "2 of 2 problems read otherwise" in compare(run, other).output
    # What was sampled may be of any length.
    longer = [evaluated(Path(f"n{n}"), [True, False], n_tokens=n) for n in (3, 7)]
    assert compare(*longer).exit_code == 0


def test_runs_without_evaluations_or_that_are_none_are_refused() -> None:
    run = evaluated(Path("run"), [True])
    empty = Path("empty")
    empty.mkdir()
    assert "is not a run directory" in compare(run, empty).output
    (empty / "recipe.yaml").write_text("run: {name: x}\n")
    result = compare(run, empty)
    assert result.exit_code == 2
    assert "run has verifiable; empty has none" in result.output
    assert "eval.tasks" in result.output


def test_an_earlier_evaluation_does_not_stand_in_for_a_damaged_one() -> None:
    whole = evaluated(Path("whole"), [True, False])
    run = evaluated(Path("run"), [True, False], step=2)
    evaluated(run, [True, True], step=4)
    (run / "metrics.jsonl").write_text("no JSON\n{}\n")  # nothing that is compared
    assert compare(whole, run).exit_code == 0
    last = run / "evals" / "verifiable-step-000004.json"
    last.write_text(last.read_text()[:20])
    for pair in ((whole, run), (run, whole)):
        result = compare(*pair)
        assert result.exit_code == 2
        assert "run/evals cannot be read: verifiable-step-000004.json: " in result.output


def test_a_pipeline_is_named_by_its_stages() -> None:
    stage = evaluated(Path("stage"), [True])
    pipeline = Path("both")
    pipeline.mkdir()
    (pipeline / "recipe.yaml").write_text("run: {name: both}\nstages: [{name: one}]\n")
    for _ in range(2):
        result = compare(stage, pipeline)
        assert result.exit_code == 2
        assert "both is a pipeline; name a stage: both/stages/NAME" in result.output
        (pipeline / "recipe.yaml").unlink(missing_ok=True)
        (pipeline / "stages" / "one").mkdir(parents=True, exist_ok=True)
    evaluated(pipeline / "stages" / "one", [True])
    assert compare(stage, pipeline / "stages" / "one").exit_code == 0
