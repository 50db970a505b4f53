"""What the methods that learn from a language model's feedback have in common: sampled answers, and
the chat model that is asked about them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alignment.config.methods.feedback import (
    AIFeedbackConfig,
    ChatModelConfig,
    ConstitutionalConfig,
)
from alignment.data.formats import prompt_of
from alignment.data.prompts import with_system
from alignment.feedback.chat_model import (
    ChatModel,
    Conversation,
    Failable,
    Failure,
    check_failures,
)
from alignment.feedback.constitution import Constitution, load_constitution
from alignment.feedback.endpoint import EndpointChatModel
from alignment.feedback.local import LocalChatModel, model_logprobs
from alignment.modeling.load import load_causal_lm, load_tokenizer
from alignment.rollout.collect import Grade
from alignment.runs.lineage import text_hash
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import TrainingContext
from alignment.trainers.sampler import completer
from alignment.trainers.sampling import sampling_params
from alignment.trainers.setup import in_process, make_engine
from alignment.trainers.update import timed
from alignment.types import (
    Completion,
    Outcome,
    Prompt,
    RewardedCompletion,
    Rollout,
    StopReason,
    UserInputError,
)

CACHE_FILE = "replies.sqlite"
"""Where a run keeps an endpoint's replies, in its cache folder."""


# -- the chat model -------------------------------------------------------------------------------


def make_chat_model(context: TrainingContext, config: ChatModelConfig) -> ChatModel:
    """The model that a recipe's `judge` names.

    Raises:
        UserInputError: it cannot be loaded, has no chat template, or its address or key cannot be
            right.
    """
    return _MAKERS[config.kind](context, config)


def _policy(context: TrainingContext, _: ChatModelConfig) -> ChatModel:
    budget = context.recipe.optim.micro_batch_tokens
    context.engine.weights_updated(0)  # methods that make data change no weights
    return LocalChatModel(
        context.engine,
        context.tokenizer,
        context=_context_length(context.policy.model),
        logprobs=lambda samples: context.policy.logprobs(samples, budget),
        name="the policy",
        template_remedy="set model.chat_template, or use another judge (algorithm.judge)",
    )


def _local(context: TrainingContext, config: ChatModelConfig) -> ChatModel:
    assert config.path is not None  # checked with the recipe
    recipe = context.recipe
    model = load_causal_lm(
        config.path, dtype=config.dtype or recipe.model.dtype, attention=recipe.model.attention
    ).to(context.distributed.device)
    tokenizer = load_tokenizer(config.path)
    return LocalChatModel(
        make_engine(in_process(recipe.rollout), model, tokenizer),
        tokenizer,
        context=_context_length(model),
        logprobs=model_logprobs(model, recipe.optim.micro_batch_tokens),
        name=config.path,
        template_remedy="use another model (algorithm.judge.path), or a copy of this one with a "
        "chat_template.jinja in its folder",
    )


def _endpoint(context: TrainingContext, config: ChatModelConfig) -> ChatModel:
    assert config.base_url is not None and config.model is not None
    return EndpointChatModel(
        config.base_url,
        config.model,
        api_key_variable=config.api_key_variable,
        timeout_seconds=config.timeout_seconds,
        retries=config.retries,
        max_in_flight=config.max_in_flight,
        token_limit_key=config.token_limit_key,
        cache=config.cache or context.cache / CACHE_FILE,
    )


_MAKERS: Mapping[str, Callable[[TrainingContext, ChatModelConfig], ChatModel]] = {
    "policy": _policy,
    "local": _local,
    "endpoint": _endpoint,
}


def _context_length(model: Any) -> int | None:
    length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length


# -- the constitution -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rules:
    """The constitution of a run, and the hash by which a resumed run knows that it is the same."""

    name: str
    constitution: Constitution
    hash: str

    @classmethod
    def load(cls, context: TrainingContext, name: str, chat_model: ChatModel) -> Rules:
        """Load the constitution, and note in the events what it says and who goes by it.

        Raises:
            UserInputError: there is none of this name, or it is malformed.
        """
        constitution = load_constitution(name)
        principles = ", ".join(principle.name for principle in constitution.principles)
        context.events.write(
            "constitution",
            f"{name}: {principles}; feedback from {chat_model.name}",
            constitution=constitution.model_dump(mode="json"),
        )
        return cls(name, constitution, text_hash(constitution.model_dump_json()))

    def check_same(self, saved: str) -> None:
        """Refuse to go on by other principles than those that the run began with.

        Raises:
            UserInputError: the file has changed.
        """
        if saved != self.hash:
            raise UserInputError(
                f"the constitution {self.name!r} has changed since this run began; restore it (the "
                "run's events.jsonl has what it said), or start a new run"
            )


# -- the answers ----------------------------------------------------------------------------------


