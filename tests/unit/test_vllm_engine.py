"""What a rollout engine on a server must not do: sample from other weights than the policy's.

1. The server has the policy's weights after every change, merged where they are LoRA's.
2. Completions of a server that was restarted, or is shared, are an error.
3. A server that was started otherwise than it must be is refused, with the command to start it.
4. A busy server is asked again; one that says no is quoted.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from tiny_runs import events_of, metrics_of, recipe_of, rollouts_of, run, steps_of, weights_of
from transformers import AutoTokenizer
from vllm_server import VLLMStandIn, vllm_server

from alignment.config.load import dump_recipe, load_recipe
from alignment.config.schema import Recipe, ServerConfig, TaskConfig
from alignment.distributed import Distributed
from alignment.modeling.catalog import fetch
from alignment.modeling.finite import NonFiniteError
from alignment.rollout.native import NativeEngine
from alignment.rollout.server import ServerError
from alignment.rollout.vllm import VLLMEngine
from alignment.runs.directory import RunDirectory
from alignment.runs.outputs import FINISHED
from alignment.trainers.evaluation import evaluate_model
from alignment.trainers.run import train
from alignment.types import AlignmentError, Prompt, SamplingParams, UserInputError

PROMPTS = [Prompt((5, 9, 30), "", 4), Prompt((7,), "", 9)]
GREEDY = SamplingParams(max_new_tokens=8, temperature=0.0)
SAMPLED = SamplingParams(max_new_tokens=6, n=3, seed=1, step=2)


class Letters:
    eos_token_id = 2

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return "".join(chr(48 + i) for i in ids)


@pytest.fixture
def server() -> Iterator[VLLMStandIn]:
    with vllm_server(Letters().decode) as stand_in:
        yield stand_in


def engine_on(server: VLLMStandIn, model: Any, **settings: Any) -> VLLMEngine:
    config = ServerConfig(url=server.url, **settings)
    return VLLMEngine(model, Letters(), server=config, distributed=Distributed())


def greedy_tokens(model: Any) -> list[tuple[int, ...]]:
    """By the toolkit's own engine, which samples from the model itself."""
    return [c.token_ids for c in NativeEngine(model, Letters()).generate(PROMPTS, GREEDY)]


# -- 1: the policy's weights ----------------------------------------------------------------------


