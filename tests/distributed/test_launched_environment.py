"""What the shipped configurations put into a rank's environment: what the tests of two processes
set by hand."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pytest
import torch.distributed.run
from sharded_worker import FSDP2
from zero_worker import zero

from alignment.cli.launch import _Agent, plan_launch
from alignment.distributed import Distributed

SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
BY_HAND = {"ddp": {}, "fsdp2": FSDP2, "zero2": zero("2"), "zero3": zero("3")}


@pytest.fixture(autouse=True)
def not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("ACCELERATE_", "FSDP_")) or name == "RANK":
            monkeypatch.delenv(name)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def environment_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """Of the ranks that `align train R --accelerate NAME --processes 2` starts."""
    seen: dict[str, str] = {}
    monkeypatch.setattr(torch.distributed.run, "run", lambda _: seen.update(os.environ))
    agent = _Agent(plan_launch(name, 2), ["train", "tiny/sft"])
    agent.run()
    assert agent.error is None
    return seen


@pytest.mark.parametrize("name", BY_HAND)
def test_a_shipped_configuration_asks_for_what_is_tested(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    environment = environment_of(name, monkeypatch)
    expected = dict.fromkeys(SHARDING, "false") | BY_HAND[name]
    assert {key: environment.get(key, "false") for key in expected} == expected
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    Distributed(cpu=True)  # refuses nothing of it
