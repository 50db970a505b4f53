"""`PolicyWithReference`: the model being trained, and the point it is held near."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alignment.modeling.backbone import Backbone
from alignment.modeling.finite import require_finite
from alignment.modeling.heads import ScalarHead
from alignment.modeling.memory import TokenCap, micro_batched
from alignment.modeling.packing import plan_micro_batches
from alignment.modeling.reference import Reference, trainable
from alignment.modeling.scorer import (
    PredictingStates,
    Scores,
    choose_layout,
    predicting_states,
    read_values,
    score,
)
from alignment.modeling.shards import MakeShards, Shards, Skeleton, Whole, gathered_tree, held
from alignment.types import AlignmentError, Sample, SamplingParams, UserInputError


class PolicyWithReference(nn.Module):
    """A causal LM in training, with an optional reference.

    The module stays in eval mode except inside `updating(policy)`, so that sampling and scoring see
    no dropout.

    Args:
        model: the policy; it must have something to train.
        reference: see `alignment.modeling.reference`; None where nothing is compared.
        value_head: reads a critic's values off the policy's own hidden states; None without one.
        router_loss: whether scores under gradients carry a mixture of experts' balancing loss.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: Reference | None,
        *,
        value_head: ScalarHead | None = None,
        router_loss: bool = False,
    ) -> None:
        super().__init__()
        if not trainable(model):
            raise UserInputError(
                "the policy has no trainable parameter, so training would do nothing; give "
                "model.lora.target_modules that exist, or train without LoRA"
            )
        self.model = model.eval()
        self.backbone = Backbone(model)
        self.reference = reference
        self.value_head = value_head
        self.router_loss = router_loss
        self.cap = TokenCap()
        self.shards: Shards = Whole()
        self._skeleton: Skeleton | None = None
        choose_layout(self.backbone)
        if reference is not None:
            with reference.backbone() as compared:
                choose_layout(compared)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def forward(self, samples: Sequence[Sample], **options: Any) -> Scores:
        """Score samples under the policy; options as for `alignment.modeling.scorer.score`."""
        return self.shards.run(
            lambda: score(
                self.backbone,
                samples,
                value_head=self.value_head,
                router_loss=self.router_loss and torch.is_grad_enabled(),
                **options,
            )
        )

    def shard(self, make: MakeShards) -> None:
        """Keep the weights in parts from now on, the reference's too. Before any optimizer."""
        self._skeleton = Skeleton(self.model)
        self.shards = make(self, self.model)
        if self.reference is not None:
            self.reference.shard(self.shards, make)

    @contextmanager
    def gathered(self, *, reference: bool = False) -> Iterator[None]:
        """The weights whole on every rank inside, which all enter.

        Args:
            reference: those of the reference too.
        """
        with self.shards.gathered():
            if reference and self.reference is not None:
                with self.reference.gathered():
                    yield
            else:
                yield

    def whole_model(self, *, keep: bool) -> nn.Module | None:
        """The policy's model with all its weights, a copy on the CPU where they are in parts; None
        on the ranks that do not keep it. Every rank calls this."""
        if self._skeleton is None:
            return self.model
        weights = gathered_tree({n: held(p) for n, p in self.model.named_parameters()}, keep=keep)
        return self._skeleton.filled(weights) if keep else None

    def plan(
        self, samples: Sequence[Sample], token_budget: int, *, together: int = 1
    ) -> list[list[int]]:
        """Micro-batches for these samples on this architecture."""
        shares = self.backbone.plain_reason is None
        return plan_micro_batches(samples, token_budget, share_prompts=shares, together=together)

    @torch.no_grad()
    def score_all(
        self,
        samples: Sequence[Sample],
        token_budget: int,
        *,
        of_reference: bool = False,
        together: int = 1,
        **options: Any,
    ) -> Iterator[tuple[Scores, list[int]]]:
        """Score without gradients, micro-batch by micro-batch: scores, and indices of the rows.

        Args:
            of_reference: score the reference instead of the policy.
            together: so many neighbours are never parted (2 for pairs).
            options: as for `alignment.modeling.scorer.score`.
        """
        scored: AbstractContextManager[Backbone] = nullcontext(self.backbone)
        with self._reference().backbone() if of_reference else scored as backbone:
            shards = self._reference().shards if of_reference else self.shards
            yield from micro_batched(
                self,
                samples,
                token_budget,
                lambda rows: shards.run(lambda: score(backbone, rows, **options)),
                together=together,
            )

    def logprobs(
        self,
        samples: Sequence[Sample],
        token_budget: int,
        *,
        of_reference: bool = False,
        together: int = 1,
        sampling: SamplingParams | None = None,
    ) -> list[Tensor]:
        """Log-probabilities without gradients, one `[completion length]` tensor a sample.

        Raises:
            NonFiniteError: one is NaN or infinite.
        """
        out: list[Tensor] = [torch.empty(0)] * len(samples)
        for scores, batch in self.score_all(
            samples, token_budget, of_reference=of_reference, together=together, sampling=sampling
        ):
            for row, i in enumerate(batch):
                out[i] = scores.logprobs[row, : len(samples[i].completion_ids)]
        whose = "the reference" if of_reference else "the policy"
        require_finite(out, self.model, f"a log-probability of {whose}")
        return out

    @torch.no_grad()
    def values(self, samples: Sequence[Sample], token_budget: int) -> list[Tensor]:
        """The value head where each token is chosen, without gradients, `[completion length]` each.

        Raises:
            AlignmentError: there is no value head.
        """
        if self.value_head is None:
            raise AlignmentError("this policy has no value head")
        out: list[Tensor] = [torch.empty(0)] * len(samples)
        head = self.value_head
        for read, batch in micro_batched(
            self,
            samples,
            token_budget,
            lambda rows: self.shards.run(
                lambda: read_values(self.backbone, head, rows, reads="before")
            ),
        ):
            for row, i in enumerate(batch):
                out[i] = read.values[row, : len(samples[i].completion_ids)]
        return out

    def reference_states(self, samples: Sequence[Sample]) -> PredictingStates:
        """The reference's predicting hidden states, to compute the full KL against."""
        reference, head = self._reference(), self.backbone.lm_head
        moving_head = head if head is not None and trainable(head) else None

        def states() -> PredictingStates:
            found = predicting_states(backbone, samples)
            if moving_head is None or backbone.lm_head is not moving_head:
                return found
            # They are read later, when the head has the policy's weights again.
            kept = copy.copy(backbone)
            kept.lm_head = copy.deepcopy(moving_head).requires_grad_(False)
            return replace(found, backbone=kept)

        with reference.backbone() as backbone:
            return reference.shards.run(states)

    def _reference(self) -> Reference:
        if self.reference is None:
            raise AlignmentError("this policy has no reference to score; set model.reference")
        return self.reference


@contextmanager
def updating(model: nn.Module) -> Iterator[None]:
    """The gradient pass: train mode (dropout, activation checkpointing), then eval again."""
    model.train()
    try:
        yield
    finally:
        model.eval()


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to zero, in modules and in configs read by attention.

    With dropout the probability ratio of an unchanged policy is not one (measured 0.16 to 14).
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
