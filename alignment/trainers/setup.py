"""From a recipe to the parts a trainer works with."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignment import registry
from alignment.activity import doing
from alignment.config.methods.base import needs_of
from alignment.config.methods.ppo import CriticConfig
from alignment.config.model import LoraConfig, ModelConfig
from alignment.config.options import resolve, validate_options
from alignment.config.schema import DataConfig, Recipe, RolloutConfig
from alignment.data.chat import stop_token_ids
from alignment.data.order import DataOrder, split_held_out
from alignment.data.places import WHOLE_SOURCE, PlacedRows, Places
from alignment.data.sources import file, line_numbers
from alignment.data.text_form import fixed_style
from alignment.distributed import Distributed
from alignment.modeling.attention import recomputed_alike
from alignment.modeling.heads import ScalarHead, ScalarModel
from alignment.modeling.heap import keep_freed_memory
from alignment.modeling.load import (
    DTYPES,
    LoraOptions,
    load_causal_lm,
    load_tokenizer,
    model_hash,
    template_hash,
    tokenizer_hash,
)
from alignment.modeling.optimizer import (
    AdamWOptions,
    MasterWeightOptimizer,
    Optimizer,
    SumCounts,
)
from alignment.modeling.policy import PolicyWithReference, disable_dropout
from alignment.modeling.reference import make_reference, trainable
from alignment.modeling.scalar import load_scalar_model
from alignment.modeling.shards import MakeShards
from alignment.rewards.compose import CompositeReward, RewardSpec, build_rewards
from alignment.rollout.engine import RolloutEngine
from alignment.runs.events import EventLog
from alignment.runs.lineage import data_hash, text_hash
from alignment.trainers.context import TokenizedData, Trained, TrainingContext
from alignment.trainers.local_paths import require_local_paths
from alignment.trainers.tokenized import TokenizedForms, n_rows
from alignment.types import UserInputError

# The held-out split does not depend on the run's seed: runs whose recipes describe the same rows
# and the same `held_out` are compared on the same problems, and a later stage never evaluates on
# what an earlier one saw. Another size or `held_out` is another split.
_SPLIT_SEED = 0


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """sha256 sums of what a run was made from."""

    model: str
    tokenizer: str
    template: str
    data: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a recipe names, in memory; `warnings` are what was noticed on the way."""

    recipe: Recipe
    tokenizer: Any
    model: Any
    critic: ScalarModel | None
    rewards: CompositeReward | None
    train: TokenizedData
    held_out: TokenizedData
    fingerprints: Fingerprints
    warnings: Sequence[str]


def load_parts(recipe: Recipe) -> Loaded:
    """Load model, data and rewards.

    Raises:
        UserInputError: one of them is not usable, with the remedy.
    """
    warnings: list[str] = []
    require_local_paths(recipe)
    with doing("loading", "the data"):
        train_rows, held_out_rows = load_rows(recipe.data)
    with doing("loading", "the rewards and the tokenizer"):
        rewards = make_rewards(recipe)
        tokenizer = load_policy_tokenizer(recipe.model)
        if rewards is not None:
            rewards.bind(tokenizer, policy_style=fixed_style(recipe.data.style, tokenizer))
    with doing("loading", f"the model {recipe.model.path}"):
        model = load_model(recipe)
        critic = load_critic(recipe)
    backbone = getattr(model, "backbone", None)
    config = backbone.config if backbone is not None else model.config.get_text_config()
    forms = TokenizedForms(
        recipe,
        tokenizer,
        context_length=getattr(config, "max_position_embeddings", None),
        generation_config=getattr(model, "generation_config", None),
    )
    with doing("loading", "the data, into tokens"):
        train = forms.training(train_rows, warnings)
        held_out = forms.held_out(held_out_rows, warnings)
    with doing("loading", "hashes of all of it"):
        fingerprints = Fingerprints(
            model=model_hash(model),
            tokenizer=tokenizer_hash(tokenizer),
            template=template_hash(tokenizer),
            data=data_hash([*train_rows.rows, *held_out_rows.rows]),
        )
    return Loaded(
        recipe=recipe,
        tokenizer=tokenizer,
        model=model,
        critic=critic,
        rewards=rewards,
        train=train,
        held_out=held_out,
        fingerprints=fingerprints,
        warnings=warnings,
    )


