"""Reward-KL frontier and preference reports of a synthetic pipeline, read back from its files."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.config.methods.base import DataForm
from alignment.trainers.compared import Role
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
from evals.charts import run_charts, same_scale
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
SAMPLING = SamplingParams(TOKENS)


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
    sampling: SamplingParams = SAMPLING
    prompts: Sequence[Prompt] = PROMPTS
    samples: Sequence[Sample] = ()
    seed: int = 0
    pairs: PairBatch | None = None
    steps: Sequence[SteppedSample] = ()
    pair_scores: Callable[[PairBatch], tuple[list[float], list[float]]] | None = None
    pair_scores_are_logits: bool = True
    step_scores: None = None
    why_not: Mapping[DataForm, str] = field(default_factory=dict)

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
                "critic/loss": 0.3 + math.exp(-3 * done),
                "critic/explained_variance": 0.7 * done - 0.1,
                "critic/value/clip_fraction": 0.08 * (1 - done),
                "critic/value/mean": 2 + done,
                "critic/return/mean": 2.2 + done,
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
                "dpo/reward/chosen": 0.4 * done - 0.6 * done**2,
                "dpo/reward/rejected": -1.5 * done,
                "dpo/reward/margin": 1.9 * done - 0.6 * done**2,
                "dpo/reward/accuracy": 0.5 + 0.28 * done,
                "dpo/logps/chosen": -80 - 6 * done + float(rng.normal()),
                "dpo/logps/rejected": -84 - 25 * done + float(rng.normal()),
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
            "reward_model/accuracy": 0.5 + 0.25 * i / 40,
            "reward_model/margin": 1.4 * i / 40,
            "reward_model/score/chosen": 0.9 * i / 40,
            "reward_model/score/rejected": -0.5 * i / 40,
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


ROLES: dict[str, Role] = {"base": "ancestor", "sft": "itself", "ppo": "start", "dpo": "start"}


def make_pipeline(
    root: Path, *, evaluated: bool = False, order: Sequence[str] = tuple(ROLES)
) -> Path:
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
    compare_in_run({name: results[name] for name in order}, path, "frontier", ROLES)
    return path


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("runs"))


def point(points: Sequence[FrontierPoint], method: str, n: int | None = None) -> FrontierPoint:
    (found,) = [one for one in points if one.method == method and one.n == n]
    return found


def test_the_frontier_is_read_from_the_files_of_the_comparison(pipeline: Path) -> None:
    (frontier,) = read_frontiers(read_run(pipeline))
    assert (frontier.task, frontier.gold, frontier.proxy, frontier.reference) == (
        "frontier",
        "reward/sentiment",
        "reward/reward_model",
        "sft",
    )
    models = frontier.of_kind("model")
    assert [one.method for one in models] == ["base", "sft", "ppo", "dpo"]
    saved = EvalResult.load(pipeline / "evals/ppo-frontier")
    ppo = point(models, "ppo")
    assert ppo.kl == Span(saved.metrics["kl"], *saved.intervals["kl"])
    gold = "reward/sentiment"
    assert ppo.gold == Span(saved.metrics[gold], *saved.intervals[gold])
    sft = EvalResult.load(pipeline / "evals/sft-frontier")
    best = frontier.of_kind("best_of")
    assert [one.n for one in best] == [1, 2, 4, 8, 16]
    assert best[2].kl == Span(math.log(4) - 3 / 4)
    assert best[2].gold is not None
    assert best[2].gold.value == sft.metrics["best_of/4/reward/sentiment"]
    assert frontier.deviation[gold] == sft.metrics["reward_std/sentiment"]


def test_training_is_averaged_over_neighbouring_steps(pipeline: Path) -> None:
    (frontier,) = read_frontiers(read_run(pipeline))
    way = frontier.of_kind("training")
    assert {one.method for one in way} == {"ppo"}  # DPO logs neither divergence nor rewards
    assert [one.step for one in way] == list(range(3, 61, 3))
    rows = [json.loads(line) for line in (pipeline / "stages/ppo/metrics.jsonl").open()][3:6]
    assert way[1].kl.value == pytest.approx(sum(row["kl/sequence"] for row in rows) / 3)
    assert way[1].proxy is not None
    assert way[1].proxy.value == pytest.approx(sum(r["reward/reward_model"] for r in rows) / 3)


def test_evaluations_in_training_stand_for_training_metrics(tmp_path: Path) -> None:
    (frontier,) = read_frontiers(read_run(make_pipeline(tmp_path, evaluated=True)))
    way = frontier.of_kind("evaluation")
    assert [(one.method, one.step) for one in way] == [("dpo", s) for s in (0, 10, 20, 40)]
    assert all(one.gold is not None and one.gold.low is not None for one in way)


def test_without_the_reference_there_is_no_place_for_best_of_n(pipeline: Path) -> None:
    run = read_run(pipeline)
    run.evals[:] = [one for one in run.evals if not one.path.stem.startswith("sft-")]
    (frontier,) = read_frontiers(run)
    assert frontier.reference is None and frontier.of_kind("best_of") == []
    view = frontier_view(frontier)
    assert "None of the compared models is the reference" in view.notes[0]
    assert [row[0] for row in view.rows[1:]] == ["base", "ppo", "dpo"]


def test_the_reference_is_the_one_that_the_pipeline_names(tmp_path: Path) -> None:
    """A policy that stayed near the reference is not taken for it."""
    path = make_pipeline(tmp_path, order=("dpo", "ppo"))
    near = evaluate(0.1, 0.03, 5)
    near = replace(near, labels={**near.labels, "reference": "start"})
    assert abs(near.metrics["kl"]) < 0.05
    near.save(path / "evals" / "ppo-frontier")
    (frontier,) = read_frontiers(read_run(path))
    assert frontier.reference is None and frontier.of_kind("best_of") == []
    assert {one.method for one in frontier.of_kind("training")} == {"ppo"}


def without_labels(path: Path) -> None:
    """Make the results of a comparison such as earlier versions wrote."""
    for file in (path / "evals").glob("*.json"):
        summary = json.loads(file.read_text())
        del summary["labels"]["reference"]
        file.write_text(json.dumps(summary))


@pytest.mark.parametrize("order", [tuple(ROLES), ("ppo", "base", "dpo", "sft")])
def test_results_of_earlier_versions_tell_the_reference_by_its_divergence(
    tmp_path: Path, order: tuple[str, ...]
) -> None:
    path = make_pipeline(tmp_path, order=order)
    (labelled,) = read_frontiers(read_run(path))
    assert frontier_view(labelled).notes == ()
    without_labels(path)
    (frontier,) = read_frontiers(read_run(path))
    assert (frontier.reference, frontier.ancestors) == ("sft", ("base",))
    assert frontier.points == labelled.points
    (note,) = frontier_view(frontier).notes
    assert "sft, at no distance from it, is taken for it" in note and "finished.json" in note


def test_results_of_earlier_versions_without_the_reference_keep_the_ways_of_training(
    tmp_path: Path,
) -> None:
    path = make_pipeline(tmp_path, order=("base", "dpo", "ppo"))
    without_labels(path)
    (frontier,) = read_frontiers(read_run(path))
    assert (frontier.reference, frontier.ancestors) == (None, ())
    assert {one.method for one in frontier.of_kind("training")} == {"ppo"}
    notes = frontier_view(frontier).notes
    assert len(notes) == 2 and "which model the reference is. To have it noted" in notes[1]


def test_models_without_a_role_are_told_from_results_without_labels(tmp_path: Path) -> None:
    """One that stayed near a reference from elsewhere is not taken for it."""
    (tmp_path / "evals").mkdir()
    compare_in_run({"ppo": evaluate(0.1, 0.0, 5)}, tmp_path, "reward_kl", {})
    (frontier,) = read_frontiers(read_run(tmp_path))
    assert abs(frontier.of_kind("model")[0].kl.value) < 0.05
    assert frontier.reference is None and frontier.labelled


@pytest.mark.parametrize("order", [("dpo", "ppo", "base", "sft"), ("ppo", "base", "dpo", "sft")])
def test_models_are_drawn_wherever_the_reference_is_listed(
    tmp_path: Path, order: tuple[str, ...]
) -> None:
    (frontier,) = read_frontiers(read_run(make_pipeline(tmp_path, order=order)))
    assert frontier.ancestors == ("base",)
    for chart in frontier_view(frontier).charts:
        assert [row[0] for row in chart.rows if row[1] == "model"] == [
            name for name in order if name != "base"
        ]
        assert "In the table alone, as the reference came from it: base." in chart.caption
    assert [row[0] for row in frontier_view(frontier).rows[1:5]] == list(order)


@pytest.mark.parametrize(
    ("settings", "drawn"),
    [
        ("rollout: {temperature: 1.0}\nalgorithm: {kl: {estimator: k3}}", True),
        ("rollout: {temperature: 1.0}\nalgorithm: {kl: {estimator: k1}}", True),
        ("rollout: {temperature: 0.7}\nalgorithm: {kl: {estimator: k1}}", False),
        ("rollout: {temperature: 1.0}\nalgorithm: {kl: {estimator: k2}}", False),
        ("model: {reference: {mode: synced}}", False),
    ],
)
def test_a_way_of_another_divergence_is_left_out(
    tmp_path: Path, settings: str, drawn: bool
) -> None:
    """kl/sequence at another temperature is of other distributions, k2 is no unbiased estimate, and
    a reference that follows is not where the training started."""
    path = make_pipeline(tmp_path)
    (path / "stages/ppo/recipe.yaml").write_text(settings + "\n")
    (frontier,) = read_frontiers(read_run(path))
    assert bool(frontier.of_kind("training")) == drawn


def test_names_that_begin_alike_keep_their_results(tmp_path: Path) -> None:
    results = {"sft": evaluate(0, 0, 1), "sft-ppo": evaluate(1, 4, 2)}
    (tmp_path / "evals").mkdir()
    compare_in_run(results, tmp_path, "reward_kl", {"sft": "itself", "sft-ppo": "start"})
    (frontier,) = read_frontiers(read_run(tmp_path))
    for name, result in results.items():
        kl = point(frontier.of_kind("model"), name).kl.value
        assert kl == pytest.approx(result.metrics["kl"], abs=1e-12)


def test_a_run_without_such_a_comparison_has_no_frontier(tmp_path: Path) -> None:
    _write_metrics(tmp_path, [{"loss": 1.0}])
    assert read_frontiers(read_run(tmp_path)) == []
    with pytest.raises(UserInputError, match="task 'reward_kl'"):
        frontier_report(tmp_path)


def test_the_second_figure_measures_gains_in_deviations_of_the_reference(pipeline: Path) -> None:
    (frontier,) = read_frontiers(read_run(pipeline))
    models = frontier.of_kind("model")
    ppo, sft = point(models, "ppo"), point(models, "sft")
    assert ppo.proxy is not None and sft.proxy is not None
    gain = (ppo.proxy.value - sft.proxy.value) / frontier.deviation["reward/reward_model"]
    _, second = frontier_view(frontier).charts
    tip = f"ppo: proxy {gain:.4g} at {math.sqrt(ppo.kl.value):.4g}"
    assert f"<title>{tip}</title>" in second.svg
    assert "std. deviations" in second.svg
    raw = frontier_view(replace(frontier, deviation={})).charts[1]
    assert f"ppo: proxy {ppo.proxy.value:.4g} at" in raw.svg and "std. deviations" not in raw.svg


def test_the_table_has_every_policy_and_says_what_is_a_bound(pipeline: Path) -> None:
    (frontier,) = read_frontiers(read_run(pipeline))
    rows = frontier_view(frontier).rows
    assert rows[0] == [
        "policy",
        "n",
        "KL, nats",
        "95% interval",
        "gold: sentiment",
        "95% interval",
        "proxy: reward_model",
        "95% interval",
    ]
    assert all(len(row) == len(rows[0]) for row in rows)
    assert [row[0] for row in rows[1:]] == ["base", "sft", "ppo", "dpo", *["best of n"] * 5]
    assert [row[2] for row in rows[-2:]] == ["≤ 1.20", "≤ 1.84"]


def test_the_report_of_a_pipeline_shows_its_frontier(pipeline: Path) -> None:
    page = html_report(pipeline).read_text(encoding="utf-8")
    assert "Reward against divergence from sft" in page
    assert "reward_kl: reward/sentiment with 95% intervals" in page
    for figure in ("Gold reward (sentiment) against divergence", "Proxy and gold against"):
        assert page.count(f"<figcaption>{figure}") == 1
    assert "Could not be read" not in page
    for name in ("Explained variance of the critic", "Log-probability of rejected", "Value loss"):
        assert f"<figcaption>{name}</figcaption>" in page
    svgs = re.findall(r'<svg class="chart".*?</svg>', page, re.DOTALL)
    assert len(svgs) > 25
    for svg in svgs:
        assert "nan" not in svg and "inf" not in svg.replace("info", "")
        ElementTree.fromstring(svg)


def test_a_reward_models_report_has_its_reliability_diagram(pipeline: Path) -> None:
    page = html_report(pipeline / "stages/rm").read_text(encoding="utf-8")
    assert page.count("<figcaption>Reliability (preference, step 40)</figcaption>") == 1
    saved = EvalResult.load(pipeline / "stages/rm/evals/preference-step-000040")
    assert f"Expected calibration error {saved.metrics['ece']:.3f}." in page
    assert "Held-out calibration error (preference)" in page


def test_the_frontier_as_files(pipeline: Path) -> None:
    data = json.loads(frontier_report(pipeline).read_text())
    kinds = [one["kind"] for one in data[0]["points"]]
    assert (kinds.count("model"), kinds.count("best_of"), kinds.count("training")) == (4, 5, 20)
    for index in (1, 2):
        source = (pipeline / f"frontier-frontier-{index}.svg").read_text(encoding="utf-8")
        assert ElementTree.fromstring(source).tag == "{http://www.w3.org/2000/svg}svg"


def test_names_of_rewards_and_stages_are_escaped() -> None:
    hostile = "<script>&\"'"
    svg = scatter_chart(
        [Track(hostile, (Mark(0, 1, label=hostile, tip=hostile), Mark(9, 2)), 0, "solid")],
        title=hostile,
        x_label=hostile,
        y_label=hostile,
    )
    assert "<script" not in svg
    ElementTree.fromstring(svg)


def test_labels_cover_nothing_and_are_left_out_where_there_is_no_room() -> None:
    crowd = tuple(Mark(i / 10, 1.0, label="n=100") for i in range(200))
    svg = scatter_chart([Track("t", crowd, 0)], title="t", x_label="x", y_label="y")
    boxes = [
        (float(x), float(y)) for x, y in re.findall(r'<text x="([\d.]+)" y="([\d.]+)">n=', svg)
    ]
    assert 0 < len(boxes) < 200
    for i, (x, y) in enumerate(boxes):
        assert all(abs(x - a) >= 39 or abs(y - b) >= 12 for a, b in boxes[:i])


def test_a_long_legend_goes_on_in_another_row() -> None:
    tracks = [Track(f"a method with a long name {i}", (Mark(i, i),), i) for i in range(6)]
    svg = scatter_chart(tracks, title="t", x_label="x", y_label="y")
    element = ElementTree.fromstring(svg)
    names = [t for t in element.iter("text") if (t.text or "").startswith("a method")]
    assert len({t.get("y") for t in names}) > 1
    assert all(float(t.get("x") or 0) + 7 * len(t.text or "") < 560 for t in names)


def test_parts_of_unlike_size_get_charts_of_their_own(pipeline: Path) -> None:
    titles = [one.title for one in run_charts(read_run(pipeline / "stages/ppo")).main]
    assert "Reward parts: reward_model" in titles and "Reward parts: sentiment" in titles
    assert same_scale({"a": 1.0, "b": 5.0, "c": 0.1, "zero": 0.0}) == [["a", "b"], ["c", "zero"]]
    assert same_scale({}) == []


def test_a_metric_with_a_prefix_is_not_taken_for_another_that_is_named_in_full(
    tmp_path: Path,
) -> None:
    _write_metrics(tmp_path, [{"loss": 1.0, "critic/loss": 2.0, "dpo/logps/chosen": -3.0}])
    charts = {one.title: one.header for one in run_charts(read_run(tmp_path)).main}
    assert charts["Loss"] == ("step", "loss") and charts["Value loss"] == ("step", "loss")
    assert "Log-probability of chosen" in charts
    lines = [name for one in CURVES for name, _ in one.lines]
    assert len(lines) == len(set(lines)) and set(lines) <= NAMED


def test_an_interval_moves_with_its_value() -> None:
    assert Span(5.0, 4.0, 7.0).moved(1.0, 2.0) == Span(2.0, 1.5, 3.0)
    assert Span(5.0).moved(1.0, 2.0) == Span(2.0)
