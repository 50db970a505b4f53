"""Talking with a model: what a run made, or any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from alignment.config.model import ModelConfig
from alignment.config.schema import RolloutConfig
from alignment.data.chat import ChatEncoder
from alignment.data.formats import Turns
from alignment.data.prompts import with_system
from alignment.distributed import Distributed
from alignment.modeling.load import load_causal_lm
from alignment.trainers.finished import find_model
from alignment.trainers.sampling import sampling_params
from alignment.trainers.setup import in_process, load_policy_tokenizer, make_engine
from alignment.types import Prompt, UserInputError

Message = Mapping[str, str]

# A run samples as many tokens as its task needs; an answer in a conversation may take more.
_ANSWER_TOKENS = 512
# Where no recipe says how to sample. Low: small models wander at 1.
_TEMPERATURE = 0.2


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a conversation needs to know of a run, or of a model that is none."""

    model: ModelConfig
    rollout: RolloutConfig
    system: str | None = None
    seed: int = 0


def chat(path: str) -> Callable[[list[dict[str, str]]], str]:
    """Load a model, and return a function that answers a conversation.

    A run is sampled as it was in training: its temperature, system message, chat template and
    number format. Of a pipeline, the model is the last stage's. A model without a chat template
    continues the text of the messages, joined by line breaks.

    Args:
        path: a run folder, or a model (catalogue name, folder, hub id).

    Returns:
        messages `[{"role", "content"}, ...]` in, the answer out. It raises `UserInputError` where
        the conversation has outgrown the model's context.

    Raises:
        UserInputError: there is no such run or model, or the run is not finished.
    """
    settings = _settings(path)
    tokenizer = load_policy_tokenizer(settings.model)
    model: Any = load_causal_lm(
        settings.model.path,
        dtype=settings.model.dtype,
        attention=settings.model.attention,
        trust_remote_code=settings.model.trust_remote_code,
        revision=settings.model.revision,
    )
    engine = make_engine(in_process(settings.rollout), model.to(Distributed().device), tokenizer)
    encoder = ChatEncoder(tokenizer)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    params = sampling_params(settings.rollout, n=1, seed=settings.seed, step=0)
    turns = count()  # every answer has its own random numbers, also to the same question

    def reply(messages: list[dict[str, str]]) -> str:
        ids, text = encoder.prompt(_turns(messages, settings.system, encoder.has_template))
        _check_room(len(ids), context)
        (completion,) = engine.generate([Prompt(ids, text, index=next(turns))], params)
        return completion.text

    return reply


def _settings(path: str) -> _Settings:
    named = find_model(path)
    recipe = named.recipe
    if recipe is None:
        return _Settings(ModelConfig(path=path), _for_answers(None))
    model = ModelConfig(
        path=named.path,
        dtype=recipe.model.dtype,
        attention=recipe.model.attention,
        trust_remote_code=recipe.model.trust_remote_code,
        chat_template=recipe.model.chat_template,
    )
    return _Settings(model, _for_answers(recipe.rollout), recipe.data.system, recipe.run.seed)


def _for_answers(rollout: RolloutConfig | None) -> RolloutConfig:
    """A run's way of sampling, with room for one answer of any usual length."""
    if rollout is None:
        return RolloutConfig(max_new_tokens=_ANSWER_TOKENS, temperature=_TEMPERATURE, max_rows=1)
    longest = max(rollout.max_new_tokens, _ANSWER_TOKENS)
    return rollout.model_copy(update={"max_new_tokens": longest, "max_rows": 1, "kv_tokens": None})


def _turns(messages: Sequence[Message], system: str | None, has_template: bool) -> Turns:
    if has_template:
        return with_system([dict(message) for message in messages], system, "the conversation")
    return "\n".join(message["content"] for message in messages)


def _check_room(n_tokens: int, context: int | None) -> None:
    if context is not None and n_tokens >= context:
        raise UserInputError(
            f"the conversation has {n_tokens} tokens and the model's context {context}, so there "
            "is no room for an answer; start over (/reset)"
        )
