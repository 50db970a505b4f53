"""Rules between the sections of a recipe: combinations that could not work, each with a remedy.

A rule is a function from a recipe to the problems it finds; `RULES` is the table of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from pydantic_core import InitErrorDetails

from alignment.config.fields import Path, problem
from alignment.config.methods.base import compares_with_reference, needs_of
from alignment.config.options import resolve
from alignment.config.plugins import PluginSection

if TYPE_CHECKING:
    from alignment.config.schema import Recipe

Problems = Iterator[InitErrorDetails]


def cross_checks(recipe: Recipe) -> list[InitErrorDetails]:
    """All problems that concern more than one section."""
    return [found for rule in RULES for found in rule(recipe)]


def cautions(recipe: Recipe) -> list[str]:
    """What can be run but is probably not meant, in words."""
    found = []
    kl = getattr(recipe.algorithm, "kl", None)
    if kl is not None and kl.placement == "reward" and kl.estimator in ("k2", "k3"):
        found.append(
            f"algorithm.kl.estimator: {kl.estimator} in the reward does not give the gradient "
            "of the KL divergence; k1 does"
        )
    if needs_of(recipe.algorithm).rewards == "required" and all(
        reward.weight == 0.0 for reward in recipe.rewards
    ):
        found.append("rewards: every weight is 0, so there is nothing to learn from")
    mode = recipe.model.reference.mode
    if mode != "none" and not compares_with_reference(recipe.algorithm):
        found.append(
            f"model.reference: the loss looks at no reference, so {mode} is never scored; use none"
        )
    loss = getattr(recipe.algorithm, "loss", None)
    if "robust" in getattr(loss, "kinds", ()) and getattr(loss, "label_smoothing", None) == 0.0:
        found.append(
            "algorithm.loss.label_smoothing: 0 makes robust the plain sigmoid; give the share of "
            "labels that are wrong, such as 0.1"
        )
    if recipe.model.dtype != "float32" and recipe.model.master_dtype == "none":
        found.append(
            f"model.master_dtype: none with {recipe.model.dtype} weights loses updates smaller "
            "than the weights' precision"
        )
    return found


def _sections_are_there(recipe: Recipe) -> Problems:
    needs, name = needs_of(recipe.algorithm), _name(recipe)
    if needs.rollout and recipe.rollout is None:
        yield problem(
            ("rollout",),
            f"required by {name}, but missing; add rollout: {{max_new_tokens: 256}}",
        )
    if needs.rewards == "required" and not recipe.rewards:
        yield problem(
            ("rewards",), f"required by {name}, but missing; add rewards: [{{type: ...}}]"
        )
    if needs.trains and recipe.optim.lr is None:
        yield problem(("optim", "lr"), f"required by {name}, but missing: peak learning rate")


def _unused_sections_are_absent(recipe: Recipe) -> Problems:
    needs = needs_of(recipe.algorithm)
    # A task may grade completions in the evaluations of a method that learns from none.
    if needs.rewards == "none" and recipe.rewards and not recipe.eval.tasks:
        yield problem(
            ("rewards",),
            f"{_name(recipe)} does not learn from rewards, and no task under eval.tasks uses them; "
            "remove the section, or use a method that does (grpo)",
        )


def _names_are_unique(recipe: Recipe) -> Problems:
    lists: list[tuple[Path, Sequence[PluginSection]]] = [
        (("rewards",), recipe.rewards),
        (("eval", "tasks"), recipe.eval.tasks),
    ]
    for path, items in lists:
        names = [getattr(item, "name", None) or item.type for item in items]
        for index, name in enumerate(names):
            if name in names[:index]:
                yield problem(
                    (*path, index),
                    f"the name {name!r} is taken by another of the list, and names their metrics; "
                    "give this one a name: of its own",
                )


def _rl_samples_the_full_distribution(recipe: Recipe) -> Problems:
    if not needs_of(recipe.algorithm).on_policy or recipe.rollout is None:
        return
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    for key, value in off.items():
        if getattr(recipe.rollout, key) != value:
            yield problem(
                ("rollout", key),
                f"{_name(recipe)} needs the full distribution: the ratio of a token the "
                f"sampler cut off is not defined; set {key} to {value} and use temperature",
            )
    if recipe.rollout.temperature == 0.0:
        yield problem(
            ("rollout", "temperature"),
            f"{_name(recipe)} needs samples that differ; greedy decoding gives one answer. Use 1.0",
        )


def _reference_is_there(recipe: Recipe) -> Problems:
    mode = recipe.model.reference.mode
    if mode == "precomputed" and needs_of(recipe.algorithm).rollout:
        yield problem(
            ("model", "reference"),
            f"precomputed is for offline methods; {_name(recipe)} samples new completions. "
            "Use frozen_copy, or adapter_off with model.lora",
        )
    if mode == "precomputed" and needs_of(recipe.algorithm).data == "labelled":
        yield problem(
            ("model", "reference"),
            f"precomputed is for preference pairs; {_name(recipe)} compares other pairs of prompt "
            "and completion at each step. Use frozen_copy, or adapter_off with model.lora",
        )
    if mode == "none" and getattr(recipe.algorithm, "uses_reference", False):
        yield problem(
            ("model", "reference"),
            f"{_name(recipe)} compares with a reference, and this is none; use frozen_copy, or "
            "adapter_off with model.lora",
        )
    kl = getattr(recipe.algorithm, "kl", None)
    if mode == "none" and kl is not None and kl.coef > 0.0:
        yield problem(
            ("algorithm", "kl", "coef"),
            "a KL penalty needs a reference, and model.reference is none; use frozen_copy, or "
            "adapter_off with model.lora, or set coef to 0",
        )


def _overlong_fits(recipe: Recipe) -> Problems:
    overlong, rollout = getattr(recipe.algorithm, "overlong", None), recipe.rollout
    if overlong is None or rollout is None:
        return
    if overlong.buffer >= rollout.max_new_tokens:
        yield problem(
            ("algorithm", "overlong", "buffer"),
            f"{overlong.buffer} tokens leave nothing of rollout.max_new_tokens "
            f"({rollout.max_new_tokens}) unpenalized; use a smaller buffer",
        )


def _rlvr_has_a_verifier(recipe: Recipe) -> Problems:
    if getattr(recipe.algorithm, "type", None) != "rlvr" or not recipe.rewards:
        return
    counting = [reward for reward in recipe.rewards if reward.weight != 0.0]
    if not any(is_verifier(reward.type) for reward in counting):
        yield problem(
            ("rewards",),
            "rlvr needs a verifier, a reward that tells right from wrong (is_verifier = True); "
            "add one with a weight, or use type: grpo",
        )


def _warmup_ends(recipe: Recipe) -> Problems:
    steps = getattr(recipe.algorithm, "steps", None)
    if isinstance(steps, int) and recipe.optim.warmup_steps >= steps:
        yield problem(
            ("optim", "warmup_steps"),
            f"the run has {steps} steps (algorithm.steps), so warm-up would never end; use fewer",
        )


def _evaluation_has_work(recipe: Recipe) -> Problems:
    if recipe.eval.every > 0 and not recipe.eval.tasks:
        yield problem(
            ("eval", "every"), "there are no tasks to evaluate; list some under eval.tasks"
        )


COMPARING_TASKS = ("preference", "reward_kl")
"""Tasks that compare a policy with its reference."""


def _evaluation_has_a_reference(recipe: Recipe) -> Problems:
    if needs_of(recipe.algorithm).model != "policy":
        return
    mode = recipe.model.reference.mode
    ranks_alone = not compares_with_reference(recipe.algorithm)
    for index, task in enumerate(recipe.eval.tasks):
        found = ""
        if task.type == "preference" and ranks_alone:
            continue
        if task.type in COMPARING_TASKS and mode == "synced":
            found = "compares with the reference, and one that follows the policy is no measure"
        elif task.type == "preference" and mode == "none":
            found = "scores completions by comparing with a reference, and this is none"
        elif task.type == "reward_kl" and mode in ("none", "precomputed"):
            found = f"measures the KL of new completions from a reference; {mode} scores none"
        if found:
            yield problem(
                ("eval", "tasks", index),
                f"task {task.type} {found} (model.reference). Use frozen_copy, or adapter_off with "
                "model.lora; or leave the task out, and give it to align eval when the run is done",
            )


RULES: tuple[Callable[[Recipe], Problems], ...] = (
    _sections_are_there,
    _unused_sections_are_absent,
    _names_are_unique,
    _rl_samples_the_full_distribution,
    _reference_is_there,
    _overlong_fits,
    _rlvr_has_a_verifier,
    _warmup_ends,
    _evaluation_has_work,
    _evaluation_has_a_reference,
)


def _name(recipe: Recipe) -> str:
    return getattr(recipe.algorithm, "type", type(recipe.algorithm).__name__)


def is_verifier(reward: str) -> bool:
    """Whether a reward says of itself that it tells right from wrong."""
    return bool(getattr(resolve("reward", reward), "is_verifier", False))
