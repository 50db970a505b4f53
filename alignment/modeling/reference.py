"""Reference modes: where the policy's starting point is kept, and how it is scored.

The reference is the policy *as handed over*, in memory, never a reload by name: a policy that was
fine-tuned, merged or edited before training starts has KL 0 to its reference at step 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alignment.modeling.backbone import Backbone
from alignment.modeling.cast import cast_parameters
from alignment.modeling.shards import (
    Kept,
    MakeShards,
    Shards,
    Whole,
    assign_,
    copied,
    held,
    own_part,
    whole,
)
from alignment.types import UserInputError


class Reference(Protocol):
    """A frozen point the policy is compared with.

    Attributes:
        shards: how the weights that it is scored with lie over processes.
    """

    shards: Shards

    def backbone(self) -> AbstractContextManager[Backbone]:
        """Context manager giving the `Backbone` to score with, gradients off."""
        ...

    def shard(self, policys: Shards, make: MakeShards) -> None:
        """Keep the weights in parts, once those of the policy are.

        Args:
            policys: how the policy's own lie.
        """
        ...

    def gathered(self) -> AbstractContextManager[None]:
        """The weights whole inside, once those of the policy are."""
        ...

    def after_step(self, step: int) -> None:
        """Called after each step, for references that follow the policy."""
        ...

    def state_dict(self) -> dict[str, Kept]:
        """What cannot be rebuilt from the policy's starting point."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters the optimizer moves, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class AdapterOff:
    """LoRA: the reference is the frozen base under the adapter as it was handed over.

    A fresh adapter adds nothing, so it is switched off; an adapter that already holds an update
    (SFT before RL) is kept as a copy and swapped in.
    """

    def __init__(self, model: nn.Module) -> None:
        if not hasattr(model, "disable_adapter"):
            raise UserInputError(
                "model.reference: adapter_off needs a LoRA policy; add model.lora, or use "
                "reference: frozen_copy"
            )
        self.shards: Shards = Whole()
        self._model: Any = model
        self._backbone = Backbone(model)
        self._initial = {name: copied(held(p)) for name, p in trainable(model).items()}
        self._is_fresh = not any(
            bool(own_part(t).any()) for name, t in self._initial.items() if "lora_B" in name
        ) and all("lora_" in name for name in self._initial)

    def shard(self, policys: Shards, make: MakeShards) -> None:
        self.shards = policys
        self._initial = {name: copied(held(p)) for name, p in trainable(self._model).items()}

    @contextmanager
    def gathered(self) -> Iterator[None]:
        with _whole_inside(self._initial):
            yield

    @contextmanager
    def backbone(self) -> Iterator[Backbone]:
        with torch.no_grad():
            if self._is_fresh:
                with self._model.disable_adapter():
                    yield self._backbone
            else:
                with swapped(self._model, self._initial):
                    yield self._backbone


