"""Plug-in registry: names to objects, by kind, lazily.

Three ways in, one way out:

* built-ins are listed in `_BUILTIN` as ``"module:attribute"`` and imported on first use;
* `register(kind, name)` decorates an object of the user's own;
* an installed package announces entry points in the group ``alignment.<kind>``.

`get(kind, name)` is the way out. A name that two different objects claim is an error when either
is looked up, and an unknown name is answered with the nearest known one.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, distributions
from typing import Any, Literal, TypeVar, get_args

from alignment.types import UserInputError

Kind = Literal["trainer", "engine", "reward", "source", "task", "report"]
KINDS: tuple[str, ...] = get_args(Kind)

T = TypeVar("T")

_BUILTIN: dict[str, dict[str, str]] = {
    "trainer": {
        "sft": "alignment.trainers.sft:SFTTrainer",
        "reward_model": "alignment.trainers.reward:RewardModelTrainer",
        "process_reward_model": "alignment.trainers.process_reward:ProcessRewardTrainer",
        "grpo": "alignment.trainers.grpo:GRPOTrainer",
        "rlvr": "alignment.trainers.grpo:GRPOTrainer",
        "ppo": "alignment.trainers.ppo:PPOTrainer",
        "dpo": "alignment.trainers.dpo:DPOTrainer",
        "kto": "alignment.trainers.kto:KTOTrainer",
        "online_dpo": "alignment.trainers.online_dpo:OnlineDPOTrainer",
        "rejection_sampling": "alignment.trainers.make_data:DataMaker",
        "preference_sampling": "alignment.trainers.make_data:DataMaker",
        "raft": "alignment.trainers.raft:RAFTTrainer",
        "constitutional": "alignment.trainers.constitutional:ConstitutionalMaker",
        "ai_feedback": "alignment.trainers.ai_feedback:AIFeedbackMaker",
    },
    "engine": {
        "native": "alignment.rollout.native:NativeEngine",
        "hf": "alignment.rollout.hf:HFEngine",
        "paged": "alignment.rollout.paged:PagedEngine",
        "vllm": "alignment.rollout.vllm:VLLMEngine",
    },
    "reward": {},
    "source": {
        "arithmetic": "alignment.data.arithmetic:arithmetic",
        "arithmetic_pairs": "alignment.data.arithmetic_pairs:arithmetic_pairs",
        "arithmetic_steps": "alignment.data.arithmetic_steps:arithmetic_steps",
        "file": "alignment.data.sources:file",
        "hub": "alignment.data.sources:hub",
        "package": "alignment.data.package_data:package",
        "reasoning_gym": "alignment.data.procedural:reasoning_gym",
        "review_continuations": "alignment.data.reviews:review_continuations",
        "shipped": "alignment.data.shipped:shipped",
    },
    "task": {},
    "report": {},
}

_registered: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}


def register(kind: Kind, name: str) -> Callable[[T], T]:
    """Decorator: make an object available as `name` among the plug-ins of `kind`.

    Raises:
        UserInputError: the name is taken by another object.
    """

    def decorate(obj: T) -> T:
        # A module may both be announced as an entry point and register what it announces.
        own = f"{getattr(obj, '__module__', '')}:{getattr(obj, '__qualname__', '')}"
        others = {_builtin(kind).get(name, own), *_entry_points(kind).get(name, [])} - {own}
        if others or _registered[kind].get(name, obj) is not obj:
            raise UserInputError(
                f"the {kind} name {name!r} is already taken; register {obj!r} under another name"
            )
        _registered[kind][name] = obj
        return obj

    return decorate


def get(kind: Kind, name: str) -> Any:
    """The object registered as `name`; imports it if that has not happened yet.

    Raises:
        UserInputError: unknown name (with the nearest known one), a name claimed twice, or a
            plug-in that fails to import (with its own error).
    """
    target = find(kind, name)
    return _registered[kind][name] if target is None else load_target(target, f"{kind} {name!r}:")


def find(kind: Kind, name: str) -> str | None:
    """The "module:attribute" that `name` stands for, not imported; None for a registered object.

    Raises:
        UserInputError: unknown name (with the nearest known one), or a name claimed twice.
    """
    if name in _registered[kind]:
        return None
    claims = [_builtin(kind)[name]] if name in _builtin(kind) else []
    claims += _entry_points(kind).get(name, [])
    if not claims:
        raise UserInputError(unknown_name(kind, name, names(kind)))
    if len(set(claims)) > 1:
        raise UserInputError(
            f"the {kind} name {name!r} is claimed twice, by {' and '.join(sorted(set(claims)))}; "
            "uninstall or rename one"
        )
    return claims[0]


def names(kind: Kind) -> list[str]:
    """All names of a kind, sorted, without importing any of them."""
    return sorted({*_registered[kind], *_builtin(kind), *_entry_points(kind)})


def unknown_name(what: str, name: str, known: list[str]) -> str:
    """The message for a name that does not exist: what it is close to, and what there is."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(known) or 'none'}."


def load_target(target: str, what: str) -> Any:
    """Import ``"module:attribute"``.

    Raises:
        UserInputError: the module or the attribute cannot be had, with the reason.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise UserInputError(f"{what} {target!r} is not of the form 'module:attribute'")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise UserInputError(f"{what} {target!r} cannot be imported: {error!r}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [name for name in dir(found) if not name.startswith("_")]
            near = difflib.get_close_matches(part, public, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserInputError(f"{what} {target!r}: {module_name} has no {part!r}{hint}")
        found = getattr(found, part)
    return found


def _builtin(kind: str) -> dict[str, str]:
    return _BUILTIN[kind]


@cache
def _entry_points(kind: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for point in _announced():
        if point.group == f"alignment.{kind}":
            found.setdefault(point.name, []).append(point.value)
    return found


@cache
def _announced() -> tuple[EntryPoint, ...]:
    """The entry points of installed packages in our groups.

    Not by `importlib.metadata.entry_points`: of two descriptions of one package it takes the first
    on the path, which is what an older build left in a source folder (egg-info) as soon as that
    folder is the current one.
    """
    chosen: dict[str, tuple[bool, list[EntryPoint]]] = {}
    for package in distributions():
        points = [point for point in package.entry_points if point.group.startswith("alignment.")]
        if not points:
            continue
        name = package.name.lower().replace("_", "-")
        installed = package.read_text("METADATA") is not None
        if name not in chosen or (installed and not chosen[name][0]):
            chosen[name] = (installed, points)
    return tuple(point for _, points in chosen.values() for point in points)
