"""DeepSpeed's ZeRO optimizer as trainers see one: whole tensors by name in its state, and clipping,
skipping and scaling left to them.

Which elements of a parameter this rank has masters, gradients and moments of is read off
DeepSpeed's optimizers (stages 2 and 3), which promise none of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignment.activity import exchanging
from alignment.modeling.optimizer import OTHER_PARAMETERS, PROBE, SumCounts, check_moments
from alignment.modeling.shards import Fragment, assign_, first_elements, held, whole
from alignment.types import AlignmentError

WEIGHTS = 3
"""The stage that shares out weights."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run.

    sum, max: element-wise, over ranks.
    """

    rank: int
    world_size: int
    device: torch.device
    sum: SumCounts
    max: SumCounts


@dataclass(frozen=True, slots=True)
class _Place:
    """Where this rank's run of elements of a parameter lies in its flat masters, gradients and
    moments.

    flat:   the masters.
    offset: elements in it before these.
    n:      how many these are.
    start:  elements of the parameter before these.
    """

    flat: Tensor
    offset: int
    n: int
    start: int
    shape: torch.Size

    def of(self, flat: Tensor) -> Fragment:
        return Fragment(flat.detach()[self.offset : self.offset + self.n], self.start, self.shape)


class ZeroOptimizer:
    """DeepSpeed's optimizer, as `MasterWeightOptimizer`."""

    def __init__(
        self,
        zero: Any,
        parameters: Mapping[str, nn.Parameter],
        lr: float,
        stage: int,
        ranks: Ranks,
    ) -> None:
        self._zero = zero
        self._parameters = dict(parameters)
        self._stage = stage
        self._ranks = ranks
        self._is_fp32 = all(p.dtype == torch.float32 for p in parameters.values())
        self._is_whole = False  # whether the gradients of all micro-batches are put together
        self.base_lr = lr

    @property
    def gradients(self) -> list[Tensor]:
        """This rank's parts of the gradients, summed over ranks; zeros where nothing arrived."""
        zero = self._zero
        if not self._is_whole:
            if self._stage == WEIGHTS:
                zero.independent_gradient_partition_epilogue()
            else:
                if self._is_fp32 and zero.all_grad_tensors.get(0) is None:
                    zero.all_grad_tensors[0] = zero.get_all_grad_tensors(
                        zero.params_in_partition[0], dtype=torch.float32
                    )
                zero.finalize_gradient_accumulation_boundary()
            self._is_whole = True
        return [part for parts in zero.averaged_gradients.values() for part in parts]

    def set_lr(self, lr: float) -> None:
        for group in self._zero.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def clip_(self, max_norm: float | None) -> float:
        gradients = self.gradients
        own = float(nn.utils.get_total_norm(gradients))
        (squares,) = self._ranks.sum([own**2])
        norm = math.sqrt(squares)
        if max_norm is not None and math.isfinite(norm) and norm > max_norm:
            torch._foreach_mul_(gradients, max_norm / norm)
        return norm

    @torch.no_grad()
    def step(self) -> float:
        before = self._probe()
        with exchanging():
            self._zero.step()
        self.drop_gradients()
        after = self._probe()
        moved: float = sum(int((a != b).sum()) for a, b in zip(after, before, strict=True))
        moved, seen = self._ranks.sum([moved, sum(t.numel() for t in before)])
        return moved / max(seen, 1)

    @torch.no_grad()
    def scale_(self, name: str, factor: float) -> None:
        master = self._masters()[name]
        master.local.mul_(factor)
        with exchanging():
            self._publish(name, master)

    def drop_gradients(self) -> None:
        zero = self._zero
        zero.zero_grad()
        if self._stage == WEIGHTS:
            zero.grad_partitions_flat_buffer.zero_()
            zero.averaged_gradients = {}
        else:
            for group in zero.averaged_gradients:
                zero.averaged_gradients[group] = None
                zero.all_grad_tensors[group] = None
        self._is_whole = False

    def state_dict(self) -> dict[str, Any]:
        """As `MasterWeightOptimizer`'s, in this rank's parts."""
        states, moments = self._zero.optimizer.state, {}
        for name, place in self._places().items():
            if states.get(place.flat):
                moments[name] = {
                    key: place.of(value) if key in _MOMENTS else value
                    for key, value in states[place.flat].items()
                }
        masters = {} if self._is_fp32 else self._masters()
        return {"masters": masters, "moments": moments}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore strictly, after the weights.

        Raises:
            AlignmentError: the state is of other parameters.
        """
        masters, moments = self._masters(), state["moments"]
        if set(state["masters"]) != (set() if self._is_fp32 else set(masters)):
            raise AlignmentError(OTHER_PARAMETERS)
        check_moments(moments, masters)
        with exchanging():
            for name, master in masters.items():
                if self._is_fp32:
                    assign_(master, whole(held(self._parameters[name])))
                else:
                    assign_(master, state["masters"][name])
                    self._publish(name, master)
        states = self._zero.optimizer.state
        states.clear()
        places = self._places()
        for name, saved in moments.items():
            place = places[name]
            kept = states[place.flat]
            for key, value in saved.items():
                if key in _MOMENTS:
                    kept.setdefault(key, torch.zeros_like(place.flat))
                    assign_(place.of(kept[key]), value)
                else:
                    kept[key] = value.to(place.flat.device, copy=True)

    def _masters(self) -> dict[str, Fragment]:
        return {name: place.of(place.flat) for name, place in self._places().items()}

    def _publish(self, name: str, master: Fragment) -> None:
        """Round a master to the weight that is computed with."""
        assign_(held(self._parameters[name]), whole(master))

    def _places(self) -> dict[str, _Place]:
        place = self._place_of_shared if self._stage == WEIGHTS else self._place_of_whole
        return {name: place(parameter) for name, parameter in self._parameters.items()}

    def _place_of_shared(self, parameter: Any) -> _Place:
        """Each rank has an equally long run of each parameter; the last ones may be padding."""
        group, offset, each = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start = self._ranks.rank * each
        n = max(min(each, parameter.ds_numel - start), 0)
        flat = self._zero.fp32_partitioned_groups_flat[group]
        return _Place(flat, offset, n, start, parameter.ds_shape)

    def _place_of_whole(self, parameter: Any) -> _Place:
        """Each rank has a run of all parameters in a row, of many of them nothing."""
        (flat,), here = self._zero.single_partition_of_fp32_groups, parameter._hp_mapping
        if here is None:
            return _Place(flat, 0, 0, 0, parameter.shape)
        inside, before = here.hp_fragment_address, here.lp_fragment_address.start
        return _Place(flat, inside.start, inside.numel, before, parameter.shape)

    def _probe(self) -> list[Tensor]:
        return [first_elements(held(parameter), PROBE) for parameter in self._parameters.values()]