class OtherModel:
    """A model of its own, which nobody else uses.

    Args:
        backbone: of the model.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.shards: Shards = Whole()
        self._backbone = backbone

    def shard(self, policys: Shards, make: MakeShards) -> None:
        """Nothing: only a finished model is compared with another one."""

    def gathered(self) -> AbstractContextManager[None]:
        return self.shards.gathered()

    @contextmanager
    def backbone(self) -> Iterator[Backbone]:
        with torch.no_grad():
            yield self._backbone


class FrozenCopy(OtherModel):
    """A copy of the whole policy, in any dtype and on any device."""

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        frozen = copy.deepcopy(model).requires_grad_(False).eval()
        self.model = (frozen if dtype is None else cast_parameters(frozen, dtype)).to(device=device)
        super().__init__(Backbone(self.model))
        self._stays = device is not None

    def shard(self, policys: Shards, make: MakeShards) -> None:
        if not self._stays:
            self.shards = make(self.model, self.model)


class Fixed:
    """A reference that stays where it is: nothing happens after a step, and nothing is saved.

    Args:
        mode: its name in a recipe.
        point: gives the `Backbone` to score with.
    """

    def __init__(self, mode: str, point: AdapterOff | OtherModel) -> None:
        self._mode = mode
        self._point = point
        self.shards = point.shards

    def shard(self, policys: Shards, make: MakeShards) -> None:
        self._point.shard(policys, make)
        self.shards = self._point.shards

    def gathered(self) -> AbstractContextManager[None]:
        return self._point.gathered()

    def backbone(self) -> AbstractContextManager[Backbone]:
        return self._point.backbone()

    def after_step(self, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, Kept]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state:
            raise UserInputError(
                "the checkpoint holds a moving reference, but this run's reference is "
                f"{self._mode}; resume with the recipe the run was started with"
            )


class Synced:
    """A reference that follows the policy: every `every` steps, ref <- (1 - mix) ref + mix policy.

    `mix=1.0` is a periodic hard copy; smaller values are the moving average of TR-DPO
    (arXiv:2404.09656). Only what the policy trains is kept, in fp32 where it is mixed.
    """

    def __init__(self, model: nn.Module, *, every: int, mix: float) -> None:
        if every < 1 or not 0.0 < mix <= 1.0:
            raise UserInputError(
                f"model.reference: synced needs every >= 1 and 0 < mix <= 1, not every={every}, "
                f"mix={mix}"
            )
        self.shards: Shards = Whole()
        self._model = model
        self._backbone = Backbone(model)
        self._every = every
        self._mix = mix
        self._kept = self._taken()

    def _taken(self) -> dict[str, Kept]:
        return {
            name: copied(held(p), torch.float32 if self._mix < 1.0 else p.dtype)
            for name, p in trainable(self._model).items()
        }

    def shard(self, policys: Shards, make: MakeShards) -> None:
        self.shards = policys
        self._kept = self._taken()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        with _whole_inside(self._kept):
            yield

    @contextmanager
    def backbone(self) -> Iterator[Backbone]:
        with torch.no_grad(), swapped(self._model, self._kept):
            yield self._backbone

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if step % self._every:
            return
        for name, parameter in trainable(self._model).items():
            kept = own_part(self._kept[name])
            kept.lerp_(own_part(held(parameter)).to(kept.dtype), self._mix)

    def state_dict(self) -> dict[str, Kept]:
        return dict(self._kept)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != set(self._kept):
            raise UserInputError(
                "the checkpoint's reference holds other parameters than this policy: "
                f"{sorted(set(state) ^ set(self._kept))[:3]} differ"
            )
        for name, tensor in state.items():
            assign_(self._kept[name], tensor)


def make_reference(
    model: nn.Module,
    mode: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    every: int = 1,
    mix: float = 1.0,
) -> Reference | None:
    """The reference of a mode's name; None for `none` and `precomputed`, which score nothing."""
    table: dict[str, Callable[[], Reference | None]] = {
        "adapter_off": lambda: Fixed(mode, AdapterOff(model)),
        "frozen_copy": lambda: Fixed(mode, FrozenCopy(model, dtype=dtype, device=device)),
        "synced": lambda: Synced(model, every=every, mix=mix),
        "precomputed": lambda: None,
        "none": lambda: None,
    }
    if mode not in table:
        raise UserInputError(f"unknown reference mode {mode!r}; use one of {', '.join(table)}")
    return table[mode]()


@contextmanager
def swapped(model: nn.Module, tensors: Mapping[str, Kept]) -> Iterator[None]:
    """Run with other values in the named parameters; the originals are back bit for bit after."""
    parameters = trainable(model)
    swaps = [_Swap(parameters[name], tensor) for name, tensor in tensors.items()]
    try:
        for swap in swaps:
            swap.enter()
        yield
    finally:
        for swap in swaps:
            swap.leave()


class _Swap:
    """Another value in one parameter.

    A part of a sharded parameter stays where it is in memory, from where it is gathered: there the
    values move. Else the parameter points elsewhere for a while.
    """

    def __init__(self, parameter: nn.Parameter, value: Kept) -> None:
        self._parameter = parameter
        self._value = own_part(value)
        kept = held(parameter)
        self._part = None if type(kept) is Tensor else own_part(kept)
        self._original = parameter.data if self._part is None else self._part.clone()

    def enter(self) -> None:
        if self._part is None:
            self._parameter.data = self._value.to(self._original.dtype)
        else:
            self._part.copy_(self._value)

    def leave(self) -> None:
        if self._part is None:
            self._parameter.data = self._original
        else:
            self._part.copy_(self._original)


@contextmanager
def _whole_inside(tensors: dict[str, Kept]) -> Iterator[None]:
    """These tensors whole while inside, for `swapped` on gathered weights."""
    parts = dict(tensors)
    tensors |= {name: whole(tensor) for name, tensor in parts.items()}
    try:
        yield
    finally:
        tensors |= parts
