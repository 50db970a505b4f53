"""DeepSpeed's ZeRO: stage 2 shares out gradients and optimizer states, stage 3 weights as well.

The only file that imports DeepSpeed, and imported only where a run was launched with it. DeepSpeed
gathers weights, sums gradients and steps AdamW on its fp32 masters. When to clip, to skip or to
save is for the trainers to say, which see its optimizer as they see their own.

Gradients are summed, not averaged (`alignment.distributed`): DeepSpeed divides by the number of
ranks, so that each loss is multiplied by it first.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

import deepspeed
import torch
from torch import Tensor, nn

from alignment.activity import exchanging
from alignment.modeling.optimizer import AdamWOptions
from alignment.modeling.shards import MakeShards, Shards, Whole
from alignment.modeling.zero_optimizer import WEIGHTS, Ranks, ZeroOptimizer
from alignment.types import UserInputError

T = TypeVar("T")

# It speaks of every buffer it makes, on stdout, and calls functions that torch is renaming.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
# Would be compiled now, for exchanges on a CPU; without it they are torch's.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]

# Elements exchanged at once.
_BUCKET = 50_000_000


def zero_maker(stage: int, ranks: Ranks) -> MakeShards:
    """What puts a model under ZeRO."""
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())

    def make(model: nn.Module, language_model: nn.Module) -> Shards:
        is_constant = not any(p.requires_grad for p in model.parameters())
        if is_constant and stage != WEIGHTS:
            model.to(ranks.device)
            return Whole()
        return ZeroShards(model, language_model, stage, ranks)

    return make


class ZeroShards:
    """A model under ZeRO.

    In stage 3 weights are gathered layer by layer in use. What is outside the layers (embeddings,
    head) is whole for the length of a pass: how often the head is called depends on the samples,
    and what ranks exchange must not. Where nothing is trained, it stays whole on every rank: logits
    are read off hidden states later (the exact KL).

    Args:
        model: the whole model. One that is trained gets its `own_optimizer` before any pass.
        language_model: the transformers model in it.
        stage: 2 or 3.

    Raises:
        UserInputError: transformers does not say what the model's layers are.
    """

    def __init__(
        self, model: nn.Module, language_model: nn.Module, stage: int, ranks: Ranks
    ) -> None:
        self._is_constant = not any(p.requires_grad for p in model.parameters())
        layers = _layers(language_model)
        self._root = _Root(layers, () if self._is_constant else tuple(model.parameters()))
        self._stage = stage
        self._ranks = ranks
        self._engine: Any = None
        self._gathered = False
        self._linear: Any = nn.functional.linear
        if stage == WEIGHTS:
            linear = nn.functional.linear
            with exchanging():
                deepspeed.zero.Init(module=self._root, config_dict_or_path=self._config())
            self._linear, nn.functional.linear = nn.functional.linear, linear
        model.to(ranks.device)
        if self._is_constant:
            self._start(None)

    def own_optimizer(
        self,
        parameters: Mapping[str, nn.Parameter],
        options: AdamWOptions,
        *,
        master_dtype: torch.dtype | None,
    ) -> ZeroOptimizer:
        """AdamW on fp32 masters, of which each rank keeps and steps a part.

        Raises:
            UserInputError: the masters are to be of another type, or the weights are of several.
        """
        types = {parameter.dtype for parameter in parameters.values()}
        if master_dtype is None and types != {torch.float32}:
            raise UserInputError(
                "model.master_dtype: DeepSpeed keeps fp32 masters; leave it out, or use "
                "--accelerate fsdp2"
            )
        if len(types) > 1 or torch.float16 in types:
            raise UserInputError(
                "under DeepSpeed trained weights are all float32 or all bfloat16, not "
                f"{', '.join(sorted(map(str, types)))}; change model.dtype, or use "
                "--accelerate fsdp2"
            )
        adamw = torch.optim.AdamW(
            list(parameters.values()),
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            fused=True,
        )
        zero = self._start(adamw)
        return ZeroOptimizer(zero, parameters, options.lr, self._stage, self._ranks)

    def _start(self, optimizer: torch.optim.Optimizer | None) -> Any:
        with exchanging():
            self._engine, zero, *_ = deepspeed.initialize(
                model=self._root, optimizer=optimizer, config=self._config()
            )
        return zero

    def _config(self) -> dict[str, Any]:
        # Stage 2 puts gradients together after the last micro-batch, which DeepSpeed would tell by
        # counting; here the step tells. Stage 3 adds each to its place, and takes no other way.
        counts = self._stage == WEIGHTS
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": counts,
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": self._stage,
                "reduce_bucket_size": _BUCKET,
                # Between passes no weight is whole: what is read and written then are the parts.
                "stage3_param_persistence_threshold": 0,
                "stage3_max_reuse_distance": 0,
            },
        }

    @property
    def lockstep(self) -> bool:
        if self._stage != WEIGHTS:
            return torch.is_grad_enabled()
        return not self._gathered

    def passes(self, n: int) -> int:
        return int(self._ranks.max([n])[0]) if self.lockstep else n

    def run(self, forward: Callable[[], T]) -> T:
        if not self.lockstep:
            return forward()
        found: list[Any] = []

        def differentiable() -> dict[str, Tensor]:
            found.append(forward())
            return _differentiable(found[0])

        with exchanging(), self._linear_that_lets_go():
            tensors = self._engine(differentiable)
            if not torch.is_grad_enabled():
                self._let_go()
        result: T = replace(found[0], **tensors)
        return result

    def backward(self, loss: Tensor) -> None:
        with exchanging(), self._linear_that_lets_go():  # what is recomputed has to be alike
            self._engine.backward(loss * self._ranks.world_size)
            self._let_go()

    def _let_go(self) -> None:
        """Of whole weights, also of those that DeepSpeed has gathered ahead of a pass that may not
        come."""
        if self._stage == WEIGHTS:
            self._engine.optimizer.empty_partition_cache()

    @contextmanager
    def _linear_that_lets_go(self) -> Iterator[None]:
        """torch's linear function keeps a weight for the backward pass, DeepSpeed's looks for it
        then. DeepSpeed would put it in place of torch's for good."""
        linear, nn.functional.linear = nn.functional.linear, self._linear
        try:
            yield
        finally:
            nn.functional.linear = linear

    @contextmanager
    def gathered(self) -> Iterator[None]:
        if self._stage != WEIGHTS or self._gathered:
            yield
            return
        with exchanging():
            gather = deepspeed.zero.GatheredParameters(list(self._root.parameters()))
            gather.__enter__()
        zero = self._engine.optimizer
        hooks = getattr(zero, "parameter_offload", zero)
        for hook in (*hooks.forward_hooks, *hooks.backward_hooks):
            hook.remove()
        hooks.forward_hooks, hooks.backward_hooks = [], []
        self._gathered = True
        try:
            yield
        finally:
            self._gathered = False
            hooks._register_deepspeed_module(hooks.module)
            gather.__exit__(None, None, None)