def assemble(
    loaded: Loaded,
    distributed: Distributed,
    events: EventLog,
    *,
    cache: Path,
    for_training: bool = True,
) -> TrainingContext:
    """Put loaded parts together; what was noticed while loading goes into the event log.

    Args:
        cache: folder for what can be computed again.
        for_training: without it there is no optimizer, and none of its memory.
    """
    recipe = loaded.recipe
    if distributed.device.type == "cpu":
        keep_freed_memory()
    trains = for_training and needs_of(recipe.algorithm).trains
    # What is sharded goes to the device layer by layer, and each rank keeps its part.
    shards = trains and distributed.shards_state
    model, critic = loaded.model, loaded.critic
    if not shards:
        model.to(distributed.device)
        critic = None if critic is None else critic.to(distributed.device)
    trained: PolicyWithReference | ScalarModel = (
        model if isinstance(model, ScalarModel) else make_policy(recipe, model)
    )
    for warning in loaded.warnings:
        events.write("warning", warning)
    if trained.backbone.plain_reason is not None:
        reason = trained.backbone.plain_reason
        events.write("warning", f"padded rows without shared prompts are used: {reason}")
    if shards:
        make = make_shards(distributed)
        trained.shard(make)
        if critic is not None:
            critic.shard(make)
    sum_counts = distributed.sum if shards else None
    prints = loaded.fingerprints
    return TrainingContext(
        recipe=recipe,
        distributed=distributed,
        events=events,
        tokenizer=loaded.tokenizer,
        trained=Trained(trained, make_optimizer(recipe, trained, sum_counts) if trains else None),
        critic=None
        if critic is None
        else Trained(critic, make_optimizer(recipe, critic, sum_counts)),
        sampler=None
        if isinstance(model, ScalarModel)
        else make_engine(
            recipe.rollout,
            model,
            loaded.tokenizer,
            distributed=distributed,
            whole_model=partial(_whole_model, trained, keep=distributed.is_main),
        ),
        rewards=loaded.rewards,
        train=loaded.train,
        held_out=loaded.held_out,
        order=DataOrder(
            n_rows(loaded.train, recipe), seed=recipe.run.seed, shuffle=recipe.data.shuffle
        ),
        fingerprint=text_hash(
            " ".join([prints.model, prints.tokenizer, prints.template, prints.data])
        ),
        cache=cache,
    )


def _whole_model(trained: PolicyWithReference | ScalarModel, *, keep: bool) -> nn.Module | None:
    assert isinstance(trained, PolicyWithReference)  # nothing is sampled from the others
    return trained.whole_model(keep=keep)


def make_shards(distributed: Distributed) -> MakeShards:
    """What shares a model out over ranks, as the run was launched."""
    if distributed.zero_stage is None:
        return distributed.shard
    zero = importlib.import_module("alignment.modeling.zero")  # seconds to import
    ranks = zero.Ranks(
        distributed.rank,
        distributed.world_size,
        distributed.device,
        sum=distributed.sum,
        max=distributed.max,
    )
    make: MakeShards = zero.zero_maker(distributed.zero_stage, ranks)
    return make


def load_rows(config: DataConfig) -> tuple[PlacedRows, PlacedRows]:
    """(training rows, held-out rows) of a recipe's source."""
    source = resolve("source", config.type)
    options = validate_options(source, config.options, where="data")
    everything = PlacedRows(source(**options), _places(source, options))
    try:
        train, held_out = split_held_out(everything.rows, config.held_out, seed=_SPLIT_SEED)
    except UserInputError as error:
        raise UserInputError(f"data.held_out: {error}") from error
    return everything.select(train[: config.limit]), everything.select(held_out)


def _places(source: Any, options: Mapping[str, Any]) -> Places:
    """By file, in a local one, and there by line, if rows are lines."""
    if source is not file:
        return WHOLE_SOURCE
    options = {key: value for key, value in options.items() if key != "columns"}
    lines = line_numbers(**options)
    if lines is None:
        return Places(WHOLE_SOURCE.numbers, options["path"], by_line=False)
    return Places(lines, options["path"])


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


