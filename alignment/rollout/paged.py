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

from alignment.modeling.backbone import Backbone
from alignment.modeling.logits import check_sampling_params
from alignment.rollout.mode import sampling_mode
from alignment.rollout.rows import Row, lay_out
from alignment.rollout.sampling import row_key
from alignment.rollout.stopping import StopRule, end_tokens
from alignment.types import (
    AlignmentError,
    Completion,
    Prompt,
    SamplingParams,
    UserInputError,
)

_PAGE = 32  # tokens of one page of the cache
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
        backbone = Backbone(model)
        implementation = backbone.config._attn_implementation
        if backbone.plain_reason is not None or implementation == "eager":
            raise UserInputError(
                "rollout.engine 'paged' cannot run this model: "
                f"{backbone.plain_reason or 'it uses eager attention'}; use 'native'"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.policy_version = 0
        self._causal_lm = backbone.causal_lm
        self._context = getattr(backbone.config, "max_position_embeddings", None)
        self._device = backbone.device
        self._max_rows = max_rows
        self._stop_ids = (
            end_tokens(self._causal_lm, tokenizer)
            if stop_token_ids is None
            else frozenset(stop_token_ids)
        )

    def weights_updated(self, policy_version: int) -> None:
        """Completions from now on carry this version; nothing is kept between calls."""
        self.policy_version = policy_version

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """Sample `params.n` completions for each prompt, in prompt-major order.

        Raises:
            UserInputError: parameters that define no distribution, min-p, or a prompt that is
                empty or fills the context.
            AlignmentError: transformers delivered no result for a request.
        """
        check_sampling_params(params)
        if params.min_p > 0:
            raise UserInputError("rollout.min_p has no effect in 'paged'; use engine 'native'")
        rows = lay_out(prompts, params, self._context)
        rule = StopRule(self._stop_ids, params.stop, self.tokenizer)
        cuda = [self._device] if self._device.type == "cuda" else []
        # Seeding it seeds torch's generator, which belongs to the training loop.
        with sampling_mode(self.model), torch.random.fork_rng(cuda):
            for _, same_limit in groupby(sorted(rows, key=_limit), key=_limit):
                self._run(list(same_limit), params, rule)
        return [row.completion(self.policy_version, self.tokenizer) for row in rows]

    def _run(self, rows: list[Row], params: SamplingParams, rule: StopRule) -> None:
        """Sample rows of one limit."""
        results = self._causal_lm.generate_batch(
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
                "eos_token_id": sorted(self._stop_ids) or None,
            }
        )

    def _batching_config(self, rows: list[Row], params: SamplingParams) -> ContinuousBatchingConfig:
        longest = max(len(row.prompt_ids) for row in rows) + rows[0].limit
        on_cpu = self._device.type == "cpu"
        return ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=self._max_rows * -(-longest // _PAGE) if on_cpu else None,
            max_batch_tokens=_CPU_BATCH_TOKENS if on_cpu else None,
            max_requests_per_batch=self._max_rows,
            return_logprobs=True,
            seed=row_key(params.seed, params.step, 0, 0) % 2**32,
        )


def _limit(row: Row) -> int:
    return row.limit
