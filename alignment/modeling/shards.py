"""Weights that lie in parts over processes, as models and their trainers see them.

Where weights are sharded, every forward and backward pass gathers them layer by layer, so all ranks
take part in each: they run in lockstep. A rank that has fewer micro-batches than another, or none,
makes up for it with passes over a dummy sample, of which nothing reaches a loss or a metric.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alignment.types import AlignmentError, Sample

if TYPE_CHECKING:
    from alignment.modeling.optimizer import AdamWOptions, Optimizer

T = TypeVar("T")

_DUMMY = Sample((0,), (0,), (False,))


class Shards(Protocol):
    """How the weights of a model lie over the ranks of a run."""

    @property
    def lockstep(self) -> bool:
        """Whether all ranks take part in each pass: weights are in parts, and not gathered now."""
        ...

    def passes(self, n: int) -> int:
        """Passes that a rank makes which has work for `n`: in lockstep, as many as any rank."""
        ...

    def run(self, forward: Callable[[], T]) -> T:
        """A forward pass through the model, its weights gathered on the way.

        Args:
            forward: gives a dataclass, whose tensors a backward pass may start from.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """The backward pass from a loss, its gradients accumulated; in lockstep, of all ranks."""
        ...

    def gathered(self) -> AbstractContextManager[None]:
        """All weights whole on every rank inside, where ranks then do what they like."""
        ...

    def own_optimizer(
        self,
        parameters: Mapping[str, nn.Parameter],
        options: AdamWOptions,
        *,
        master_dtype: torch.dtype | None,
    ) -> Optimizer | None:
        """The optimizer that belongs to these shards; None where the usual one serves."""
        ...


class Whole:
    """Every rank has all weights."""

    lockstep = False

    def passes(self, n: int) -> int:
        return n

    def run(self, forward: Callable[[], T]) -> T:
        return forward()

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def own_optimizer(
        self,
        parameters: Mapping[str, nn.Parameter],
        options: AdamWOptions,
        *,
        master_dtype: torch.dtype | None,
    ) -> None:
        return None


MakeShards = Callable[[nn.Module, nn.Module], Shards]
"""A model and the transformers model inside it in; its weights are in parts afterwards."""


def lockstep(shards: Shards, batches: Sequence[list[int]]) -> list[list[int]]:
    """This rank's micro-batches, and an empty one for each pass that only others need."""
    return [*batches, *([] for _ in range(shards.passes(len(batches)) - len(batches)))]


def rows_of(samples: Sequence[Sample], batch: Sequence[int]) -> list[Sample]:
    """The samples of a micro-batch; a dummy where it is empty."""
    return [samples[i] for i in batch] or [_DUMMY]


def zero_loss(*tensors: Tensor | None) -> Tensor:
    """0, with a gradient of 0 for all that the tensors depend on.

    Every rank's backward pass then reaches the same parameters, whatever its loss looks at.
    """
    parts = [
        torch.where(torch.zeros_like(tensor, dtype=torch.bool), tensor, 0.0).sum()
        for tensor in tensors
        if tensor is not None and tensor.requires_grad
    ]
    return torch.stack(parts).sum()


@dataclass(frozen=True, slots=True)
class Fragment:
    """This rank's run of elements of a tensor that lies flat over all ranks (ZeRO).

    local: the elements, where they are kept.
    start: elements of the tensor before them.
    shape: the tensor's.
    """

    local: Tensor
    start: int
    shape: torch.Size


Kept = Tensor | Fragment
"""What a rank keeps of a tensor: all of it, or (as a `DTensor` or a `Fragment`) a part."""


def held(parameter: nn.Parameter) -> Kept:
    """What this rank keeps of a parameter at the moment.

    DeepSpeed's stage 3 leaves an empty tensor in its place between passes, and keeps this rank's
    elements beside it, padded to the same length on every rank.
    """
    beside: Any = parameter
    part: Tensor | None = getattr(beside, "ds_tensor", None)
    if part is None or parameter.numel() == beside.ds_numel:
        return parameter.detach()
    start = torch.distributed.get_rank() * part.numel()
    n = max(beside.ds_numel - start, 0)
    return Fragment(part.detach().flatten()[:n], start, beside.ds_shape)


