"""Keys and values of running groups, each group's tokens side by side.

A group is one prompt and the rows sampled from it. Its stretch of the cache holds the prompt's
tokens first and then every token its rows have drawn, in the order of drawing; `owner` says whose
each token is. Nothing is copied to fork a prompt, to append a token, or to finish a row. A row sees
the prompt's tokens and its own.

    place      0   1   2   3   4   5   6   7
    owner      P   P   P   7   8   9   7   9      (row 8 ended with its first token)
    position   0   1   2   3   3   3   4   4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alignment.rollout.sampling import IntArray

PROMPT = -1
EMPTY = -2
NOBODY = -3  # the "row" of an empty place among a group's queries

_STEP = 64  # capacities are multiples of this
_WASTE = 1.3  # compact when attention passes over this many times the tokens that are alive


@dataclass(frozen=True, slots=True)
class _Write:
    """What the next forward stores: token `source[i]` of the batch at `slots[i]`."""

    slots: Tensor
    source: Tensor | None
    attend_to_cache: bool


class GroupedCache:
    """The cache object a transformers decoder writes to and reads from.

    It has the methods a decoder calls (`update`, `get_seq_length`); masks and positions are always
    handed to the decoder ready made, so it asks for nothing else. Before a forward, `plan_prompts`
    or `plan_tokens` says where its tokens go.

    Attributes:
        owner, position: `[groups, capacity]`, whose token stands there and its position.
        used: `[groups]`, places taken.
    """

    def __init__(self, device: torch.device) -> None:
        self.owner = np.empty((0, 0), dtype=np.int64)
        self.position = np.empty((0, 0), dtype=np.int64)
        self.used = np.zeros(0, dtype=np.int64)
        self._device = device
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._write: _Write | None = None

    # -- what the decoder calls ------------------------------------------------------------

    @property
    def n_groups(self) -> int:
        return self.owner.shape[0]

    @property
    def capacity(self) -> int:
        """Places of one group."""
        return self.owner.shape[1]

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values `[B, H, S, D]`; return those to attend to."""
        assert self._write is not None
        if layer_idx not in self._layers:
            self._layers[layer_idx] = (self._empty_like(keys), self._empty_like(values))
        stored_keys, stored_values = self._layers[layer_idx]
        self._store(stored_keys, keys, self._write)
        self._store(stored_values, values, self._write)
        if not self._write.attend_to_cache:
            return keys, values
        return self._visible(stored_keys), self._visible(stored_values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the longest group."""
        return int(self.used.max(initial=0))

    # -- what the engine calls -------------------------------------------------------------

    def plan_prompts(self, groups: Sequence[int], lengths: Sequence[int], width: int) -> None:
        """The next forward computes prompts, right-padded to `[len(groups), width]`."""
        slots, source = [], []
        for batch_row, (group, length) in enumerate(zip(groups, lengths, strict=True)):
            self._mark_prompt(group, length)
            slots.append(group * self.capacity + np.arange(length))
            source.append(batch_row * width + np.arange(length))
        self._write = _Write(
            self._tensor(np.concatenate(slots)), self._tensor(np.concatenate(source)), False
        )

    def copy_prompt(self, source: int, target: int, length: int) -> None:
        """Give group `target` the prompt that group `source` holds."""
        self._mark_prompt(target, length)
        for stored in (tensor for layer in self._layers.values() for tensor in layer):
            places = stored.view(self.n_groups, self.capacity, *stored.shape[1:])
            places[target, :length] = places[source, :length]

    def plan_tokens(
        self,
        groups: IntArray,
        columns: IntArray,
        numbers: IntArray,
        positions: IntArray,
        source: Tensor | None = None,
    ) -> None:
        """The next forward brings one token for each of R rows.

        Args:
            groups: `[R]`, each row's group.
            columns: `[R]`, 0, 1, ... among the rows of its group.
            numbers: `[R]`, the rows' names.
            positions: `[R]`, the tokens' positions.
            source: `[R]`, where they stand in the batch, None: in this order.
        """
        place = self.used[groups] + columns
        self.owner[groups, place] = numbers
        self.position[groups, place] = positions
        np.add.at(self.used, groups, 1)
        self._write = _Write(self._tensor(groups * self.capacity + place), source, True)

    def visible(self, numbers: IntArray) -> tuple[Tensor, Tensor]:
        """What the rows named `numbers` `[groups, W]` see: bool `[groups, W, K]`, and the keys'
        positions `[groups, K]`."""
        longest = self.get_seq_length()
        owner = self.owner[:, None, :longest]
        allowed = (owner == PROMPT) | (owner == numbers[:, :, None])
        return self._tensor(allowed), self._tensor(self.position[:, :longest])

    def free_groups(self, taken: Sequence[int]) -> list[int]:
        """Groups not among `taken`, emptied. One place stays visible: no softmax runs dry."""
        free = sorted(set(range(len(self.used))) - set(taken))
        self.owner[free] = EMPTY
        self.owner[free, :1] = PROMPT
        self.used[free] = 0
        return free

    def wants_compaction(self, alive: Sequence[int], incoming: Sequence[int]) -> bool:
        """Whether to `rebuild`: no room for the next tokens, or too much is passed over in vain.

        Args:
            alive: tokens alive in each group that is in use.
            incoming: tokens about to be added to it.
        """
        used = self.get_seq_length()
        if used + max(incoming) > self.capacity:
            return True
        passed_over = self.n_groups * used
        return passed_over > _WASTE * len(alive) * max(alive) + 4 * _STEP

    def rebuild(
        self, kept: Sequence[tuple[int, Sequence[int]]], groups: int, capacity: int
    ) -> None:
        """Move what is alive into a new cache of `groups` times `capacity` places.

        Args:
            kept: for each group that stays, its index and the rows that are alive. It becomes
                group 0, 1, ... in this order.
        """
        owner, position, old_capacity = self.owner, self.position, self.capacity
        self.owner = np.full((groups, capacity), EMPTY, dtype=np.int64)
        self.owner[:, :1] = PROMPT
        self.position = np.zeros((groups, capacity), dtype=np.int64)
        self.used = np.zeros(groups, dtype=np.int64)
        index = np.zeros((groups, capacity), dtype=np.int64)
        for new, (group, numbers) in enumerate(kept):
            places = np.flatnonzero(np.isin(owner[group], [PROMPT, *numbers]))
            size = self.used[new] = len(places)
            self.owner[new, :size] = owner[group, places]
            self.position[new, :size] = position[group, places]
            index[new, :size] = group * old_capacity + places
        flat = self._tensor(index.reshape(-1))
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = (keys.index_select(0, flat), values.index_select(0, flat))

    def _mark_prompt(self, group: int, length: int) -> None:
        self.owner[group, :length] = PROMPT
        self.owner[group, length:] = EMPTY
        self.position[group, :length] = np.arange(length)
        self.used[group] = length

    def _store(self, stored: Tensor, new: Tensor, write: _Write) -> None:
        tokens = new.transpose(1, 2).flatten(0, 1)
        if write.source is not None:
            tokens = tokens.index_select(0, write.source)
        stored.index_copy_(0, write.slots, tokens)

    def _visible(self, stored: Tensor) -> Tensor:
        places = stored.view(self.n_groups, self.capacity, *stored.shape[1:])
        return places[:, : self.get_seq_length()].transpose(1, 2)

    def _empty_like(self, new: Tensor) -> Tensor:
        # Zeros: what no row may see is masked, and a masked NaN would still spoil the sum.
        return new.new_zeros(self.owner.size, new.shape[1], new.shape[3])

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def capacity_for(tokens: int) -> int:
    """Places to set aside for a group that now needs `tokens`: a quarter more, rounded up."""
    return -(-(tokens + tokens // 4) // _STEP) * _STEP
