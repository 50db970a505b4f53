"""Linear layers in bfloat16 on a CPU against float64, beside torch's own."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, tiny_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from alignment.modeling import linear_cpu
from alignment.modeling.linear_cpu import Linear, replace_linears
from alignment.modeling.load import LoraOptions, add_lora, load_pretrained

NARROWING, WIDENING, SQUARE = (96, 40), (40, 96), (64, 64)  # in, out


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs that took the own path, which small layers take here, as on any CPU."""
    found: list[Tensor] = []
    function = linear_cpu._Linear

    class Counted:
        @staticmethod
        def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            found.append(x)
            return function.apply(x, weight, bias)

    monkeypatch.setattr(linear_cpu, "_Linear", Counted)
    monkeypatch.setattr(linear_cpu, "_FEWEST_WEIGHTS", 512)
    monkeypatch.setattr(linear_cpu, "_FEWEST_TOKENS", 20)
    monkeypatch.setattr(linear_cpu, "_FEWEST_TOKENS_NARROWING", 10)
    monkeypatch.setattr(linear_cpu, "MULTIPLIES_FAST", True)
    return found


def bfloat(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def pair(sizes: tuple[int, int], bias: bool = True) -> tuple[Linear, nn.Linear]:
    """An own layer and torch's, of the same weights."""
    theirs = nn.Linear(*sizes, bias=bias, dtype=torch.bfloat16)
    own = Linear(*sizes, bias=bias, dtype=torch.bfloat16)
    own.load_state_dict(theirs.state_dict())
    return own, theirs


def results(layer: nn.Linear, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    leaf = x.detach().requires_grad_()
    layer.zero_grad()
    out = layer(leaf)
    out.backward(grad)
    found = {"out": out.detach(), "input": leaf.grad, "weight": layer.weight.grad}
    return found if layer.bias is None else {**found, "bias": layer.bias.grad}


def exact(layer: nn.Linear, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """y = x W' + b, by hand, in float64."""
    x, weight, grad = x.double(), layer.weight.detach().double(), grad.double()
    rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    found = {
        "out": torch.einsum("...i,oi->...o", x, weight),
        "input": torch.einsum("...o,oi->...i", grad, weight),
        "weight": torch.einsum("no,ni->oi", grad_rows, rows),
    }
    if layer.bias is None:
        return found
    return {
        **found,
        "out": found["out"] + layer.bias.detach().double(),
        "bias": grad_rows.sum(0),
    }


def error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


def check(own: dict[str, Tensor], theirs: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """The same output, and gradients as accurate; or of one rounding to bfloat16, which is 0.4% at
    most and 0.17% on average."""
    assert own.keys() == theirs.keys() == right.keys()
    assert torch.equal(own["out"], theirs["out"])
    for name, value in right.items():
        assert own[name].dtype == torch.bfloat16 and own[name].shape == value.shape
        bound = max(1.1 * error(theirs[name], value), 0.0018)
        assert error(own[name], value) <= bound, name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(20,), (256,), (600,), (3, 100), (1, 257)])
@pytest.mark.parametrize("sizes", [NARROWING, WIDENING, SQUARE])
def test_gradients_are_as_accurate_as_torchs(
    sizes: tuple[int, int], shape: tuple[int, ...], bias: bool, calls: list[Tensor]
) -> None:
    """Of more tokens than are transposed at a time, and fewer, and not a multiple."""
    own, theirs = pair(sizes, bias)
    x, grad = bfloat(*shape, sizes[0]), bfloat(*shape, sizes[1], seed=1)
    found = results(own, x, grad)
    assert len(calls) == 1
    check(found, results(theirs, x, grad), exact(theirs, x, grad))
    assert len(calls) == 1
    # Adding it to `.grad` would put it in a row.
    (gradient,) = torch.autograd.grad(own(x), [own.weight], grad)
    assert gradient.is_contiguous() and gradient.stride() == own.weight.stride()


@pytest.mark.parametrize("sizes", [NARROWING, WIDENING])
def test_inputs_and_gradients_that_do_not_stand_in_a_row(
    sizes: tuple[int, int], calls: list[Tensor]
) -> None:
    """Transposed, cut out of wider ones, and expanded from a sum."""
    n_in, n_out = sizes
    own, theirs = pair(sizes)
    inputs = [
        bfloat(100, 3, n_in).transpose(0, 1),
        bfloat(n_in, 300).t(),
        bfloat(3, 100, n_in + 8)[..., 8:],
        bfloat(1, 1, n_in).expand(3, 100, n_in),
    ]
    grads = [
        bfloat(n_out, 100, 3, seed=1).permute(2, 1, 0),
        bfloat(n_out, 300, seed=1).t(),
        bfloat(3, 100, 2 * n_out, seed=1)[..., ::2],
        torch.ones(1).bfloat16().expand(3, 100, n_out),
    ]
    for x, grad in zip(inputs, grads, strict=True):
        assert not x.is_contiguous() and not grad.is_contiguous()
        check(results(own, x, grad), results(theirs, x, grad), exact(theirs, x, grad))
    assert len(calls) == len(inputs)


@pytest.mark.parametrize("sizes", [NARROWING, WIDENING])
def test_the_narrower_of_the_two_is_transposed(
    sizes: tuple[int, int], calls: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, _ = pair(sizes)
    shapes, transposed = [], linear_cpu._transposed
    monkeypatch.setattr(
        linear_cpu, "_transposed", lambda x: (shapes.append(tuple(x.shape)), transposed(x))[1]
    )
    own(bfloat(300, sizes[0])).backward(bfloat(300, sizes[1], seed=1))
    assert [shape for shape in shapes if shape[0] == 300] == [(300, 40)]


@pytest.mark.parametrize("sizes", [NARROWING, WIDENING])
def test_an_input_that_needs_no_gradient(sizes: tuple[int, int], calls: list[Tensor]) -> None:
    own, theirs = pair(sizes)
    x, grad = bfloat(50, sizes[0]), bfloat(50, sizes[1], seed=1)
    right = exact(theirs, x, grad)
    for layer in (own, theirs):
        layer(x).backward(grad)
    assert len(calls) == 1 and x.grad is None
    for name in ("weight", "bias"):
        found, other = (layer.get_parameter(name).grad for layer in (own, theirs))
        assert error(found, right[name]) <= max(1.1 * error(other, right[name]), 0.0018)


def test_a_bias_that_needs_no_gradient(calls: list[Tensor]) -> None:
    own, theirs = pair(NARROWING)
    own.bias.requires_grad_(False)
    x, grad = bfloat(50, 96), bfloat(50, 40, seed=1)
    found = results(own, x, grad)
    assert len(calls) == 1 and found["bias"] is None
    right = exact(theirs, x, grad)
    expected = results(theirs, x, grad)
    del found["bias"], expected["bias"], right["bias"]
    check(found, expected, right)


@pytest.mark.parametrize(
    ("sizes", "fewest"),
    [(NARROWING, 10), (WIDENING, 20), (SQUARE, 20)],
)
def test_few_tokens_take_the_plain_path(
    sizes: tuple[int, int], fewest: int, calls: list[Tensor]
) -> None:
    own, theirs = pair(sizes)
    for shape in ((fewest - 1,), (1, fewest - 1), ()):
        x, grad = bfloat(*shape, sizes[0]), bfloat(*shape, sizes[1], seed=1)
        found, expected = results(own, x, grad), results(theirs, x, grad)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not calls
    own(bfloat(2, fewest // 2, sizes[0]))
    assert len(calls) == 1


def test_few_weights_take_the_plain_path(calls: list[Tensor]) -> None:
    pair((32, 15))[0](bfloat(50, 32))
    assert not calls
    pair((32, 16))[0](bfloat(50, 32))
    assert len(calls) == 1


@pytest.mark.parametrize("sizes", [NARROWING, WIDENING])
def test_without_a_gradient_of_the_weight_the_plain_path_is_taken(
    sizes: tuple[int, int], calls: list[Tensor]
) -> None:
    own, theirs = pair(sizes)
    x, grad = bfloat(50, sizes[0]), bfloat(50, sizes[1], seed=1)
    with torch.no_grad():
        assert torch.equal(own(x), theirs(x))
    with torch.inference_mode():
        own(x)
    for layer in (own, theirs):
        layer.weight.requires_grad_(False)
    found, expected = results(own, x, grad), results(theirs, x, grad)
    assert found["weight"] is None
    assert torch.equal(found["input"], expected["input"])
    assert torch.equal(found["bias"], expected["bias"])
    assert not calls


def test_under_autocast_float32_inputs_take_the_plain_path(calls: list[Tensor]) -> None:
    own, theirs = pair(NARROWING, True)
    found = []
    for layer in (own, theirs):
        leaf = bfloat(40, NARROWING[0]).float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(leaf).float().sum().backward()
        found.append((leaf.grad, layer.weight.grad))
    assert not calls
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_weights_cast_to_float32_take_the_plain_path(calls: list[Tensor]) -> None:
    own, theirs = (layer.float() for layer in pair(NARROWING))
    x, grad = bfloat(50, 96).float(), bfloat(50, 40, seed=1).float()
    found, expected = results(own, x, grad), results(theirs, x, grad)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not calls


@pytest.mark.parametrize("sizes", [NARROWING, WIDENING])
def test_backward_twice_gives_the_same_and_leaves_what_it_reads(
    sizes: tuple[int, int], calls: list[Tensor]
) -> None:
    own, _ = pair(sizes)
    x, grad = bfloat(300, sizes[0]).requires_grad_(), bfloat(300, sizes[1], seed=1)
    wanted, before = [x, own.weight, own.bias], [t.detach().clone() for t in (x, own.weight, grad)]
    out = own(x)
    first = torch.autograd.grad(out, wanted, grad, retain_graph=True)
    second = torch.autograd.grad(out, wanted, grad)
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((x, own.weight, grad), before, strict=True))


def test_gradients_add_up_over_passes(calls: list[Tensor]) -> None:
    own, theirs = pair(WIDENING)
    batches = [(bfloat(50, 40, seed=i), bfloat(50, 96, seed=i + 9)) for i in range(3)]
    for x, grad in batches:
        for layer in (own, theirs):
            layer(x).backward(grad)
    right = sum(exact(theirs, x, grad)["weight"] for x, grad in batches)
    assert len(calls) == 3
    assert error(own.weight.grad, right) <= 1.1 * error(theirs.weight.grad, right)


def test_a_weight_that_changed_before_the_backward_pass_is_an_error(calls: list[Tensor]) -> None:
    own, _ = pair(NARROWING)
    out = own(bfloat(50, 96).requires_grad_())
    with torch.no_grad():
        own.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    assert len(calls) == 1


def test_recomputed_activations_give_the_same_gradients(calls: list[Tensor]) -> None:
    layers = nn.Sequential(pair(WIDENING)[0], nn.SiLU(), pair((96, 40))[0])
    x, grad = bfloat(2, 50, 40).requires_grad_(), bfloat(2, 50, 40, seed=1)
    wanted = [x, *layers.parameters()]
    plain = torch.autograd.grad(layers(x), wanted, grad)
    assert len(calls) == 2
    again = torch.autograd.grad(checkpoint(layers, x, use_reentrant=False), wanted, grad)
    assert len(calls) == 6  # forward, and forward again
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


def test_a_weight_that_two_layers_share_gets_both_gradients(calls: list[Tensor]) -> None:
    own, theirs = (
        nn.ModuleList(layers)
        for layers in zip(pair(WIDENING, bias=False), pair(WIDENING, bias=False), strict=True)
    )
    own[1].weight, theirs[1].weight = own[0].weight, theirs[0].weight
    xs = [bfloat(50, 40, seed=i) for i in range(2)]
    grads = [bfloat(50, 96, seed=i + 5) for i in range(2)]
    for layers in (own, theirs):
        outs = [layer(x) for layer, x in zip(layers, xs, strict=True)]
        torch.autograd.backward(outs, grads)
    right = sum(exact(theirs[0], x, g)["weight"] for x, g in zip(xs, grads, strict=True))
    assert len(calls) == 2
    bound = 1.1 * error(theirs[0].weight.grad, right)
    assert error(own[0].weight.grad, right) <= bound


def test_the_real_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of 1024 x 512 from 512 tokens on, and of 512 x 1024 from 2048 on."""
    seen: list[int] = []

    class Counted:
        @staticmethod
        def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            seen.append(len(x))
            return nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(linear_cpu, "_Linear", Counted)
    for sizes, fewest in (((1024, 512), 512), ((512, 1024), 2048), ((1024, 511), None)):
        layer = Linear(*sizes, dtype=torch.bfloat16)
        for n_tokens in (511, 512, 2047, 2048):
            seen.clear()
            layer(torch.zeros(n_tokens, sizes[0], dtype=torch.bfloat16))
            assert bool(seen) == (fewest is not None and n_tokens >= fewest)


class Subclass(nn.Linear):
    pass


def linears(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, Linear)]


def computed(model: Any) -> dict[str, Tensor]:
    """Logits, and the gradients of what is trained."""
    ids = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.float().log_softmax(-1)[..., 5].sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"": logits.detach(), **grads}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_a_model_computes_as_before_with_its_own_weights(family: str, calls: list[Tensor]) -> None:
    model = tiny_model(family).bfloat16()
    before, weights = computed(model), dict(model.named_parameters())
    keys, n_linears = list(model.state_dict()), sum(type(m) is nn.Linear for m in model.modules())
    replace_linears(model)
    assert len(linears(model)) == n_linears > 0
    after = dict(model.named_parameters())
    assert list(after) == list(weights) and list(model.state_dict()) == keys
    assert all(after[name] is weight for name, weight in weights.items())
    found = computed(model)
    assert len(calls) == n_linears  # the head too, which some share with the embeddings
    assert torch.equal(found.pop(""), before.pop(""))
    assert found.keys() == before.keys()
    for name, grad in found.items():
        assert error(grad, before[name].double()) < 0.01, name


def test_hooks_stay(calls: list[Tensor]) -> None:
    layer, seen = nn.Linear(96, 40, dtype=torch.bfloat16), []
    layer.register_forward_hook(lambda module, args, out: seen.append(out))
    replace_linears(layer)
    assert type(layer) is Linear
    out = layer(bfloat(50, 96))
    assert len(seen) == 1 and seen[0] is out and len(calls) == 1


def test_other_layers_stay(calls: list[Tensor]) -> None:
    model = nn.ModuleList(
        [
            Subclass(96, 40, dtype=torch.bfloat16),
            nn.Linear(96, 40),
            nn.MultiheadAttention(32, 4, dtype=torch.bfloat16),
            nn.Embedding(40, 96, dtype=torch.bfloat16),
        ]
    )
    before = [type(module) for module in model.modules()]
    replace_linears(model)
    assert [type(module) for module in model.modules()] == before


def test_nothing_is_replaced_where_products_are_slow(
    calls: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_cpu, "MULTIPLIES_FAST", False)
    model = tiny_model().bfloat16()
    before = [type(module) for module in model.modules()]
    replace_linears(model)
    assert [type(module) for module in model.modules()] == before


def test_twice_is_once(calls: list[Tensor]) -> None:
    model = tiny_model().bfloat16()
    replace_linears(model)
    before = [type(module) for module in model.modules()]
    replace_linears(model)
    assert [type(module) for module in model.modules()] == before


def test_a_copy_has_weights_of_its_own(calls: list[Tensor]) -> None:
    model = nn.Sequential(nn.Linear(96, 40), nn.Linear(40, 96)).bfloat16()
    replace_linears(model)
    copy, x = deepcopy(model), bfloat(50, 96)
    assert len(linears(copy)) == 2
    assert torch.equal(copy(x), model(x)) and len(calls) == 4
    before = model(x)
    with torch.no_grad():
        copy[0].weight.mul_(2)
    assert torch.equal(model(x), before)
    assert not torch.equal(copy(x), before)


def test_weights_are_saved_and_loaded_as_any_others(calls: list[Tensor]) -> None:
    model, plain = tiny_model().bfloat16(), tiny_model(seed=1).bfloat16()
    replace_linears(model)
    plain.load_state_dict(model.state_dict())
    other = tiny_model(seed=2).bfloat16()
    replace_linears(other)
    other.load_state_dict(plain.state_dict())
    right = computed(model)[""]
    assert torch.equal(computed(plain)[""], right)
    assert torch.equal(computed(other)[""], right)


def test_an_adapter_trains_as_before(calls: list[Tensor]) -> None:
    """LoRA finds the layers; as they are frozen, they take the plain path, bit by bit."""
    plain, model = tiny_model().bfloat16(), tiny_model().bfloat16()
    replace_linears(model)
    plain, model = (add_lora(m, LoraOptions(rank=4), seed=0) for m in (plain, model))
    for adapted in (plain, model):
        generator = torch.Generator().manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero at the start
                parameter.data.normal_(generator=generator)
    found, right = computed(model), computed(plain)
    assert found.keys() == right.keys()
    assert sum("lora_" in name for name in found) == len(found) - 1 == 28
    assert all(torch.equal(found[name], grad) for name, grad in right.items())
    assert len(linears(model)) == 15 and not calls
    ids = torch.arange(3, 43)[None]
    merged = [m.merge_and_unload()(input_ids=ids).logits for m in (model, plain)]
    assert torch.equal(*merged)


def test_a_loaded_model_has_them_and_saves_as_any_other(
    calls: list[Tensor], tmp_path: Path
) -> None:
    model = tiny_model().bfloat16()
    model.save_pretrained(tmp_path / "before")
    loaded, unused = load_pretrained(
        AutoModelForCausalLM, tmp_path / "before", torch.bfloat16, "auto", False, None
    )
    assert len(linears(loaded)) == 15 and not unused
    loaded.save_pretrained(tmp_path / "after")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "after", dtype=torch.bfloat16)
    expected = model.state_dict()
    assert not linears(again) and list(again.state_dict()) == list(expected)
    assert all(torch.equal(w, expected[name]) for name, w in again.state_dict().items())
