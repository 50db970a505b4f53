"""State trees: bit-exact there and back, and a refusal for everything else."""

import enum
import json
import math
from collections import OrderedDict, defaultdict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignment.runs.state_tree import decode_tree, encode_tree, first_difference
from alignment.types import AlignmentError, Outcome

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def through_json(tree):
    """As a file would do it: text, and tensors that share no memory with those saved."""
    encoded = encode_tree(tree)
    document = json.loads(json.dumps(encoded.document, allow_nan=False))
    return decode_tree(document, {name: t.clone() for name, t in encoded.tensors.items()})


def same(left, right):
    """Equal in type and in every bit; written apart from the code under test."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(
            type(a) is type(b) and same(left[a], right[b]) for a, b in zip(left, right, strict=True)
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
        return (
            left.dtype == right.dtype and left.shape == right.shape and torch.equal(raw[0], raw[1])
        )
    if isinstance(left, np.ndarray | np.generic):
        return (
            left.dtype == right.dtype
            and left.shape == right.shape
            and left.tobytes() == right.tobytes()
        )
    if isinstance(left, float):
        return left.hex() == right.hex()
    return left == right


@st.composite
def tensors(draw):
    """Tensors of every kind from random bytes, so NaNs with odd bits come up too."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    seed = draw(st.integers(0, 2**32))
    size = math.prod(shape) * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        return (raw % 2).bool().view(shape)
    return raw.view(dtype).view(shape) if size else torch.zeros(shape, dtype=dtype)


arrays = st.builds(
    lambda seed, dtype, shape: np.random.default_rng(seed).integers(0, 2, shape).astype(dtype),
    st.integers(0, 99),
    st.sampled_from(
        ["float32", "float64", "int64", "uint32", "uint64", "uint8", "bool", "float16"]
    ),
    st.lists(st.integers(0, 3), max_size=2).map(tuple),
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.sampled_from([np.float64(0.1), np.int32(-4), np.bool_(True), np.float32(math.nan)]),
    tensors(),
    arrays,
)
keys = st.one_of(st.text(), st.integers(), st.sampled_from(["$tensor", "a.b", "a", "__metadata__"]))
trees = st.recursive(
    leaves,
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(keys, children, max_size=4),
    ),
    max_leaves=12,
)


@given(trees)
def test_any_tree_comes_back_the_same(tree):
    assert same(through_json(tree), tree)


@given(st.floats())
def test_floats_keep_every_bit(value):
    back = through_json([value])[0]
    assert back.hex() == value.hex()


def test_tensors_are_named_by_their_dotted_path():
    tree = {"optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}, "rng": [torch.zeros(1)]}
    assert sorted(encode_tree(tree).tensors) == ["optimizer.state.0.exp_avg", "rng.0"]


def test_paths_that_read_alike_stay_apart():
    tree = {"a": {"b": torch.tensor(1)}, "a.b": torch.tensor(2), "a.b#2": torch.tensor(3)}
    back = through_json(tree)
    assert (back["a"]["b"], back["a.b"], back["a.b#2"]) == (1, 2, 3)
    tree = {1: torch.tensor(1), "1": torch.tensor(2)}
    back = through_json(tree)
    assert (back[1], back["1"]) == (1, 2)


@pytest.mark.parametrize("key", ["$tensor", "$dict", "$float", "$new", "$"])
def test_keys_that_look_like_the_tags_come_back(key):
    for tree in ({key: "nan"}, {key: [[1, 2]], "a": torch.ones(1)}, {"a": 1, key: {key: 0.5}}):
        assert same(through_json(tree), tree)


def test_optimizer_state_comes_back_with_int_keys_and_steps_alike():
    """Two optimizers, one restored from the other's saved state, take the same next step."""
    models = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]
    x = torch.randn(4, 3)
    models[0](x).square().sum().backward()
    optimizers[0].step()
    state = through_json({"model": models[0].state_dict(), "optim": optimizers[0].state_dict()})
    assert list(state["optim"]["state"]) == [0, 1]
    models[1].load_state_dict(state["model"])
    optimizers[1].load_state_dict(state["optim"])
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(left, right)


def test_random_generators_come_back():
    numpy_rng = np.random.default_rng(3)
    torch_rng = torch.Generator().manual_seed(3)
    saved = through_json(
        {
            "numpy": numpy_rng.bit_generator.state,
            "legacy": np.random.RandomState(3).get_state(),
            "torch": torch_rng.get_state(),
        }
    )
    other = np.random.default_rng(0)
    other.bit_generator.state = saved["numpy"]
    assert other.integers(0, 2**62) == numpy_rng.integers(0, 2**62)
    legacy = np.random.RandomState(0)
    legacy.set_state(saved["legacy"])
    assert legacy.randint(2**30) == np.random.RandomState(3).randint(2**30)
    copy = torch.Generator()
    copy.set_state(saved["torch"])
    assert torch.equal(torch.rand(4, generator=copy), torch.rand(4, generator=torch_rng))


