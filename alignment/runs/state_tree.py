"""A tree of training state as JSON plus named tensors, and back, bit for bit, without pickle.

What a tree may hold, and how JSON writes it:

    dict with str keys      object            (a key that begins with "$" makes it a pair list)
    dict with int keys too  {"$dict": [[key, value], ...]}
    list, tuple             array, {"$tuple": [...]}
    None, bool, int, str    as they are
    float                   as its shortest exact form; {"$float": "nan" | "inf" | "-inf"}
    bytes                   {"$bytes": base64}
    torch tensor            {"$tensor": name}  (dense; comes back on the CPU, without gradient)
    numpy array, scalar     {"$array": name}, {"$scalar": name}

`OrderedDict` and `defaultdict` come back as dict. Anything else is refused when it is saved: a
state that cannot be read back is found out at once, not on the day it is needed.
"""

from __future__ import annotations

import base64
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alignment.types import AlignmentError

_PLAIN_TYPES = (type(None), bool, int, str)
_NUMPY_KINDS = "biuf"  # bool, integers, floats
_MAX_DEPTH = 200


@dataclass
class EncodedTree:
    """JSON for the structure, and the tensors by name, where they are and as they are."""

    document: Any
    tensors: dict[str, Tensor]


def encode_tree(tree: Any) -> EncodedTree:
    """Split `tree` into JSON and tensors. A tensor is named by its dotted path.

    Raises:
        AlignmentError: a leaf or key of a type not listed above, with its path.
    """
    encoder = _Encoder()
    return EncodedTree(encoder.encode(tree, ()), encoder.tensors)


