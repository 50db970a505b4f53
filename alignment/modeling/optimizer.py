"""AdamW with fp32 master weights behind low-precision compute weights, and learning-rate schedules.

At the rates of RL (1e-6) an AdamW that lives in bf16 moves 2% of its weights: the update is below
half a unit in the last place of the rest. So the optimizer owns fp32 copies, gradients are summed
in fp32 as soon as each is ready, and the model keeps the rounded weights it computes with. No
autocast is involved: sampling, scoring and training all run the same low-precision model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alignment.modeling.shards import Kept, assign_, first_elements, like, own_part, whole
from alignment.types import AlignmentError

PROBE = 4096
"""Elements looked at in each tensor to tell what share of the weights a step moved."""

OTHER_PARAMETERS = (
    "the optimizer's state in the checkpoint is of other parameters than those that are trained; "
    "resume with the recipe the run was started with"
)

SumCounts = Callable[[Sequence[float]], Sequence[float]]


class Optimizer(Protocol):
    """What an update asks of an optimizer.

    Attributes:
        base_lr: the learning rate it was made with.
    """

    base_lr: float

    @property
    def gradients(self) -> list[Tensor]:
        """Accumulated gradients in a fixed order; zeros where nothing has arrived."""
        ...

    def set_lr(self, lr: float) -> None: ...

    def clip_(self, max_norm: float | None) -> float:
        """Global gradient norm (L2) before clipping; gradients are scaled to `max_norm` if set."""
        ...

    def step(self) -> float:
        """Update the weights and drop the gradients.

        Returns:
            the share of (sampled) compute weights that changed. Near zero, the updates are
            smaller than the weights' precision and the run learns nothing.
        """
        ...

    def scale_(self, name: str, factor: float) -> None:
        """Multiply one trained tensor by `factor`, its master first. AdamW's moments stay."""
        ...

    def drop_gradients(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """Moments and step counts by parameter name, and the masters where they differ."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore strictly, once the weights are restored.

        Raises:
            AlignmentError: the state is of other parameters.
        """
        ...


@dataclass(frozen=True, slots=True)
class AdamWOptions:
    """AdamW (Loshchilov and Hutter, 2019); the defaults are the usual ones."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


class MasterWeightOptimizer:
    """AdamW over `named_parameters`, stepping masters in `master_dtype`.

    Args:
        parameters: what is trained, by name.
        options: AdamW's.
        master_dtype: dtype of master weights, gradients and moments; None to use each parameter's
            own (pure low precision: smaller, and at small rates most weights stand still).
        sum_counts: over ranks; needed where parameters are sharded, and with them all that is kept
            here.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        options: AdamWOptions,
        *,
        master_dtype: torch.dtype | None = torch.float32,
        sum_counts: SumCounts | None = None,
    ) -> None:
        self._parameters = dict(parameters)
        self._masters: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if master_dtype is None or parameter.dtype == master_dtype:
                self._masters[name] = parameter
            else:
                master = parameter.detach().to(master_dtype)
                self._masters[name] = master
                hooked: Any = parameter
                hooked.register_post_accumulate_grad_hook(_accumulate_into(master))
        self._adamw = torch.optim.AdamW(
            list(self._masters.values()),
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.base_lr = options.lr
        self._sum_counts = sum_counts

    @property
    def gradients(self) -> list[Tensor]:
        for master in self._masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [m.grad for m in self._masters.values() if m.grad is not None]

    def set_lr(self, lr: float) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def clip_(self, max_norm: float | None) -> float:
        gradients = self.gradients
        norm = float(whole(nn.utils.get_total_norm(gradients)))
        if max_norm is not None and math.isfinite(norm) and norm > max_norm:
            torch._foreach_mul_(gradients, max_norm / norm)
        return norm

    @torch.no_grad()
    def step(self) -> float:
        before = self._probe()
        self._adamw.step()
        for name, parameter in self._parameters.items():
            if self._masters[name] is not parameter:
                parameter.copy_(self._masters[name])
        self.drop_gradients()
        after = self._probe()
        moved: float = sum(int((a != b).sum()) for a, b in zip(after, before, strict=True))
        seen: float = sum(t.numel() for t in before)
        if self._sum_counts is not None:
            moved, seen = self._sum_counts([moved, seen])
        return moved / max(seen, 1)

    @torch.no_grad()
    def scale_(self, name: str, factor: float) -> None:
        self._masters[name].mul_(factor)
        if self._masters[name] is not self._parameters[name]:
            self._parameters[name].copy_(self._masters[name])

    def drop_gradients(self) -> None:
        for name, parameter in self._parameters.items():
            self._masters[name].grad = None
            parameter.grad = None  # a backward pass that failed may have left its own behind

    def state_dict(self) -> dict[str, Any]:
        moments = {
            name: dict(self._adamw.state[master])
            for name, master in self._masters.items()
            if master in self._adamw.state
        }
        return {"masters": self._own_masters(), "moments": moments}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        masters = self._own_masters()
        if set(state["masters"]) != set(masters):
            raise AlignmentError(OTHER_PARAMETERS)
        check_moments(state["moments"], self._masters)
        for name, master in masters.items():
            assign_(master, state["masters"][name])
            self._parameters[name].copy_(master)
        self._adamw.state.clear()
        for name, moments in state["moments"].items():
            master = self._masters[name]
            self._adamw.state[master] = {key: like(master, value) for key, value in moments.items()}

    def _own_masters(self) -> dict[str, Tensor]:
        return {n: m for n, m in self._masters.items() if m is not self._parameters[n]}

    def _probe(self) -> list[Tensor]:
        return [first_elements(parameter, PROBE) for parameter in self._parameters.values()]


def check_moments(moments: Mapping[str, Mapping[str, Tensor]], masters: Mapping[str, Kept]) -> None:
    """Refuse what AdamW cannot go on from: its fused step reads beyond a moment that is too short.

    An update moves all parameters: either all have moments, or none before the first one.

    Args:
        moments: whole ones, by the parameter's name.

    Raises:
        AlignmentError: they are not the moments of these masters.
    """
    if not moments:
        return
    found = {
        name: {key: (value.shape, value.dtype) for key, value in of_one.items()}
        for name, of_one in moments.items()
    }
    if found != {name: _moments_of(master) for name, master in masters.items()}:
        raise AlignmentError(OTHER_PARAMETERS)


def _moments_of(master: Kept) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shapes and dtypes of what fused AdamW keeps for a tensor."""
    own = (master.shape, own_part(master).dtype)
    return {"step": (torch.Size(()), torch.float32), "exp_avg": own, "exp_avg_sq": own}


def _accumulate_into(master: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        if master.grad is None:
            master.grad = gradient.to(master.dtype)
        else:
            master.grad.add_(gradient)
        parameter.grad = None

    return hook


def learning_rate(
    step: int,
    *,
    base: float,
    schedule: str,
    warmup_steps: int,
    total_steps: int,
    min_ratio: float = 0.0,
) -> float:
    """The rate of update `step` (0-based): linear warm-up, then constant, linear or cosine decay.

    Decay goes from `base` to `min_ratio * base` over the steps after warm-up.
    """
    if step < warmup_steps:
        return base * (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda x: 1.0,
        "linear": lambda x: 1.0 - x,
        "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    }
    shape = shapes[schedule](min(done, 1.0))
    return base * (min_ratio + (1.0 - min_ratio) * shape)
