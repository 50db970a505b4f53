"""Memory that does not hold the rows being sampled: fewer at a time, the same completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_runs
from fault_runs import NO_TASKS, run_out
from tiny_models import tiny_model
from tiny_runs import events_of, metrics_of

from alignment.modeling import memory
from alignment.modeling.memory import OutOfMemory
from alignment.rollout import hf, native, rows
from alignment.rollout.hf import HFEngine
from alignment.rollout.native import NativeEngine
from alignment.types import Prompt, SamplingParams


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_faults_memory.py."""
    monkeypatch.setattr(memory, "gc", SimpleNamespace(collect=lambda: 0))


PARAMS = SamplingParams(max_new_tokens=9, n=3, seed=3, step=2)
PROMPTS = [Prompt((5,) * size, "", index) for index, size in enumerate((4, 1, 7))]


class Letters:
    eos_token_id = 2

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


@contextmanager
def memory_for_rows(limit: int) -> Iterator[list[int]]:
    """Engines run out of memory when they draw a third token for more rows than this."""
    drawn: list[int] = []

    def extend(running: Sequence[rows.Row], *rest: Any) -> None:
        drawn.append(len(running))
        if len(running) > limit and min(len(row.tokens) for row in running) >= 2:
            run_out()
        rows.extend(running, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "extend", extend)
        patch.setattr(hf, "extend", extend)
        yield drawn


@pytest.mark.parametrize("make", [NativeEngine, HFEngine], ids=["native", "hf"])
@pytest.mark.parametrize("limit", [1, 3])
def test_sampling_out_of_memory_goes_on_with_fewer_rows(make: Any, limit: int) -> None:
    model = tiny_model("llama")
    expected = make(model, Letters()).generate(PROMPTS, PARAMS)
    engine = make(model, Letters())
    with memory_for_rows(limit) as drawn:
        found = engine.generate(PROMPTS, PARAMS)
        assert max(drawn) == 9
        assert 1 <= engine.max_rows <= max(limit, 2)
        drawn.clear()
        assert engine.generate(PROMPTS, PARAMS) == found
        assert max(drawn) <= engine.max_rows
    for one, other in zip(found, expected, strict=True):
        assert one.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=1e-5)
        assert replace(one, sampling_logprobs=()) == replace(other, sampling_logprobs=())


@pytest.mark.parametrize("make", [NativeEngine, HFEngine], ids=["native", "hf"])
def test_one_completion_that_does_not_fit_is_named(make: Any) -> None:
    with memory_for_rows(0), pytest.raises(OutOfMemory, match=r"up to 16 tokens .*max_new_tokens"):
        make(tiny_model("llama"), Letters(), stop_token_ids=()).generate(PROMPTS, PARAMS)


def test_a_run_tells_that_it_samples_fewer_rows(tmp_path: Path) -> None:
    whole = tiny_runs.run("grpo", tmp_path / "whole", NO_TASKS)
    with memory_for_rows(5):
        directory = tiny_runs.run("grpo", tmp_path / "few", NO_TASKS)
    (event,) = events_of(directory, "out_of_memory")
    assert (event["setting"], event["step"], event["old"]) == ("rollout.max_rows", 1, 64)
    assert event["new"] <= 8
    assert [record["reward/mean"] for record in metrics_of(directory)] == pytest.approx(
        [record["reward/mean"] for record in metrics_of(whole)], rel=1e-4
    )
