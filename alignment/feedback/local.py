"""The live policy, or any model in this process, as a chat model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignment.data.chat import ChatEncoder
from alignment.feedback.chat_model import (
    ContinuationScores,
    Conversation,
    Failure,
    Reply,
    derived_seed,
    occurrences,
)
from alignment.modeling.backbone import Backbone
from alignment.modeling.logits import check_sampling_params
from alignment.modeling.packing import plan_micro_batches
from alignment.modeling.scorer import choose_layout, score
from alignment.rollout.engine import RolloutEngine
from alignment.rollout.mode import sampling_mode
from alignment.types import Completion, Prompt, Sample, SamplingParams, StopReason, UserInputError

Logprobs = Callable[[Sequence[Sample]], Sequence[Tensor]]
"""Samples to the log-probabilities of their completion tokens, one `[T]` each."""


class LocalChatModel:
    """Replies sampled by a rollout engine, from conversations rendered with the chat template.

    With counter-based randomness a reply depends only on weights, conversation, seed and how often
    the conversation came before in the call, not on the other conversations.

    Args:
        engine: samples the replies.
        tokenizer: with a chat template.
        context: the most tokens a conversation and its reply have together; None: any. A
            conversation that leaves no room is refused.
        logprobs: needed by `score` only, such as `model_logprobs(model)`.
        template_options: keyword arguments that the chat template understands.
        name: what messages call it.
        template_remedy: what to do about a tokenizer without a chat template, for the message.

    Raises:
        UserInputError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: Any,
        *,
        context: int | None = None,
        logprobs: Logprobs | None = None,
        template_options: Mapping[str, Any] | None = None,
        name: str = "the local model",
        template_remedy: str = "give the tokenizer one, or use another model",
    ) -> None:
        self.name = name
        self._engine = engine
        self._encoder = ChatEncoder(tokenizer, template_options=template_options)
        self._end_of_turn = self._encoder.end_of_turn_id()
        self._context = context
        self._logprobs = logprobs
        if not self._encoder.has_template:
            raise UserInputError(
                f"{name} cannot hold a conversation: its tokenizer has no chat template; "
                f"{template_remedy}"
            )

    def reply(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[Reply]:
        """One reply for each conversation, in order; see `ChatModel`.

        Raises:
            UserInputError: sampling parameters that define no distribution.
        """
        params = SamplingParams(max_new_tokens, temperature=temperature, seed=seed)
        check_sampling_params(params)
        prompts: dict[int, Prompt] = {}
        replies: dict[int, Reply] = {}
        for i, (number, repeat) in enumerate(occurrences(conversations)):
            try:
                ids, text = self._prompt(conversations[i], f"conversation {i}")
            except UserInputError as error:
                replies[i] = Reply(None, Failure.REFUSED, str(error))
                continue
            index = derived_seed(number, repeat) if repeat else number
            prompts[i] = Prompt(ids, text, index)
        results = self._generate(list(prompts.values()), params)
        replies |= {i: _as_reply(result) for i, result in zip(prompts, results, strict=True)}
        return [replies[i] for i in range(len(conversations))]

    def score(
        self, conversations: Sequence[Conversation], continuations: Sequence[str]
    ) -> list[ContinuationScores]:
        """Of each conversation, log p(continuation) as the beginning of the next answer.

        The tokens are those of the chat template; what ends the turn does not count.

        Raises:
            UserInputError: the model was made without `logprobs`.
        """
        if self._logprobs is None:
            raise UserInputError(
                f"{self.name} was made without log-probabilities; give LocalChatModel a "
                "`logprobs`, or let the judge answer in text (verdict='text')"
            )
        samples: dict[int, list[Sample]] = {}
        refused: dict[int, ContinuationScores] = {}
        for i, conversation in enumerate(conversations):
            try:
                samples[i] = [self._continued(conversation, text, i) for text in continuations]
            except UserInputError as error:
                refused[i] = ContinuationScores((), Failure.REFUSED, str(error))
        flat = [sample for group in samples.values() for sample in group]
        sums = [float(row.sum()) for row in self._logprobs(flat)] if flat else []
        n = len(continuations)
        scores = {
            i: ContinuationScores(tuple(sums[k * n : (k + 1) * n])) for k, i in enumerate(samples)
        }
        return [(scores | refused)[i] for i in range(len(conversations))]

    def _prompt(self, conversation: Conversation, where: str) -> tuple[tuple[int, ...], str]:
        ids, text = self._encoder.prompt([dict(message) for message in conversation], where=where)
        if self._context is not None and len(ids) >= self._context:
            raise UserInputError(
                f"{where} has {len(ids)} tokens, which leaves no room in the context of "
                f"{self._context}; shorten or drop it"
            )
        return ids, text

    def _continued(self, conversation: Conversation, text: str, i: int) -> Sample:
        where = f"conversation {i}"
        prompt_ids, _ = self._prompt(conversation, where)
        answer = {"role": "assistant", "content": text}
        whole = self._encoder.conversation(
            [*map(dict, conversation), answer], loss_on="last_assistant", where=where
        )
        ids = list(whole.completion_ids)
        while ids and ids[-1] == self._end_of_turn:
            ids.pop()
        return Sample(prompt_ids, tuple(ids), (True,) * len(ids))

    def _generate(
        self, prompts: Sequence[Prompt], params: SamplingParams
    ) -> list[Completion | UserInputError]:
        """A completion or an error for each prompt.

        An engine refuses a whole batch for one prompt that does not fit, before it samples;
        halving the batch finds the prompt at little cost.
        """
        if not prompts:
            return []
        try:
            return list(self._engine.generate(prompts, params))
        except UserInputError as error:
            if len(prompts) == 1:
                return [error]
        half = len(prompts) // 2
        return [*self._generate(prompts[:half], params), *self._generate(prompts[half:], params)]


def model_logprobs(model: nn.Module, token_budget: int = 4096) -> Logprobs:
    """The log-probabilities of a causal LM as it is, for `LocalChatModel`.

    Args:
        model: a transformers causal LM, or a peft model around one.
        token_budget: tokens computed in one forward.
    """
    backbone = Backbone(model)
    choose_layout(backbone)
    shares = backbone.plain_reason is None

    def logprobs(samples: Sequence[Sample]) -> list[Tensor]:
        out: list[Tensor] = [torch.empty(0)] * len(samples)
        with sampling_mode(model), torch.no_grad():
            for batch in plan_micro_batches(samples, token_budget, share_prompts=shares):
                rows = score(backbone, [samples[i] for i in batch]).logprobs
                for row, i in zip(rows, batch, strict=True):
                    out[i] = row[: len(samples[i].completion_ids)]
        return out

    return logprobs


def _as_reply(result: Completion | UserInputError) -> Reply:
    if isinstance(result, UserInputError):
        return Reply(None, Failure.REFUSED, str(result))
    if result.stop_reason is StopReason.LENGTH:
        detail = f"no end within {len(result.token_ids)} tokens"
        return Reply(result.text, Failure.CUT_OFF, detail)
    return Reply(result.text)
