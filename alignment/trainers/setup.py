"""From a recipe to the parts a trainer works with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignment import registry
from alignment.config.algorithms import GRPOConfig, SFTConfig
from alignment.config.options import resolve, validate_options
from alignment.config.schema import DataConfig, ModelConfig, Recipe, RolloutConfig
from alignment.data.chat import check_stop_token_trained, stop_token_ids
from alignment.data.order import DataOrder, split_held_out
from alignment.data.prompts import build_prompts
from alignment.data.report import DataReport
from alignment.data.samples import build_samples
from alignment.distributed import Distributed
from alignment.modeling.load import (
    LoraOptions,
    load_causal_lm,
    load_tokenizer,
    model_hash,
    template_hash,
    tokenizer_hash,
)
from alignment.modeling.optimizer import AdamWOptions, MasterWeightOptimizer
from alignment.modeling.policy import PolicyWithReference, disable_dropout
from alignment.modeling.reference import make_reference, trainable
from alignment.rewards.compose import CompositeReward, RewardSpec, build_rewards
from alignment.rollout.engine import RolloutEngine
from alignment.runs.events import EventLog
from alignment.runs.lineage import data_hash
from alignment.trainers.context import TrainingContext
from alignment.types import Prompt, Sample, UserInputError

# The held-out split does not depend on the run's seed: runs whose recipes describe the same rows
# and the same `held_out` are compared on the same problems, and a later stage never evaluates on
# what an earlier one saw. Another size or `held_out` is another split.
_SPLIT_SEED = 0

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# How a recipe names what is learned of a conversation, and how the data layer does.
_LOSS_ON = {"assistant": "assistant", "completion": "last_assistant"}


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """sha256 sums of what a run was made from."""

    model: str
    tokenizer: str
    template: str
    data: str


@dataclass(frozen=True, slots=True)
class TokenizedData:
    """Training and held-out data in the form the method needs."""

    prompts: Sequence[Prompt] = ()
    samples: Sequence[Sample] = ()
    held_out_prompts: Sequence[Prompt] = ()
    held_out_samples: Sequence[Sample] = ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a recipe names, in memory; `warnings` are what was noticed on the way."""

    recipe: Recipe
    tokenizer: Any
    model: Any
    rewards: CompositeReward | None
    data: TokenizedData
    fingerprints: Fingerprints
    warnings: Sequence[str]


def load_parts(recipe: Recipe) -> Loaded:
    """Load model, data and rewards.

    Raises:
        UserInputError: one of them is not usable, with the remedy.
    """
    warnings: list[str] = []
    train_rows, held_out_rows = load_rows(recipe.data)
    rewards = make_rewards(recipe)
    tokenizer = load_policy_tokenizer(recipe.model)
    model: Any = load_policy(recipe)
    data = _tokenize(recipe, train_rows, held_out_rows, tokenizer, model, warnings)
    fingerprints = Fingerprints(
        model=model_hash(model),
        tokenizer=tokenizer_hash(tokenizer),
        template=template_hash(tokenizer),
        data=data_hash([*train_rows, *held_out_rows]),
    )
    return Loaded(recipe, tokenizer, model, rewards, data, fingerprints, warnings)


def assemble(loaded: Loaded, distributed: Distributed, events: EventLog) -> TrainingContext:
    """Put loaded parts together; what was noticed while loading goes into the event log."""
    recipe, data = loaded.recipe, loaded.data
    model = loaded.model.to(distributed.device)
    policy = make_policy(recipe, model)
    for warning in loaded.warnings:
        events.write("warning", warning)
    if policy.backbone.plain_reason is not None:
        reason = policy.backbone.plain_reason
        events.write("warning", f"padded rows without shared prompts are used: {reason}")
    optim = recipe.optim
    optimizer = MasterWeightOptimizer(
        trainable(model),
        AdamWOptions(optim.lr, optim.betas, optim.eps, optim.weight_decay),
        master_dtype=_DTYPES.get(recipe.model.master_dtype),
    )
    return TrainingContext(
        recipe=recipe,
        distributed=distributed,
        events=events,
        tokenizer=loaded.tokenizer,
        policy=policy,
        optimizer=optimizer,
        engine=make_engine(recipe.rollout, model, loaded.tokenizer),
        rewards=loaded.rewards,
        prompts=data.prompts,
        samples=data.samples,
        held_out_prompts=data.held_out_prompts,
        held_out_samples=data.held_out_samples,
        order=DataOrder(
            len(data.prompts) or len(data.samples),
            seed=recipe.run.seed,
            shuffle=recipe.data.shuffle,
        ),
    )


