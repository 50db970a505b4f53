"""The engine on vLLM itself: run where the variable ALIGN_VLLM names its executable.

    ALIGN_VLLM=/path/to/bin/vllm pytest tests/oracle/test_real_vllm.py

vLLM pins versions of its own, so that it lives in another environment; on a machine without a GPU
its build for CPUs does. What the other tests hold against a stand-in is held here against the
server that it stands in for.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from peft import LoraConfig, get_peft_model
from test_engines_conform import TRANSFORMS, Letters, assert_faithful, prompts, reference_logprobs
from tiny_models import tiny_model
from tiny_runs import metrics_of, rollouts_of, run
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from alignment.config.schema import ServerConfig
from alignment.distributed import Distributed
from alignment.modeling.catalog import fetch
from alignment.rollout.native import NativeEngine
from alignment.rollout.server import ServerError
from alignment.rollout.vllm import VLLMEngine
from alignment.types import Prompt, SamplingParams, StopReason

VLLM = os.environ.get("ALIGN_VLLM", "")
pytestmark = [
    pytest.mark.skipif(not VLLM, reason="ALIGN_VLLM names no vllm executable"),
    pytest.mark.timeout(900),
]

START_SECONDS = 600
PARAMS = SamplingParams(max_new_tokens=10, n=3, seed=11, step=4)
GREEDY = replace(PARAMS, temperature=0.0)
# Heads as wide as vLLM's kernels take them, and the vocabulary of the tiny catalogue model.
WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}


@dataclass(frozen=True)
class Served:
    """A server, and the folder of the model that it was started with."""

    url: str
    folder: Path
    seen: Path

    def model(self, seed: int = 0) -> Any:
        """That model, or another of its shape."""
        if seed == 0:
            return AutoModelForCausalLM.from_pretrained(self.folder).eval()
        return tiny_model("llama", seed=seed, vocab_size=260, eos_token_id=258, **WIDE)

    def engine(self, model: Any, tokenizer: Any = None, **options: Any) -> VLLMEngine:
        config = ServerConfig(url=self.url, weights_dir=str(self.seen))
        ranks, tokenizer = Distributed(), tokenizer or Letters()
        engine = VLLMEngine(model, tokenizer, server=config, distributed=ranks, **options)
        engine.weights_updated(0)
        return engine


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=260, eos_token_id=258, **WIDE).save_pretrained(folder)
    AutoTokenizer.from_pretrained(fetch("tiny-random")).save_pretrained(folder)
    GenerationConfig(eos_token_id=258, repetition_penalty=1.5).save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    options = "--dtype float32 --enforce-eager --logprobs-mode processed_logprobs --max-model-len"
    log = folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [VLLM, "serve", str(folder), "--port", str(port), *options.split(), "200"],
            env=os.environ | settings,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, process, log)
            yield Served(url, folder, tmp_path_factory.mktemp("weights"))
        finally:
            process.terminate()
            process.wait(60)


def wait_for(url: str, process: subprocess.Popen[Any], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx2.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx2.HTTPError:
            time.sleep(1)
    raise AssertionError(f"the server did not come up: {log.read_text()[-3000:]}")


@pytest.mark.parametrize("transform", [*TRANSFORMS, "min_p"])
def test_logprobs_are_those_of_a_teacher_forced_forward(served: Served, transform: str) -> None:
    model = served.model()
    changes: dict[str, Any] = {**TRANSFORMS, "min_p": {"min_p": 0.2, "temperature": 1.5}}
    params = replace(PARAMS, **changes[transform])
    assert_faithful(model, prompts(), served.engine(model).generate(prompts(), params), params)


def test_i16_the_server_has_the_weights_after_each_change(served: Served) -> None:
    before, after = served.model(), served.model(seed=5)
    assert greedy(served, before) == locally(before)
    assert greedy(served, after) == locally(after) != locally(before)
    lora = get_peft_model(served.model(), LoraConfig(r=4, init_lora_weights=False))
    assert greedy(served, lora) == locally(lora) != locally(before)


def greedy(served: Served, model: Any) -> list[tuple[int, ...]]:
    return [c.token_ids for c in served.engine(model).generate(prompts(), GREEDY)]


def locally(model: Any) -> list[tuple[int, ...]]:
    return [c.token_ids for c in NativeEngine(model, Letters()).generate(prompts(), GREEDY)]


def test_seeds_decide_what_is_drawn(served: Served) -> None:
    engine = served.engine(served.model())
    first, again, other = (
        [c.token_ids for c in engine.generate(prompts(), replace(PARAMS, seed=seed))]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert sum(one == two for one, two in zip(first, other, strict=True)) <= 1
    assert len(set(first)) >= len(first) - 1


def test_end_tokens_and_stop_strings_are_kept(served: Served) -> None:
    engine = served.engine(served.model(), stop_token_ids=range(2, 90))
    stopped = engine.generate(prompts(), PARAMS)
    assert any(c.stop_reason is StopReason.STOP for c in stopped)
    for c in stopped:
        assert (c.stop_reason is StopReason.STOP) == (c.token_ids[-1] in range(2, 90))
        assert not set(c.token_ids[:-1]) & set(range(2, 90))


def test_a_stop_string_ends_a_completion_and_is_kept(served: Served) -> None:
    """Of the server's own text, whose letters are bytes."""
    own = AutoTokenizer.from_pretrained(served.folder)
    engine = served.engine(served.model(), own, stop_token_ids=())
    params = replace(PARAMS, n=20, stop=("a", "e", "t"))
    done = engine.generate(prompts(), params)
    assert any(c.stop_reason is StopReason.STOP for c in done)
    for c in done:
        whole, before = (own.decode(ids) for ids in (c.token_ids, c.token_ids[:-1]))
        assert (c.stop_reason is StopReason.STOP) == any(text in whole for text in params.stop)
        assert not any(text in before for text in params.stop)