def test_dict_kinds_and_parameters_come_back_plain():
    tree = {
        "o": OrderedDict(b=1, a=2),
        "d": defaultdict(list, {3: [1]}),
        "p": torch.nn.Parameter(torch.ones(2)),
    }
    back = through_json(tree)
    assert same(back, {"o": {"b": 1, "a": 2}, "d": {3: [1]}, "p": torch.ones(2)})
    assert not back["p"].requires_grad


class _Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    "leaf",
    [
        object(),
        {1, 2},
        Path("a"),
        lambda: None,
        torch.float32,
        torch.Size([1]),
        torch.device("cpu"),
        namedtuple("Pair", "a b")(1, 2),
        _Colour.RED,
        Outcome.CORRECT,
        complex(1, 2),
        bytearray(b"a"),
        np.array(["a"]),
        np.array([None]),
        np.array([1 + 2j]),
        np.array([1], dtype=">i4"),
        np.datetime64("2020-01-01"),
        torch.zeros(1, dtype=torch.complex64),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(1, device="meta"),
    ],
    ids=lambda leaf: type(leaf).__name__,
)
def test_what_cannot_come_back_is_refused_with_its_path(leaf):
    with pytest.raises(AlignmentError, match=r"the state's 'trainer\.queue\.1'"):
        encode_tree({"trainer": {"queue": [0, leaf]}})


@pytest.mark.parametrize("key", [True, 1.5, None, (1, 2)])
def test_keys_other_than_text_and_int_are_refused(key):
    with pytest.raises(AlignmentError, match="keys of a checkpoint"):
        encode_tree({"a": {key: 1}})


def test_a_container_that_holds_itself_is_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(AlignmentError, match="holds itself"):
        encode_tree(loop)


def test_documents_of_another_version_are_refused():
    with pytest.raises(AlignmentError, match=r"'\$decimal'"):
        decode_tree({"$decimal": "1"}, {})
    with pytest.raises(AlignmentError, match="'weights'"):
        decode_tree({"$tensor": "weights"}, {})


@pytest.mark.parametrize("left", [1, 1.0, True, "1", None, 0.0, -0.0, math.nan, [], (), {}, b""])
def test_leaves_differ_unless_they_are_the_same_in_type_and_bits(left):
    leaves = [1, 1.0, True, "1", None, 0.0, -0.0, math.nan, [], (), {}, b""]
    equal = [right for right in leaves if first_difference({"a": left}, {"a": right}) is None]
    assert [(type(one), repr(one)) for one in equal] == [(type(left), repr(left))]


@pytest.mark.parametrize(
    ("left", "right", "place"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "the state's 'a.b': 1 and 2"),
        ({"a": 1}, {"a": 1, "b": 2}, "the state's 'b', which one of them does not have"),
        ({"a": {"c": 1}}, {"a": {}}, "the state's 'a.c', which one of them does not have"),
        ({"a": [1, 2]}, {"a": [1]}, "the length of the state's 'a'"),
        ({"a": [1, [2]]}, {"a": [1, [3]]}, "the state's 'a.1.0': 2 and 3"),
        ({"t": torch.zeros(2)}, {"t": torch.tensor([0.0, -0.0])}, "the tensor 't'"),
        ({"t": torch.zeros(2)}, {"t": torch.zeros(2).bfloat16()}, "the tensor 't'"),
        ({"t": torch.zeros(2)}, {"t": torch.zeros(1, 2)}, "the tensor 't'"),
        ({"t": torch.zeros(2)}, {"t": torch.zeros(2, dtype=torch.int32)}, "the tensor 't'"),
        ({"t": np.zeros(2)}, {"t": np.ones(2)}, "the tensor 't'"),
    ],
)
def test_the_place_of_a_difference_is_named(left, right, place):
    assert first_difference(left, right) == place
    assert first_difference(right, left) is not None


def test_trees_that_are_the_same():
    weight = torch.tensor([[1.0, math.nan], [-0.0, math.inf]])
    left = {"w": weight, "s": torch.tensor(0.5), "n": {"x": [1, (2.0, math.nan)], 3: b"y"}}
    right = OrderedDict(n={3: b"y", "x": [1, (2.0, math.nan)]}, s=torch.tensor(0.5))
    right["w"] = torch.nn.Parameter(weight.t().contiguous().t())
    assert first_difference(left, dict(left)) is None
    assert first_difference({**left, "n": 1}, {**right, "n": 1}) is None
