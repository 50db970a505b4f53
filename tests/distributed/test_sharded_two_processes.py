"""Two processes that share out the weights (FSDP2) train what one that has them all does."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sharded_worker
import torch
from sharded_worker import CASES, FSDP2
from test_two_processes import HERE, launched
from tiny_runs import rollouts_of, steps_of, weights_of

from alignment.distributed import Distributed
from alignment.modeling.shards import Whole
from alignment.runs.directory import RunDirectory
from alignment.types import UserInputError


@dataclass(frozen=True)
class Folders:
    """Every case, trained by one process and by two."""

    one: Path
    two: Path

    def runs(self, case: str) -> tuple[RunDirectory, RunDirectory]:
        method = CASES[case][0]
        one, two = (RunDirectory.open(folder / case / method) for folder in (self.one, self.two))
        assert (two.path / "events-rank1.jsonl").is_file()  # there was a second rank
        return one, two

    def resumed(self, where: str) -> RunDirectory:
        return RunDirectory.open(self.two / "resumed" / where / "grpo")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folders = Folders(tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two"))
    recipes = {name: sharded_worker.recipe_of(name) for name in sharded_worker.CASES}
    sharded_worker.train_all(folders.one, recipes, shards=Whole, poisons=True)
    resumed = folders.two / "resumed"
    sharded_worker.cut_off(folders.one / "grpo" / "grpo", resumed / "one-to-two", after=1)
    for done in launched([str(HERE / "sharded_worker.py"), str(folders.two)], seconds=300):
        assert done.returncode == 0, done.stdout[-3000:]
    sharded_worker.cut_off(folders.two / "grpo" / "grpo", resumed / "two-to-one", after=1)
    sharded_worker.go_on("grpo", resumed / "two-to-one")
    return folders


def assert_same_steps(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], *, rel: float
) -> None:
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.keys() == yours.keys()
        for name, value in yours.items():
            close = math.isclose(mine[name], value, rel_tol=rel, abs_tol=rel)
            assert close, f"step {yours['step']}, {name}: {mine[name]} and {value}"


@pytest.mark.parametrize("case", CASES)
def test_i01_sharded_weights_learn_what_whole_ones_do(folders: Folders, case: str) -> None:
    one, two = folders.runs(case)
    assert_same_steps(steps_of(two), steps_of(one), rel=2e-6)
    assert steps_of(two)[-1]["optim/moved_share"] > 0
    weights = weights_of(two)
    assert weights.keys() == weights_of(one).keys()
    for name, weight in weights_of(one).items():
        torch.testing.assert_close(weights[name], weight, rtol=0.0, atol=1e-6)


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_update(folders: Folders) -> None:
    """On all ranks, and leaves nothing behind: what follows is what one process does (above)."""
    first, second = steps_of(folders.runs("sft-nan")[1])
    assert (first["optim/skipped_updates"], second["optim/skipped_updates"]) == (1, 0)


@pytest.mark.parametrize("case", ["grpo", "grpo-exact-kl"])
def test_i33_sharded_weights_sample_what_whole_ones_do(folders: Folders, case: str) -> None:
    one, two = map(rollouts_of, folders.runs(case))
    for alone, together in zip(one, two, strict=True):
        for mine, yours in zip(alone, together, strict=True):
            assert mine["completion_ids"] == yours["completion_ids"]


@pytest.mark.parametrize("where", ["one-to-two", "two-to-one", "replicated"])
def test_i45_a_checkpoint_serves_any_number_of_ranks(folders: Folders, where: str) -> None:
    """Taken of whole weights or of sharded ones, and gone on with by the other sort: the moving
    reference and the controller of the KL come along."""
    one, _ = folders.runs("grpo")
    resumed = folders.resumed(where)
    assert_same_steps(steps_of(resumed), steps_of(one), rel=2e-6)
    for name, weight in weights_of(one).items():
        torch.testing.assert_close(weights_of(resumed)[name], weight, rtol=0.0, atol=1e-6)


def test_i45_sharded_weights_resume_exactly(folders: Folders) -> None:
    _, two = folders.runs("grpo")
    resumed = folders.resumed("two-to-two")
    assert_same_steps(steps_of(resumed), steps_of(two), rel=0.0)
    for name, weight in weights_of(two).items():
        assert torch.equal(weights_of(resumed)[name], weight)


def test_i23_the_moved_share_is_taken_of_the_same_elements(folders: Folders) -> None:
    """The first ones of each whole tensor, wherever they are kept."""
    found = json.loads((folders.two / "first.json").read_text())
    assert found == {str(n): [float(i) for i in range(min(n, 35))] for n in (3, 21, 30, 99)}


def test_gathered_weights_are_let_go_of(folders: Folders) -> None:
    kept = json.loads((folders.two / "kept.json").read_text())
    n = kept[0]["all"]
    for when in ("before", "after"):
        parts = [rank[when] for rank in kept]
        assert sum(parts) == n
        assert max(parts) < 0.51 * n
    assert [rank["inside"] for rank in kept] == [n, n]
    assert [rank["left"] for rank in kept] == [0, 0]


def test_weights_are_copied_by_an_exchange_that_gloo_survives(folders: Folders) -> None:
    """Not by that of `DTensor.full_tensor`, by which a rank crashes now and then: see
    `alignment.modeling.shards.whole`."""
    kept = json.loads((folders.two / "kept.json").read_text())
    assert [rank["exchanges"] for rank in kept] == [["c10d.allreduce_"]] * 2


def test_i45_uneven_parts_are_whole_on_every_rank(folders: Folders) -> None:
    kept = json.loads((folders.two / "kept.json").read_text())
    rows = [[float(7 * row + column) for column in range(7)] for row in range(5)]
    assert [rank["uneven"] for rank in kept] == [rows, rows]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "TRANSFORMER_BASED_WRAP"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading: false"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "model.gradient_checkpointing"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "use accelerate's FSDP2"),
    ],
)
def test_what_is_not_done_is_refused(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], said: str
) -> None:
    for name, value in (FSDP2 | changed).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserInputError, match=said):
        Distributed(cpu=True)


def test_one_process_keeps_its_weights_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    assert not Distributed(cpu=True).shards_state
