"""RMSNorm in bfloat16 on a CPU against transformers' own and against float64."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from alignment.modeling.load import load_pretrained
from alignment.modeling.rms_norm import RMSNorm, replace_rms_norms

EPS = 1e-5
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "mixtral", "qwen3_moe")
OTHERS = ("gemma2", "gemma3_text", "gpt2")  # (1 + w), LayerNorm


def case(n_tokens: int, width: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_tokens)
    x = torch.randn(1, n_tokens, width, generator=generator) * scale
    weight = torch.rand(width, generator=generator) + 0.5
    grad = torch.randn(1, n_tokens, width, generator=generator)
    return x.bfloat16(), weight.bfloat16(), grad.bfloat16()


def transformers_norm(weight: Tensor) -> nn.Module:
    norm = LlamaRMSNorm(len(weight), EPS).bfloat16()
    norm.weight.data.copy_(weight)
    return norm


def results(norm: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    out = norm(leaf)
    out.backward(grad)
    return [out.detach(), leaf.grad, norm.weight.grad]


def exact(x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """Derived by hand: with r = 1 / rms and u = weight * grad, dx = r u - r^3 x mean(u x)."""
    x, weight, grad = x.double(), weight.double(), grad.double()
    r = (x.square().mean(-1, keepdim=True) + EPS) ** -0.5
    u = weight * grad
    dx = r * u - r**3 * x * (u * x).mean(-1, keepdim=True)
    return [weight * x * r, dx, (grad * x * r).sum(dim=(0, 1))]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("n_tokens", "width"), [(1, 64), (300, 64), (500, 576), (2000, 96)])
def test_it_is_as_accurate_as_transformers(n_tokens: int, width: int, scale: float) -> None:
    x, weight, grad = case(n_tokens, width, scale)
    own = results(RMSNorm(nn.Parameter(weight.clone()), EPS), x, grad)
    theirs = results(transformers_norm(weight), x, grad)
    # The root is the same to the last bit or two of float32, which few roundings see.
    assert float((own[0] != theirs[0]).double().mean()) < 1e-4
    for found, other, right in zip(own, theirs, exact(x, weight, grad), strict=True):
        error = float((found.double() - right).norm() / right.norm())
        # Or of two roundings, where one token leaves little to average over.
        assert error <= max(1.1 * float((other.double() - right).norm() / right.norm()), 0.005)


def test_a_gradient_with_a_mean_keeps_it() -> None:
    """The mean that LayerNorm's backward pass takes off is put back."""
    x, weight, grad = case(300, 64)
    norm = RMSNorm(nn.Parameter(weight.clone()), EPS)
    _, found, _ = results(norm, x, grad + 3)
    _, right, _ = exact(x, weight, grad + 3)
    assert float((found.double() - right).norm() / right.norm()) < 0.004


def test_inputs_that_do_not_stand_in_a_row() -> None:
    """Heads norms see views; gradients come transposed, or expanded from a sum."""
    x, weight, _ = case(60, 48)
    norm = RMSNorm(nn.Parameter(weight[:16].clone()), EPS)
    heads = x.view(1, 60, 3, 16).transpose(1, 2)[:, :2]
    assert not heads.is_contiguous()
    grad = torch.ones(1).bfloat16().expand(heads.shape)
    for g in (grad, torch.randn(1, 16, 60, 2).bfloat16().permute(0, 3, 2, 1)):
        norm.zero_grad()
        viewed = results(norm, heads, g)
        norm.weight.grad = None
        copied = results(norm, heads.contiguous(), g.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(viewed, copied, strict=True))


def test_the_backward_pass_leaves_what_it_reads_as_it_was() -> None:
    x, weight, grad = case(60, 48)
    norm, leaf, before = (
        RMSNorm(nn.Parameter(weight.clone()), EPS),
        x.requires_grad_(),
        grad.clone(),
    )
    out = norm(leaf)
    held = x.detach().clone()
    first = torch.autograd.grad(out, [leaf, norm.weight], grad, retain_graph=True)
    second = torch.autograd.grad(out, [leaf, norm.weight], grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(grad, before) and torch.equal(leaf, held)
    assert torch.equal(norm.weight, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_cast_afterwards_get_what_transformers_computes(dtype: torch.dtype) -> None:
    x, weight, _ = case(20, 48)
    own, theirs = RMSNorm(nn.Parameter(weight), EPS).float(), transformers_norm(weight).float()
    found = own(x.to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, theirs(x.to(dtype)), rtol=1e-6, atol=0.0)


def norms(model: nn.Module) -> list[RMSNorm]:
    return [m for m in model.modules() if isinstance(m, RMSNorm)]


def with_varied_norms(family: str) -> Any:
    model = tiny_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model.bfloat16()


def logits(model: Any) -> Tensor:
    ids = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_as_before_with_its_own_weights(family: str) -> None:
    model = with_varied_norms(family)
    before, weights = logits(model), dict(model.named_parameters())
    keys = list(model.state_dict())
    theirs = sum(type(m).__name__.endswith("RMSNorm") for m in model.modules())
    replace_rms_norms(model)
    assert len(norms(model)) == theirs > 0
    assert list(model.state_dict()) == keys
    after = dict(model.named_parameters())
    assert list(after) == list(weights)
    assert all(after[name] is weight for name, weight in weights.items())
    assert not any(m.training for m in model.modules())
    assert float((logits(model) != before).double().mean()) < 0.01
    torch.testing.assert_close(logits(model), before, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("family", OTHERS)
def test_norms_of_another_formula_stay(family: str) -> None:
    model = with_varied_norms(family)
    replace_rms_norms(model)
    assert not norms(model)


def test_norms_in_float32_stay() -> None:
    model = tiny_model()
    replace_rms_norms(model)
    assert not norms(model)


def test_a_norm_that_takes_a_gate_stays() -> None:
    class Optional(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
            out = super().forward(hidden_states)
            return out if gate is None else out * gate

    model = nn.ModuleList([Qwen3NextRMSNormGated(16), Optional(16)]).bfloat16()
    replace_rms_norms(model)
    assert not norms(model)


def test_a_copy_has_weights_of_its_own() -> None:
    model = with_varied_norms("llama")
    replace_rms_norms(model)
    copy, before = deepcopy(model), logits(model)
    assert torch.equal(logits(copy), before)
    with torch.no_grad():
        for norm in norms(copy):
            norm.weight.mul_(2)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(copy), before)


def test_a_loaded_model_has_them_and_saves_as_any_other(tmp_path: Path) -> None:
    model = with_varied_norms("llama")
    model.save_pretrained(tmp_path / "before")
    loaded, unused = load_pretrained(
        AutoModelForCausalLM, tmp_path / "before", torch.bfloat16, "auto", False, None
    )
    assert len(norms(loaded)) == 5 and not unused
    loaded.save_pretrained(tmp_path / "after")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "after", dtype=torch.bfloat16)
    assert not norms(again)
    expected = model.state_dict()
    assert list(again.state_dict()) == list(expected)
    assert all(torch.equal(w, expected[name]) for name, w in again.state_dict().items())