def whole(tensor: Kept) -> Tensor:
    """A tensor with all its parts; every rank calls this."""
    if isinstance(tensor, DTensor):
        if not tensor.placements[0].is_shard():  # a sum over ranks that is still to be made
            summed: Tensor = tensor.full_tensor()
            return summed
        # Not by `full_tensor`: its exchange now and then makes gloo free memory twice (torch 2.13),
        # whose two threads note the name of what is done in one string, without a lock. Of all
        # exchanges made here, that one's name alone is too long to lie inside the string.
        tensor = _rows_as_fragment(tensor)
    if not isinstance(tensor, Fragment):
        return tensor
    full = torch.zeros(tensor.shape, dtype=tensor.local.dtype, device=tensor.local.device)
    own = full.flatten()[tensor.start : tensor.start + tensor.local.numel()]
    own.copy_(tensor.local)
    # Bit by bit: the other ranks have zeros there.
    torch.distributed.all_reduce(full.flatten().view(torch.uint8))
    return full


def own_part(tensor: Kept) -> Tensor:
    """What this rank holds of a tensor."""
    if isinstance(tensor, Fragment):
        return tensor.local
    if not isinstance(tensor, DTensor):
        return tensor
    local: Tensor = tensor.to_local()
    return local


def copied(tensor: Kept, dtype: torch.dtype | None = None) -> Kept:
    """A copy, kept as the tensor is."""
    if isinstance(tensor, Fragment):
        return replace(tensor, local=tensor.local.to(dtype, copy=True))
    return tensor.to(dtype, copy=True)


@torch.no_grad()
def assign_(tensor: Kept, value: Tensor) -> None:
    """Put a whole value into a tensor of which this rank may hold a part.

    Raises:
        AlignmentError: the value has another shape.
    """
    if tensor.shape != value.shape:
        raise AlignmentError(
            f"a tensor of shape {tuple(value.shape)} was saved where this run has one of shape "
            f"{tuple(tensor.shape)}"
        )
    if isinstance(tensor, Fragment):
        value = value.flatten()[tensor.start : tensor.start + tensor.local.numel()]
    elif isinstance(tensor, DTensor):
        start, stop = _rows(tensor)
        value = value[start:stop]
    own_part(tensor).copy_(value)


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """A whole value, kept in parts where `tensor` of that shape is, and on its device."""
    if not isinstance(tensor, DTensor) or tensor.shape != value.shape:
        return value.to(tensor.device, copy=True)
    out = torch.empty_like(tensor, dtype=value.dtype)
    assign_(out, value)
    return out


def first_elements(tensor: Kept, n: int) -> Tensor:
    """This rank's share of the first `n` elements of a tensor, flat, copied."""
    if isinstance(tensor, DTensor):
        tensor = _rows_as_fragment(tensor)
    if isinstance(tensor, Fragment):
        n = max(n - tensor.start, 0)
    return own_part(tensor).detach().flatten()[:n].clone()


def _rows_as_fragment(tensor: DTensor) -> Fragment:
    before = _rows(tensor)[0] * tensor.shape[1:].numel()
    return Fragment(own_part(tensor).detach().flatten(), before, tensor.shape)


def _rows(tensor: DTensor) -> tuple[int, int]:
    """Where this rank's rows begin and end; they are dealt out as `torch.chunk` does."""
    (placement,) = tensor.placements
    if not placement.is_shard(0):
        raise AlignmentError(f"a weight is kept as {placement}, not in parts of its rows")
    n, mesh = tensor.shape[0], tensor.device_mesh
    each = -(-n // mesh.size())
    return min(mesh.get_local_rank() * each, n), min((mesh.get_local_rank() + 1) * each, n)


def gathered_tree(tree: Any, *, keep: bool) -> Any:
    """A nested mapping with every sharded tensor whole; every rank calls this.

    Args:
        keep: whether this rank wants them, on the CPU; else an empty tensor stands for each.
    """
    if isinstance(tree, Mapping):
        return {key: gathered_tree(value, keep=keep) for key, value in tree.items()}
    if not isinstance(tree, DTensor | Fragment):
        return tree
    full = whole(tree)
    return full.cpu() if keep else torch.empty(0)


class Skeleton:
    """A model without its weights, to be filled with whole ones where the model's lie in parts.

    Args:
        model: it is not changed, and its weights are whole.
    """

    def __init__(self, model: nn.Module) -> None:
        self._hollow = _with_parameters(
            model,
            {name: torch.empty_like(p, device="meta") for name, p in model.named_parameters()},
        )

    def filled(self, weights: Mapping[str, Tensor]) -> Any:
        """A copy of the model with these weights, by parameter name; shared ones stay shared."""
        return _with_parameters(self._hollow, weights)


def _with_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy of a model, but for its parameters."""
    parameters: dict[int, Any] = {
        id(p): nn.Parameter(tensors[name], requires_grad=p.requires_grad)
        for name, p in model.named_parameters()
    }
    return copy.deepcopy(model, parameters)
