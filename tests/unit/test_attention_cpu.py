"""Attention in bfloat16 on a CPU against explicit softmax attention in float64, beside torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, tiny_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignment.modeling import attention_cpu
from alignment.modeling.attention import Piece, packed_attention
from alignment.modeling.backbone import Backbone
from alignment.modeling.scorer import choose_layout, score
from alignment.types import Sample

NAMES = ("out", "query", "key", "value")


def bfloat(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


def inputs(
    heads: tuple[int, int], lengths: tuple[int, int], dim: int, scale: float = 1.0
) -> tuple[list[Tensor], Tensor]:
    """Query, key and value, as projections leave them (heads beside each other), and dL/d out."""
    (n, n_kv), (length, keys) = heads, lengths
    shapes = ((length, n), (keys, n_kv), (keys, n_kv), (length, n))
    scales = (scale, 1.0, 1.0, 1.0)
    *qkv, grad = (
        bfloat(1, *shape, dim, seed=i, scale=s).transpose(1, 2)
        for i, (shape, s) in enumerate(zip(shapes, scales, strict=True))
    )
    return qkv, grad


def explicit(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Query head h looks at key head h // (H / H_kv)."""
    shared = query.shape[1] // key.shape[1]
    heads = []
    for h in range(query.shape[1]):
        scores = scale * query[0, h] @ key[0, h // shared].T + bias[0, 0]
        p = (scores - scores.amax(-1, keepdim=True)).exp()
        heads.append(p / p.sum(-1, keepdim=True) @ value[0, h // shared])
    return torch.stack(heads)[None]


def results(attend: Callable[..., Tensor], qkv: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def errors(found: list[Tensor], right: list[Tensor]) -> dict[str, float]:
    return {
        name: float((a.double() - b).norm() / b.norm())
        for name, a, b in zip(NAMES, found, right, strict=True)
    }


def causal_bias(length: int, keys: int) -> Tensor:
    visible = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
    return torch.zeros(length, keys).masked_fill(~visible, -torch.inf)[None, None].bfloat16()


def blocks_bias(length: int, keys: int) -> Tensor:
    """A shared prompt, completions of 7 tokens that see it and themselves, and at the end tokens
    that see only themselves."""
    prompt = keys - length + 11
    key, query = torch.arange(keys)[None], torch.arange(keys - length, keys)[:, None]
    same = (key - prompt) // 7 == (query - prompt) // 7
    visible = (key <= query) & ((key < prompt) | same)
    alone = query >= keys - 5
    visible = torch.where(alone, key == query, visible)
    return torch.zeros(length, keys).masked_fill(~visible, -torch.inf)[None, None].bfloat16()


CASES: dict[str, tuple[tuple[int, int], tuple[int, int], int, float, Any]] = {
    "causal": ((6, 2), (128, 128), 64, 1.0, causal_bias),
    "causal, 80": ((6, 2), (130, 130), 80, 1.0, causal_bias),
    "carried prompt": ((6, 2), (100, 172), 64, 1.0, causal_bias),
    "blocks": ((6, 2), (133, 133), 80, 1.0, blocks_bias),
    "blocks, carried prompt": ((6, 3), (97, 150), 64, 1.0, blocks_bias),
    "no shared heads": ((3, 3), (128, 128), 64, 1.0, blocks_bias),
    "one head of keys": ((4, 1), (128, 160), 80, 1.0, causal_bias),
    "nearly uniform": ((6, 2), (512, 512), 64, 0.1, causal_bias),
    "peaked": ((6, 2), (256, 256), 64, 6.0, causal_bias),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_about_as_accurate_as_torchs(case: str) -> None:
    heads, lengths, dim, spread, bias_of = CASES[case]
    qkv, grad = inputs(heads, lengths, dim, spread)
    bias = bias_of(*lengths)
    scale = dim**-0.5
    right = results(
        lambda q, k, v: explicit(q, k, v, bias.double(), scale),
        [x.double() for x in qkv],
        grad.double(),
    )
    is_causal = bias_of is causal_bias and lengths[0] == lengths[1]
    own = results(
        lambda q, k, v: attention_cpu.attention(q, k, v, bias, causal=is_causal, scale=None),
        qkv,
        grad,
    )
    torchs = results(
        lambda q, k, v: nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, enable_gqa=True
        ),
        qkv,
        grad,
    )
    found, allowed = errors(own, right), errors(torchs, right)
    # A number of bfloat16 is off by up to 0.4%. The gradient of the queries rounds p before it is
    # multiplied, torch's does not; the other two are as good as torch's.
    assert found["out"] <= 1.01 * allowed["out"]
    assert found["query"] <= min(2.4 * allowed["query"], 0.007)
    assert found["key"] <= 1.5 * allowed["key"]
    assert found["value"] <= 1.5 * allowed["value"]
    assert [x.shape for x in own] == [x.shape for x in right]


def test_scores_of_60_and_rows_that_see_one_key() -> None:
    """Each token looks at itself (score 60, the others -60): dL/d value is dL/d out, the rest 0."""
    n = 128
    one_hot = torch.eye(n)[None, None]
    query, key = (120.0 * one_hot - 60.0).bfloat16(), one_hot.bfloat16()
    value, grad = bfloat(1, 1, n, n, seed=0), bfloat(1, 1, n, n, seed=1)
    bias = causal_bias(n, n)
    bias[..., n // 2 :, :] = torch.where(torch.eye(n)[n // 2 :] > 0, 0.0, -torch.inf).bfloat16()
    out, *gradients = results(
        lambda q, k, v: attention_cpu.attention(q, k, v, bias, causal=False, scale=1.0),
        [query, key, value],
        grad,
    )
    torch.testing.assert_close(out, value, rtol=0, atol=0)
    # dP - delta is 0 of numbers of about 11, of which delta keeps 16 bits.
    torch.testing.assert_close(gradients[0], torch.zeros_like(query), rtol=0, atol=1e-3)
    torch.testing.assert_close(gradients[1] / 60, torch.zeros_like(key), rtol=0, atol=1e-3)
    torch.testing.assert_close(gradients[2], grad, rtol=2**-7, atol=1e-20)


def test_large_scores_of_either_sign_are_as_accurate() -> None:
    qkv, grad = inputs((4, 2), (128, 128), 64, scale=15.0)  # of up to 60
    qkv[0] = torch.cat((qkv[0][:, :2], qkv[0][:, :2].abs() * -qkv[1][:, 1:].sign()), dim=1)
    bias = causal_bias(128, 128)
    right = results(
        lambda q, k, v: explicit(q, k, v, bias.double(), 0.125),
        [x.double() for x in qkv],
        grad.double(),
    )
    own = results(
        lambda q, k, v: attention_cpu.attention(q, k, v, bias, causal=True, scale=None), qkv, grad
    )
    found = errors(own, right)
    assert max(found.values()) < 0.015, found


def test_only_what_it_is_made_for_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "_MULTIPLIES_FAST", True)
    (query, key, value), _ = inputs((4, 2), (128, 128), 16)
    query.requires_grad_()
    assert attention_cpu.is_faster(query, key, value)
    assert not attention_cpu.is_faster(query.detach(), key, value)
    assert not attention_cpu.is_faster(query.float(), key.float(), value.float())
    assert not attention_cpu.is_faster(query, key, value[..., :8])
    assert not attention_cpu.is_faster(query[:, :, :16], key[:, :, :16], value[:, :, :16])
    with torch.no_grad():
        assert not attention_cpu.is_faster(query, key, value)
    monkeypatch.setattr(attention_cpu, "_MULTIPLIES_FAST", False)
    assert not attention_cpu.is_faster(query, key, value)


def test_gradients_of_some_inputs_only() -> None:
    (query, key, value), grad = inputs((4, 2), (128, 128), 64)
    bias = causal_bias(128, 128)
    _, *whole = results(
        lambda q, k, v: attention_cpu.attention(q, k, v, bias, causal=True, scale=None),
        [query, key, value],
        grad,
    )
    leaf = query.detach().clone().requires_grad_()
    out = attention_cpu.attention(leaf, key, value, bias, causal=True, scale=None)
    out.backward(grad)
    assert torch.equal(leaf.grad, whole[0])
    assert key.grad is None and value.grad is None


def test_the_backward_pass_leaves_what_it_reads_as_it_was() -> None:
    """Twice over the same graph: the same gradients."""
    qkv, grad = inputs((4, 2), (128, 128), 64)
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    bias, before = causal_bias(128, 128), grad.clone()
    out = attention_cpu.attention(*leaves, bias, causal=True, scale=None)
    held = out.detach().clone()
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(grad, before) and torch.equal(out, held)
    assert torch.equal(bias, causal_bias(128, 128))


def pieces_bias() -> tuple[tuple[Piece, ...], Tensor]:
    """A piece of a prompt (50 tokens) with a completion, and one of 110 tokens that carries it."""
    seams = (Piece(120, None, causal=True), Piece(110, (0, 50), causal=False))
    bias = torch.full((1, 1, 230, 160), -torch.inf).bfloat16()
    bias[..., :120, :120] = causal_bias(120, 120)
    bias[..., 120:, :] = causal_bias(110, 160)
    return seams, bias


def test_a_carried_prompt_gets_the_gradients_of_both_pieces() -> None:
    qkv, grad = inputs((4, 2), (230, 230), 64)
    seams, bias = pieces_bias()

    def one_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        whole = torch.full((1, 1, 230, 230), -torch.inf, dtype=torch.float64)
        whole[..., :120, :120] = causal_bias(120, 120)
        whole[..., 120:, :50] = 0.0
        whole[..., 120:, 120:] = causal_bias(110, 110)
        return explicit(q, k, v, whole, 0.125)

    right = results(one_mask, [x.double() for x in qkv], grad.double())
    own = results(
        lambda q, k, v: packed_attention(nn.Identity(), q, k, v, bias, seams=seams)[0].transpose(
            1, 2
        ),
        qkv,
        grad,
    )
    assert max(errors(own, right).values()) < 0.008


def long_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (n,), generator=generator).tolist())

    prompts = tokens(90), tokens(40)
    return [
        Sample(prompt, tokens(n), (True,) * n)
        for prompt, n in zip(prompts * 2, (130, 70) * 2, strict=True)
    ]


def model_gradient(model: Any) -> Tensor:
    backbone = Backbone(model)
    choose_layout(backbone)
    assert backbone.cuts_at_seams
    scores = score(backbone, long_samples())
    scores.logprobs[scores.mask].mean().backward()
    gradient = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    model.zero_grad()
    return gradient


def test_a_models_gradient_is_as_accurate_as_with_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "_MULTIPLIES_FAST", True)
    model = tiny_model(max_position_embeddings=512).bfloat16()
    calls = []
    attention = attention_cpu.attention
    monkeypatch.setattr(
        attention_cpu, "attention", lambda *a, **k: calls.append(1) or attention(*a, **k)
    )
    own = model_gradient(model)
    assert calls
    monkeypatch.setattr(attention_cpu, "_MULTIPLIES_FAST", False)
    torchs = model_gradient(model)
    exact = model_gradient(model.float())

    def error(gradient: Tensor) -> float:
        return float((gradient - exact).norm() / exact.norm())

    assert error(own) < 1.2 * error(torchs)
    assert error(own) < 0.03


def test_activation_checkpointing_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "_MULTIPLIES_FAST", True)
    qkv, grad = inputs((4, 2), (230, 230), 64)
    seams, bias = pieces_bias()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(nn.Identity(), q, k, v, bias, seams=seams)[0].transpose(1, 2)

    plain = results(attend, qkv, grad)
    again = results(lambda *x: checkpoint(attend, *x, use_reentrant=False), qkv, grad)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
