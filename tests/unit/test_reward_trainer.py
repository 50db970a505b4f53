"""Reward models and process reward models, trained: gradients, state, files, bad input."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import metrics_of, steps_of, weights_of
from torch import Tensor
from torch.nn.functional import logsigmoid
from typer.testing import CliRunner, Result

from alignment.cli import app
from alignment.config.load import load_recipe
from alignment.config.schema import Recipe
from alignment.data.arithmetic_steps import arithmetic_steps
from alignment.data.text_form import TextForm, read_text_form
from alignment.distributed import Distributed
from alignment.modeling.finite import NonFiniteError
from alignment.modeling.heads import ScalarModel
from alignment.modeling.optimizer import MasterWeightOptimizer
from alignment.modeling.scalar import load_scalar_model
from alignment.runs.checkpoint import list_checkpoints
from alignment.runs.directory import RunDirectory
from alignment.runs.events import EventLog
from alignment.trainers.evaluation import eval_context
from alignment.trainers.loop import Loop
from alignment.trainers.process_reward import ProcessRewardTrainer
from alignment.trainers.reward import RewardModelTrainer
from alignment.trainers.run import train
from alignment.trainers.setup import assemble, load_parts
from alignment.types import Sample, UserInputError

SHORT = {
    "reward_model": ("algorithm.steps=3", "algorithm.pairs_per_step=5", "expect=[]"),
    "process_reward_model": ("algorithm.steps=3", "algorithm.samples_per_step=5", "expect=[]"),
}
NO_CLIP = "optim.max_grad_norm=1e9"
BUDGETS = (4096, 150, 1)
TRAINERS = {"reward_model": RewardModelTrainer, "process_reward_model": ProcessRewardTrainer}


def recipe_of(method: str, folder: Path, *overrides: str) -> Recipe:
    settings = [*SHORT[method], "run.name=it", f"run.dir={folder}", *overrides]
    recipe = load_recipe(f"tiny/{method}", settings)
    assert isinstance(recipe, Recipe)
    return recipe


def run(method: str, folder: Path, *overrides: str) -> RunDirectory:
    return train(recipe_of(method, folder, *overrides))


def context_of(method: str, folder: Path, *overrides: str) -> Any:
    recipe = recipe_of(method, folder, *overrides)
    events = EventLog(folder / "events.jsonl")
    return assemble(load_parts(recipe), Distributed(), events, cache=folder)


def data_file(folder: Path, *rows: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"data={{type: file, path: '{path}'}}"


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The gradients that reach the optimizer, which then stands still."""
    seen: list[dict[str, Tensor]] = []

    def keep(self: MasterWeightOptimizer) -> float:
        seen.append(dict(zip(self._parameters, (g.clone() for g in self.gradients), strict=True)))
        self.drop_gradients()
        return 0.0

    monkeypatch.setattr(MasterWeightOptimizer, "step", keep)
    return seen


def plain_values(model: ScalarModel, sample: Sample) -> Tensor:
    """The head after each completion token `[T]`, one row and no mask, in float64."""
    ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
    hidden = model.decoder.double()(input_ids=ids, use_cache=False).last_hidden_state[0]
    read: Tensor = hidden[len(sample.prompt_ids) :] @ model.head.weight[0].double()
    return read


def assert_gradient(got: dict[str, Tensor], model: ScalarModel, loss: Tensor) -> None:
    named = dict(model.named_parameters())
    assert got.keys() == named.keys()
    expected = torch.autograd.grad(loss, list(named.values()))
    size = torch.cat([gradient.flatten() for gradient in expected]).norm()
    for name, gradient in zip(named, expected, strict=True):
        gap = (got[name].double() - gradient.double()).norm()
        assert gap < 1e-5 * size, name


# -- reward models ----------------------------------------------------------------------------