def test_i16_the_server_has_the_weights_after_each_change(server: VLLMStandIn) -> None:
    model = tiny_model("llama")
    engine = engine_on(server, model)
    engine.weights_updated(0)
    assert [c.token_ids for c in engine.generate(PROMPTS, GREEDY)] == greedy_tokens(model)
    before = greedy_tokens(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    engine.weights_updated(1)
    after = engine.generate(PROMPTS, GREEDY)
    assert [c.token_ids for c in after] == greedy_tokens(model) != before
    assert {c.policy_version for c in after} == {1}


def test_lora_is_merged_on_the_way_and_the_policy_is_as_it_was(server: VLLMStandIn) -> None:
    options = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(tiny_model("llama"), options)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    engine = engine_on(server, model)
    engine.weights_updated(0)
    assert [c.token_ids for c in engine.generate(PROMPTS, GREEDY)] == greedy_tokens(model)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    with model.disable_adapter():
        assert greedy_tokens(model) != [c.token_ids for c in engine.generate(PROMPTS, GREEDY)]


def test_one_version_of_the_weights_is_kept_on_disk(server: VLLMStandIn, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    engine = engine_on(server, tiny_model("llama"), weights_dir=str(folder))
    for version in range(3):
        engine.weights_updated(version)
        assert len(list(folder.iterdir())) == 1
    (weights,) = folder.glob("*/model.safetensors")
    assert weights.parent.stat().st_mode & 0o777 == 0o755
    del engine
    assert list(folder.iterdir()) == []


def test_what_a_killed_run_left_on_disk_is_removed(server: VLLMStandIn, tmp_path: Path) -> None:
    host = socket.gethostname()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, alive, elsewhere = (
        tmp_path / f"policy-weights-{name}-x"
        for name in (f"{host}-{ended.pid}", f"{host}-{os.getppid()}", f"other-{ended.pid}")
    )
    for folder in (dead, alive, elsewhere):
        folder.mkdir()
        (folder / "model.safetensors").touch()
    engine_on(server, tiny_model("llama"), weights_dir=str(tmp_path)).weights_updated(0)
    assert (dead.exists(), alive.exists(), elsewhere.exists()) == (False, True, True)


def test_a_folder_that_cannot_be_written_is_named(server: VLLMStandIn, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    engine = engine_on(server, tiny_model("llama"), weights_dir=str(tmp_path / "file" / "below"))
    with pytest.raises(AlignmentError, match=r"rollout.server.weights_dir: .*file/below"):
        engine.weights_updated(0)


def test_nothing_is_sampled_from_weights_that_were_never_sent(server: VLLMStandIn) -> None:
    with pytest.raises(AlignmentError, match="never given the policy's weights"):
        engine_on(server, tiny_model("llama")).generate(PROMPTS, SAMPLED)


# -- 2: a server that has other weights -----------------------------------------------------------


def test_a_server_that_was_restarted_is_an_error(server: VLLMStandIn) -> None:
    engine = engine_on(server, tiny_model("llama"))
    engine.weights_updated(0)
    server.restart()
    with pytest.raises(ServerError, match="was restarted, or another run uses it"):
        engine.generate(PROMPTS, SAMPLED)


def test_two_runs_on_one_server_are_an_error(server: VLLMStandIn) -> None:
    first, second = (engine_on(server, tiny_model("llama", seed=seed)) for seed in (0, 1))
    first.weights_updated(0)
    second.weights_updated(0)
    assert second.generate(PROMPTS, SAMPLED)
    with pytest.raises(ServerError, match="a run needs a server of its own"):
        first.generate(PROMPTS, SAMPLED)


def test_another_runs_weights_that_were_loaded_in_part_are_an_error(server: VLLMStandIn) -> None:
    """The other run ends before it can say what the server holds."""
    first, second = (engine_on(server, tiny_model("llama", seed=seed)) for seed in (0, 1))
    first.weights_updated(0)
    server.failures["/collective_rpc"] = [500]
    with pytest.raises(ServerError):
        second.weights_updated(0)
    with pytest.raises(ServerError, match="a run needs a server of its own"):
        first.generate(PROMPTS, SAMPLED)


def test_a_server_that_restarts_while_it_is_given_weights_is_an_error(server: VLLMStandIn) -> None:
    engine = engine_on(server, tiny_model("llama"))
    server.restarts_after_loading = True
    with pytest.raises(ServerError, match="holds other weights than it was just given"):
        engine.weights_updated(0)


def test_what_the_old_weights_computed_must_be_dropped(server: VLLMStandIn) -> None:
    server.cache_is_free = False
    with pytest.raises(ServerError, match="cannot drop what it computed with the old weights"):
        engine_on(server, tiny_model("llama")).weights_updated(0)


def test_weights_that_the_server_cannot_load_are_an_error(server: VLLMStandIn) -> None:
    server.failures["/collective_rpc"] = [500]
    engine = engine_on(server, tiny_model("llama"))
    with pytest.raises(ServerError, match=r"asked to fail; the weights in /.* were not loaded"):
        engine.weights_updated(0)


# -- 3: a server that was started otherwise -------------------------------------------------------

START = r"VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs"


@pytest.mark.parametrize("address", ["/v1/models", "/server_info", "/weight_info"])
def test_a_server_without_the_addresses_is_refused(server: VLLMStandIn, address: str) -> None:
    server.failures[address] = [404]
    with pytest.raises(UserInputError, match=rf"{address}.* status 404.*{START}"):
        engine_on(server, tiny_model("llama"))


def test_log_probabilities_of_another_distribution_are_refused(server: VLLMStandIn) -> None:
    server.logprobs_mode = "raw_logprobs"
    with pytest.raises(UserInputError, match=f"are raw_logprobs, not .*{START}"):
        engine_on(server, tiny_model("llama"))


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignment.rollout.server._BACKOFF_SECONDS", 0.0)
    with vllm_server(Letters().decode) as gone:
        config = ServerConfig(url=gone.url)
    with pytest.raises(UserInputError, match=rf"rollout.server.url: {gone.url} .*ConnectError"):
        VLLMEngine(tiny_model("llama"), Letters(), server=config, distributed=Distributed())


def test_the_address_may_come_from_the_environment(
    server: VLLMStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> VLLMEngine:
        config = ServerConfig()
        return VLLMEngine(tiny_model("llama"), Letters(), server=config, distributed=Distributed())

    monkeypatch.delenv("ALIGN_ROLLOUT_SERVER", raising=False)
    with pytest.raises(UserInputError, match=r"rollout.server.url is not given, and the variable"):
        make()
    monkeypatch.setenv("ALIGN_ROLLOUT_SERVER", server.url)
    make().weights_updated(0)
    assert server.loads == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("rollout.engine=vllm",), "rollout.server: required by engine vllm"),
        (("rollout.server.url=http://h",), "rollout.server: engine native uses no server"),
        (
            ("rollout.engine=vllm", "rollout.server.url=http://h", "rollout.kv_tokens=9"),
            "rollout.kv_tokens: the server's own setting",
        ),
        (
            ("rollout={engine: vllm, server: {}, max_new_tokens: 8, min_p: 0.1, top_p: 0.9}",),
            "rollout.min_p: engine vllm cuts by min_p before",
        ),
    ],
)
def test_recipes_name_a_server_where_one_is_used(
    tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserInputError, match=message):
        recipe_of("grpo", tmp_path, *settings)


@pytest.mark.parametrize("url", ["localhost:8000", "http://user:secret@host:8000", "http://"])
def test_addresses_that_cannot_be_right_are_refused_and_tell_no_secret(url: str) -> None:
    config = ServerConfig(url=url)
    with pytest.raises(UserInputError, match=r"rollout.server.url: give a plain address") as said:
        VLLMEngine(tiny_model("llama"), Letters(), server=config, distributed=Distributed())
    assert "secret" not in str(said.value)


def test_no_proxy_stands_in_between(server: VLLMStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, "socks5h://127.0.0.1:9")
    engine_on(server, tiny_model("llama")).weights_updated(0)


def test_a_shorter_context_of_the_server_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with vllm_server(Letters().decode, context=20) as short:
        engine = engine_on(short, tiny_model("llama"), weights_dir=None)
        engine.weights_updated(0)
        prompt = Prompt((5,) * 15, "", 1)
        done = engine.generate([prompt], SamplingParams(max_new_tokens=9))
    assert "the server takes 20 tokens for prompt and completion together, the model 256" in (
        caplog.text
    )
    assert len(done[0].token_ids) <= 5


# -- 4: requests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [None, 429, 503])
def test_a_busy_server_is_asked_again_for_the_same(
    server: VLLMStandIn, failure: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignment.rollout.server._BACKOFF_SECONDS", 0.0)
    engine = engine_on(server, tiny_model("llama"))
    engine.weights_updated(0)
    free = engine.generate(PROMPTS, SAMPLED)
    server.failures["/v1/completions"] = [failure, failure, 200, failure]
    assert engine.generate(PROMPTS, SAMPLED) == free


def test_what_the_server_refuses_is_quoted_and_not_asked_again(server: VLLMStandIn) -> None:
    engine = engine_on(server, tiny_model("llama"))
    engine.weights_updated(0)
    server.failures["/v1/completions"] = [400] * 6
    with pytest.raises(ServerError, match=r"/v1/completions: status 400: asked to fail"):
        engine.generate(PROMPTS, SAMPLED)
    asked = [path for path, _ in server.requests if path == "/v1/completions"]
    assert len(asked) <= 6


def test_an_error_does_not_wait_for_the_completions_in_flight(server: VLLMStandIn) -> None:
    engine = engine_on(server, tiny_model("llama"))
    engine.weights_updated(0)
    server.failures["/v1/completions"] = [400]
    server.seconds = 4.0
    began = time.monotonic()
    with pytest.raises(ServerError, match="status 400"):
        engine.generate(PROMPTS, SAMPLED)
    assert time.monotonic() - began < 3.0


def test_each_completion_is_a_request_with_a_seed_of_its_own(server: VLLMStandIn) -> None:
    engine = engine_on(server, tiny_model("llama"))
    engine.weights_updated(0)
    engine.generate(PROMPTS, SAMPLED)
    bodies = [body for path, body in server.requests if path == "/v1/completions"]
    assert len(bodies) == 6
    assert len({body["seed"] for body in bodies}) == 6


def test_a_completion_that_ends_too_early_is_an_error(server: VLLMStandIn) -> None:
    engine = engine_on(server, tiny_model("llama"))
    engine.weights_updated(0)
    server.most = 2
    with pytest.raises(ServerError, match="ended a completion after 2 tokens, which had room for"):
        engine.generate(PROMPTS, SAMPLED)


@pytest.mark.parametrize("value", [None, -9999.0])
def test_a_token_that_was_not_possible_is_an_error(
    server: VLLMStandIn, value: float | None
) -> None:
    engine = engine_on(server, tiny_model("llama"))
    engine.weights_updated(0)
    server.logprob = [value]
    with pytest.raises(NonFiniteError, match=r"token 0 of sample . of prompt . are not finite"):
        engine.generate(PROMPTS, SAMPLED)


# -- runs -----------------------------------------------------------------------------------------

EVALUATED = "eval={every: 1, at_start: true, tasks: [{type: verifiable, samples: 1}]}"


@pytest.fixture
def tiny_server() -> Iterator[VLLMStandIn]:
    tokenizer = AutoTokenizer.from_pretrained(fetch("tiny-random"))
    with vllm_server(tokenizer.decode, context=1024) as stand_in:
        yield stand_in


def test_a_run_learns_from_a_server(tiny_server: VLLMStandIn, tmp_path: Path) -> None:
    served = ("rollout.engine=vllm", f"rollout.server.url={tiny_server.url}", EVALUATED)
    done = run("grpo", tmp_path / "whole", *served)
    steps = metrics_of(done)
    assert len(steps) == 2
    assert all(step["engine/logprob_gap_max"] < 1e-5 for step in steps)
    assert steps[-1]["optim/moved_share"] > 0
    versions = [{row["policy_version"] for row in rows} for rows in rollouts_of(done)]
    assert versions == [{0}, {1}]
    assert tiny_server.loads == 2 + 3  # before each rollout, and before each evaluation
    assert len(list((done.path / "evals").glob("verifiable-step-*.json"))) == 3


def test_i45_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(
    tiny_server: VLLMStandIn, tmp_path: Path
) -> None:
    served = (
        "rollout.engine=vllm",
        f"rollout.server.url={tiny_server.url}",
        "checkpoint.every=1",
    )
    whole = run("grpo", tmp_path / "whole", *served)
    folder = tmp_path / "part" / "grpo"
    shutil.copytree(whole.path, folder)
    part = RunDirectory.open(folder)
    part.recipe.write_text(dump_recipe(recipe_of("grpo", folder.parent, *served)), "utf-8")
    shutil.rmtree(part.checkpoints_dir / "step-000002")
    (folder / FINISHED).unlink()
    again = run("grpo", folder.parent, *served)
    assert [event["step"] for event in events_of(again, "resume")] == [1]
    assert steps_of(again) == steps_of(whole)
    assert rollouts_of(again) == rollouts_of(whole)
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(again)[name], weight)


def test_evaluations_of_other_models_leave_the_server_alone(
    tiny_server: VLLMStandIn, tmp_path: Path
) -> None:
    """Rank 0 makes them by itself, and the server has the weights of the policy in training."""
    served = ("rollout.engine=vllm", f"rollout.server.url={tiny_server.url}")
    recipe = recipe_of("grpo", tmp_path, *served)
    task = TaskConfig.model_validate({"type": "verifiable", "samples": 1})
    assert evaluate_model(recipe, recipe.model, [task], seed=0)["verifiable"].metrics
    assert tiny_server.requests == []


def test_i45_an_evaluation_does_not_mark_the_answers_that_follow_it(tmp_path: Path) -> None:
    settings = [f"run.dir={tmp_path}", "expect=[]", EVALUATED]
    recipe = load_recipe("tiny/ai_feedback", settings)
    assert isinstance(recipe, Recipe)
    made = train(recipe)
    assert {row["policy_version"] for rows in rollouts_of(made) for row in rows} == {0}
