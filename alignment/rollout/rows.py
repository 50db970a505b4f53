"""One completion on its way: laid out from a request, extended token by token, handed over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignment.activity import ACTIVITY
from alignment.modeling.finite import NonFiniteError
from alignment.modeling.logits import transform_logits
from alignment.rollout.sampling import draw_tokens, row_key, uniforms
from alignment.rollout.stopping import StopRule, completion_limit
from alignment.types import Completion, Prompt, SamplingParams, StopReason


@dataclass(eq=False)
class Row:
    """A completion being sampled.

    number: its place among all requested completions, which is also its name inside the cache.
    limit:  how many tokens it may have.
    key:    key of its random numbers.
    """

    number: int
    prompt: Prompt
    sample_index: int
    limit: int
    key: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: StopReason | None = None

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.prompt.token_ids

    @property
    def next_position(self) -> int:
        """Position of the newest token, which the model has not seen yet."""
        return len(self.prompt_ids) + len(self.tokens) - 1

    def append(self, token: int, logprob: float, rule: StopRule) -> None:
        """Take in a token, and set the stop reason if it is the last.

        Raises:
            NonFiniteError: the log-probability is not finite, as it never is where a logit is NaN
                or positive infinity.
        """
        if not math.isfinite(logprob):
            raise NonFiniteError(
                f"the logits for token {len(self.tokens)} of sample {self.sample_index} of prompt "
                f"{self.prompt.index} are not finite"
            )
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if rule.is_complete(self.tokens):
            self.stop_reason = StopReason.STOP
        elif len(self.tokens) == self.limit:
            self.stop_reason = StopReason.LENGTH

    def restart(self) -> None:
        """Forget what was sampled of a row that is not finished."""
        if self.stop_reason is None:
            self.tokens, self.logprobs = [], []

    def completion(self, policy_version: int, tokenizer: Any) -> Completion:
        """The finished completion."""
        assert self.stop_reason is not None
        return Completion(
            prompt_index=self.prompt.index,
            sample_index=self.sample_index,
            token_ids=tuple(self.tokens),
            sampling_logprobs=tuple(self.logprobs),
            stop_reason=self.stop_reason,
            policy_version=policy_version,
            text=tokenizer.decode(self.tokens, skip_special_tokens=True),
        )


def lay_out(prompts: Sequence[Prompt], params: SamplingParams, context: int | None) -> list[Row]:
    """One row for each completion asked for, in prompt-major order, nothing sampled yet.

    Args:
        context: the most tokens a prompt and its completion may have together, None: any.

    Raises:
        UserInputError: a prompt that is empty or fills the context.
    """
    rows: list[Row] = []
    for prompt in prompts:
        limit = completion_limit(prompt, params, context)
        for sample in range(params.n):
            key = row_key(params.seed, params.step, prompt.index, sample)
            rows.append(Row(len(rows), prompt, sample, limit, key))
    return rows


def extend(rows: Sequence[Row], logits: Tensor, params: SamplingParams, rule: StopRule) -> None:
    """Draw the next token of each row from the model's fp32 logits `[len(rows), V]`."""
    keys = np.array([row.key for row in rows], dtype=np.uint64)
    positions = np.array([len(row.tokens) for row in rows])
    drawn = torch.from_numpy(uniforms(keys, positions)).to(logits.device)
    tokens, logprobs = draw_tokens(transform_logits(logits, params), drawn)
    for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
        row.append(token, logprob, rule)
    ACTIVITY.move()