def decode_tree(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `encode_tree` split.

    Raises:
        AlignmentError: the document names a tensor there is not, or a form it does not know.
    """
    if isinstance(document, list):
        return [decode_tree(item, tensors) for item in document]
    if not isinstance(document, dict):
        return document
    tag = next(iter(document), "")
    if not tag.startswith("$"):
        return {key: decode_tree(value, tensors) for key, value in document.items()}
    if tag not in _DECODERS:
        raise AlignmentError(
            f"the state holds {tag!r}, which this version does not know; read it with the version "
            "that wrote it"
        )
    return _DECODERS[tag](document[tag], tensors)


def first_difference(left: Any, right: Any) -> str | None:
    """Where two trees are not the same, in words; None if they are, to the last bit and type.

    Where a tensor is (which device) makes no difference, nor does the order of a dict's keys.

    Raises:
        AlignmentError: one of them is no tree.
    """
    one, other = encode_tree(left), encode_tree(right)
    place = _difference(one.document, other.document, ())
    if place is not None:
        return place
    for name, tensor in one.tensors.items():
        if not _same_tensor(tensor, other.tensors[name]):
            return f"the tensor {name!r}"
    return None


def tensor_bytes(tensor: Tensor) -> int:
    """What a tensor takes on disk."""
    return tensor.numel() * tensor.element_size()


@dataclass
class _Encoder:
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def encode(self, value: Any, path: tuple[str, ...]) -> Any:
        if len(path) > _MAX_DEPTH:
            raise AlignmentError(
                f"the state is nested over {_MAX_DEPTH} deep at {'.'.join(path[:5])}...; a "
                "container that holds itself cannot be saved"
            )
        if type(value) in _PLAIN_TYPES:
            return value
        form = _ENCODERS.get(type(value))
        if form is None and isinstance(value, np.generic):
            form = _encode_numpy_scalar
        if form is None:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise AlignmentError(
                f"{_named(path)} is a {kind}, which a checkpoint cannot hold; give tensors, "
                "arrays, numbers, text, bytes, and dicts, lists and tuples of them"
            )
        return form(self, value, path)

    def store(self, tensor: Tensor, path: tuple[str, ...]) -> str:
        """Keep a tensor under a name nothing else has."""
        wanted = ".".join(path).encode("utf-8", "replace").decode("utf-8")
        name, number = wanted, 1
        while name in self.tensors or name == "__metadata__":  # the file format's own word
            number += 1
            name = f"{wanted}#{number}"
        self.tensors[name] = tensor
        return name


def _encode_dict(encoder: _Encoder, value: dict[Any, Any], path: tuple[str, ...]) -> Any:
    for key in value:
        if type(key) not in (str, int):
            raise AlignmentError(
                f"{_named(path)} has the key {key!r}; the keys of a checkpoint are text or int"
            )
    items = [(key, encoder.encode(item, (*path, str(key)))) for key, item in value.items()]
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return dict(items)
    return {"$dict": [[key, item] for key, item in items]}


def _encode_list(encoder: _Encoder, value: list[Any], path: tuple[str, ...]) -> Any:
    return [encoder.encode(item, (*path, str(place))) for place, item in enumerate(value)]


def _encode_tuple(encoder: _Encoder, value: tuple[Any, ...], path: tuple[str, ...]) -> Any:
    return {"$tuple": _encode_list(encoder, list(value), path)}


def _encode_float(encoder: _Encoder, value: float, path: tuple[str, ...]) -> Any:
    return value if math.isfinite(value) else {"$float": str(value)}


def _encode_bytes(encoder: _Encoder, value: bytes, path: tuple[str, ...]) -> Any:
    return {"$bytes": base64.b64encode(value).decode("ascii")}


def _encode_tensor(encoder: _Encoder, value: Tensor, path: tuple[str, ...]) -> Any:
    dense = value.layout == torch.strided and not value.is_meta and not value.is_quantized
    if not dense or value.is_complex():
        raise AlignmentError(
            f"{_named(path)} is a tensor of layout {value.layout}, type {value.dtype} on "
            f"{value.device}; a checkpoint holds dense real tensors that have data"
        )
    return {"$tensor": encoder.store(value.detach(), path)}


def _encode_array(encoder: _Encoder, value: Any, path: tuple[str, ...]) -> Any:
    return {"$array": encoder.store(_array_tensor(value, path), path)}


def _encode_numpy_scalar(encoder: _Encoder, value: Any, path: tuple[str, ...]) -> Any:
    return {"$scalar": encoder.store(_array_tensor(np.asarray(value), path), path)}


def _array_tensor(array: Any, path: tuple[str, ...]) -> Tensor:
    if array.dtype.kind not in _NUMPY_KINDS or array.dtype.itemsize > 8:
        raise AlignmentError(
            f"{_named(path)} is a numpy array of type {array.dtype}, which a checkpoint cannot "
            "hold; give numbers of at most 64 bits"
        )
    if not array.dtype.isnative:
        raise AlignmentError(
            f"{_named(path)} is a numpy array in another byte order; convert it to the native one"
        )
    return torch.from_numpy(np.array(array, order="C"))  # a copy: torch asks for writable memory


def _difference(left: Any, right: Any, path: tuple[str, ...]) -> str | None:
    """Where two documents differ."""
    if type(left) is not type(right):
        return _named(path)
    if isinstance(left, dict):
        for key in (*left, *right):
            if key not in left or key not in right:
                return f"{_named((*path, key))}, which one of them does not have"
        pairs = [(str(key), left[key], right[key]) for key in left]
    elif isinstance(left, list):
        if len(left) != len(right):
            return f"the length of {_named(path)}"
        pairs = [(str(n), *both) for n, both in enumerate(zip(left, right, strict=True))]
    else:  # repr tells -0.0 from 0.0
        return None if repr(left) == repr(right) else f"{_named(path)}: {left!r} and {right!r}"
    found = (_difference(one, other, (*path, key)) for key, one, other in pairs)
    return next((place for place in found if place is not None), None)


def _same_tensor(left: Tensor, right: Tensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    bits = [t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return torch.equal(*bits)


def _named(path: tuple[str, ...]) -> str:
    return f"the state's {'.'.join(path)!r}" if path else "the state"


_ENCODERS: dict[type, Callable[[_Encoder, Any, tuple[str, ...]], Any]] = {
    dict: _encode_dict,
    OrderedDict: _encode_dict,
    defaultdict: _encode_dict,
    list: _encode_list,
    tuple: _encode_tuple,
    float: _encode_float,
    bytes: _encode_bytes,
    Tensor: _encode_tensor,
    nn.Parameter: _encode_tensor,
    np.ndarray: _encode_array,
}


def _tensor_named(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise AlignmentError(f"the state names a tensor {name!r} that its files do not hold")
    return tensors[name]


_DECODERS: dict[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "$dict": lambda pairs, tensors: {key: decode_tree(item, tensors) for key, item in pairs},
    "$tuple": lambda items, tensors: tuple(decode_tree(item, tensors) for item in items),
    "$float": lambda text, tensors: float(text),
    "$bytes": lambda text, tensors: base64.b64decode(text),
    "$tensor": _tensor_named,
    "$array": lambda name, tensors: _tensor_named(name, tensors).numpy(),
    "$scalar": lambda name, tensors: _tensor_named(name, tensors).numpy()[()],
}
