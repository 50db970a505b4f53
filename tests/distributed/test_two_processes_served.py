"""Ranks that sample on one server: the same samples and weights as one process that does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_runs import GRPO, rollouts_of, run, steps_of, weights_of
from transformers import AutoTokenizer
from vllm_server import VLLMStandIn, vllm_server

from alignment.modeling.catalog import fetch
from alignment.runs.directory import RunDirectory

HERE = Path(__file__).parent
SECONDS = 200  # a hang is a failure
SETTINGS = ("algorithm.prompts_per_step=3", "model.lora={rank: 4}", "optim.eps=1e-3")


@pytest.fixture
def server() -> Iterator[VLLMStandIn]:
    tokenizer = AutoTokenizer.from_pretrained(fetch("tiny-random"))
    with vllm_server(tokenizer.decode, context=1024) as stand_in:
        yield stand_in


def test_sharded_ranks_give_one_server_the_whole_weights(
    server: VLLMStandIn, tmp_path: Path
) -> None:
    """Three prompts for two ranks: one samples more than the other."""
    settings = (*SETTINGS, "rollout.engine=vllm", f"rollout.server.url={server.url}")
    one = run("grpo", tmp_path / "one", *settings)
    loads = server.loads
    done = subprocess.run(
        [
            *(sys.executable, "-m", "alignment", "train", "tiny/grpo"),
            *(*GRPO, *settings, f"run.dir={tmp_path / 'two'}"),
            *("--accelerate", "fsdp2", "--processes", "2"),
        ],
        env=os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    two = RunDirectory.open(tmp_path / "two" / "grpo")
    assert server.loads - loads == loads == 2  # the weights come once a step, whoever samples
    drawn = [
        [[row["completion_ids"] for row in rows] for rows in rollouts_of(run)] for run in (one, two)
    ]
    assert drawn[0] == drawn[1]
    for ours, theirs in zip(steps_of(two), steps_of(one), strict=True):
        assert ours["reward/mean"] == pytest.approx(theirs["reward/mean"], abs=1e-9)
        assert ours["engine/logprob_gap_max"] < 1e-5
    for name, weight in weights_of(one).items():
        torch.testing.assert_close(weights_of(two)[name], weight, rtol=0.0, atol=1e-6)
