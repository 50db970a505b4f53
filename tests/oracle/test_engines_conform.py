"""The contract of `RolloutEngine`, held against every engine.

1. Prompt-major order; exactly one completion for each request.
2. The stop token, or the tokens of a stop string, belong to the completion.
3. Log-probabilities equal a teacher-forced forward of the plain transformers model, one row at a
   time, unpadded, without a cache, under an independent reading of the sampling parameters.
4. The model's dtypes, modes, gradients and configs are as they were.
5. With counter-based randomness, a completion depends on its own request only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM
from vllm_server import VLLMStandIn

from alignment.config.schema import ServerConfig
from alignment.distributed import Distributed
from alignment.rollout.hf import HFEngine
from alignment.rollout.native import NativeEngine
from alignment.rollout.paged import PagedEngine
from alignment.rollout.vllm import VLLMEngine
from alignment.types import Completion, Prompt, SamplingParams, StopReason, UserInputError


class Letters:
    """A tokenizer whose token i reads as one character; ids below 3 are special."""

    eos_token_id = 2

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(48 + i) for i in ids if not (skip_special_tokens and i < 3))


def padded_native(model: Any, tokenizer: Any, **kwargs: Any) -> NativeEngine:
    return NativeEngine(model, tokenizer, share_attention=False, **kwargs)


SERVERS: list[VLLMStandIn] = []


@pytest.fixture(autouse=True)
def close_servers() -> Iterator[None]:
    yield
    while SERVERS:
        SERVERS.pop().close()


def served(model: Any, tokenizer: Any, **kwargs: Any) -> VLLMEngine:
    """On a server that draws tokens a second way, and stays up until the test is done."""
    server = VLLMStandIn(tokenizer.decode)
    SERVERS.append(server)
    config = ServerConfig(url=server.url)
    engine = VLLMEngine(model, tokenizer, server=config, distributed=Distributed(), **kwargs)
    engine.weights_updated(0)
    return engine


ENGINES: dict[str, Callable[..., Any]] = {
    "native": NativeEngine,
    "native_padded": padded_native,
    "hf": HFEngine,
    "paged": PagedEngine,
    "vllm": served,
}
COUNTED = ("native", "native_padded", "hf")
TRANSFORMS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.7},
    "all": {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "greedy": {"temperature": 0.0},
}
each_engine = pytest.mark.parametrize("name", ENGINES)
each_counted = pytest.mark.parametrize("name", COUNTED)

BASE = SamplingParams(max_new_tokens=10, n=3, seed=11, step=4)


def prompts() -> list[Prompt]:
    """Uneven lengths, one of a single token, and one prompt twice under two indices."""
    generator = torch.Generator().manual_seed(5)
    sizes = (5, 1, 13, 8)
    ids = [tuple(torch.randint(3, 64, (n,), generator=generator).tolist()) for n in sizes]
    found = [Prompt(one, "", 10 + i) for i, one in enumerate(ids)]
    return [*found, Prompt(ids[0], "", 40)]


def reference_logprobs(model: Any, prompt: Prompt, done: Completion, params: SamplingParams):
    """Log-probabilities by sorting, one position at a time, in float64."""
    ids = torch.tensor([[*prompt.token_ids, *done.token_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
    found = []
    for offset, token in enumerate(done.token_ids):
        row = logits[len(prompt.token_ids) - 1 + offset]
        if params.temperature == 0:
            found.append(0.0 if row.argmax() == token else -math.inf)
            continue
        probabilities = (row / params.temperature).softmax(-1)
        order = probabilities.argsort(descending=True).tolist()
        if params.top_k:
            order = order[: params.top_k]
        if params.top_p < 1:
            total = sum(probabilities[i].item() for i in order)
            kept, mass = [], 0.0
            for i in order:
                if mass >= params.top_p * total:
                    break
                kept.append(i)
                mass += probabilities[i].item()
            order = kept
        if params.min_p:
            order = [i for i in order if probabilities[i] >= params.min_p * probabilities[order[0]]]
        mass = sum(probabilities[i].item() for i in order)
        found.append(math.log(probabilities[token].item() / mass) if token in order else -math.inf)
    return found


def assert_faithful(model: Any, asked: list[Prompt], done: list[Completion], params) -> None:
    by_index = {prompt.index: prompt for prompt in asked}
    wanted = [(prompt.index, sample) for prompt in asked for sample in range(params.n)]
    assert [(c.prompt_index, c.sample_index) for c in done] == wanted
    for completion in done:
        assert 1 <= len(completion.token_ids) <= params.max_new_tokens
        reference = reference_logprobs(model, by_index[completion.prompt_index], completion, params)
        assert completion.sampling_logprobs == pytest.approx(reference, abs=1e-5)


@each_engine
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_logprobs_are_those_of_a_teacher_forced_forward(name: str, transform: str) -> None:
    model = tiny_model("llama")
    params = replace(BASE, **TRANSFORMS[transform])
    done = ENGINES[name](model, Letters()).generate(prompts(), params)
    assert_faithful(model, prompts(), done, params)


@each_counted
def test_min_p(name: str) -> None:
    model = tiny_model("llama")
    params = replace(BASE, min_p=0.2, temperature=1.5)
    assert_faithful(
        model, prompts(), ENGINES[name](model, Letters()).generate(prompts(), params), params
    )


@each_engine
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(name: str, family: str) -> None:
    model = tiny_model(family)
    if name == "paged" and model.config._attn_implementation == "eager":
        with pytest.raises(UserInputError, match="eager"):
            PagedEngine(model, Letters())
        return
    done = ENGINES[name](model, Letters()).generate(prompts(), BASE)
    assert_faithful(model, prompts(), done, BASE)


@each_engine
def test_several_end_tokens_end_a_completion_and_are_kept(name: str) -> None:
    ends = tuple(range(2, 22))
    params = replace(BASE, n=8, max_new_tokens=30)
    engine = ENGINES[name](tiny_model("llama"), Letters(), stop_token_ids=ends)
    done = engine.generate(prompts(), params)
    stopped = [c for c in done if c.stop_reason is StopReason.STOP]
    assert len({c.token_ids[-1] for c in stopped}) > 1
    assert any(len(c.token_ids) == 1 for c in stopped)  # at the first token
    for completion in done:
        inner = completion.token_ids[:-1]
        assert not set(inner) & set(ends)
        assert (completion.token_ids[-1] in ends) == (completion.stop_reason is StopReason.STOP)
        assert completion.stop_reason is StopReason.STOP or len(completion.token_ids) == 30


@each_engine
def test_stop_strings_end_a_completion_and_are_kept(name: str) -> None:
    model = tiny_model("llama")
    free = ENGINES[name](model, Letters(), stop_token_ids=()).generate(prompts(), BASE)
    pair = Letters().decode(free[4].token_ids[3:5])
    params = replace(BASE, stop=("no such text", pair))
    cut = ENGINES[name](model, Letters(), stop_token_ids=()).generate(prompts(), params)
    assert cut[4].token_ids == free[4].token_ids[:5]
    for whole, short in zip(free, cut, strict=True):
        text = Letters().decode(whole.token_ids)
        end = text.find(pair)
        length = len(text) if end < 0 else end + 2
        assert short.token_ids == whole.token_ids[:length]
        assert short.sampling_logprobs == pytest.approx(whole.sampling_logprobs[:length], abs=1e-5)
        assert short.stop_reason is (StopReason.LENGTH if end < 0 else StopReason.STOP)


@each_engine
def test_one_new_token(name: str) -> None:
    params = replace(BASE, max_new_tokens=1)
    model = tiny_model("llama")
    done = ENGINES[name](model, Letters()).generate(prompts(), params)
    assert_faithful(model, prompts(), done, params)
    assert {len(c.token_ids) for c in done} == {1}


@each_engine
def test_completions_end_with_the_context(name: str) -> None:
    model = tiny_model("gpt2", n_positions=16)
    done = ENGINES[name](model, Letters(), stop_token_ids=()).generate(prompts(), BASE)
    sizes = {p.index: len(p.token_ids) for p in prompts()}
    for completion in done:
        assert len(completion.token_ids) == min(10, 16 - sizes[completion.prompt_index])
        assert completion.stop_reason is StopReason.LENGTH


@each_engine
@pytest.mark.parametrize("length", [0, 256, 300])
def test_a_prompt_without_room_is_refused(name: str, length: int) -> None:
    engine = ENGINES[name](tiny_model("llama"), Letters())
    with pytest.raises(UserInputError, match="prompt 3 "):
        engine.generate([Prompt((5,) * length, "", 3)], BASE)


@each_engine
@pytest.mark.parametrize(
    "change",
    [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"min_p": 2.0}, {"stop": ("",)}],
)
def test_parameters_out_of_range_are_refused(name: str, change: dict[str, Any]) -> None:
    engine = ENGINES[name](tiny_model("llama"), Letters())
    with pytest.raises(UserInputError, match=next(iter(change))):
        engine.generate(prompts(), replace(BASE, **change))


@each_engine
def test_a_broken_model_is_an_error(name: str) -> None:
    if name == "paged":
        pytest.skip("transformers' worker thread reports a failed draw by its own error")
    model = tiny_model("llama")
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(Exception, match="not finite"):
        ENGINES[name](model, Letters()).generate(prompts(), BASE)


@each_engine
def test_text_and_version(name: str) -> None:
    engine = ENGINES[name](tiny_model("llama"), Letters(), stop_token_ids=range(2, 30))
    engine.weights_updated(7)
    for completion in engine.generate(prompts(), BASE):
        assert completion.policy_version == 7
        assert completion.text == Letters().decode(completion.token_ids, skip_special_tokens=True)


@each_engine
def test_nothing_asked_nothing_done(name: str) -> None:
    assert ENGINES[name](tiny_model("llama"), Letters()).generate([], BASE) == []


@each_counted
@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_does_not_depend_on_its_batch(name: str, family: str) -> None:
    model = tiny_model(family)
    params = replace(BASE, max_new_tokens=14)
    engine = ENGINES[name](model, Letters(), stop_token_ids=range(2, 8))
    together = {
        (c.prompt_index, c.sample_index): c.token_ids for c in engine.generate(prompts(), params)
    }
    for prompt in prompts():
        for c in engine.generate([prompt], replace(params, n=1)):
            assert c.token_ids == together[c.prompt_index, c.sample_index]
    backwards = engine.generate(prompts()[::-1], replace(params, n=11))
    assert all(
        c.token_ids == together[c.prompt_index, c.sample_index]
        for c in backwards
        if c.sample_index < 3
    )


@each_counted
def test_equal_prompts_with_different_indices_differ(name: str) -> None:
    engine = ENGINES[name](tiny_model("llama"), Letters(), stop_token_ids=())
    done = engine.generate(prompts(), BASE)
    first = [c.token_ids for c in done if c.prompt_index == 10]
    again = [c.token_ids for c in done if c.prompt_index == 40]
    assert len({*first, *again}) == 6


@each_counted
@pytest.mark.parametrize("change", [{"seed": 12}, {"step": 5}])
def test_seed_and_step_change_the_draws(name: str, change: dict[str, int]) -> None:
    engine = ENGINES[name](tiny_model("llama"), Letters())
    first = [c.token_ids for c in engine.generate(prompts(), BASE)]
    assert first == [c.token_ids for c in engine.generate(prompts(), BASE)]
    other = [c.token_ids for c in engine.generate(prompts(), replace(BASE, **change))]
    assert sum(a == b for a, b in zip(first, other, strict=True)) <= 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3_text", "gemma2"])
def test_the_counted_engines_agree(family: str) -> None:
    model = tiny_model(family)
    drawn = [
        [c.token_ids for c in ENGINES[name](model, Letters()).generate(prompts(), BASE)]
        for name in COUNTED
    ]
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.parametrize("name", ["native", "native_padded"])
@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
@pytest.mark.parametrize(
    "limits",
    [{"max_rows": 1}, {"max_rows": 9}, {"kv_tokens": 23}, {"kv_tokens": 90}, {"prefill_tokens": 1}],
    ids=str,
)
def test_limits_change_no_token(name: str, family: str, limits: dict[str, int]) -> None:
    # 13 prompt tokens and 10 new ones: a budget of 23 lets rows in one at a time.
    model = tiny_model(family)
    params = replace(BASE, n=9)
    ends = range(2, 8)
    free = ENGINES[name](model, Letters(), stop_token_ids=ends).generate(prompts(), params)
    tight = ENGINES[name](model, Letters(), stop_token_ids=ends, **limits)
    done = tight.generate(prompts(), params)
    assert [c.token_ids for c in done] == [c.token_ids for c in free]
    for one, other in zip(done, free, strict=True):
        assert one.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=1e-5)


def test_a_prompt_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    engine = NativeEngine(model, Letters(), max_rows=2)
    computed: list[int] = []
    monkeypatch.setattr(
        model.model.embed_tokens,
        "forward",
        lambda ids: (
            computed.append(ids.numel())
            or torch.nn.functional.embedding(ids, model.model.embed_tokens.weight)
        ),
    )
    done = engine.generate([prompts()[0], prompts()[4]], replace(BASE, n=9))
    fed_back = sum(len(c.token_ids) - 1 for c in done)
    assert sum(computed) == len(prompts()[0].token_ids) + fed_back


def test_native_samples_from_the_active_adapter() -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, init_lora_weights=False))
    done = NativeEngine(model, Letters()).generate(prompts(), BASE)
    assert_faithful(model, prompts(), done, BASE)
    with model.disable_adapter():
        plain = NativeEngine(model, Letters()).generate(prompts(), BASE)
    assert [c.token_ids for c in plain] != [c.token_ids for c in done]


def test_native_hands_recurrent_models_to_generate(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mamba",
        vocab_size=64,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=2,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    engine = NativeEngine(model, Letters())
    assert "recurrent state" in str(engine.fallback_reason)
    assert "transformers' generate" in caplog.text
    assert_faithful(model, prompts(), engine.generate(prompts(), BASE), BASE)