def load_model(recipe: Recipe) -> Any:
    """What the recipe's model section names, its adapter on it: a causal language model, or a
    `ScalarModel`. Dropout is off where the method learns by probability ratios."""
    config = recipe.model
    needs = needs_of(recipe.algorithm)
    options: dict[str, Any] = {
        "dtype": config.dtype,
        "attention": config.attention,
        "trust_remote_code": config.trust_remote_code,
        "revision": config.revision,
        "seed": recipe.run.seed,
        "lora": _lora(config.lora),
    }
    model: Any
    if needs.model == "scalar":
        router_loss = config.router_aux_coef > 0
        model = load_scalar_model(config.path, **options, router_loss=router_loss)
    else:
        model = load_causal_lm(config.path, **options)
    if not needs.dropout:
        disable_dropout(model)
    if config.gradient_checkpointing:
        decoder: Any = model.decoder if isinstance(model, ScalarModel) else model
        decoder.gradient_checkpointing_enable(
            {"use_reentrant": False, "context_fn": recomputed_alike(decoder.config)}
        )
    return model


def load_critic(recipe: Recipe) -> ScalarModel | None:
    """PPO's critic, where the recipe asks for one of its own; it starts from a reward model, or
    from the policy's model with a head of zeros."""
    critic: CriticConfig | None = getattr(recipe.algorithm, "critic", None)
    if critic is None or critic.kind != "separate":
        return None
    config = recipe.model
    model = load_scalar_model(
        critic.path or config.path,
        dtype=config.dtype,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
        revision=None if critic.path else config.revision,
        lora=_lora(critic.lora),
        seed=recipe.run.seed,
        initial="zero",
    )
    disable_dropout(model)
    return model


def make_optimizer(
    recipe: Recipe, trained: PolicyWithReference | ScalarModel, sum_counts: SumCounts | None
) -> Optimizer:
    """AdamW on all that the model trains, its head included.

    Args:
        sum_counts: over ranks, where weights are sharded.
    """
    optim = recipe.optim
    assert optim.lr is not None  # a recipe whose method trains has one
    parameters = trainable(trained)
    options = AdamWOptions(optim.lr, optim.betas, optim.eps, optim.weight_decay)
    master_dtype = DTYPES.get(recipe.model.master_dtype)
    own = trained.shards.own_optimizer(parameters, options, master_dtype=master_dtype)
    if own is not None:
        return own
    return MasterWeightOptimizer(
        parameters, options, master_dtype=master_dtype, sum_counts=sum_counts
    )


def make_policy(recipe: Recipe, model: Any) -> PolicyWithReference:
    """The policy with its reference, and with a value head where PPO's critic shares its trunk."""
    reference = recipe.model.reference
    critic: CriticConfig | None = getattr(recipe.algorithm, "critic", None)
    value_head = None
    if critic is not None and critic.kind == "shared":
        hidden_size = model.config.get_text_config().hidden_size
        parameter = next(model.parameters())
        value_head = ScalarHead(hidden_size, dtype=parameter.dtype, device=parameter.device)
        torch.nn.init.zeros_(value_head.weight)
    return PolicyWithReference(
        model,
        make_reference(
            model,
            reference.mode,
            dtype=DTYPES.get(reference.dtype or ""),
            device=reference.device,
            every=reference.every,
            mix=reference.mix,
        ),
        value_head=value_head,
        router_loss=recipe.model.router_aux_coef > 0,
    )


def _lora(config: LoraConfig | None) -> LoraOptions | None:
    if config is None:
        return None
    return LoraOptions(config.rank, config.alpha, config.dropout, config.target_modules)


def in_process(config: RolloutConfig | None) -> RolloutConfig | None:
    """The rollout section for another model than the policy, whose weights a server has."""
    if config is None or config.server is None:
        return config
    return config.model_copy(update={"engine": "native", "server": None})


def make_engine(
    config: RolloutConfig | None, model: Any, tokenizer: Any, **served: Any
) -> RolloutEngine:
    """The recipe's engine on the live model; without a rollout section, the default one.

    Args:
        served: what an engine needs besides where it samples on a server.
    """
    factory = registry.get("engine", config.engine if config else "native")
    stop_ids = stop_token_ids(tokenizer, getattr(model, "generation_config", None))
    options: dict[str, Any] = {"stop_token_ids": stop_ids, **served}
    if config is not None:
        options |= {
            "max_rows": config.max_rows,
            "kv_tokens": config.kv_tokens,
            "server": config.server,
        }
    known = inspect.signature(factory).parameters
    engine: RolloutEngine = factory(
        model, tokenizer, **{key: value for key, value in options.items() if key in known}
    )
    return engine
