"""The only file that knows about processes: what rank this is, exact global sums, sharded weights.

Gradients are summed, not averaged: every loss is a sum divided by a count that is already global,
so the sum over ranks is the gradient of the whole batch, whatever share of it each rank holds.

Each rank has all weights, unless the run was launched with accelerate's FSDP2 or DeepSpeed. With
all weights, ranks may run different numbers of forward passes, or none; nothing synchronises inside
the backward pass. With a part of each weight they run in lockstep (`alignment.modeling.shards`).
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
    patch_environment,
)
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from alignment.activity import exchanging
from alignment.types import UserInputError

T = TypeVar("T")

# How long is too long is for the watch of a run to say, which names the rank that all wait for.
_LONGEST_EXCHANGE = timedelta(days=1)


class Distributed:
    """This process among those of the run (one process where nothing was launched).

    Raises:
        UserInputError: the run was launched for something that this toolkit does not do.
    """

    def __init__(self, *, cpu: bool = False) -> None:
        self._fsdp = _fsdp_asked_for()
        self._zero_stage = _zero_stage_asked_for()
        self._mesh: DeviceMesh | None = None
        # accelerate joins processes on a CPU only where it is told that there is nothing else.
        no_accelerator = not torch.accelerator.is_available()
        on_cpu = cpu or no_accelerator or parse_flag_from_env("ACCELERATE_USE_CPU")
        if on_cpu:  # DeepSpeed looks for an accelerator when transformers imports it, and says so
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # It would import DeepSpeed, which joins what is there when it is needed.
        with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):
            self._state = PartialState(cpu=on_cpu, timeout=_LONGEST_EXCHANGE)

    @property
    def rank(self) -> int:
        return int(self._state.process_index)

    @property
    def world_size(self) -> int:
        return int(self._state.num_processes)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        device: torch.device = self._state.device
        return device

    def peak_gigabytes(self) -> float:
        """This process's peak memory so far: allocated on a GPU, else resident."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e9

    @property
    def shards_state(self) -> bool:
        """Whether each rank keeps a part of what is trained: of moments and masters, mostly also of
        weights (FSDP2, ZeRO)."""
        return self.world_size > 1 and (self._fsdp is not None or self._zero_stage is not None)

    @property
    def zero_stage(self) -> int | None:
        """The stage of ZeRO, where DeepSpeed shares out what is trained."""
        return self._zero_stage if self.shards_state else None

    def shard(self, model: nn.Module, language_model: nn.Module) -> Sharded:
        """Keep a part of each of a model's weights on every rank from now on; all ranks call this.

        Args:
            model: goes to this rank's device, layer by layer.
            language_model: the transformers model in it, whose layers are gathered one by one.

        Raises:
            UserInputError: accelerate finds no layers in it.
        """
        assert self._fsdp is not None
        if self._mesh is None:
            self._mesh = init_device_mesh(self.device.type, (self.world_size,))
        try:
            is_layer = fsdp2_prepare_auto_wrap_policy(self._fsdp, language_model)
        except ValueError as error:
            raise UserInputError(
                f"accelerate's FSDP cannot tell the layers of {type(language_model).__name__} "
                f"({error}); mend fsdp_transformer_layer_cls_to_wrap, or remove it"
            ) from error
        layers = [] if is_layer is None else [m for m in language_model.modules() if is_layer(m)]
        if not layers:
            raise UserInputError(
                f"transformers does not say which layers {type(language_model).__name__} is made "
                "of; name their class in accelerate's fsdp_transformer_layer_cls_to_wrap"
            )
        reshards = bool(self._fsdp.reshard_after_forward)
        return Sharded(model, layers, self._mesh, reshards=reshards, largest=self.max)

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's contiguous part of `items`; the parts differ by one at most."""
        n, world = len(items), self.world_size
        return list(items[n * self.rank // world : n * (self.rank + 1) // world])

    def deal(self, items: Sequence[T]) -> list[T]:
        """This rank's part, dealt out one by one: every stretch is spread over all ranks."""
        return list(items[self.rank :: self.world_size])

    @exchanging()
    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over ranks."""
        if self.world_size == 1:
            return [float(v) for v in values]
        # Accelerators such as MPS have no float64; counts and sums there stay below 2^24.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        tensor = torch.tensor(values, dtype=dtype, device=self.device)
        torch.distributed.all_reduce(tensor)
        out: list[float] = tensor.tolist()
        return out

    @exchanging()
    def max(self, values: Sequence[float]) -> list[float]:
        """Element-wise maxima over ranks."""
        if self.world_size == 1:
            return [float(v) for v in values]
        tensor = torch.tensor(values, dtype=torch.float32, device=self.device)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        out: list[float] = tensor.tolist()
        return out

    @exchanging()
    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Sum each gradient over ranks, in place. All ranks hold the same list in one order.

        Those of sharded weights, and by ZeRO all, were summed in the backward pass.
        """
        if self.world_size == 1 or self._zero_stage is not None:
            return
        own = [g for g in gradients if not isinstance(g, DTensor)]
        handles = [torch.distributed.all_reduce(g, async_op=True) for g in own]
        for handle in handles:
            if handle is not None:
                handle.wait()

    @exchanging()
    def gather(self, items: Sequence[T]) -> list[T]:
        """All ranks' items in rank order, on every rank."""
        if self.world_size == 1:
            return list(items)
        gathered: list[T] = gather_object(list(items))
        return gathered

    @exchanging()
    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box: list[Any] = [value]
        broadcast_object_list(box)
        out: T = box[0]
        return out

    @exchanging()
    def barrier(self) -> None:
        self._state.wait_for_everyone()


class Sharded:
    """A model of which every rank keeps a part of each weight, gathered layer by layer in use.

    FSDP2: `fully_shard` on each layer, and on the rest of the model as one. What is outside the
    layers (embeddings, head) is whole from the forward pass to the end of the backward pass.

    Args:
        model: the whole model.
        layers: parts of it that are gathered each by itself.
        mesh: of all ranks.
        reshards: whether a layer is let go of after its forward pass and gathered again for its
            backward pass, or kept.
        largest: element-wise maxima over ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        mesh: DeviceMesh,
        *,
        reshards: bool,
        largest: Callable[[Sequence[float]], Sequence[float]],
    ) -> None:
        self._root: Any = _Root(model)
        self._reshards = reshards
        self._largest = largest
        self._gathered = False
        # Nobody trains it: what is outside its layers can stay whole, which reading logits off its
        # hidden states later (the exact KL) counts on.
        self._is_constant = not any(p.requires_grad for p in model.parameters())
        # Sums in float32, whatever the weights' own precision.
        precision = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in reversed(layers):  # the inner ones first
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshards, mp_policy=precision)
        fully_shard(self._root, mesh=mesh, reshard_after_forward=False, mp_policy=precision)
        self._parts: list[Any] = [m for m in self._root.modules() if isinstance(m, FSDPModule)]
        with torch.no_grad():
            self._root(lambda: None)  # torch settles which module is the outermost
        # In the backward pass each part has the one before it gathered ahead. By default torch goes
        # by the forward passes made so far, which differ between ranks where weights were gathered.
        ordered: list[Any] = [*layers, self._root]
        for part, ahead in zip(ordered, [ordered[0], *ordered], strict=False):
            part.set_modules_to_backward_prefetch([ahead])
        for part in self._parts:
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
            # Gathered once as they are now, so that weights which are to be trained stay so, though
            # a reference without the adapter may be what is scored first.
            part.unshard()
            part.reshard()

    @property
    def lockstep(self) -> bool:
        return not self._gathered

    def passes(self, n: int) -> int:
        return n if self._gathered else int(self._largest([n])[0])

    def run(self, forward: Callable[[], T]) -> T:
        """A forward pass of all ranks; what is outside the layers is whole in it."""
        if self._gathered:
            return forward()
        if self._is_constant:
            self._forget_passes()
        with exchanging():
            result: T = self._root(forward)
        if not torch.is_grad_enabled() and not self._is_constant:
            for part in self._parts:
                part.reshard()  # no backward pass will do that
        return result

    def backward(self, loss: Tensor) -> None:
        with exchanging() if self.lockstep else nullcontext():
            loss.backward()  # type: ignore[no-untyped-call]

    def own_optimizer(self, *_: Any, **__: Any) -> None:
        return None

    def _forget_passes(self) -> None:
        """Drop torch's notes on earlier passes, which only a backward pass would."""
        forget = getattr(self._root, "reset_iter_state", None)  # since torch 2.13
        if forget is not None:
            forget()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All weights whole on every rank inside; all enter, and then do what they like."""
        if self._gathered:
            yield
            return
        with exchanging():
            for part in self._parts:
                part.set_reshard_after_forward(False, recurse=False)
                part.unshard()
        self._gathered = True
        try:
            yield
        finally:
            self._gathered = False
            for part in self._parts:
                part.reshard()
                reshards = self._reshards and part is not self._root
                part.set_reshard_after_forward(reshards, recurse=False)


class _Root(nn.Module):
    """Runs any pass through a model as its own forward, which FSDP2 takes for the model's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], T]) -> T:
        return run()


_NOT_DONE = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}

_USE_FSDP2 = (
    "use accelerate's FSDP2 (recipes/accelerate/fsdp2.yaml), which shards weights, gradients and "
    "optimizer states"
)


_ZERO_STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"

# What may stand in what `accelerate launch` sets, and what to write where something else does.
_DEEPSPEED_SETTINGS = {
    _ZERO_STAGE: (("2", "3"), "zero_stage: 2 or 3"),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": (("none",), "no deepspeed_config_file (it is not read)"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        ("none", "auto", "1"),
        "gradient_accumulation_steps: 1 (the recipe has optim.micro_batch_tokens)",
    ),
    "ACCELERATE_GRADIENT_CLIPPING": (
        ("none", "auto"),
        "no gradient_clipping (the recipe has optim.max_grad_norm)",
    ),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": (("none",), "offload_optimizer_device: none"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": (("none",), "offload_param_device: none"),
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": (("none", "false"), "zero3_init_flag: false"),
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": (("none",), "no deepspeed_moe_layer_cls_names"),
}