class AnswerSource:
    """Samples answers to the next prompts, step by step.

    Args:
        samples: answers for each prompt.
        grade: the rewards; None where there are none.

    Attributes:
        total_steps: rounds until the recipe's `steps`, or until every prompt has been drawn once.
    """

    def __init__(
        self,
        context: TrainingContext,
        config: ConstitutionalConfig | AIFeedbackConfig,
        *,
        samples: int,
        grade: Grade | None = None,
    ) -> None:
        assert context.recipe.rollout is not None
        self._context = context
        self._rollout = context.recipe.rollout
        self._per_step = config.prompts_per_step
        self._samples = samples
        self._complete = completer(context, grade or ungraded)
        n_prompts = len(context.train.prompts)
        # Without a number of steps each prompt is drawn once, and the last step may be smaller.
        self._n_draws = n_prompts if config.steps is None else config.steps * self._per_step
        self.total_steps = math.ceil(self._n_draws / self._per_step)

    def sample(self, step: int, metrics: MetricSums) -> Rollout:
        """This rank's part of the step's answers: neighbouring prompts, in the order drawn."""
        context, order = self._context, self._context.order
        drawn = order.take(min(self._per_step, self._n_draws - order.position))
        prompts = [
            replace(context.train.prompts[row], index=index)
            for index, row in context.distributed.share(drawn)
        ]
        sampling = sampling_params(
            self._rollout, n=self._samples, seed=context.recipe.run.seed, step=step
        )
        if context.recorded is None:
            context.engine.weights_updated(0)  # an evaluation has marked it with its step
        with timed(metrics, "rollout"):
            items = self._complete(prompts, sampling)
        return Rollout(tuple(items), self._samples, step)

    def conversation(self, prompt: Prompt) -> Conversation:
        """What an answer answers, as messages."""
        where = prompt.row_name
        turns = prompt_of(prompt.row, chat=True, where=where)
        conversation = with_system(turns, self._context.recipe.data.system, where)
        assert not isinstance(conversation, str)  # a string became a message
        return conversation


def ungraded(items: Sequence[tuple[Prompt, Completion]]) -> list[RewardedCompletion]:
    """Completions as they are, for methods that have no rewards."""
    return [
        RewardedCompletion(prompt, completion, None, Outcome.SCORED, {})
        for prompt, completion in items
    ]


def is_cut_off(item: RewardedCompletion) -> bool:
    return item.completion.stop_reason is StopReason.LENGTH


def is_blank(item: RewardedCompletion) -> bool:
    return not item.completion.text.strip()


def record_answers(items: Sequence[RewardedCompletion], metrics: MetricSums) -> None:
    """How long the answers are, and how many were cut off."""
    lengths = [len(item.completion.token_ids) for item in items]
    metrics.add("completion/length", sum(lengths), len(items))
    metrics.add("completion/cut_off", sum(map(is_cut_off, items)), len(items))


# -- what came of them ----------------------------------------------------------------------------


def settle(
    context: TrainingContext,
    step: int,
    results: Sequence[Failable],
    left_out: Sequence[str],
    reasons: Sequence[str],
    metrics: MetricSums,
    what: str,
) -> None:
    """Count what gave a row and what did not, and stop where too much failed.

    Args:
        results: what the chat model made of each item it was asked about.
        left_out: for each candidate of a row, why it gives none; "" where it gives one.
        reasons: all that `left_out` may hold.
        what: the results and who was asked, for messages.

    Raises:
        AlignmentError: a larger share than `limits.unscorable` failed, over all ranks.
    """
    counts = Counter(left_out)
    metrics.add_count("made/rows", counts[""])
    metrics.add("made/usable", counts[""], len(left_out))
    for reason in reasons:
        metrics.add_count(f"made/left_out/{reason}", counts[reason])
    failures = Counter(result.failure for result in results)
    for failure in filter(None, Failure):
        metrics.add(f"judge/failed/{failure.value}", failures[failure], len(results))
    everyones = context.distributed.gather(list(left_out))
    everywhere = context.distributed.gather(list(results))
    if any(everyones) and context.distributed.is_main:
        context.events.write("left_out", _told(step, everyones, everywhere, what), step=step)
    check_failures(everywhere, context.recipe.limits.unscorable, what)


def _told(step: int, left_out: Sequence[str], results: Sequence[Failable], what: str) -> str:
    counts = Counter(filter(None, left_out)).most_common()
    listed = ", ".join(f"{reason}: {count}" for reason, count in counts)
    text = f"step {step}: {sum(n for _, n in counts)} of {len(left_out)} gave no row ({listed})"
    failed = next((result for result in results if result.failure), None)
    if failed is None:
        return text
    return f"{text}; the first that failed of the {what}, {failed.failure.value}: {failed.detail}"
