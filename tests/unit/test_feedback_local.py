"""The local chat model, on a tiny random model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from chat_server import free_port
from transformers import AutoModelForCausalLM

from alignment.feedback.chat_model import Failure, Reply
from alignment.feedback.endpoint import EndpointChatModel
from alignment.feedback.judging import judge_pairs
from alignment.feedback.local import LocalChatModel, model_logprobs
from alignment.modeling.tiny import build_tiny, byte_tokenizer
from alignment.rollout.native import NativeEngine
from alignment.types import UserInputError

CONTEXT = 1024


def tiny(folder: Path) -> Any:
    """A tiny model whose replies differ and end: larger weights, and an end that is likely."""
    build_tiny(folder)
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def chat(model: Any) -> LocalChatModel:
    tokenizer = byte_tokenizer(context=CONTEXT)
    engine = NativeEngine(model, tokenizer, max_rows=4)
    return LocalChatModel(engine, tokenizer, logprobs=model_logprobs(model))


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def ask(chat: LocalChatModel, *texts: str, seed: int = 0, temperature: float = 1.0) -> list[Reply]:
    return chat.reply(
        [says(text) for text in texts], max_new_tokens=12, temperature=temperature, seed=seed
    )


def test_a_reply_depends_on_what_was_asked_and_not_on_what_else_was(chat: LocalChatModel) -> None:
    alone = [ask(chat, text)[0] for text in ("a", "b", "c")]
    assert ask(chat, "a", "b", "c") == alone
    assert ask(chat, "c", "x", "a", "b") == [alone[2], ask(chat, "x")[0], alone[0], alone[1]]
    assert ask(chat, "a", seed=1) != [alone[0]]


def test_a_repeated_conversation_is_drawn_again(chat: LocalChatModel) -> None:
    one, two, three = ask(chat, "a", "a", "a")
    assert len({one.text, two.text, three.text}) == 3
    assert ask(chat, "b", "a", "a")[1:] == [one, two]


def test_greedy_replies_do_not_depend_on_the_seed(chat: LocalChatModel) -> None:
    assert ask(chat, "a", temperature=0.0) == ask(chat, "a", temperature=0.0, seed=9)


def test_a_reply_without_an_end_is_cut_off(chat: LocalChatModel) -> None:
    (reply,) = ask(chat, "a", temperature=0.0)
    assert reply.failure is Failure.CUT_OFF
    assert reply.text
    assert reply.detail == "no end within 12 tokens"


@pytest.mark.parametrize("context", [None, CONTEXT])
def test_what_cannot_be_answered_is_refused_alone(model: Any, context: int | None) -> None:
    tokenizer = byte_tokenizer(context=CONTEXT)
    chat = LocalChatModel(NativeEngine(model, tokenizer), tokenizer, context=context)
    assistant_last = [*says("a"), {"role": "assistant", "content": "b"}]
    no_content = [{"role": "user"}]
    conversations = [says("a"), says("x" * 2000), assistant_last, says("b"), no_content, []]
    found = chat.reply(conversations, max_new_tokens=12, temperature=1.0, seed=0)
    refused = [reply.failure is Failure.REFUSED for reply in found]
    assert refused == [False, True, True, False, True, True]
    assert "leaves no room" in found[1].detail
    assert [found[0], found[3]] == ask(chat, "a", "b")


def test_parameters_that_make_no_sense_are_the_callers_mistake(chat: LocalChatModel) -> None:
    with pytest.raises(UserInputError, match="temperature"):
        ask(chat, "a", temperature=-1.0)


def test_a_model_without_a_chat_template_is_refused(model: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserInputError, match="the local model cannot hold a conversation"):
        LocalChatModel(NativeEngine(model, tokenizer), tokenizer)


def test_continuations_are_scored_as_the_next_answer(chat: LocalChatModel, model: Any) -> None:
    found = chat.score([says("a"), says("xyz")], ("A", "Be"))
    tokenizer = byte_tokenizer()
    for question, scores in zip(("a", "xyz"), found, strict=True):
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        for continuation, logprob in zip(("A", "Be"), scores.logprobs, strict=True):
            ids = torch.tensor([tokenizer.encode(text + continuation)])
            with torch.no_grad():
                log_p = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
            n = len(continuation)
            expected = sum(float(log_p[-1 - n + k, ids[0, -n + k]]) for k in range(n))
            assert logprob == pytest.approx(expected, abs=1e-4)


def test_scoring_leaves_the_model_as_it_was(chat: LocalChatModel, model: Any) -> None:
    model.train()
    try:
        inside = chat.score([says("a")], ("A", "B"))
        assert model.training
    finally:
        model.eval()
    assert inside == chat.score([says("a")], ("A", "B"))


def test_what_cannot_be_scored_is_refused_alone(chat: LocalChatModel) -> None:
    assistant_last = [*says("a"), {"role": "assistant", "content": "b"}]
    good, bad = chat.score([says("a"), assistant_last], ("A", "B"))
    assert (good.failure, bad.failure, bad.logprobs) == (Failure.NONE, Failure.REFUSED, ())


def test_scoring_without_log_probabilities_is_refused(model: Any) -> None:
    tokenizer = byte_tokenizer()
    chat = LocalChatModel(NativeEngine(model, tokenizer), tokenizer)
    with pytest.raises(UserInputError, match="made without log-probabilities"):
        judge_pairs(chat, [(says("q"), "a", "b")], principle="p", seed=0, verdict="logprobs")


def test_a_local_judge_is_antisymmetric_in_its_margin(chat: LocalChatModel) -> None:
    items = [(says("q"), "one", "two"), (says("q"), "two", "one")]
    there, back = judge_pairs(chat, items, principle="p", seed=0, verdict="logprobs")
    assert there.margin is not None
    assert back.margin is not None
    assert there.margin == pytest.approx(-back.margin, abs=1e-5)
    assert abs(there.margin) > 1e-3


def test_a_model_of_nan_weights_gives_no_verdicts(tmp_path: Path) -> None:
    broken = tiny(tmp_path)
    with torch.no_grad():
        broken.get_input_embeddings().weight.fill_(float("nan"))
    tokenizer = byte_tokenizer(context=CONTEXT)
    engine = NativeEngine(broken, tokenizer)
    chat = LocalChatModel(engine, tokenizer, logprobs=model_logprobs(broken))
    items = [(says("q"), "one", "two"), (says("r"), "one", "two")]
    judged = judge_pairs(chat, items, principle="p", seed=0, verdict="logprobs")
    assert [judgement.failure for judgement in judged] == [Failure.NOT_FINITE] * 2


# --- a real server -------------------------------------------------------------------------------


@contextmanager
def transformers_serve(folder: Path, log: Path) -> Iterator[str]:
    """`transformers serve` on a model folder; its address."""
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_until_up(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx2.get(address, timeout=2).status_code == 200:
                return
        except httpx2.HTTPError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


@pytest.mark.slow
def test_transformers_serve_gives_the_local_models_replies(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="transformers[serving] is not installed")
    pytest.importorskip("uvicorn", reason="transformers[serving] is not installed")
    folder = tmp_path / "model"
    model = tiny(folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "do_sample": True}))
    tokenizer = byte_tokenizer(context=CONTEXT)
    local = LocalChatModel(NativeEngine(model, tokenizer), tokenizer)
    conversations = [says("hello"), [{"role": "system", "content": "Be kind."}, *says("Who?")]]
    greedy: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "seed": 0}
    sampled = greedy | {"temperature": 1.0}

    with transformers_serve(folder, tmp_path / "log") as url:
        remote = EndpointChatModel(url, str(folder), cache=tmp_path / "cache", max_in_flight=1)
        expected = local.reply(conversations, **greedy)
        found = remote.reply(conversations, **greedy)
        assert [reply.text for reply in found] == [reply.text for reply in expected]
        assert [reply.failure for reply in found] == [reply.failure for reply in expected]
        assert found[0].text != found[1].text

        first = remote.reply(conversations, **sampled)
        assert [r.text for r in first] == [r.text for r in remote.reply(conversations, **sampled)]
        assert [r.text for r in first] != [
            r.text for r in remote.reply(conversations, **sampled | {"seed": 1})
        ]

        (refused,) = EndpointChatModel(url, "another").reply(conversations[:1], **greedy)
        assert refused.failure is Failure.REFUSED
        assert "another" in refused.detail
