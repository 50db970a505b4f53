"""The report of a synthetic run directory, written by the project's own writers."""

from __future__ import annotations

import json
import math
import re
import tomllib
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment import registry
from alignment.runs.directory import RunDirectory
from alignment.runs.events import EventLog
from alignment.runs.metrics import MetricsWriter
from alignment.runs.samples import SampleRecorder, read_rollout
from alignment.types import (
    Completion,
    Outcome,
    Prompt,
    RewardedCompletion,
    Rollout,
    Score,
    StopReason,
    UserInputError,
)
from evals.browser import choose, printable, rollout_groups
from evals.charts import run_charts
from evals.compare import compare
from evals.frontier_charts import frontier_report
from evals.preference_task import preference
from evals.process_task import process
from evals.report import html_report
from evals.results import EvalRecord, EvalResult
from evals.reward_kl_task import reward_kl
from evals.rundata import read_run
from evals.summary import summarize_graded
from evals.svg import Series, line_chart, tick_labels, ticks
from evals.tasks import held_out_loss, verifiable

ATTACK = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\u202e{{ 7*7 }}"
RECIPE = """\
run: {name: arithmetic, seed: 0}
model: {path: smollm2-135m-instruct, dtype: bfloat16, lora: {rank: 16}, reference: adapter_off}
data: {source: arithmetic, operands: 2, maximum: 20}
algorithm: {type: grpo, group_size: 8, prompts_per_step: 8, kl: {coef: 0.02, estimator: k3}}
rewards:
- {type: math, weight: 1.0}
- {type: length, weight: 0.1}
expect: ["reward/mean[-5:] > reward/mean[:5] + 0.2", "kl/mean[-1] < 0.05"]
"""


def _rollout(step: int, rate: float, rng: np.random.Generator) -> Rollout:
    items = []
    for problem in range(8):
        a, b = (int(n) for n in rng.integers(1, 21, 2))
        prompt = Prompt((1, 5), f"<|im_start|>user\nWhat is {a} + {b}?<|im_end|>\n", problem, {})
        for sample in range(4):
            draw = float(rng.random())
            outcome = Outcome.CORRECT if draw < rate else Outcome.WRONG
            outcome = Outcome.TIMEOUT if draw > 0.97 else outcome
            answer = a + b + (outcome is not Outcome.CORRECT)
            value = None if outcome.is_failure else float(outcome is Outcome.CORRECT)
            completion = Completion(
                problem, sample, (4, 2), (-0.1, -0.2), StopReason.STOP, 0, f"The sum is {answer}."
            )
            parts = {"math": Score(value, outcome, f"expected {a + b}"), "length": Score(0.3)}
            reward = None if value is None else value + 0.03
            items.append(RewardedCompletion(prompt, completion, reward, outcome, parts))
    return Rollout(tuple(items), group_size=4, step=step)


def _result(rate: float, rng: np.random.Generator, text: str = "The sum is 7.") -> EvalResult:
    difficulty = np.linspace(-0.35, 0.35, 40)
    correct = rng.random((40, 8)) < rate + difficulty[:, None]
    records = tuple(
        EvalRecord(
            problem,
            sample,
            Outcome.CORRECT if correct[problem, sample] else Outcome.WRONG,
            float(correct[problem, sample]),
            f"What is {problem} + 3?",
            text,
            int(rng.integers(5, 40)),
            StopReason.STOP if rng.random() < 0.8 else StopReason.LENGTH,
        )
        for problem in range(40)
        for sample in range(8)
    )
    metrics, intervals = summarize_graded(records, (1, 4, 8))
    return EvalResult("verifiable", records, metrics, intervals)


