"""KTO: mismatched pairs, the balance of the classes, its reference point, and bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from preference_runs import made_up_labelled, parts_of, recipe_of, run
from tiny_runs import events_of, metrics_of

from alignment.config.methods.kto import UnpairedLossConfig
from alignment.trainers.context import TrainingContext
from alignment.trainers.kto import KTOTrainer, balance_warning, mismatched
from alignment.types import LabelledSample, Sample, UserInputError


def sample(prompt: tuple[int, ...], completion: tuple[int, ...]) -> Sample:
    return Sample(prompt, completion, (True,) * len(completion))


# -- mismatched pairs -------------------------------------------------------------------------


def test_a_completion_goes_behind_the_next_other_prompt() -> None:
    a, b, c = (1, 1), (2,), (3, 3, 3)
    rows = [sample(a, (10,)), sample(a, (11,)), sample(b, (12, 13)), sample(c, (14,))]
    assert mismatched(rows, 99) == [
        sample(b, (10,)),
        sample(b, (11,)),
        sample(c, (12, 13)),
        sample(a, (14,)),
    ]


def test_a_mismatched_completion_is_cut_to_the_longest_sample() -> None:
    long, short = (1,) * 6, (2,)
    rows = [
        Sample(short, (10, 11, 12, 13), (True, False, True, True)),
        sample(long, (14,)),
    ]
    cut, whole = mismatched(rows, 8)
    assert cut == Sample(long, (10, 11), (True, False))
    assert whole == sample(short, (14,))


def test_samples_of_one_prompt_have_no_partner() -> None:
    assert mismatched([sample((1,), (2,)), sample((1,), (3,))], 9) == []


def with_labelled(context: TrainingContext, labelled: list[LabelledSample]) -> TrainingContext:
    order = type(context.order)(len(labelled), seed=0, shuffle=False)
    return replace(context, train=replace(context.train, labelled=labelled), order=order)


def test_without_partners_the_reference_point_is_zero(tmp_path: Path) -> None:
    labelled = [LabelledSample(sample((1,), (2 + i,)), bool(i % 2)) for i in range(6)]
    trainer = KTOTrainer(with_labelled(parts_of("kto", tmp_path, "optim.lr=1e-2"), labelled))
    for step in (1, 2):
        assert trainer.step(step).metrics.result()["kto/kl"] == 0.0


def test_the_reference_point_moves_and_is_never_negative(tmp_path: Path) -> None:
    directory = run("kto", tmp_path, "algorithm.steps=12", "optim.lr=1e-2")
    points = [record["kto/kl"] for record in metrics_of(directory)]
    assert points[0] == 0.0
    assert min(points) >= 0.0
    assert max(points) > 0.1


def test_the_classes_part(tmp_path: Path) -> None:
    context = parts_of("kto", tmp_path, "algorithm={type: kto, steps: 10, samples_per_step: 7}")
    trainer = KTOTrainer(with_labelled(context, made_up_labelled(7)))
    first, *_, last = (trainer.step(step).metrics.result() for step in range(1, 11))
    assert first["kto/reward/desirable"] == first["kto/reward/undesirable"] == 0.0
    assert last["kto/reward/desirable"] > last["kto/reward/undesirable"] + 0.1
    assert last["loss"] < first["loss"]
    assert last["kto/logps/desirable"] > first["kto/logps/desirable"]


def test_bcos_point_follows_the_rewards_and_is_in_the_checkpoint(tmp_path: Path) -> None:
    context = parts_of("kto", tmp_path, "algorithm.loss.kind=bco", "optim.lr=1e-2")
    trainer = KTOTrainer(with_labelled(context, made_up_labelled(12)))
    trainer.step(1)
    assert trainer.bco_shift == 0.0  # the policy is its reference still
    trainer.step(2)
    assert trainer.bco_shift != 0.0
    again = KTOTrainer(with_labelled(context, made_up_labelled(12)))
    again.load_state_dict(trainer.state_dict())
    assert again.bco_shift == trainer.bco_shift


def test_a_step_of_one_class_leaves_bcos_point_where_it_is(tmp_path: Path) -> None:
    context = parts_of("kto", tmp_path, "algorithm.loss.kind=bco", "optim.lr=1e-2")
    liked = [replace(one, desirable=True) for one in made_up_labelled(12)]
    trainer = KTOTrainer(with_labelled(context, liked))
    for step in (1, 2):
        trainer.step(step)
    assert trainer.bco_shift == 0.0


# -- the balance of the classes ---------------------------------------------------------------


def labels(n_desirable: int, n_undesirable: int) -> list[LabelledSample]:
    one = sample((1,), (2,))
    return [LabelledSample(one, i < n_desirable) for i in range(n_desirable + n_undesirable)]


@pytest.mark.parametrize(
    ("counts", "weights", "remedy"),
    [
        ((4, 4), (1.0, 1.0), ""),
        ((4, 3), (1.0, 1.0), ""),  # 4:3
        ((5, 3), (1.0, 1.0), "undesirable_weight to 1.67"),
        ((3, 4), (1.0, 1.0), "desirable_weight to 1.33"),
        ((3, 4), (1.33, 1.0), ""),
        ((10, 1), (1.0, 10.0), ""),
        ((10, 1), (1.0, 20.0), "desirable_weight to 2"),
        ((5, 0), (1.0, 1.0), "one class only"),
    ],
)
def test_weights_outside_the_papers_range_are_warned_of(
    counts: tuple[int, int], weights: tuple[float, float], remedy: str
) -> None:
    config = UnpairedLossConfig(desirable_weight=weights[0], undesirable_weight=weights[1])
    warning = balance_warning(labels(*counts), config)
    assert bool(warning) == bool(remedy)
    assert remedy in warning


def test_the_warning_is_an_event(tmp_path: Path) -> None:
    directory = run("kto", tmp_path, "algorithm.loss.undesirable_weight=3.0")
    (event,) = events_of(directory, "warning")
    assert "21 desirable and 21 undesirable samples weigh 21 to 63" in event["message"]
    assert not events_of(run("kto", tmp_path / "even"), "warning")


# -- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.samples_per_step=1", "a number of at least 2"),
        ("algorithm.epochs=1", "give either steps or epochs; found both"),
        ("algorithm={type: kto}", "give either steps or epochs; found neither"),
        (
            "algorithm={type: kto, steps: 1, loss: {desirable_weight: 0, undesirable_weight: 0}}",
            "both weights are 0",
        ),
        ("algorithm.loss.desirable_wieght=2", "did you mean 'desirable_weight'?"),
        ("algorithm.loss.bco_decay=0.5", "applies to kind: bco only"),
        ("model.reference=none", "kto compares with a reference"),
    ],
)
def test_a_section_that_cannot_work_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserInputError) as refused:
        recipe_of("kto", tmp_path, override)
    assert message in str(refused.value)


def test_no_samples_are_refused(tmp_path: Path) -> None:
    context = parts_of("kto", tmp_path)
    empty = replace(context, train=replace(context.train, labelled=()))
    with pytest.raises(UserInputError, match="there is no labelled completion"):
        KTOTrainer(empty)


def test_labelled_rows_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"say {i}", "completion": f"{i}", "label": i % 2 == 0} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = f"data={{type: file, path: '{path}'}}"
    assert len(metrics_of(run("kto", tmp_path, data))) == 2
