"""Rotary embeddings in bfloat16 on a CPU against transformers' own, bit by bit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, recurrent_model, tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from alignment.modeling import rotary_cpu
from alignment.modeling.load import load_pretrained
from alignment.modeling.rotary_cpu import Rotary, replace_rotary

NAME = "apply_rotary_pos_emb"
FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "phi3",
    "mixtral",
    "qwen3_moe",
    "granite",
    "olmo2",
    "gemma2",
    "gemma3_text",
)
# Numbers that lie beside each other turned together; in gpt_oss, cosines of half of the width; in
# gptj, one tensor at a time.
OTHERS = {
    "glm": {"head_dim": 8},
    "cohere": {},
    "ernie4_5": {},
    "gpt_oss": {"head_dim": 8},
    "gptj": {"rotary_dim": 4},
}
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

Restore = Callable[[Any], ModuleType]


def original(module: ModuleType) -> Callable[..., Any]:
    found = getattr(module, NAME)
    theirs: Callable[..., Any] = found.theirs if isinstance(found, Rotary) else found
    return theirs


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Restore:
    """Gives a model's modeling file with transformers' function in it, and puts that back after the
    test: the replacement is one for the process, and another test may have made it before."""

    def restore(model: Any) -> ModuleType:
        module = sys.modules[type(model).__module__]
        setattr(module, NAME, original(module))
        monkeypatch.setattr(module, NAME, original(module))
        return module

    return restore


def bfloat(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def case(batch: int, heads: int, kv_heads: int, length: int, dim: int) -> list[Tensor]:
    """Queries and keys as projections leave them (heads beside each other), cosines and sines that
    differ between the halves, and two gradients as attention leaves them."""
    q, k, grad_q, grad_k = (
        bfloat(batch, length, n, dim, seed=seed).transpose(1, 2)
        for seed, n in enumerate((heads, kv_heads, heads, kv_heads))
    )
    angle = torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(4))
    return [q, k, angle.cos().bfloat16(), angle.sin().bfloat16(), grad_q, grad_k]


def results(rotate: Callable[..., Any], tensors: list[Tensor], **more: int) -> list[Tensor]:
    q, k, cos, sin, *grads = tensors
    leaves = [q.detach().requires_grad_(), k.detach().requires_grad_()]
    out = rotate(*leaves, cos, sin, **more)
    return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, grads)]


def all_equal(found: list[Tensor], right: list[Tensor]) -> bool:
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(found, right, strict=True)
    )


@pytest.mark.parametrize("dim", [16, 64, 80])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length"),
    [(1, 4, 4, 7), (2, 6, 2, 33), (1, 9, 3, 300), (3, 2, 1, 1)],
)
def test_outputs_and_gradients_are_transformers_to_the_bit(
    batch: int, heads: int, kv_heads: int, length: int, dim: int
) -> None:
    theirs = original(modeling_llama)
    tensors = case(batch, heads, kv_heads, length, dim)
    assert length == 1 or not tensors[0].is_contiguous()
    assert all_equal(results(Rotary(theirs), tensors), results(theirs, tensors))
    in_a_row = [x.contiguous() for x in tensors]
    assert all_equal(results(Rotary(theirs), in_a_row), results(theirs, tensors))


def test_cosines_for_all_rows_alike() -> None:
    """Positions given once for a batch."""
    theirs = original(modeling_llama)
    q, k, cos, sin, *grads = case(3, 4, 2, 12, 16)
    tensors = [q, k, cos[:1], sin[:1], *grads]
    assert all_equal(results(Rotary(theirs), tensors), results(theirs, tensors))


def test_heads_in_the_dimension_after_the_tokens() -> None:
    theirs = original(modeling_llama)
    q, k, cos, sin, *grads = case(2, 4, 2, 12, 16)
    tensors = [q.transpose(1, 2), k.transpose(1, 2), cos, sin, *(g.transpose(1, 2) for g in grads)]
    found = results(Rotary(theirs), tensors, unsqueeze_dim=2)
    assert all_equal(found, results(theirs, tensors, unsqueeze_dim=2))


def test_a_gradient_that_is_expanded_from_a_sum() -> None:
    theirs = original(modeling_llama)
    q, k, cos, sin, *_ = case(2, 4, 2, 12, 16)
    ones = torch.ones(1).bfloat16()
    tensors = [q, k, cos, sin, ones.expand(q.shape), ones.expand(k.shape)]
    assert all_equal(results(Rotary(theirs), tensors), results(theirs, tensors))


def test_what_it_reads_stays_as_it_was() -> None:
    tensors = case(2, 4, 2, 12, 16)
    before = [x.clone() for x in tensors]
    q, k, cos, sin, *grads = tensors
    leaves = [q.requires_grad_(), k.requires_grad_()]
    out = Rotary(original(modeling_llama))(*leaves, cos, sin)
    first = torch.autograd.grad(out, leaves, grads, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grads)
    assert all_equal(list(first), list(second))
    assert all_equal([x.detach() for x in tensors], before)


@pytest.mark.parametrize("exact", [(0, 1, 2, 3), (0, 1), (2, 3), (3,)])
def test_theirs_computes_whatever_is_in_float32(exact: tuple[int, ...]) -> None:
    """Weights in float32, or cosines that a model keeps exact."""
    seen: list[Any] = []

    def theirs(*tensors: Tensor, unsqueeze_dim: int) -> Any:
        seen.append((tensors, unsqueeze_dim))
        return original(modeling_llama)(*tensors, unsqueeze_dim=unsqueeze_dim)

    tensors = [x.float() if i in exact else x for i, x in enumerate(case(1, 4, 2, 9, 16)[:4])]
    found = Rotary(theirs)(*tensors)
    ((passed, dimension),) = seen
    assert dimension == 1
    assert all(a is b for a, b in zip(passed, tensors, strict=True))
    assert all_equal(list(found), list(original(modeling_llama)(*tensors)))
    Rotary(theirs)(*(x.transpose(1, 2) for x in tensors[:2]), *tensors[2:], unsqueeze_dim=2)
    assert seen[1][1] == 2


def computed(model: Any) -> list[Tensor]:
    """Logits, and the gradients of all parameters."""
    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.float().log_softmax(-1)[..., 5].sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def calls_of_its_own(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    calls: list[Tensor] = []
    function = rotary_cpu._Rotary

    class Counted:
        @staticmethod
        def apply(x: Tensor, *others: Tensor) -> Tensor:
            calls.append(x)
            return function.apply(x, *others)

    monkeypatch.setattr(rotary_cpu, "_Rotary", Counted)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_as_before(
    family: str, restored: Restore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family).bfloat16()
    module = restored(model)
    theirs, before = getattr(module, NAME), computed(model)
    replace_rotary(model)
    replacement = getattr(module, NAME)
    assert isinstance(replacement, Rotary) and replacement.theirs is theirs
    calls = calls_of_its_own(monkeypatch)
    after = computed(model)
    # Queries and keys of two layers; olmo2's cosines are in float32.
    assert len(calls) == (0 if family == "olmo2" else 4)
    assert len(after) > 10 and all_equal(after, before)


@pytest.mark.parametrize("family", OTHERS)
def test_a_family_with_another_formula_keeps_it(family: str, restored: Restore) -> None:
    config = AutoConfig.for_model(family, **(SMALL | OTHERS[family]))
    model = AutoModelForCausalLM.from_config(config).eval().bfloat16()
    module = restored(model)
    theirs, before = getattr(module, NAME), computed(model)
    replace_rotary(model)
    assert getattr(module, NAME) is theirs
    assert all_equal(computed(model), before)


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "qwen3_next"])
def test_a_model_that_turns_a_part_of_each_head_computes_as_before(
    name: str, restored: Restore
) -> None:
    """Their cosines are narrower than their heads, and the rest of a head passes through."""
    if name == "gpt_neox":
        config = AutoConfig.for_model(name, **SMALL, rotary_pct=0.5)
        model = AutoModelForCausalLM.from_config(config).eval()
    elif name == "phi3":
        model = tiny_model(name, partial_rotary_factor=0.5)
    else:
        model = recurrent_model(name)
    model = model.bfloat16()
    restored(model)
    before = computed(model)
    replace_rotary(model)
    assert all_equal(computed(model), before)


def test_a_function_that_may_be_called_otherwise_is_kept(restored: Restore) -> None:
    """Of the same numbers where it is called as ours: one that queries may go through alone, and
    one that takes position ids (qwen4_exp and glmasr have such)."""
    model = tiny_model().bfloat16()
    module = restored(model)
    llamas = getattr(module, NAME)

    def queries_alone(q: Any, k: Any = None, cos: Any = None, sin: Any = None, unsqueeze_dim=1):
        turned = llamas(q, q if k is None else k, cos, sin, unsqueeze_dim)
        return turned if k is not None else turned[0]

    def with_positions(q: Any, k: Any, cos: Any, sin: Any, position_ids=None, unsqueeze_dim=1):
        return llamas(q, k, cos, sin, unsqueeze_dim)

    for theirs in (queries_alone, with_positions):
        setattr(module, NAME, theirs)
        replace_rotary(model)
        assert getattr(module, NAME) is theirs


def test_a_model_without_rotary_embeddings_is_left_alone() -> None:
    model = tiny_model("gpt2").bfloat16()
    before = computed(model)
    replace_rotary(model)
    assert not hasattr(sys.modules[type(model).__module__], NAME)
    assert all_equal(computed(model), before)


def test_twice_is_once(restored: Restore) -> None:
    model = tiny_model().bfloat16()
    module = restored(model)
    theirs = getattr(module, NAME)
    replace_rotary(model)
    first = getattr(module, NAME)
    replace_rotary(tiny_model().bfloat16())
    assert getattr(module, NAME) is first
    assert first.theirs is theirs and not isinstance(theirs, Rotary)


def test_a_model_in_float32_computes_as_before(restored: Restore) -> None:
    """The change is one for all models of the process, of whatever precision."""
    model = tiny_model()
    module = restored(model)
    before = computed(model)
    replace_rotary(model)
    assert isinstance(getattr(module, NAME), Rotary)
    assert all_equal(computed(model), before)


def test_a_function_of_the_same_name_that_computes_otherwise_stays(
    restored: Restore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model().bfloat16()
    module = restored(model)
    own = original(module)

    def later(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return own(q, k, cos, -sin)  # the other way about

    def keys_only(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return q, own(q, k, cos, sin)[1]

    for function in (later, keys_only):
        monkeypatch.setattr(module, NAME, function)
        replace_rotary(model)
        assert getattr(module, NAME) is function


def test_a_loaded_model_has_it(restored: Restore, tmp_path: Path) -> None:
    model = tiny_model().bfloat16()
    module = restored(model)
    model.save_pretrained(tmp_path)
    before = computed(model)
    loaded, _ = load_pretrained(AutoModelForCausalLM, tmp_path, torch.bfloat16, "auto", False, None)
    assert isinstance(getattr(module, NAME), Rotary)
    assert all_equal(computed(model), before)
    assert sys.modules[type(loaded).__module__] is module