def make_run(root: Path, name: str = "arithmetic", *, steps: int = 60, text: str = "7") -> Path:
    """A GRPO run of `steps` steps with evaluations, rollouts and events."""
    rng = np.random.default_rng(0)
    info = {
        "time": "2026-01-02T03:04:05.000+00:00",
        "command": ["align", "train", "recipes/smollm2/arithmetic.yaml"],
        "seed": 0,
        "model_hash": "3f" * 32,
        "versions": {"alignment": "0.1.0", "python": "3.12.1", "torch": "2.13.0"},
        "git": {"commit": "0" * 40, "dirty": False},
    }
    run = RunDirectory.create(root, name, recipe_yaml=RECIPE, info=info)
    events, metrics = EventLog(run.events), MetricsWriter(run.metrics)
    recorder = SampleRecorder(run.rollouts_dir)
    events.write("start", "training starts")
    for step in range(1, steps + 1):
        progress = 1 / (1 + math.exp(-(step - steps / 2) / (steps / 8)))
        reward = 0.15 + 0.55 * progress + 0.04 * float(rng.normal())
        metrics.write(
            step,
            {
                "reward/mean": reward,
                "reward/std_in_group": math.sqrt(max(reward * (1 - reward), 0.01)),
                "reward/math": reward - 0.03,
                "reward/length": 0.3,
                "outcome/correct": min(max(reward, 0), 1),
                "outcome/wrong": min(max(0.95 - reward, 0), 1),
                "outcome/timeout": 0.05,
                "loss": 0.02 * float(rng.normal()),
                "kl/mean": 0.08 * progress + 0.004 * float(rng.random()),
                "completion/length": 30 - 14 * progress + float(rng.normal()),
                "policy/entropy": 1.1 - 0.6 * progress,
                "optim/grad_norm": float(rng.gamma(4, 0.1)) if step != 7 else math.nan,
                "optim/lr": 1e-4 * (1 - step / steps),
                "time/step_seconds": 2 + float(rng.random()),
                "policy/clip_fraction/low": 0.01 * float(rng.random()),
                "policy/clip_fraction/high": 0.02 * float(rng.random()),
            },
        )
        if step in (1, steps // 2, steps):
            recorder.write(_rollout(step, min(reward, 0.9), rng))
        if step % 20 == 0:
            events.write("checkpoint", f"checkpoint of step {step}", step=step)
    for step in range(0, steps + 1, max(1, steps // 4)):
        path = run.evals_dir / f"verifiable-step-{step:06d}"
        _result(0.38 + 0.4 * step / steps, rng, text).save(path)
    events.write("diagnosis", "the grader timed out on 5% of the samples; raise its limit", step=40)
    events.write("end", "training ended")
    events.close()
    metrics.close()
    return run.path


def make_pipeline(root: Path) -> Path:
    """A pipeline of two stages with a comparison of three models."""
    path = root / "pipeline"
    make_run(path / "stages", "sft", steps=30)
    make_run(path / "stages", "rlvr", steps=60)
    (path / "recipe.yaml").write_text("stages: [{name: sft}, {name: rlvr}]\n")
    rng = np.random.default_rng(1)
    results = {"base": _result(0.36, rng), "sft": _result(0.45, rng), "rlvr": _result(0.63, rng)}
    for name, result in results.items():
        result.save(path / "evals" / name)
    compare(results).save(path / "comparison.json")
    return path


class _Page(HTMLParser):
    """Collects what a page holds, and checks that its elements are closed in order."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.seen if tag == name]


def _page(path: Path) -> _Page:
    return _Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"), text=ATTACK)


@pytest.fixture(scope="module")
def report(run_dir: Path) -> Path:
    return html_report(run_dir)


def test_report_is_one_file_that_loads_nothing(report: Path) -> None:
    page = _page(report)
    policies = [m["content"] for m in page.tags("meta") if m.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert {tag for tag, _ in page.seen}.isdisjoint({"script", "link", "iframe", "img", "object"})
    attributes = [pair for _, found in page.seen for pair in found.items()]
    assert not [name for name, _ in attributes if name.startswith("on") or name in ("src", "href")]
    assert "url(" not in report.read_text() and "@import" not in report.read_text()
    assert report.stat().st_size < 300_000


def test_completions_cannot_act_as_markup_or_reorder_text(report: Path) -> None:
    page = _page(report)
    assert "<script>alert(1)</script>" in page.text  # as text
    assert "\u202e" not in report.read_text() and "[U+202E]" in page.text
    assert "{{ 7*7 }}" in page.text  # and not evaluated as a template


def test_every_text_of_a_run_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "hostile"
    path.mkdir()
    (path / "run.json").write_text(json.dumps({"command": [ATTACK], "versions": {ATTACK: ATTACK}}))
    (path / "recipe.yaml").write_text(json.dumps({"model": {"path": ATTACK}, "expect": [ATTACK]}))
    (path / "metrics.jsonl").write_text(json.dumps({"step": 1, ATTACK: 2, "reward/mean": 0.5}))
    (path / "events.jsonl").write_text(json.dumps({"kind": ATTACK, "message": ATTACK}) + "\n")
    page = _page(html_report(path))
    assert not page.tags("script") and not page.tags("img")
    assert page.text.count("alert(1)") >= 7


def test_report_shows_what_was_run_and_found(report: Path) -> None:
    text = " ".join(_page(report).text.split())
    for part in (
        "grpo · smollm2-135m-instruct · 60 steps · finished",
        "align train recipes/smollm2/arithmetic.yaml",
        "torch 2.13.0",
        "reward/mean[-5:] > reward/mean[:5] + 0.2 met",
        "kl/mean[-1] < 0.05 not met",
        "the grader timed out on 5% of the samples",
        "verifiable: accuracy with 95% intervals",
        "step 0 -> step 60",
        "No finite gradient norm at step 7.",
        "Training step 30",
        "Unscorable · timeout · no reward",
        "math : 1 correct (expected",
    ):
        assert part in text, part


def test_figures_have_titles_axes_and_tables(report: Path) -> None:
    source = report.read_text()
    figures = re.findall(r"<figure>.*?</figure>", source, re.DOTALL)
    assert len(figures) >= 12
    for figure in figures:
        svg = re.search(r"<svg.*?</svg>", figure, re.DOTALL)
        assert svg is not None
        element = ElementTree.fromstring(svg.group())
        assert element.get("aria-label")
        labels = [text.text for text in element.iter("text")]
        assert "training step" in labels and len(labels) >= 6
        numbers = re.findall(r"[-\d.]+", " ".join(e.get("d", "") for e in element.iter("path")))
        assert all(math.isfinite(float(number)) for number in numbers if number != "-")
        assert "<figcaption>" in figure and "<table>" in figure


def test_pipeline_report_compares_models_and_holds_its_stages(tmp_path: Path) -> None:
    text = " ".join(_page(html_report(make_pipeline(tmp_path))).text.split())
    assert "pipeline · 2 stages · finished" in text
    for part in ("base -> sft", "sft -> rlvr", "base -> rlvr", "Stage 1: sft", "Stage 2: rlvr"):
        assert part in text, part
    assert text.index("verifiable, base") < text.index("verifiable, sft")


def test_a_run_that_is_still_going_has_a_report(tmp_path: Path) -> None:
    path = make_run(tmp_path, steps=6)
    events = (path / "events.jsonl").read_text().splitlines()
    (path / "events.jsonl").write_text("\n".join(events[:-1]) + "\n")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "reward/me')
    assert [row["step"] for row in read_run(path).metrics] == [1, 2, 3, 4, 5, 6]
    text = _page(html_report(path)).text
    assert "not finished, or still going" in text and "not checked yet" in text
    assert "Could not be read" not in text


@pytest.mark.parametrize("missing", ["evals", "rollouts", "metrics.jsonl", "events.jsonl", "all"])
def test_parts_may_be_missing(tmp_path: Path, missing: str) -> None:
    path = make_run(tmp_path, steps=4)
    for entry in list(path.iterdir()):
        if entry.name == missing or (missing == "all" and entry.name != "run.json"):
            entry.rename(tmp_path / f"gone-{entry.name}")
    assert "Could not be read" not in _page(html_report(path)).text


def test_damaged_files_are_listed_and_the_rest_is_shown(tmp_path: Path) -> None:
    path = make_run(tmp_path, steps=4)
    (path / "run.json").write_text("[1")
    (path / "recipe.yaml").write_text("a: [")
    (path / "rollouts/step-000004.parquet").write_bytes(b"PAR1 not really")
    (path / "evals/verifiable-step-000004.jsonl").write_text("torn")
    lines = (path / "metrics.jsonl").read_text().splitlines()
    (path / "metrics.jsonl").write_text("\n".join([lines[0], "%%", *lines[1:]]) + "\n")
    text = _page(html_report(path)).text
    listed = text[text.index("Could not be read") :]
    for name in ("run.json", "recipe.yaml", "step-000004.parquet", "verifiable-step-000004"):
        assert name in listed, name
    assert "line 2 is not JSON" in listed
    assert "Training step 2" in text


def test_what_dynamic_sampling_dropped_is_not_among_the_samples(tmp_path: Path) -> None:
    path = make_run(tmp_path, steps=4)
    recorder = SampleRecorder(path / "rollouts")
    whole = read_rollout(path / "rollouts/step-000004.parquet")
    half = len(whole.items) // 2
    recorder.write(replace(whole, items=whole.items[:half], dropped=whole.items[half:]))
    groups = {group.title: group for group in rollout_groups(read_run(path))}
    assert groups["Training step 1"].total == len(whole.items)
    assert groups["Training step 4"].total == half
    recorder.write(replace(whole, items=(), dropped=whole.items))
    assert "Training step 4" not in {group.title for group in rollout_groups(read_run(path))}


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="not a run directory"):
        html_report(tmp_path)
    with pytest.raises(UserInputError, match="not a run directory"):
        html_report(tmp_path / "missing")


def test_long_runs_are_averaged_and_say_so(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.mkdir()
    rows = [{"step": step, "loss": float(step)} for step in range(1, 1001)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (loss,) = run_charts(read_run(path)).main
    assert loss.caption == "Each point is the mean of 4 steps."
    assert loss.rows[0] == ("2.5", "2.5")  # the mean of 1, 2, 3, 4 at the mean of their steps


def test_prefixed_metrics_find_their_chart_and_others_get_their_own(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    row = {"step": 1, "policy/entropy": 1.0, "reward/math": 0.5, "mine/x": 3, "eval/t/accuracy": 1}
    (path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    charts = run_charts(read_run(path))
    assert [one.title for one in charts.main] == ["Reward parts", "Entropy of the policy"]
    assert [one.title for one in charts.other] == ["mine/x"]


def test_chosen_samples_are_the_best_the_worst_and_the_unscorable() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt_index": p, "sample_index": s, "reward": r, "outcome": o}
        for p, s, r, o in (
            (0, 0, 1.0, "wrong"),
            (0, 1, 1.0, "correct"),
            (1, 0, 0.9, "correct"),
            (1, 1, 0.5, "wrong"),
            (2, 0, 0.2, "wrong"),
            (2, 1, -1.0, "wrong"),
            (2, 2, None, "crash"),
            (2, 3, math.nan, "correct"),
        )
    ]
    shown = [(one.why, one.problem, one.sample_index) for one in choose(rows)]
    assert shown == [
        ("best", "0", "1"),
        ("best", "1", "0"),
        ("worst", "1", "1"),
        ("worst", "2", "1"),
        ("unscorable", "2", "2"),
        ("unscorable", "2", "3"),
    ]
    assert [one.why for one in choose(rows[:1])] == ["best"]
    assert choose([]) == ()


def test_printable_shows_invisible_characters_and_cuts_long_text() -> None:
    assert printable("a\u202eb\x1b[0m\n\t") == "a[U+202E]b[U+001B][0m\n\t"
    assert printable("é 你好 👩\u200d🔬") == "é 你好 👩\u200d🔬"
    assert printable("x" * 7000).endswith("x [... 1000 more characters]")


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0.0, 1.0, 5, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3.0, 7.0, 5, [-2.0, 0.0, 2.0, 4.0, 6.0]),
        (0.00011, 0.00029, 4, [0.00015, 0.0002, 0.00025]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, count: int, expected: Any) -> None:
    assert ticks(low, high, count) == pytest.approx(expected, abs=1e-12)


def test_tick_labels_tell_neighbours_apart() -> None:
    assert tick_labels([0.0, 0.5, 1.0]) == ["0.0", "0.5", "1.0"]
    assert tick_labels([0, 500, 1000]) == ["0", "500", "1,000"]
    assert tick_labels([0.0, 2e-5, 4e-5]) == ["0", "2e-5", "4e-5"]
    assert tick_labels([0.99995, 1.0, 1.00005]) == ["0.99995", "1.00000", "1.00005"]
    assert tick_labels([3.0]) == ["3"]
    assert tick_labels([0.0]) == ["0"]


def test_charts_of_odd_data_are_finite() -> None:
    for ys in ([0.0, 0.0], [1e-12, 2e-12], [1e12, -1e12], [5.0, None], [1.0, 1.0 + 1e-15]):
        svg = line_chart([Series("y", [1, 2], ys)], title="t", x_label="x", y_label="y")
        assert "nan" not in svg and "inf" not in svg
        ElementTree.fromstring(svg)
    with pytest.raises(ValueError, match="at least one point"):
        line_chart([Series("y", [1], [None])], title="t", x_label="x", y_label="y")


def test_plug_ins_of_this_package_are_announced() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    groups = project["entry-points"]
    tasks = {name: registry.load_target(t, "task") for name, t in groups["alignment.task"].items()}
    assert tasks == {
        "verifiable": verifiable,
        "held_out_loss": held_out_loss,
        "preference": preference,
        "process": process,
        "reward_kl": reward_kl,
    }
    assert registry.load_target(groups["alignment.report"]["frontier"], "report") is frontier_report
    assert registry.load_target(groups["alignment.report"]["html"], "report") is html_report
