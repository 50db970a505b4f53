"""`PolicyWithReference`: the model being trained, and the point it is held near."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from alignment.modeling.backbone import Backbone
from alignment.modeling.heads import ScalarHead
from alignment.modeling.packing import plan_micro_batches
from alignment.modeling.reference import Reference, trainable
from alignment.modeling.scorer import (
    PredictingStates,
    Scores,
    packing_fault,
    predicting_states,
    read_values,
    score,
)
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
        if self.backbone.plain_reason is None:
            self.backbone.plain_reason = packing_fault(self.backbone)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def forward(self, samples: Sequence[Sample], **options: Any) -> Scores:
        """Score samples under the policy; options as for `alignment.modeling.scorer.score`."""
        return score(
            self.backbone,
            samples,
            value_head=self.value_head,
            router_loss=self.router_loss and torch.is_grad_enabled(),
            **options,
        )

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
        **options: Any,
    ) -> Iterator[tuple[Scores, list[int]]]:
        """Score without gradients, micro-batch by micro-batch: scores, and indices of the rows.

        Args:
            of_reference: score the reference instead of the policy.
            options: as for `alignment.modeling.scorer.score`.
        """
        with self._reference_backbone() if of_reference else nullcontext(self.backbone) as backbone:
            for batch in self.plan(samples, token_budget):
                yield score(backbone, [samples[i] for i in batch], **options), batch

    def logprobs(
        self,
        samples: Sequence[Sample],
        token_budget: int,
        *,
        of_reference: bool = False,
        sampling: SamplingParams | None = None,
    ) -> list[Tensor]:
        """Log-probabilities without gradients, one `[completion length]` tensor a sample."""
        out: list[Tensor] = [torch.empty(0)] * len(samples)
        for scores, batch in self.score_all(
            samples, token_budget, of_reference=of_reference, sampling=sampling
        ):
            for row, i in enumerate(batch):
                out[i] = scores.logprobs[row, : len(samples[i].completion_ids)]
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
        for batch in self.plan(samples, token_budget):
            rows = [samples[i] for i in batch]
            read = read_values(self.backbone, self.value_head, rows, reads="before")
            for row, i in enumerate(batch):
                out[i] = read.values[row, : len(samples[i].completion_ids)]
        return out

    def reference_states(self, samples: Sequence[Sample]) -> PredictingStates:
        """The reference's predicting hidden states, to compute the full KL against."""
        with self._reference_backbone() as backbone:
            return predicting_states(backbone, samples)

    def _reference_backbone(self) -> Any:
        if self.reference is None:
            raise AlignmentError("this policy has no reference to score; set model.reference")
        return self.reference.backbone()


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
