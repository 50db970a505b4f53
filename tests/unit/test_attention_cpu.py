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
from alignment.modeling.attention import packed_attention
from alignment.modeling.backbone import Backbone
from alignment.modeling.scorer import choose_layout, score
from alignment.modeling.seams import Piece, Seams
from alignment.types import Sample

NAMES = ("out", "query", "key", "value")


def bfloat(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


def inputs(
    heads: tuple[int, int], length: int, dim: int, scale: float = 1.0
) -> tuple[list[Tensor], Tensor]:
    """Query, key and value, as projections leave them (heads beside each other), and dL/d out."""
    n, n_kv = heads
    query, key, value = (
        bfloat(1, length, h, dim, seed=i, scale=by).transpose(1, 2)
        for i, (h, by) in enumerate(((n, scale), (n_kv, 1.0), (n_kv, 1.0)))
    )
    return [query, key, value], bfloat(1, length, n, dim, seed=3)


def explicit(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Query head h looks at key head h // (H / H_kv); `visible` is `[L, L]`, of the whole row."""
    shared = query.shape[1] // key.shape[1]
    heads = []
    for h in range(query.shape[1]):
        scores = scale * query[0, h] @ key[0, h // shared].T
        scores = scores.masked_fill(~visible, -torch.inf)
        p = (scores - scores.amax(-1, keepdim=True)).exp()
        heads.append(p / p.sum(-1, keepdim=True) @ value[0, h // shared])
    return torch.stack(heads, dim=1)[None]


def results(attend: Callable[..., Tensor], qkv: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def errors(found: list[Tensor], right: list[Tensor]) -> dict[str, float]:
    return {
        name: float((a.double() - b).norm() / b.norm())
        for name, a, b in zip(NAMES, found, right, strict=True)
    }


def zero_or_inf(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)[None, None].bfloat16()


def bias_of(seams: Seams, visible: Tensor) -> Tensor:
    """What each token sees of the keys of its piece: those of the carried prompt, then its own."""
    keys, start = [], 0
    starts = []
    for piece in seams:
        starts.append(start)
        own = list(range(start, start + piece.length))
        home, n = piece.prompt or (0, 0)
        keys.append((own, [*range(starts[home], starts[home] + n), *own]))
        start += piece.length
    seen = torch.zeros(start, max(len(of) for _, of in keys), dtype=torch.bool)
    for own, of in keys:
        seen[own[0] : own[-1] + 1, : len(of)] = visible[own][:, of]
    return zero_or_inf(seen)


def causal(length: int) -> tuple[Seams, Tensor]:
    """One sequence."""
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    return (Piece(length, None, causal=True),), visible


def carried(prompt: int, first: int, others: int) -> tuple[Seams, Tensor]:
    """A prompt with a completion, and in a piece of their own two completions that carry it; the
    last tokens of those see only themselves."""
    seams = (
        Piece(prompt + first, None, causal=True),
        Piece(2 * others, (0, prompt), causal=False),
    )
    length = prompt + first + 2 * others
    part = torch.arange(length).sub(prompt + first).div(others, rounding_mode="floor")
    same = part[:, None] == part
    visible = same | (torch.arange(length) < prompt)
    visible[:prompt, : prompt + first] = visible[prompt : prompt + first, : prompt + first] = True
    visible &= torch.ones(length, length, dtype=torch.bool).tril()
    visible[-5:] = torch.eye(length, dtype=torch.bool)[-5:]
    return seams, visible


def units(prompt: int, completions: int, sequence: int) -> tuple[Seams, Tensor]:
    """One piece of a prompt with completions of 7 tokens, and of another sequence."""
    length = prompt + 7 * completions + sequence
    part = torch.cat(
        (
            torch.zeros(prompt, dtype=torch.long),
            1 + torch.arange(7 * completions) // 7,
            torch.full((sequence,), -1),
        )
    )
    visible = (part[:, None] == part) | ((part == 0) & (part[:, None] >= 0))
    visible &= torch.ones(length, length, dtype=torch.bool).tril()
    return (Piece(length, None, causal=False),), visible


def attended(case: tuple[Seams, Tensor], scale: float | None = None) -> Callable[..., Tensor]:
    seams, visible = case
    bias = bias_of(seams, visible)
    return lambda q, k, v: attention_cpu.attention(q, k, v, bias, seams, scale=scale)


CASES: dict[str, tuple[tuple[int, int], int, float, tuple[Seams, Tensor]]] = {
    "causal": ((6, 2), 64, 1.0, causal(128)),
    "causal, 80": ((6, 2), 80, 1.0, causal(130)),
    "carried prompt": ((6, 2), 64, 1.0, carried(72, 61, 50)),
    "carried prompt, 80": ((6, 3), 80, 1.0, carried(50, 70, 48)),
    "units": ((6, 2), 64, 1.0, units(60, 7, 40)),
    "no shared heads": ((3, 3), 64, 1.0, units(51, 11, 0)),
    "one head of keys": ((4, 1), 80, 1.0, carried(60, 40, 30)),
    "nearly uniform": ((6, 2), 64, 0.1, causal(512)),
    "peaked": ((6, 2), 64, 6.0, causal(256)),
    "short": ((4, 2), 16, 1.0, carried(3, 4, 6)),
}


@pytest.mark.parametrize("most_scores", [1024 * 1024, 4096])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_about_as_accurate_as_torchs(
    case: str, most_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a piece's queries all at once, or a few at a time."""
    monkeypatch.setattr(attention_cpu, "_MOST_SCORES", most_scores)
    heads, dim, spread, (seams, visible) = CASES[case]
    qkv, grad = inputs(heads, len(visible), dim, spread)
    right = results(
        lambda q, k, v: explicit(q, k, v, visible, dim**-0.5),
        [x.double() for x in qkv],
        grad.double(),
    )
    own = results(attended((seams, visible)), qkv, grad)
    torchs = results(
        lambda q, k, v: nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=zero_or_inf(visible), enable_gqa=True
        ).transpose(1, 2),
        qkv,
        grad,
    )
    found, allowed = errors(own, right), errors(torchs, right)
    # A number of bfloat16 is off by up to 0.4%. The gradient of the queries rounds p before it is
    # multiplied, torch's does not; the other two are as good as torch's, or as one rounding of p.
    assert found["out"] <= 1.01 * allowed["out"]
    assert found["query"] <= min(2.4 * allowed["query"], 0.007)
    assert found["key"] <= max(1.5 * allowed["key"], 0.004)
    assert found["value"] <= max(1.5 * allowed["value"], 0.004)
    assert [x.shape for x in own] == [x.shape for x in right]


def test_scores_of_60_and_rows_that_see_one_key() -> None:
    """Each token looks at itself (score 60, the others -60): dL/d value is dL/d out, the rest 0."""
    n = 128
    one_hot = torch.eye(n)[None, None]
    query, key = (120.0 * one_hot - 60.0).bfloat16(), one_hot.bfloat16()
    value, grad = bfloat(1, 1, n, n, seed=0), bfloat(1, n, 1, n, seed=1)
    visible = torch.ones(n, n, dtype=torch.bool).tril()
    visible[n // 2 :] = torch.eye(n, dtype=torch.bool)[n // 2 :]
    seams = (Piece(n, None, causal=False),)
    out, *gradients = results(attended((seams, visible), 1.0), [query, key, value], grad)
    torch.testing.assert_close(out, value.transpose(1, 2), rtol=0, atol=0)
    # dP - delta is 0 of numbers of about 11, of which delta keeps 16 bits.
    torch.testing.assert_close(gradients[0], torch.zeros_like(query), rtol=0, atol=1e-3)
    torch.testing.assert_close(gradients[1] / 60, torch.zeros_like(key), rtol=0, atol=1e-3)
    torch.testing.assert_close(gradients[2], grad.transpose(1, 2), rtol=2**-7, atol=1e-20)


def test_large_scores_of_either_sign_are_as_accurate() -> None:
    qkv, grad = inputs((4, 2), 128, 64, scale=15.0)  # of up to 60
    qkv[0] = torch.cat((qkv[0][:, :2], qkv[0][:, :2].abs() * -qkv[1][:, 1:].sign()), dim=1)
    seams, visible = causal(128)
    right = results(
        lambda q, k, v: explicit(q, k, v, visible, 0.125), [x.double() for x in qkv], grad.double()
    )
    found = errors(results(attended((seams, visible)), qkv, grad), right)
    assert max(found.values()) < 0.015, found


def test_only_what_it_is_made_for_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "MULTIPLIES_FAST", True)
    (query, _, value), _ = inputs((4, 2), 128, 16)
    query.requires_grad_()
    assert attention_cpu.is_faster(query, value)
    assert not attention_cpu.is_faster(query.detach(), value)
    assert not attention_cpu.is_faster(query.float(), value.float())
    assert not attention_cpu.is_faster(query, value[..., :8])
    with torch.no_grad():
        assert not attention_cpu.is_faster(query, value)
    monkeypatch.setattr(attention_cpu, "MULTIPLIES_FAST", False)
    assert not attention_cpu.is_faster(query, value)


def test_gradients_of_some_inputs_only() -> None:
    (query, key, value), grad = inputs((4, 2), 128, 64)
    attend = attended(causal(128))
    _, *whole = results(attend, [query, key, value], grad)
    leaf = query.detach().clone().requires_grad_()
    attend(leaf, key, value).backward(grad)
    assert torch.equal(leaf.grad, whole[0])
    assert key.grad is None and value.grad is None


def test_the_backward_pass_leaves_what_it_reads_as_it_was() -> None:
    """Twice over the same graph: the same gradients."""
    qkv, grad = inputs((4, 2), 128, 64)
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    seams, visible = causal(128)
    bias, before = bias_of(seams, visible), grad.clone()
    out = attention_cpu.attention(*leaves, bias, seams, scale=None)
    held = out.detach().clone()
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(grad, before) and torch.equal(out, held)
    assert torch.equal(bias, bias_of(seams, visible))


def test_it_goes_forward_as_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, so that a first minibatch's ratio is 1."""
    monkeypatch.setattr(attention_cpu, "MULTIPLIES_FAST", True)
    qkv, _ = inputs((6, 2), 233, 64)
    seams, visible = carried(72, 61, 50)
    bias = bias_of(seams, visible)
    with torch.no_grad():
        scored, _ = packed_attention(nn.Identity(), *qkv, bias, seams=seams)
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    trained, _ = packed_attention(nn.Identity(), *leaves, bias, seams=seams)
    assert trained.grad_fn.name() == "_AttentionBackward"
    assert torch.equal(trained, scored)


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
    monkeypatch.setattr(attention_cpu, "MULTIPLIES_FAST", True)
    model = tiny_model(max_position_embeddings=512).bfloat16()
    calls = []
    attention = attention_cpu.attention
    monkeypatch.setattr(
        attention_cpu, "attention", lambda *a, **k: calls.append(1) or attention(*a, **k)
    )
    own = model_gradient(model)
    assert calls
    monkeypatch.setattr(attention_cpu, "MULTIPLIES_FAST", False)
    torchs = model_gradient(model)
    exact = model_gradient(model.float())

    def error(gradient: Tensor) -> float:
        return float((gradient - exact).norm() / exact.norm())

    assert error(own) < 1.2 * error(torchs)
    assert error(own) < 0.03


def test_activation_checkpointing_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "MULTIPLIES_FAST", True)
    qkv, grad = inputs((4, 2), 233, 64)
    seams, visible = carried(72, 61, 50)
    bias = bias_of(seams, visible)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(nn.Identity(), q, k, v, bias, seams=seams)[0]

    plain = results(attend, qkv, grad)
    again = results(lambda *x: checkpoint(attend, *x, use_reentrant=False), qkv, grad)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
