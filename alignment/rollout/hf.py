"""Rollouts through transformers' own `generate`: slower, and right for every architecture.

Batches are left-padded, and every row runs until the longest of its batch ends. Tokens are still
drawn by this package (a logits processor leaves `generate` one token to choose), so the
distribution, its log-probabilities and the random numbers are those of the native engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from alignment.activity import doing
from alignment.modeling.finite import explained
from alignment.rollout.live import LiveModel
from alignment.rollout.memory import finish_rows
from alignment.rollout.mode import sampling_mode
from alignment.rollout.rows import Row, extend
from alignment.rollout.stopping import StopRule
from alignment.types import Completion, Prompt, SamplingParams

_PAD = 0  # masked wherever it stands, so any id will do


class HFEngine:
    """Samples completions with `transformers`' `generate`; see `RolloutEngine` for the contract.

    Args:
        model: a transformers causal LM, or a peft model around one.
        tokenizer: decodes completions.
        max_rows: completions in one batch; fewer once memory did not hold as many.
        stop_token_ids: ids that end a completion; None: those of the model and the tokenizer.

    Attributes:
        counter_based: True: random numbers depend on counters alone.
    """

    counter_based = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_rows: int = 64,
        stop_token_ids: Sequence[int] | None = None,
    ) -> None:
        self._live = LiveModel(model, tokenizer, stop_token_ids)
        self.max_rows = max_rows
        # A recurrent state would run over padding; there, a batch has prompts of one length only.
        self._pads = self._live.backbone.plain_reason is None

    def weights_updated(self, policy_version: int) -> None:
        """Completions from now on carry this version; nothing is kept between calls."""
        self._live.policy_version = policy_version

    @doing("sampling")
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """Sample `params.n` completions for each prompt, in prompt-major order.

        Raises:
            UserInputError: parameters that define no distribution, or a prompt that is empty or
                fills the context.
            NonFiniteError: the model's logits are not finite.
            OutOfMemory: memory does not hold one row.
        """
        live = self._live
        rows = live.rows(prompts, params)
        rule = live.stop_rule(params)

        def finish(unfinished: list[Row], max_rows: int) -> None:
            for batch in self._batches(unfinished, max_rows):
                self._run(batch, params, rule)

        with (
            explained(live.model, f"step {params.step}, sampling"),
            sampling_mode(live.model),
            _blank_generation_config(live.backbone.causal_lm),
        ):
            self.max_rows = finish_rows(rows, self.max_rows, finish)
        return live.completions(rows)

    def _batches(self, rows: Sequence[Row], max_rows: int) -> list[list[Row]]:
        """Rows of similar prompt length, which `generate` can run on together."""
        batches: list[list[Row]] = []
        for row in sorted(rows, key=lambda row: len(row.prompt_ids)):
            if batches and len(batches[-1]) < max_rows and self._joins(batches[-1][0], row):
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches

    def _joins(self, first: Row, row: Row) -> bool:
        """Whether a row may join the batch that `first`, of a shorter prompt, began: no padding
        where it is not valid, and no position past the context, finished rows included."""
        if not self._pads and len(first.prompt_ids) != len(row.prompt_ids):
            return False
        context = self._live.context
        return context is None or len(row.prompt_ids) + first.limit <= context

    def _run(self, rows: list[Row], params: SamplingParams, rule: StopRule) -> None:
        width = max(len(row.prompt_ids) for row in rows)
        ids = torch.full((len(rows), width), _PAD)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row.prompt_ids) :] = torch.tensor(row.prompt_ids)
            mask[i, width - len(row.prompt_ids) :] = 1
        backbone = self._live.backbone
        backbone.causal_lm.generate(
            ids.to(backbone.device),
            attention_mask=mask.to(backbone.device),
            synced_gpus=False,  # ranks have batches of their own, also where weights are sharded
            generation_config=GenerationConfig.from_dict(
                {
                    "do_sample": False,
                    "max_new_tokens": max(row.limit for row in rows),
                    "pad_token_id": _PAD,
                }
            ),
            logits_processor=LogitsProcessorList([_Draw(rows, params, rule)]),
            stopping_criteria=StoppingCriteriaList([_Ended(rows)]),
        )


class _Draw(LogitsProcessor):
    """Draws the next token of every running row, and leaves `generate` no other choice."""

    def __init__(self, rows: list[Row], params: SamplingParams, rule: StopRule) -> None:
        self._rows = rows
        self._params = params
        self._rule = rule

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        running = [i for i, row in enumerate(self._rows) if row.stop_reason is None]
        rows = [self._rows[i] for i in running]
        extend(rows, scores[torch.tensor(running)].float(), self._params, self._rule)
        chosen = torch.full((len(self._rows), 1), _PAD)
        chosen[torch.tensor(running), 0] = torch.tensor([row.tokens[-1] for row in rows])
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen.to(scores.device), 0.0)


class _Ended(StoppingCriteria):
    """Which rows have a stop reason."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = [row.stop_reason is not None for row in self._rows]
        return torch.tensor(ended, device=input_ids.device)


@contextmanager
def _blank_generation_config(causal_lm: Any) -> Iterator[None]:
    """Set the model's generation config aside: `generate` would merge it in, and a repetition
    penalty or a minimum length that came with a checkpoint would change the distribution."""
    before = causal_lm.generation_config
    causal_lm.generation_config = GenerationConfig.from_dict({})
    try:
        yield
    finally:
        causal_lm.generation_config = before