def _zero_stage_asked_for() -> int | None:
    """The stage of ZeRO where `accelerate launch` asked for DeepSpeed.

    Raises:
        UserInputError: it asked for something that is not done here.
    """
    if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return None
    wrong = [
        remedy
        for variable, (accepted, remedy) in _DEEPSPEED_SETTINGS.items()
        if os.environ.get(variable, "none").lower() not in accepted
    ]
    if wrong:
        raise UserInputError(f"accelerate's deepspeed_config: set {', '.join(wrong)}")
    if find_spec("deepspeed") is None:
        raise UserInputError(
            "the run was launched with DeepSpeed, which is not installed: "
            "pip install 'alignment-toolkit[deepspeed]'"
        )
    return int(os.environ[_ZERO_STAGE])


def _fsdp_asked_for() -> FullyShardedDataParallelPlugin | None:
    """The settings of FSDP2 where `accelerate launch` asked for it.

    Raises:
        UserInputError: it asked for something that is not done here.
    """
    for flag, name in _NOT_DONE.items():
        if parse_flag_from_env(flag):
            raise UserInputError(f"the run was launched with {name}, not supported: {_USE_FSDP2}")
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserInputError(
            f"the run was launched with FSDP version {version}; set fsdp_version: 2 in "
            "accelerate's fsdp_config"
        )
    plugin = FullyShardedDataParallelPlugin()
    wrap = os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP")
    remedies = {
        "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP": wrap != "TRANSFORMER_BASED_WRAP",
        "fsdp_offload_params: false": parse_flag_from_env("FSDP_OFFLOAD_PARAMS"),
        "fsdp_cpu_ram_efficient_loading: false": plugin.cpu_ram_efficient_loading,
        "fsdp_activation_checkpointing: false (the recipe has model.gradient_checkpointing)": (
            plugin.activation_checkpointing
        ),
    }
    wrong = [remedy for remedy, applies in remedies.items() if applies]
    if wrong:
        raise UserInputError(f"accelerate's fsdp_config: set {', '.join(wrong)}")
    return plugin
