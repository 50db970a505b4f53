"""Two processes under DeepSpeed's ZeRO train what one that has everything does."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import zero_worker
from ppo_runs import last_state
from test_sharded_two_processes import assert_same_steps
from test_two_processes import HERE, launched
from tiny_models import tiny_model
from tiny_runs import rollouts_of, steps_of, weights_of
from zero_worker import CASES

from alignment.distributed import Distributed
from alignment.modeling.optimizer import AdamWOptions
from alignment.modeling.shards import Whole
from alignment.runs.directory import RunDirectory
from alignment.types import UserInputError

DEEPSPEED = zero_worker.zero("3")

ROUNDED = ("sft-masters",)
"""In bfloat16 gradients are rounded rank by rank."""


@dataclass(frozen=True)
class Folders:
    """Cases, trained by one process and by two."""

    one: Path
    two: Path

    def run_of_one(self, case: str) -> RunDirectory:
        return RunDirectory.open(self.one / case / zero_worker.method_of(case))

    def run_of_two(self, case: str, stage: str) -> RunDirectory:
        run = RunDirectory.open(self.two / stage / case / zero_worker.method_of(case))
        assert (run.path / "events-rank1.jsonl").is_file()  # there was a second rank
        return run

    def resumed(self, where: str) -> RunDirectory:
        return RunDirectory.open(self.two / "resumed" / where / "grpo")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    pytest.importorskip("deepspeed")
    folders = Folders(tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two"))
    zero_worker.train_all(folders.one, CASES["3"], shards=Whole, poisons=True)
    resumed = folders.two / "resumed"
    zero_worker.cut_off(folders.one / "grpo" / "grpo", resumed / "one-to-two", after=1)
    for done in launched([str(HERE / "zero_worker.py"), str(folders.two)], seconds=300):
        assert done.returncode == 0, done.stdout[-3000:]
    for stage in CASES:
        where = resumed / f"two-to-one-{stage}"
        zero_worker.cut_off(folders.two / stage / "grpo" / "grpo", where, after=1)
        zero_worker.go_on("grpo", where)
    return folders


def assert_same_weights(ours: RunDirectory, theirs: RunDirectory, *, atol: float) -> None:
    mine, yours = weights_of(ours), weights_of(theirs)
    assert mine.keys() == yours.keys()
    for name, weight in yours.items():
        torch.testing.assert_close(mine[name], weight, rtol=0.0, atol=atol)


@pytest.mark.parametrize(
    ("stage", "case"),
    [(stage, case) for stage, cases in CASES.items() for case in cases if case not in ROUNDED],
)
def test_i01_zero_learns_what_one_process_does(folders: Folders, case: str, stage: str) -> None:
    one, two = folders.run_of_one(case), folders.run_of_two(case, stage)
    assert_same_steps(steps_of(two), steps_of(one), rel=2e-6)
    assert steps_of(two)[-1]["optim/moved_share"] > 0
    assert_same_weights(two, one, atol=1e-6)


@pytest.mark.parametrize("stage", CASES)
def test_a_gradient_that_is_not_finite_skips_the_update_on_all_ranks(
    folders: Folders, stage: str
) -> None:
    """And leaves nothing behind: what follows is what one process does (the test above)."""
    first, second = steps_of(folders.run_of_two("sft-nan", stage))
    assert (first["optim/skipped_updates"], second["optim/skipped_updates"]) == (1, 0)


@pytest.mark.parametrize("stage", CASES)
def test_i23_zero_steps_fp32_masters(folders: Folders, stage: str) -> None:
    one, two = folders.run_of_one("sft-masters"), folders.run_of_two("sft-masters", stage)
    assert_same_steps(steps_of(two), steps_of(one), rel=2e-3)
    mine, yours = (_model_state(run) for run in (two, one))
    masters = mine["optimizer"]["masters"]
    assert masters.keys() == mine["weights"].keys()
    for name, master in masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(master.bfloat16(), mine["weights"][name])
        torch.testing.assert_close(master, yours["optimizer"]["masters"][name], rtol=0.0, atol=5e-4)


def _model_state(run: RunDirectory) -> Any:
    return last_state(run)["model"]


def test_each_rank_keeps_its_part(folders: Folders) -> None:
    for stage in CASES:
        kept = json.loads((folders.two / f"kept-{stage}.json").read_text())
        n = kept[0]["all"]
        whole, weights = (n, 2 * n) if stage == "2" else (0, n)
        assert [rank["whole weights"] for rank in kept] == [whole, whole]
        assert sum(rank["weights"] for rank in kept) == weights
        assert sum(rank["masters"] for rank in kept) == n
        assert all(rank["gradients"] < 0.6 * n for rank in kept)


@pytest.mark.parametrize("stage", CASES)
def test_i33_zero_samples_what_one_process_does(folders: Folders, stage: str) -> None:
    one, two = folders.run_of_one("grpo"), folders.run_of_two("grpo", stage)
    for alone, together in zip(rollouts_of(one), rollouts_of(two), strict=True):
        for mine, yours in zip(alone, together, strict=True):
            assert mine["completion_ids"] == yours["completion_ids"]


@pytest.mark.parametrize("where", ["one-to-two", "two-to-one-2", "two-to-one-3"])
def test_i45_a_checkpoint_goes_into_zero_and_out_of_it(folders: Folders, where: str) -> None:
    """The moving reference and the controller of the KL come along."""
    one, resumed = folders.run_of_one("grpo"), folders.resumed(where)
    assert_same_steps(steps_of(resumed), steps_of(one), rel=2e-6)
    assert_same_weights(resumed, one, atol=1e-6)


@pytest.mark.parametrize("stage", CASES)
def test_i45_zero_resumes_exactly(folders: Folders, stage: str) -> None:
    two, resumed = folders.run_of_two("grpo", stage), folders.resumed(f"two-to-two-{stage}")
    assert_same_steps(steps_of(resumed), steps_of(two), rel=0.0)
    assert_same_weights(resumed, two, atol=0.0)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero_stage: 2 or 3"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "no deepspeed_config_file"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "optim.micro_batch_tokens"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "optim.max_grad_norm"),
        (
            {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            "offload_optimizer_device: none",
        ),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "offload_param_device: none"),
        ({"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, "zero3_init_flag: false"),
        ({"ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "A"}, "no deepspeed_moe_layer_cls_names"),
    ],
)
def test_what_is_not_done_is_refused(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], said: str
) -> None:
    for name, value in (DEEPSPEED | changed).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserInputError, match=said):
        Distributed(cpu=True)


@pytest.mark.parametrize(
    ("dtypes", "master", "said"),
    [
        ((torch.bfloat16,), None, "model.master_dtype"),
        ((torch.float16,), torch.float32, "not torch.float16; change model.dtype"),
        ((torch.bfloat16, torch.float32), torch.float32, "not torch.bfloat16, torch.float32"),
    ],
)
def test_weights_that_deepspeed_would_train_otherwise_are_refused(
    dtypes: tuple[torch.dtype, ...],
    master: torch.dtype | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    zero = importlib.import_module("alignment.modeling.zero")
    model = tiny_model()
    ranks = zero.Ranks(0, 2, torch.device("cpu"), sum=list, max=list)
    parameters = {
        f"weight {i}": torch.nn.Parameter(torch.zeros(2, dtype=dtype))
        for i, dtype in enumerate(dtypes)
    }
    shards = zero.ZeroShards(model, model, 2, ranks)
    with pytest.raises(UserInputError, match=said):
        shards.own_optimizer(parameters, AdamWOptions(1e-3), master_dtype=master)


def test_a_missing_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in DEEPSPEED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("alignment.distributed.find_spec", lambda name: None)
    with pytest.raises(UserInputError, match=r"alignment-toolkit\[deepspeed\]"):
        Distributed(cpu=True)


def test_one_process_needs_no_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    for name, value in DEEPSPEED.items():
        monkeypatch.setenv(name, value)
    ranks = Distributed(cpu=True)
    assert (ranks.shards_state, ranks.zero_stage) == (False, None)
