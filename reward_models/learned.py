"""Learned reward models as rewards: of whole completions, and of their steps.

The options are here; what needs torch is `reward_models.scalar_scoring`, loaded when a policy's
tokenizer is known, so that checking a recipe stays quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from alignment.registry import load_target
from alignment.rewards.protocol import Item
from alignment.types import AlignmentError, Score, UserInputError

Mismatch = Literal["refuse", "retokenize"]
Style = Literal["auto", "chat", "plain"]
FixedStyle = Literal["chat", "plain"]
DType = Literal["float32", "bfloat16", "float16"]
Aggregate = Literal["min", "mean", "last", "product"]

_SCORING = "reward_models.scalar_scoring"


class RewardModelReward:
    """The score that a reward model gives a completion, at its last token.

    Completions of one prompt share its computation. A completion that was cut off is scored at its
    last token as it is. Where the policy's tokens and conversation format are the reward model's
    own, the sampled tokens are scored, and never tokenized again; a model that was trained here
    brings a note of how its data was rendered. A completion that the model cannot read, being
    empty or longer than its context, is a `crash`.

    Args:
        path: the reward model: a run's `model` folder, or any sequence-classification model with
            one label.
        dtype: number format that it computes in.
        micro_batch_tokens: most tokens that go through it at once.
        normalize: subtract the mean of the model's scores on training pairs, and divide by their
            standard deviation; `auto` does where the model comes with them.
        on_mismatch: what to do where the policy has another tokenizer, chat template or data.style:
            `refuse` stops the run; `retokenize` renders the row's prompt and the completion's text
            with the model's own.
        style: how the model's training data was rendered, as data.style has it; `auto` is what is
            noted beside the model, or else the chat template if its tokenizer has one.
        system: the system message that retokenized prompts begin with, as data.system has it; null
            is what is noted beside the model.

    Raises:
        UserInputError: `micro_batch_tokens` is below one.
    """

    def __init__(
        self,
        *,
        path: str,
        dtype: DType = "bfloat16",
        micro_batch_tokens: int = 4096,
        normalize: bool | Literal["auto"] = "auto",
        on_mismatch: Mismatch = "refuse",
        style: Style = "auto",
        system: str | None = None,
    ) -> None:
        self._options = _checked(path, dtype, micro_batch_tokens, on_mismatch)
        self._options |= {"style": style, "system": system}
        self._normalize = normalize
        self._scorer: Any = None

    def bind(self, tokenizer: Any, policy_style: FixedStyle | None = None) -> None:
        """Load the model, for a policy with this tokenizer.

        Args:
            policy_style: how the policy's rows become tokens; None is not known, and not compared.

        Raises:
            UserInputError: the model cannot be loaded, or reads other tokens than the policy
                writes.
        """
        load = load_target(f"{_SCORING}:load_reward_model", "reward_model:")
        self._scorer = load(
            tokenizer, policy_style=policy_style, normalize=self._normalize, **self._options
        )

    def __call__(self, items: Sequence[Item], /) -> list[Score]:
        return _score(self._scorer, items)

    def close(self) -> None:
        """Let go of the model and its memory."""
        self._scorer = None


class ProcessRewardModelReward:
    """What a process reward model says of a completion's steps, as one number from 0 to 1.

    A step's score is the probability that it is good, read at the token that holds its last
    character. Tokens, cut-off completions and failures are treated as by the reward `reward_model`;
    a last step that was cut off counts as one.

    Args:
        path: the process reward model: a run's `model` folder.
        separator: what stands between two steps; blank steps do not count. Null is what stood there
            in the model's training as noted beside it, or else a line break.
        aggregate: `min` (Lightman et al. 2023: an answer is as good as its worst step), `product`
            (the chance that all are good), `mean`, or `last`.
        dtype: number format that it computes in.
        micro_batch_tokens: most tokens that go through it at once.
        on_mismatch: what to do where the policy has another tokenizer, chat template or data.style:
            `refuse` stops the run; `retokenize` renders the row's prompt and the completion's text
            with the model's own.
        style: how the model's training data was rendered, as data.style has it; `auto` is what is
            noted beside the model, or else the chat template if its tokenizer has one.
        system: the system message that retokenized prompts begin with, as data.system has it; null
            is what is noted beside the model.

    Raises:
        UserInputError: `micro_batch_tokens` is below one, or the separator is empty.
    """

    def __init__(
        self,
        *,
        path: str,
        separator: str | None = None,
        aggregate: Aggregate = "min",
        dtype: DType = "bfloat16",
        micro_batch_tokens: int = 4096,
        on_mismatch: Mismatch = "refuse",
        style: Style = "auto",
        system: str | None = None,
    ) -> None:
        if separator == "":
            raise UserInputError(
                "process_reward_model: the separator is empty; give what stands between two steps"
            )
        self._options = _checked(path, dtype, micro_batch_tokens, on_mismatch)
        self._options |= {"style": style, "system": system}
        self._options |= {"separator": separator, "aggregate": aggregate}
        self._scorer: Any = None

    def bind(self, tokenizer: Any, policy_style: FixedStyle | None = None) -> None:
        """Load the model, for a policy with this tokenizer.

        Args:
            policy_style: how the policy's rows become tokens; None is not known, and not compared.

        Raises:
            UserInputError: the model cannot be loaded, or reads other tokens than the policy
                writes.
        """
        load = load_target(f"{_SCORING}:load_process_reward_model", "process_reward_model:")
        self._scorer = load(tokenizer, policy_style=policy_style, **self._options)

    def __call__(self, items: Sequence[Item], /) -> list[Score]:
        return _score(self._scorer, items)

    def close(self) -> None:
        """Let go of the model and its memory."""
        self._scorer = None


def _checked(
    path: str, dtype: DType, micro_batch_tokens: int, on_mismatch: Mismatch
) -> dict[str, Any]:
    if micro_batch_tokens < 1:
        raise UserInputError(f"micro_batch_tokens is {micro_batch_tokens}; give 1 or more")
    return {
        "path": path,
        "dtype": dtype,
        "micro_batch_tokens": micro_batch_tokens,
        "on_mismatch": on_mismatch,
    }


def _score(scorer: Any, items: Sequence[Item]) -> list[Score]:
    if scorer is None:
        raise AlignmentError(
            "a reward model was asked for scores before it knew whose tokens these are; call "
            "bind(tokenizer) with the policy's tokenizer first"
        )
    scores: list[Score] = scorer(items)
    return scores
