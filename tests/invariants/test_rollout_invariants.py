"""Rows of the table of silent bugs that a rollout engine must not have."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from alignment.modeling.logits import transform_logits
from alignment.rollout.hf import HFEngine
from alignment.rollout.native import NativeEngine
from alignment.rollout.paged import PagedEngine
from alignment.types import Prompt, SamplingParams


class Letters:
    eos_token_id = 2

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(48 + i) for i in ids)


PARAMS = SamplingParams(max_new_tokens=8, n=2, seed=1)
SHORT = Prompt((9, 8, 7), "", 0)
LONG = Prompt(tuple(range(5, 45)), "", 1)
each_engine = pytest.mark.parametrize("engine", [NativeEngine, HFEngine, PagedEngine])
each_counted = pytest.mark.parametrize("engine", [NativeEngine, HFEngine])


def outcome(engine: Any, prompts: list[Prompt], params: SamplingParams = PARAMS) -> list[Any]:
    return [(c.token_ids, c.sampling_logprobs) for c in engine.generate(prompts, params)]


def assert_padding_is_invisible(engine: Any, family: str) -> None:
    """A short prompt next to a long one: same tokens, same log-probabilities."""
    model = tiny_model(family)
    together = outcome(engine(model, Letters(), stop_token_ids=()), [SHORT, LONG])[:2]
    alone = outcome(engine(model, Letters(), stop_token_ids=()), [SHORT])
    for (tokens, logprobs), (tokens_alone, logprobs_alone) in zip(together, alone, strict=True):
        assert tokens == tokens_alone
        assert logprobs == pytest.approx(logprobs_alone, abs=1e-5)


@each_counted
def test_i05_learned_positions_do_not_see_padding(engine: Any) -> None:
    assert_padding_is_invisible(engine, "gpt2")


@each_counted
def test_i06_rotary_positions_do_not_see_padding(engine: Any) -> None:
    assert_padding_is_invisible(engine, "llama")


@each_engine
@pytest.mark.parametrize(
    "change", [{"temperature": 0.6}, {"top_p": 0.8}, {"top_k": 5}], ids=["i10", "i11_p", "i11_k"]
)
def test_i10_i11_ratio_is_one_under_the_sampled_distribution(engine: Any, change: Any) -> None:
    model = tiny_model("llama")
    params = replace(PARAMS, **change)
    for completion in engine(model, Letters()).generate([SHORT, LONG], params):
        prompt = (SHORT, LONG)[completion.prompt_index]
        tokens = torch.tensor(completion.token_ids)
        with torch.no_grad():
            ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
            logits = model(input_ids=ids, use_cache=False).logits[0]
        logits = logits[len(prompt.token_ids) - 1 : -1].float()
        plain = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        same = transform_logits(logits, params, keep=tokens).log_softmax(-1)
        sampled = torch.tensor(completion.sampling_logprobs)
        ratio = (same.gather(1, tokens[:, None])[:, 0] - sampled).exp()
        assert (ratio - 1).abs().max() < 1e-5
        assert (plain - sampled).abs().max() > 0.01  # what the silent bug would have been


@each_engine
def test_i12_no_dropout_while_sampling(engine: Any) -> None:
    quiet = tiny_model("gpt2")
    noisy = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    noisy.load_state_dict(quiet.state_dict())
    greedy = replace(PARAMS, temperature=0.0)
    assert outcome(engine(noisy, Letters()), [LONG], greedy) == outcome(
        engine(quiet, Letters()), [LONG], greedy
    )


@each_counted
def test_i16_no_stale_state_after_a_weight_update(engine: Any) -> None:
    model = tiny_model("llama")
    used = engine(model, Letters())
    before = outcome(used, [SHORT, LONG])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    used.weights_updated(1)
    after = outcome(used, [SHORT, LONG])
    assert after == outcome(engine(copy.deepcopy(model), Letters()), [SHORT, LONG])
    assert after != before


@each_engine
def test_i16_no_stale_state_after_a_weight_update_greedily(engine: Any) -> None:
    """Also of engines whose random draws are not counter-based."""
    model = tiny_model("llama")
    used = engine(model, Letters())
    greedy = replace(PARAMS, temperature=0.0, n=1)
    before = outcome(used, [SHORT, LONG], greedy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    used.weights_updated(1)
    after = outcome(used, [SHORT, LONG], greedy)
    assert after == outcome(engine(copy.deepcopy(model), Letters()), [SHORT, LONG], greedy)
    assert after != before


@each_engine
def test_i43_sampling_leaves_the_shared_random_state_alone(engine: Any) -> None:
    used = engine(tiny_model("llama"), Letters())
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    used.generate([SHORT], PARAMS)
    assert torch.equal(torch.rand(4), expected)


@each_engine
@pytest.mark.parametrize("fails", [False, True])
def test_i44_the_model_is_as_it_was(engine: Any, fails: bool) -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].eval()  # someone's own choice: it must survive
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    state = {name: (p.dtype, p.clone(), p.grad.clone()) for name, p in model.named_parameters()}
    flags = [module.training for module in model.modules()]
    configs = model.config.to_dict(), model.generation_config.to_dict()
    implementation = model.config._attn_implementation
    if fails:
        used = engine(model, Broken())  # which looks for the stop string after the first token
        with pytest.raises(RuntimeError, match="decoder"):
            used.generate([SHORT], replace(PARAMS, stop=("never",)))
    else:
        engine(model, Letters()).generate([SHORT], PARAMS)
    assert [module.training for module in model.modules()] == flags
    assert (model.config.to_dict(), model.generation_config.to_dict()) == configs
    assert model.config._attn_implementation == implementation
    for name, parameter in model.named_parameters():
        dtype, value, gradient = state[name]
        assert parameter.dtype == dtype
        assert parameter.requires_grad
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, gradient)


class Broken(Letters):
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        raise RuntimeError("the decoder is broken")


@pytest.mark.parametrize("pack_weights", [False, True])
def test_i44_bfloat16_stays_bfloat16(pack_weights: bool) -> None:
    # Large enough for its weights to be rearranged while sampling on a CPU.
    model = tiny_model("llama", hidden_size=128, intermediate_size=256).bfloat16()
    engine = NativeEngine(model, Letters(), stop_token_ids=(), pack_weights=pack_weights)
    done = engine.generate([SHORT, LONG], replace(PARAMS, max_new_tokens=20))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any("forward" in vars(module) for module in model.modules())
    for completion in done:
        prompt = (SHORT, LONG)[completion.prompt_index]
        tokens = torch.tensor(completion.token_ids)
        with torch.no_grad():
            ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
        logprobs = logits[len(prompt.token_ids) - 1 : -1].log_softmax(-1)
        difference = logprobs.gather(1, tokens[:, None])[:, 0] - torch.tensor(
            completion.sampling_logprobs
        )
        assert difference.abs().mean() < 0.05