def load_rows(
    config: DataConfig,
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """(training rows, held-out rows) of a recipe's source."""
    source = resolve("source", config.type)
    options = validate_options(source, config.options, where="data")
    train, held_out = split_held_out(source(**options), config.held_out, seed=_SPLIT_SEED)
    return train[: config.limit], held_out


def make_rewards(recipe: Recipe) -> CompositeReward | None:
    """The recipe's rewards; None where it lists none."""
    if not recipe.rewards:
        return None
    return build_rewards([RewardSpec(r.type, r.weight, r.name, r.options) for r in recipe.rewards])


def load_policy_tokenizer(config: ModelConfig) -> Any:
    return load_tokenizer(
        config.path,
        chat_template=config.chat_template,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
    )


def load_policy(recipe: Recipe) -> Any:
    """The model to train, its adapter on it, dropout off for RL."""
    config = recipe.model
    lora = config.lora
    model: Any = load_causal_lm(
        config.path,
        dtype=config.dtype,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        seed=recipe.run.seed,
        lora=None
        if lora is None
        else LoraOptions(lora.rank, lora.alpha, lora.dropout, lora.target_modules),
    )
    if isinstance(recipe.algorithm, GRPOConfig):
        disable_dropout(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def make_policy(recipe: Recipe, model: Any) -> PolicyWithReference:
    reference = recipe.model.reference
    return PolicyWithReference(
        model,
        make_reference(
            model,
            reference.mode,
            dtype=_DTYPES.get(reference.dtype or ""),
            device=reference.device,
            every=reference.every,
            mix=reference.mix,
        ),
        router_loss=recipe.model.router_aux_coef > 0,
    )


def make_engine(config: RolloutConfig | None, model: Any, tokenizer: Any) -> RolloutEngine:
    """The recipe's engine on the live model; without a rollout section, the default one."""
    factory = registry.get("engine", config.engine if config else "native")
    stop_ids = stop_token_ids(tokenizer, getattr(model, "generation_config", None))
    options: dict[str, Any] = {"stop_token_ids": stop_ids}
    if config is not None:
        options |= {"max_rows": config.max_rows, "kv_tokens": config.kv_tokens}
    known = inspect.signature(factory).parameters
    engine: RolloutEngine = factory(
        model, tokenizer, **{key: value for key, value in options.items() if key in known}
    )
    return engine


def _tokenize(
    recipe: Recipe,
    train_rows: Sequence[Mapping[str, Any]],
    held_out_rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    model: Any,
    warnings: list[str],
) -> TokenizedData:
    """Rows as what the method trains on; what is dropped is a warning."""
    context_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(recipe.algorithm, SFTConfig):
        stop_ids = stop_token_ids(tokenizer, getattr(model, "generation_config", None))
        check_stop_token_trained(tokenizer, stop_ids)
        options: dict[str, Any] = {
            "loss_on": _LOSS_ON[recipe.algorithm.loss_on],
            "system": recipe.data.system,
            "max_tokens": context_length,
        }
        samples = _reported(build_samples(train_rows, tokenizer, **options), "training", warnings)
        held_out = build_samples(held_out_rows, tokenizer, **options)[0] if held_out_rows else ()
        held_out_prompts = _if_they_fit(
            build_prompts, held_out_rows, tokenizer, system=recipe.data.system
        )
        return TokenizedData((), samples, held_out_prompts, held_out)
    options = {
        "system": recipe.data.system,
        "max_prompt_tokens": _prompt_limit(recipe, context_length),
    }
    prompts = _reported(build_prompts(train_rows, tokenizer, **options), "training", warnings)
    held_out_prompts = (
        build_prompts(held_out_rows, tokenizer, **options)[0] if held_out_rows else ()
    )
    held_out_samples = _if_they_fit(
        build_samples,
        held_out_rows,
        tokenizer,
        system=recipe.data.system,
        max_tokens=context_length,
    )
    return TokenizedData(prompts, (), held_out_prompts, held_out_samples)


def _if_they_fit(
    build: Callable[..., tuple[Sequence[Any], DataReport]],
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    **options: Any,
) -> Sequence[Any]:
    """Held-out rows in the form that only evaluation uses; empty where the rows have no such form.

    So any task runs on any run whose data has what it needs, whatever the method.
    """
    try:
        return build(rows, tokenizer, **options)[0]
    except UserInputError:
        return ()


def _prompt_limit(recipe: Recipe, context_length: int | None) -> int | None:
    """Longest prompt that leaves room for one token, or the recipe's own limit if it is lower."""
    limits = [recipe.data.max_prompt_tokens, context_length - 1 if context_length else None]
    return min((limit for limit in limits if limit is not None), default=None)


def _reported(built: tuple[Sequence[Any], DataReport], what: str, warnings: list[str]) -> Any:
    items, report = built
    if report.n_dropped or report.truncated:
        warnings.append(f"{what} data: {report.summary()}")
    if not items:
        raise UserInputError(f"{what} data: no row is left; {report.summary()}")
    return items
