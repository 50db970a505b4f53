"""Reward-KL frontier and preference reports of a synthetic pipeline, read back from its files."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.types import (
    Completion,
    Outcome,
    PairBatch,
    Prompt,
    RewardedCompletion,
    Sample,
    SamplingParams,
    Score,
    SteppedSample,
    StopReason,
    UserInputError,
)
from evals.charts import run_charts
from evals.compare import compare_in_run
from evals.curves import CURVES, NAMED
from evals.frontier import FrontierPoint, Span, read_frontiers
from evals.frontier_charts import frontier_report, frontier_view
from evals.preference_task import preference
from evals.report import html_report
from evals.results import EvalResult
from evals.reward_kl_task import reward_kl
from evals.rundata import read_run
from evals.scatter import Mark, Track, scatter_chart

PROMPTS = tuple(Prompt((1, 9, index), f"The film number {index} was", index) for index in range(24))
TOKENS = 12


@dataclass(frozen=True)
class Scores:
    logprobs: Sequence[Sequence[float]]
    greedy_correct: Sequence[Sequence[bool]] = ()


@dataclass(frozen=True)
class Policy:
    """A policy that is `drift` standard deviations away from the reference: its proxy goes on
    rising with the drift, its gold falls again."""

    drift: float
    kl: float
    rng: np.random.Generator
    sampling: SamplingParams = SamplingParams(TOKENS)
    prompts: Sequence[Prompt] = PROMPTS
    samples: Sequence[Sample] = ()
    seed: int = 0
    pairs: PairBatch | None = None
    steps: Sequence[SteppedSample] = ()
    pair_scores: Callable[[PairBatch], tuple[list[float], list[float]]] | None = None
    step_scores: None = None

    @property
    def engine(self) -> Policy:
        return self

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        return [
            Completion(
                prompt.index,
                sample,
                tuple(int(i) for i in self.rng.integers(2, 60, TOKENS)),
                (-1.0,) * TOKENS,
                StopReason.LENGTH,
                0,
                "quite <b>good</b>, really",
            )
            for prompt in prompts
            for sample in range(params.n)
        ]

    def grade(self, pairs: Sequence[tuple[Prompt, Completion]]) -> list[RewardedCompletion]:
        graded = []
        for prompt, completion in pairs:
            shared, own, other = self.rng.normal(size=3)
            latent = 0.4 * math.sin(prompt.index) + shared
            proxy = 3.0 + 2.0 * (latent + 0.7 * own + self.drift)
            gold = math.tanh(0.4 * (latent + 0.5 * other + self.drift - 0.28 * self.drift**2))
            parts = {"reward_model": Score(proxy), "sentiment": Score(gold)}
            graded.append(RewardedCompletion(prompt, completion, proxy, Outcome.SCORED, parts))
        return graded

    def score(self, samples: Sequence[Sample]) -> Scores:
        rows = [[-1.0] * len(sample.completion_ids) for sample in samples]
        return Scores(rows)

    def reference_score(self, samples: Sequence[Sample]) -> Scores:
        noise = 0.15 * math.sqrt(self.kl)
        return Scores(
            [list(-1.0 - self.kl / TOKENS + noise * self.rng.normal(size=TOKENS)) for _ in samples]
        )


def evaluate(drift: float, kl: float, seed: int) -> EvalResult:
    task = reward_kl(
        samples=16, best_of=[1, 2, 4, 8, 16], select_by="reward_model", gold="sentiment"
    )
    return task.run(Policy(drift, kl, np.random.default_rng(seed)))


def _write_metrics(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"step": i, **row}) + "\n" for i, row in enumerate(rows, start=1))
    (folder / "metrics.jsonl").write_text(text)


def ppo_metrics(steps: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, steps + 1):
        done = step / steps
        drift, kl = 2.9 * done, 22 * done**1.6
        gold = math.tanh(0.4 * (drift - 0.28 * drift**2)) + 0.03 * float(rng.normal())
        rows.append(
            {
                "reward/mean": 3 + 2 * drift + 0.2 * float(rng.normal()) - 0.05 * kl,
                "reward/reward_model": 3 + 2 * drift + 0.2 * float(rng.normal()),
                "reward/sentiment": gold,
                "kl/sequence": kl * (1 + 0.05 * float(rng.normal())),
                "kl/mean": kl / TOKENS,
                "kl/coef": 0.05 * 1.01**step,
                "value/loss": 0.3 + math.exp(-3 * done),
                "value/explained_variance": 0.7 * done - 0.1,
                "value/clip_fraction": 0.08 * (1 - done),
                "value/mean": 2 + done,
                "return/mean": 2.2 + done,
                "policy/clip_fraction/low": 0.05 * float(rng.random()),
                "policy/clip_fraction/high": 0.07 * float(rng.random()),
                "policy/entropy": 2.4 - 0.9 * done,
                "completion/length": 20 + 8 * done,
                "loss": 0.1 * float(rng.normal()),
                "optim/grad_norm": 1 + float(rng.random()),
                "optim/lr": 1e-5 * (1 - done),
            }
        )
    return rows


def dpo_metrics(steps: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, steps + 1):
        done = step / steps
        rows.append(
            {
                "loss": math.log(2) * (1 - 0.5 * done),
                "reward/chosen": 0.4 * done - 0.6 * done**2,
                "reward/rejected": -1.5 * done,
                "reward/margin": 1.9 * done - 0.6 * done**2,
                "reward/accuracy": 0.5 + 0.28 * done,
                "logps/chosen": -80 - 6 * done + float(rng.normal()),
                "logps/rejected": -84 - 25 * done + float(rng.normal()),
                "optim/grad_norm": 1 + float(rng.random()),
                "optim/lr": 1e-6,
            }
        )
    return rows


def rm_run(folder: Path, rng: np.random.Generator) -> None:
    """A reward model's stage with two evaluations."""
    rows = [
        {
            "loss": math.log(2) - 0.3 * i / 40,
            "reward/accuracy": 0.5 + 0.25 * i / 40,
            "reward/margin": 1.4 * i / 40,
            "score/chosen": 0.9 * i / 40,
            "score/rejected": -0.5 * i / 40,
            "optim/grad_norm": 2.0,
        }
        for i in range(1, 41)
    ]
    _write_metrics(folder, rows)
    side = [tuple(range(2, 2 + int(n))) for n in rng.integers(5, 60, size=600)]
    samples = [Sample((1, i // 2), ids, (True,) * len(ids)) for i, ids in enumerate(side)]
    pairs = PairBatch(tuple(samples[::2]), tuple(samples[1::2]))

    for step, skill in ((0, 0.02), (20, 1.0), (40, 2.4)):

        def scores(batch: PairBatch, skill: float = skill) -> tuple[list[float], list[float]]:
            margin = rng.normal(0.55, 1.0, size=len(batch)) * skill
            return list(margin), [0.0] * len(batch)

        context = Policy(0, 0, rng, pairs=pairs, pair_scores=scores)
        preference().run(context).save(folder / "evals" / f"preference-step-{step:06d}")


def make_pipeline(root: Path, *, evaluated: bool = False) -> Path:
    """SFT, reward model, PPO and DPO, compared on `reward_kl` under the name `frontier`."""
    path = root / "rlhf"
    rng = np.random.default_rng(0)
    (path / "evals").mkdir(parents=True)
    stages = ("sft", "rm", "ppo", "dpo")
    recipe = {"stages": [{"name": name} for name in stages]}
    (path / "recipe.yaml").write_text(json.dumps(recipe))
    _write_metrics(path / "stages/sft", [{"loss": 3.0 - i / 20} for i in range(20)])
    rm_run(path / "stages/rm", rng)
    _write_metrics(path / "stages/ppo", ppo_metrics(60, rng))
    _write_metrics(path / "stages/dpo", dpo_metrics(60, rng))
    for name, kind in (("sft", "sft"), ("rm", "reward_model"), ("ppo", "ppo"), ("dpo", "dpo")):
        text = f"algorithm: {{type: {kind}}}\nmodel: {{path: smollm2-135m-instruct}}\n"
        (path / "stages" / name / "recipe.yaml").write_text(text)
    if evaluated:
        for step in (0, 10, 20, 40):
            result = evaluate(step / 20, 3.0 * step / 20, seed=step)
            result.save(path / "stages/dpo/evals" / f"frontier-step-{step:06d}")
    results = {
        "base": evaluate(-1.0, 160.0, 1),
        "sft": evaluate(0.0, 0.0, 2),
        "ppo": evaluate(2.9, 22.0, 3),
        "dpo": evaluate(1.4, 7.5, 4),
    }
    compare_in_run(results, path, "frontier")
    return path
