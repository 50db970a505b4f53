"""The report of a synthetic run directory, written by the project's own writers."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment import registry
from alignment.runs.directory import RunDirectory
from alignment.runs.events import EventLog
from alignment.runs.metrics import MetricsWriter
from alignment.runs.samples import SampleRecorder
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
from evals.browser import choose, printable
from evals.compare import compare
from evals.report import html_report
from evals.results import EvalRecord, EvalResult
from evals.rundata import read_run
from evals.summary import summarize_graded

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
