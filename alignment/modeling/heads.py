"""`ScalarModel`: a decoder with one number per token, for reward models and critics."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from alignment.modeling.backbone import Backbone
from alignment.modeling.memory import TokenCap, micro_batched
from alignment.modeling.packing import Reads, plan_micro_batches
from alignment.modeling.scorer import Values, choose_layout, read_values
from alignment.modeling.shards import MakeShards, Shards, Skeleton, Whole, gathered_tree, held
from alignment.types import Sample


class ScalarHead(nn.Linear):
    """One number `[...]` off hidden states `[..., D]`, computed in float32, without a bias."""

    def __init__(self, hidden_size: int, *, dtype: torch.dtype, device: Any = None) -> None:
        super().__init__(hidden_size, 1, bias=False, dtype=dtype, device=device)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.float(), self.weight.float()).squeeze(-1)


class ScalarModel(nn.Module):
    """A decoder with a scalar head.

    Like a policy, it stays in eval mode except inside `updating(model)`.

    Args:
        decoder: a `transformers` model without a language-model head, or a peft model around one.
        head: reads its hidden states.
        router_loss: whether values under gradients carry a mixture of experts' balancing loss.
    """

    def __init__(self, decoder: nn.Module, head: ScalarHead, *, router_loss: bool = False) -> None:
        super().__init__()
        self.decoder = decoder.eval()
        self.head = head
        self.backbone = Backbone(decoder)
        self.router_loss = router_loss
        self.cap = TokenCap()
        self.shards: Shards = Whole()
        self._skeleton: Skeleton | None = None
        choose_layout(self.backbone)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def forward(self, samples: Sequence[Sample], *, reads: Reads = "after") -> Values:
        """The head `[B, T]` at each completion token.

        Args:
            reads: `after`, once the token is seen (a reward model's score is the one after the last
                token); or `before`, where the token is predicted (a critic's value of the state
                that the token is chosen in).
        """
        return self.shards.run(
            lambda: read_values(
                self.backbone,
                self.head,
                samples,
                reads=reads,
                router_loss=self.router_loss and torch.is_grad_enabled(),
            )
        )

    def shard(self, make: MakeShards) -> None:
        """Keep the weights in parts from now on. Before any optimizer."""
        self._skeleton = Skeleton(self)
        self.shards = make(self, self.decoder)

    def gathered(self) -> AbstractContextManager[None]:
        """The weights whole on every rank inside, which all enter."""
        return self.shards.gathered()

    def whole_model(self, *, keep: bool) -> ScalarModel | None:
        """This model with all its weights, a copy on the CPU where they are in parts; None on the
        ranks that do not keep it. Every rank calls this."""
        if self._skeleton is None:
            return self
        weights = gathered_tree({n: held(p) for n, p in self.named_parameters()}, keep=keep)
        return self._skeleton.filled(weights) if keep else None

    def plan(
        self, samples: Sequence[Sample], token_budget: int, *, together: int = 1
    ) -> list[list[int]]:
        """Micro-batches for these samples on this architecture, whichever way they are read."""
        shares = self.backbone.plain_reason is None
        return plan_micro_batches(
            samples, token_budget, reads="after", share_prompts=shares, together=together
        )

    @torch.no_grad()
    def values(self, samples: Sequence[Sample], token_budget: int, *, reads: Reads) -> list[Tensor]:
        """The head without gradients, one fp32 `[completion length]` tensor a sample."""
        out: list[Tensor] = [torch.empty(0)] * len(samples)
        for read, batch in micro_batched(
            self, samples, token_budget, lambda rows: self(rows, reads=reads)
        ):
            for row, i in enumerate(batch):
                out[i] = read.values[row, : len(samples[i].completion_ids)]
        return out

    def scores(self, samples: Sequence[Sample], token_budget: int) -> list[float]:
        """A reward model's score of each sample: the head after the last completion token."""
        return [float(row[-1]) for row in self.values(samples, token_budget, reads="after")]
