"""A live model as an engine samples from it: its context, its end tokens, its version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from alignment.modeling.backbone import Backbone
from alignment.modeling.logits import check_sampling_params
from alignment.rollout.rows import Row, lay_out
from alignment.rollout.stopping import StopRule, end_tokens
from alignment.types import Completion, Prompt, SamplingParams


class LiveModel:
    """What engines know of the model they sample from, and how a request begins and ends.

    The model is used as it is at the time of a call: nothing derived from its weights is kept.

    Args:
        model: a transformers causal LM, or a peft model around one.
        tokenizer: decodes completions.
        stop_token_ids: ids that end a completion; None: those of the model and the tokenizer.

    Attributes:
        context: the most tokens a prompt and its completion may have together, None: any.
        policy_version: the version that completions are marked with.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, stop_token_ids: Sequence[int] | None
    ) -> None:
        self.model = model
        self.backbone = Backbone(model)
        self.context: int | None = getattr(self.backbone.config, "max_position_embeddings", None)
        self.stop_ids = (
            end_tokens(self.backbone.causal_lm, tokenizer)
            if stop_token_ids is None
            else frozenset(stop_token_ids)
        )
        self.policy_version = 0
        self._tokenizer = tokenizer

    def rows(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Row]:
        """One row for each completion asked for, in prompt-major order, nothing sampled yet.

        Raises:
            UserInputError: parameters that define no distribution, or a prompt that is empty or
                fills the context.
        """
        check_sampling_params(params)
        return lay_out(prompts, params, self.context)

    def stop_rule(self, params: SamplingParams) -> StopRule:
        """When a completion of this request ends."""
        return StopRule(self.stop_ids, params.stop, self._tokenizer)

    def completions(self, rows: Sequence[Row]) -> list[Completion]:
        """The finished completions of rows that each have a stop reason."""
        return [row.completion(self.policy_version, self._tokenizer) for row in rows]
