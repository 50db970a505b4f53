"""Rollouts through transformers' continuous batching (`generate_batch`), meant for GPUs.

It draws tokens itself, from torch's generator: a completion is reproducible for the same batch,
seed and step, but depends on what else is in the batch (`counter_based` is False).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from alignment.activity import doing
from alignment.modeling.finite import explained
from alignment.rollout.live import LiveModel
from alignment.rollout.mode import sampling_mode
from alignment.rollout.rows import Row
from alignment.rollout.sampling import row_key
from alignment.rollout.stopping import StopRule
from alignment.types import (
    AlignmentError,
    Completion,
    Prompt,
    SamplingParams,
    UserInputError,
)

_PAGE = 32  # tokens of one page of the cache
# transformers 5.17 has the older name, which later versions warn of.
_PAGE_OPTIONS: dict[str, Any] = {
    "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size": _PAGE
}
_CPU_BATCH_TOKENS = 512  # no estimate of free memory is made on a CPU


class PagedEngine:
    """Samples completions with `generate_batch`; see `RolloutEngine` for the contract.

    Two things are refused rather than done differently: min-p, which transformers drops there,
    and models that run eager attention, whose logit soft-capping is left out there.

    Args:
        model: a transformers causal LM, or a peft model around one.
        tokenizer: decodes completions.
        max_rows: completions that run at the same time.
        stop_token_ids: ids that end a completion; None: those of the model and the tokenizer.

    Raises:
        UserInputError: the model runs eager attention, or keeps a recurrent state.
    """

    counter_based = False

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_rows: int = 64,
        stop_token_ids: Sequence[int] | None = None,
    ) -> None:
        self._live = LiveModel(model, tokenizer, stop_token_ids)
        self._max_rows = max_rows
        backbone = self._live.backbone
        implementation = backbone.config._attn_implementation
        if backbone.plain_reason is not None or implementation == "eager":
            raise UserInputError(
                "rollout.engine 'paged' cannot run this model: "
                f"{backbone.plain_reason or 'it uses eager attention'}; use 'native'"
            )

    def weights_updated(self, policy_version: int) -> None:
        """Completions from now on carry this version; nothing is kept between calls."""
        self._live.policy_version = policy_version

    @doing("sampling")
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """Sample `params.n` completions for each prompt, in prompt-major order.

        Raises:
            UserInputError: parameters that define no distribution, min-p, or a prompt that is
                empty or fills the context.
            AlignmentError: transformers delivered no result for a request.
        """
        live = self._live
        rows = live.rows(prompts, params)
        if params.min_p > 0:
            raise UserInputError("rollout.min_p has no effect in 'paged'; use engine 'native'")
        device = live.backbone.device
        cuda = [device] if device.type == "cuda" else []
        # Seeding it seeds torch's generator, which belongs to the training loop.
        with (
            explained(live.model, f"step {params.step}, sampling"),
            sampling_mode(live.model),
            torch.random.fork_rng(cuda),
        ):
            for _, same_limit in groupby(sorted(rows, key=_limit), key=_limit):
                self._run(list(same_limit), params, live.stop_rule(params))
        return live.completions(rows)

    def _run(self, rows: list[Row], params: SamplingParams, rule: StopRule) -> None:
        """Sample rows of one limit."""
        results = self._live.backbone.causal_lm.generate_batch(
            [list(row.prompt_ids) for row in rows],
            generation_config=self._generation_config(rows[0].limit, params),
            continuous_batching_config=self._batching_config(rows, params),
        )
        if len(results) != len(rows):
            raise AlignmentError(
                f"generate_batch returned {len(results)} of {len(rows)} completions; its own "
                "messages in the log say why"
            )
        for row, result in zip(rows, results.values(), strict=True):
            if result.error is not None:
                raise AlignmentError(f"generate_batch failed for a prompt: {result.error}")
            greedy = params.temperature == 0
            for token, logprob in zip(result.generated_tokens, result.logprobs, strict=True):
                row.append(token, 0.0 if greedy else logprob, rule)
                if row.stop_reason is not None:
                    break  # what follows a stop string was sampled in vain
            if row.stop_reason is None:
                raise AlignmentError("generate_batch ended a completion before its end")

    def _generation_config(self, limit: int, params: SamplingParams) -> GenerationConfig:
        greedy = params.temperature == 0
        return GenerationConfig.from_dict(
            {
                "do_sample": not greedy,
                "temperature": 1.0 if greedy else params.temperature,
                "top_k": params.top_k,
                "top_p": params.top_p,
                "max_new_tokens": limit,
                "eos_token_id": sorted(self._live.stop_ids) or None,
            }
        )

    def _batching_config(self, rows: list[Row], params: SamplingParams) -> ContinuousBatchingConfig:
        longest = max(len(row.prompt_ids) for row in rows) + rows[0].limit
        on_cpu = self._live.backbone.device.type == "cpu"
        return ContinuousBatchingConfig(
            **_PAGE_OPTIONS,
            num_blocks=self._max_rows * -(-longest // _PAGE) if on_cpu else None,
            max_batch_tokens=_CPU_BATCH_TOKENS if on_cpu else None,
            max_requests_per_batch=self._max_rows,
            return_logprobs=True,
            seed=row_key(params.seed, params.step, 0, 0) % 2**32,
        )


def _limit(row: Row) -> int:
    return row.limit
