"""A copy of the training state, for writing it while the weights move on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignment.runs.state_tree import encode_tree, tensor_bytes

_BYTES_A_TENSOR = 200  # of a file's header, besides the name


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state as it was when it was taken: no later step changes anything in it.

    document: the structure, as JSON (`state_tree`).
    tensors:  contiguous copies in this machine's memory, by name. No two share storage.
    """

    document: bytes
    tensors: Mapping[str, Tensor]

    @property
    def n_bytes(self) -> int:
        """What it takes on disk, at most."""
        headers = sum(len(name.encode()) + _BYTES_A_TENSOR for name in self.tensors)
        return len(self.document) + headers + sum(map(tensor_bytes, self.tensors.values()))


def take_snapshot(state: Mapping[str, Any]) -> Snapshot:
    """Copy `state`, a tree as `state_tree` describes it: its tensors are in memory once more.

    Raises:
        AlignmentError: the state holds what cannot be saved.
    """
    tree = encode_tree(dict(state))
    document = json.dumps(tree.document, allow_nan=False).encode()
    return Snapshot(document, {name: _copy(tensor) for name, tensor in tree.tensors.items()})


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
