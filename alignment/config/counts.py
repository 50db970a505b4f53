"""The arithmetic of a recipe in words, so that nobody has to work out a product."""

from __future__ import annotations

from alignment.config.algorithms import GRPOConfig, SFTConfig
from alignment.config.load import load_stage
from alignment.config.pipeline import PipelineRecipe
from alignment.config.schema import Recipe


def describe_counts(recipe: Recipe | PipelineRecipe) -> list[str]:
    """How much a run samples and trains on, a line each.

    A trainer plug-in's `Config` takes part by having a method `describe_counts() -> list[str]`.
    """
    if isinstance(recipe, PipelineRecipe):
        return [
            f"{stage.name}: {line}"
            for stage in recipe.stages
            for line in describe_counts(load_stage(recipe, stage.name))
        ]
    algorithm = recipe.algorithm
    if isinstance(algorithm, SFTConfig):
        lines = _sft(algorithm)
    elif isinstance(algorithm, GRPOConfig):
        lines = _grpo(algorithm, recipe.rollout.max_new_tokens if recipe.rollout else None)
    else:
        describe = getattr(algorithm, "describe_counts", list)
        lines = [str(line) for line in describe()]
    return [*lines, *_saves(recipe)]


def _sft(algorithm: SFTConfig) -> list[str]:
    batch = f"{_many(algorithm.samples_per_step, 'sample')} a step, 1 update a step"
    if algorithm.steps is None:
        return [f"{batch}; {algorithm.epochs:g} passes over the data"]
    total = _many(algorithm.steps * algorithm.samples_per_step, "sample")
    return [f"{batch}; {_many(algorithm.steps, 'step')} = {total}"]


def _grpo(algorithm: GRPOConfig, max_new_tokens: int | None) -> list[str]:
    samples = algorithm.prompts_per_step * algorithm.group_size
    updates = algorithm.updates_per_step
    passes = algorithm.epochs_per_step
    of = f"{_many(updates, 'update')} of {samples // updates}"
    if passes > 1:
        of = f"{passes} passes x {of} = {passes * updates} updates"
    lines = [
        f"{_many(algorithm.prompts_per_step, 'prompt')} x {algorithm.group_size} completions = "
        f"{samples} samples a step, {of}; {_many(algorithm.steps, 'step')} = "
        f"{_many(algorithm.steps * samples, 'sample')}, "
        f"{_many(algorithm.steps * updates * passes, 'update')}"
    ]
    if max_new_tokens is not None:
        most = f"{samples * max_new_tokens:,}"
        lines.append(
            f"at most {samples} x {max_new_tokens} = {most} completion tokens sampled a step"
        )
    if algorithm.dynamic_sampling == "refill":
        extra = algorithm.max_refills * samples
        lines.append(
            f"up to {_many(algorithm.max_refills, 'refill')} a step, {_many(extra, 'more sample')}"
        )
    return lines


def _saves(recipe: Recipe) -> list[str]:
    steps = getattr(recipe.algorithm, "steps", None)
    every = recipe.checkpoint.every
    if not every or not isinstance(steps, int):
        return []
    saved = -(-steps // every)
    return [
        f"a checkpoint every {_many(every, 'step')} and at the end = {saved}, "
        f"of which the last {min(saved, recipe.checkpoint.keep)} are kept"
    ]


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