OBJECTIVES: dict[str, tuple[tuple[str, ...], Callable[[Tensor, Tensor, float], Tensor]]] = {
    "plain": ((), lambda c, r, m: -logsigmoid(c - r)),
    "margin": (("algorithm.margin=column",), lambda c, r, m: -logsigmoid(c - r - m)),
    "centred and smoothed": (
        ("algorithm.center_coef=0.5", "algorithm.label_smoothing=0.1"),
        lambda c, r, m: -0.9 * logsigmoid(c - r) - 0.1 * logsigmoid(r - c) + 0.5 * (c + r) ** 2,
    ),
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_i01_the_gradient_is_that_of_the_mean_over_pairs(
    tmp_path: Path, gradients: list[dict[str, Tensor]], objective: str, budget: int
) -> None:
    """Against one row at a time in float64; two of the pairs have one prompt."""
    settings, formula = OBJECTIVES[objective]
    rows = [
        {"prompt": "one", "chosen": "yes", "rejected": "no, not at all", "margin": 0.5},
        {"prompt": "one", "chosen": "of course", "rejected": "no", "margin": 2.0},
        {"prompt": "two", "chosen": "a" * 30, "rejected": "b", "margin": -1.0},
        {"prompt": "three is a longer one", "chosen": "c", "rejected": "d" * 20, "margin": 0.0},
    ]
    size = f"optim.micro_batch_tokens={budget}"
    pairs = ("algorithm.pairs_per_step=4", "algorithm.center_coef=0", "eval={tasks: []}")
    data = data_file(tmp_path, *rows)
    context = context_of("reward_model", tmp_path, data, *pairs, *settings, NO_CLIP, size)
    RewardModelTrainer(context).step(1)
    model = context.scalar_model.double()
    batch = context.train.pairs
    assert [len(batch), batch.margins] == [4, (0.5, 2.0, -1.0, 0.0)]
    losses = [
        formula(plain_values(model, better)[-1], plain_values(model, worse)[-1], margin)
        for better, worse, margin in zip(batch.chosen, batch.rejected, batch.margins, strict=True)
    ]
    assert_gradient(gradients[0], model, torch.stack(losses).mean())


def test_metrics_say_what_was_scored(tmp_path: Path) -> None:
    """The first step's, against the model as it was handed over."""
    recipe = recipe_of("reward_model", tmp_path, "algorithm.center_coef=0")
    context = context_of("reward_model", tmp_path, "algorithm.center_coef=0")
    pairs = context.train.pairs
    rows = [row for _, row in context.order.take(5)]
    chosen = context.scalar_model.scores([pairs.chosen[row] for row in rows], 64)
    rejected = context.scalar_model.scores([pairs.rejected[row] for row in rows], 64)
    first = metrics_of(train(recipe))[0]
    gaps = [c - r for c, r in zip(chosen, rejected, strict=True)]
    expected = {
        "reward_model/score/chosen": statistics.fmean(chosen),
        "reward_model/score/rejected": statistics.fmean(rejected),
        "reward_model/margin": statistics.fmean(gaps),
        "reward_model/accuracy": statistics.fmean(gap > 0 for gap in gaps),
        "loss": statistics.fmean(math.log1p(math.exp(-gap)) for gap in gaps),
        "data/epoch": 5 / len(pairs),
    }
    assert {name: first[name] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("lora", [(), ("model.lora={rank: 4}",)])
def test_the_model_that_was_trained_is_the_one_that_is_saved(
    tmp_path: Path, lora: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head included; without an adapter to the last bit."""
    trained: list[ScalarModel] = []

    class Kept(RewardModelTrainer):
        def __init__(self, context: Any) -> None:
            super().__init__(context)
            trained.append(context.scalar_model)

    monkeypatch.setattr("alignment.trainers.reward.RewardModelTrainer", Kept)
    saved = run("reward_model", tmp_path, "optim.lr=1e-2", *lora)
    pairs = context_of("reward_model", tmp_path).train.pairs
    samples = [*pairs.chosen, *pairs.rejected]
    ours = trained[0].scores(samples, 4096)
    loaded = load_scalar_model(saved.model_dir)
    assert loaded.scores(samples, 4096) == (pytest.approx(ours, abs=1e-5) if lora else ours)
    untrained = load_scalar_model("tiny-random").scores(samples, 4096)
    assert max(abs(a - b) for a, b in zip(ours, untrained, strict=True)) > 0.01


@pytest.mark.parametrize(("most", "rows"), [(256, range(12)), (5, (0, 2, 4, 7, 9))])
def test_normalization_is_that_of_the_model_that_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, rows: Sequence[int]
) -> None:
    """On pairs spread over the training data; the head began at random, and moved far."""
    monkeypatch.setattr("alignment.trainers.reward.NORMALIZED_ON", most)
    saved = run("reward_model", tmp_path, "optim.lr=1e-2")
    pairs = context_of("reward_model", tmp_path).train.pairs
    assert len(pairs) == 12
    samples = [side[row] for row in rows for side in (pairs.chosen, pairs.rejected)]
    scores = load_scalar_model(saved.model_dir).scores(samples, 4096)
    stated = json.loads((saved.model_dir / "score_normalization.json").read_text())
    expected = {
        "mean": statistics.fmean(scores),
        "std": statistics.pstdev(scores),
        "count": len(samples),
    }
    assert stated == pytest.approx(expected, rel=1e-5)
    *before, last = steps_of(saved)
    assert last["reward_model/score/mean"] == stated["mean"]
    assert last["reward_model/score/std"] == stated["std"]
    assert not any("reward_model/score/mean" in record for record in before)
    untrained = load_scalar_model("tiny-random").scores(samples, 4096)
    assert abs(statistics.fmean(untrained) - stated["mean"]) > 0.1 * stated["std"]


@pytest.mark.parametrize("method", ["reward_model", "process_reward_model"])
def test_a_head_that_gives_no_numbers_is_found_by_evaluations(tmp_path: Path, method: str) -> None:
    context = context_of(method, tmp_path)
    next(context.scalar_model.parameters()).data.fill_(math.nan)
    view = eval_context(context)
    with pytest.raises(NonFiniteError, match="is not finite"):
        if method == "reward_model":
            assert view.pair_scores is not None
            view.pair_scores(context.train.pairs)
        else:
            assert view.step_scores is not None
            view.step_scores(context.train.steps)


def test_scores_that_are_no_numbers_are_not_normalized_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ScalarModel, "scores", lambda _, samples, __: [math.nan] * len(samples))
    with pytest.raises(NonFiniteError, match="a score is not finite"):
        run("reward_model", tmp_path, "eval.tasks=[]")


def test_nothing_is_normalized_unless_asked_for(tmp_path: Path) -> None:
    saved = run("reward_model", tmp_path, "algorithm.normalize=false")
    assert not (saved.model_dir / "score_normalization.json").exists()
    assert not any("score/mean" in name for name in metrics_of(saved)[-1])


def test_what_the_model_reads_is_noted_beside_it(tmp_path: Path) -> None:
    settings = ("algorithm.separator=' ## '", "data.system=be kind")
    saved = run("process_reward_model", tmp_path / "steps", *settings)
    noted = read_text_form(saved.model_dir)
    assert noted == TextForm("chat", system="be kind", separator=" ## ")
    context = context_of("process_reward_model", tmp_path, *settings)
    answers = [context.tokenizer.decode(one.sample.completion_ids) for one in context.train.steps]
    assert all(" ## " in answer and "\n" not in answer for answer in answers)
    saved = run("reward_model", tmp_path / "pairs", "data.style=plain")
    assert read_text_form(saved.model_dir) == TextForm("plain")


def test_epochs_are_passes_over_the_pairs(tmp_path: Path) -> None:
    length = ("algorithm.steps=null", "algorithm.epochs=2", "algorithm.pairs_per_step=8")
    context = context_of("reward_model", tmp_path, *length)
    assert len(context.train.pairs) == 12
    assert RewardModelTrainer(context).total_steps == 3


# -- process reward models --------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
def test_i01_the_gradient_is_that_of_the_mean_over_steps(
    tmp_path: Path, gradients: list[dict[str, Tensor]], budget: int
) -> None:
    """Every step weighs the same, whatever the answer it is in, and soft labels are taken."""
    rows = [
        {"prompt": "p", "completions": ["a", "bcd", "e f"], "labels": [True, False, 0.25]},
        {"prompt": "p", "completions": ["only one"], "labels": [1]},
        {"prompt": "another", "completions": ["x" * 20, "y"], "labels": [0.0, 0.0]},
    ]
    size = f"optim.micro_batch_tokens={budget}"
    settings = ("algorithm.samples_per_step=3", "eval={tasks: []}", NO_CLIP, size)
    data = data_file(tmp_path, *rows)
    context = context_of("process_reward_model", tmp_path, data, *settings)
    ProcessRewardTrainer(context).step(1)
    model = context.scalar_model.double()
    # Byte-level tokens: a step's last token is its last character.
    ends = [[0, 4, 8], [7], [19, 21]]
    losses = []
    for row, at, answer in zip(rows, ends, context.train.steps, strict=True):
        for end, label in zip(at, row["labels"], strict=True):
            x = plain_values(model, answer.sample)[end]
            losses.append(-label * logsigmoid(x) - (1 - label) * logsigmoid(-x))
    assert len(losses) == 6
    assert_gradient(gradients[0], model, torch.stack(losses).mean())


def test_a_process_reward_model_is_saved_and_evaluated(tmp_path: Path) -> None:
    saved = run("process_reward_model", tmp_path)
    last = metrics_of(saved)[-1]
    assert {"process_reward_model/accuracy", "eval/process/step_accuracy"} <= last.keys()
    assert load_scalar_model(saved.model_dir).head.weight.shape == (1, 64)
    assert evaluated(saved, "process", "step_accuracy") == pytest.approx(
        last["eval/process/step_accuracy"], rel=1e-3
    )


def test_a_reward_model_is_evaluated_on_held_out_pairs(tmp_path: Path) -> None:
    saved = run("reward_model", tmp_path)
    last = metrics_of(saved)[-1]
    for metric in ("accuracy", "margin"):
        expected = pytest.approx(last[f"eval/preference/{metric}"], rel=1e-3)
        assert evaluated(saved, "preference", metric) == expected


def evaluated(of: RunDirectory, task: str, metric: str) -> float:
    """What `align eval` prints."""
    result = CliRunner().invoke(app, ["eval", str(of.path), "--task", task, "--overwrite"])
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines()]
    (value,) = (float(row[2]) for row in rows if row[:2] == [task, metric])
    return value


# -- resuming ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TRAINERS)
@pytest.mark.parametrize(
    ("moment", "dtype"), [("in the step", "bfloat16"), ("before its checkpoint", "float32")]
)
def test_i45_resumed_is_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, moment: str, dtype: str
) -> None:
    """Bit for bit: weights, metrics, running moments, checkpoint. Evaluations change nothing."""
    settings = ("algorithm.steps=4", "checkpoint={every: 1, keep: 2}", "model.lora={rank: 4}")
    settings += ("model.lora.dropout=0.2", f"model.dtype={dtype}")
    whole = run(method, tmp_path / "whole", *settings, "eval={}")
    settings += ("eval.every=2",)
    owner, name = (TRAINERS[method], "step") if moment == "in the step" else (Loop, "_save")
    original = getattr(owner, name)

    def failing(self: Any, step: int, *arguments: Any) -> Any:
        if step == 3:
            raise RuntimeError("killed")
        return original(self, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(RuntimeError, match="killed"):
            run(method, tmp_path / "parts", *settings)
    resumed = run(method, tmp_path / "parts", *settings)
    assert any(resumed.evals_dir.glob("*")) and not any(whole.evals_dir.glob("*"))
    ours, theirs = weights_of(resumed), weights_of(whole)
    assert "score.weight" in ours and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert steps_of(resumed) == steps_of(whole)
    (_, mine), (_, yours) = (list_checkpoints(r.checkpoints_dir)[-1] for r in (resumed, whole))
    for file in yours.iterdir():
        assert (mine / file.name).read_bytes() == file.read_bytes()
    if method == "reward_model":
        files = [r.model_dir / "score_normalization.json" for r in (resumed, whole)]
        assert files[0].read_text() == files[1].read_text()


# -- bad input --------------------------------------------------------------------------------


def refused(method: str, folder: Path, *overrides: str) -> Result:
    settings = [*SHORT[method], "run.name=it", f"run.dir={folder / 'runs'}", *overrides]
    result = CliRunner().invoke(app, ["train", f"tiny/{method}", *settings])
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert not (folder / "runs" / "it").exists()
    return result


def test_a_margin_that_the_data_does_not_have_is_refused(tmp_path: Path) -> None:
    result = refused("reward_model", tmp_path, "algorithm.margin=column")
    assert "algorithm.margin: column" in result.output
    assert "set margin: none" in result.output


@pytest.mark.parametrize(("margin", "said"), [("none", 1), ("column", 0)])
def test_a_margin_that_is_not_looked_at_is_a_warning(
    tmp_path: Path, margin: str, said: int
) -> None:
    rows = [{"prompt": p, "chosen": "yes", "rejected": "no", "margin": 0.5} for p in ("one", "two")]
    settings = (data_file(tmp_path, *rows), f"algorithm.margin={margin}", "eval={tasks: []}")
    RewardModelTrainer(context_of("reward_model", tmp_path, *settings))
    events = tmp_path / "events.jsonl"
    text = events.read_text(encoding="utf-8") if events.exists() else ""
    assert text.count("set algorithm.margin: column") == said


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("reward_model", ("rows.jsonl:1", "needs 'chosen' and 'rejected'")),
        ("process_reward_model", ("rows.jsonl:1", "needs 'completions' and 'labels'")),
    ],
)
def test_data_of_another_form_is_refused(
    tmp_path: Path, method: str, words: tuple[str, ...]
) -> None:
    row = {"prompt": "p", "completion": "c"}
    output = refused(method, tmp_path, data_file(tmp_path, row, row)).output
    assert all(word in output for word in words)


def test_pairs_that_teach_nothing_are_refused(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "c"}
    output = refused("reward_model", tmp_path, data_file(tmp_path, row, row)).output
    assert "chosen and rejected are the same" in output


@pytest.mark.parametrize("method", TRAINERS)
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("algorithm.epochs=1", "give either steps or epochs; found both"),
        ("algorithm.steps=null", "give either steps or epochs; found neither"),
    ],
)
def test_the_length_is_stated_once(tmp_path: Path, method: str, setting: str, message: str) -> None:
    assert message in refused(method, tmp_path, setting).output


def test_label_smoothing_of_a_half_is_refused(tmp_path: Path) -> None:
    output = refused("reward_model", tmp_path, "algorithm.label_smoothing=0.5").output
    assert "algorithm.label_smoothing" in output and "0.5" in output


@pytest.mark.parametrize("method", TRAINERS)
def test_a_trainer_without_its_data_says_so(tmp_path: Path, method: str) -> None:
    """Rows of the other form, given by hand: no recipe comes this far."""
    other = next(name for name in TRAINERS if name != method)
    own, theirs = context_of(method, tmp_path), context_of(other, tmp_path)
    object.__setattr__(own, "train", theirs.train)
    with pytest.raises(UserInputError, match=r"data: there is no (pair|labelled step)"):
        TRAINERS[method](own)


# -- the data of the tiny recipes -------------------------------------------------------------


def total(expression: str) -> int:
    return sum(int(part) for part in expression.split(" + "))


def test_arithmetic_steps_are_bad_from_the_first_mistake_on() -> None:
    rows = arithmetic_steps(operands=4, high=9, size=200, wrong=0.5)
    n_wrong = 0
    for row in rows:
        holds = [
            total(a) == total(b) for a, b in (line.split(" = ") for line in row["completions"])
        ]
        first = holds.index(False) if False in holds else len(holds)
        assert row["labels"] == [line < first for line in range(3)]
        n_wrong += first < 3
    assert 70 < n_wrong < 130
    assert all(all(row["labels"]) for row in arithmetic_steps(size=20, wrong=0.0))
