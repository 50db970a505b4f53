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
from alignment.types import UserInputError


class Reference(Protocol):
    """A frozen point the policy is compared with."""

    def backbone(self) -> AbstractContextManager[Backbone]:
        """Context manager giving the `Backbone` to score with, gradients off."""
        ...

    def after_step(self, step: int) -> None:
        """Called after each step, for references that follow the policy."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
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
        self._model: Any = model
        self._backbone = Backbone(model)
        self._initial = {name: p.detach().clone() for name, p in trainable(model).items()}
        self._is_fresh = not any(
            bool(t.any()) for name, t in self._initial.items() if "lora_B" in name
        ) and all("lora_" in name for name in self._initial)

    @contextmanager
    def backbone(self) -> Iterator[Backbone]:
        with torch.no_grad():
            if self._is_fresh:
                with self._model.disable_adapter():
                    yield self._backbone
            else:
                with swapped(self._model, self._initial):
                    yield self._backbone


class FrozenCopy:
    """A copy of the whole policy, in any dtype and on any device."""

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        frozen = copy.deepcopy(model).requires_grad_(False).eval()
        self.model = frozen.to(device=device, dtype=dtype)
        self._backbone = Backbone(self.model)

    @contextmanager
    def backbone(self) -> Iterator[Backbone]:
        with torch.no_grad():
            yield self._backbone


class Fixed:
    """A reference that stays where it is: nothing happens after a step, and nothing is saved.

    Args:
        mode: its name in a recipe.
        point: gives the `Backbone` to score with.
    """

    def __init__(self, mode: str, point: AdapterOff | FrozenCopy) -> None:
        self._mode = mode
        self._point = point

    def backbone(self) -> AbstractContextManager[Backbone]:
        return self._point.backbone()

    def after_step(self, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor]:
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
        self._model = model
        self._backbone = Backbone(model)
        self._every = every
        self._mix = mix
        self._kept = {
            name: p.detach().to(torch.float32 if mix < 1.0 else p.dtype, copy=True)
            for name, p in trainable(model).items()
        }

    @contextmanager
    def backbone(self) -> Iterator[Backbone]:
        with torch.no_grad(), swapped(self._model, self._kept):
            yield self._backbone

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if step % self._every:
            return
        for name, parameter in trainable(self._model).items():
            kept = self._kept[name]
            kept.lerp_(parameter.detach().to(kept.dtype), self._mix)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._kept)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != set(self._kept):
            raise UserInputError(
                "the checkpoint's reference holds other parameters than this policy: "
                f"{sorted(set(state) ^ set(self._kept))[:3]} differ"
            )
        for name, tensor in state.items():
            self._kept[name].copy_(tensor)


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
def swapped(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Run with other values in the named parameters; the originals are back bit for bit after."""
    parameters = trainable(model)
    originals = {name: parameters[name].data for name in tensors}
    try:
        for name, tensor in tensors.items():
            parameters[name].data = tensor.to(originals[name].dtype)
        yield
    finally:
        for name, original in originals.items():
            parameters[name].data = original