class _Root(nn.Module):
    """Weights as DeepSpeed gathers them, and any pass through the model as their forward.

    Args:
        parameters: those outside the layers are kept as the root's own; the modules they are of are
            not for DeepSpeed to see.
    """

    def __init__(self, layers: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        inside = {id(parameter) for parameter in self.layers.parameters()}
        for i, parameter in enumerate(parameters):
            if id(parameter) not in inside:
                self.register_parameter(str(i), parameter)

    def forward(self, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return run()


def _layers(language_model: nn.Module) -> list[nn.Module]:
    names = {
        n for m in language_model.modules() for n in getattr(m, "_no_split_modules", None) or ()
    }
    layers = [m for m in language_model.modules() if type(m).__name__ in names]
    if not layers:
        raise UserInputError(
            f"transformers does not say which layers {type(language_model).__name__} is made of, "
            "which DeepSpeed would gather one by one; use --accelerate ddp, or fsdp2 with "
            "fsdp_transformer_layer_cls_to_wrap"
        )
    return layers


def _differentiable(result: Any) -> dict[str, Tensor]:
    """The tensors of a dataclass that a backward pass may start from, by field."""
    named = {field.name: getattr(result, field.name) for field in fields(result)}
    return {n: t for n, t in named.items() if isinstance(t, Tensor) and t.requires_grad}