def test_the_generation_config_of_the_served_model_changes_nothing(served: Served) -> None:
    """It penalizes repetition, and the prompt's tokens come again."""
    model = served.model()
    prompt = Prompt((7,) * 40, "", 1)
    params = replace(PARAMS, n=12, temperature=0.5)
    done = served.engine(model).generate([prompt], params)
    assert_faithful(model, [prompt], done, params)


def test_completions_end_with_the_servers_context(served: Served) -> None:
    engine = served.engine(served.model(), stop_token_ids=())
    (done,) = engine.generate([Prompt((5,) * 196, "", 3)], replace(PARAMS, n=1))
    assert len(done.token_ids) == 4
    reference = reference_logprobs(served.model(), Prompt((5,) * 196, "", 3), done, PARAMS)
    assert done.sampling_logprobs == pytest.approx(reference, abs=1e-5)


def test_two_runs_on_one_server_are_an_error(served: Served) -> None:
    first, second = (served.engine(served.model(seed=seed)) for seed in (0, 5))
    assert second.generate(prompts(), PARAMS)
    with pytest.raises(ServerError, match="a run needs a server of its own"):
        first.generate(prompts(), PARAMS)


def test_a_run_learns_from_it(served: Served, tmp_path: Path) -> None:
    settings = (
        f"model.path={served.folder}",
        "rollout.engine=vllm",
        f"rollout.server={{url: {served.url}, weights_dir: {served.seen}}}",
        "algorithm.steps=3",
        "data.max_tokens=150",
    )
    done = run("grpo", tmp_path, *settings)
    for step in metrics_of(done):
        assert step["engine/logprob_gap_max"] < 1e-4
        assert step["optim/moved_share"] > 0
    versions = [{row["policy_version"] for row in rows} for rows in rollouts_of(done)]
    assert versions == [{0}, {1}, {2}]
