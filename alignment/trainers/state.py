"""Everything a resumed run needs, as one tree: taken from the parts of a run, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from alignment.activity import exchanging
from alignment.modeling.policy import PolicyWithReference
from alignment.modeling.reference import Reference, trainable
from alignment.modeling.shards import assign_, gathered_tree, held
from alignment.runs.state_tree import first_difference
from alignment.trainers.context import Trained, Trainer, TrainingContext
from alignment.trainers.reward_state import REWARDS, restore_reward_states, reward_states
from alignment.types import AlignmentError


def training_state(trainer: Trainer, context: TrainingContext, step: int) -> dict[str, Any]:
    """Everything a resumed run needs, as one tree; every rank calls this.

    It does not depend on how weights lie over ranks. Where they are in parts, rank 0 alone has them
    whole in it, on the CPU. What rewards of the user's own keep may be another on each rank.
    """
    reference = _reference(context)
    state = {
        "step": step,
        **{name: _trained_state(trained) for name, trained in _all_trained(context).items()},
        "reference": reference.state_dict() if reference else {},
        "trainer": trainer.state_dict(),
        **reward_states(context.rewards, context.distributed),
    }
    is_sharded = context.distributed.shards_state
    with exchanging() if is_sharded else nullcontext():
        gathered: dict[str, Any] = gathered_tree(state, keep=context.distributed.is_main)
    return gathered


@torch.no_grad()
def restore_state(trainer: Trainer, context: TrainingContext, state: Mapping[str, Any]) -> int:
    """Put a saved state back, strictly: taken once more, it is the one that was saved.

    Where completions and their rewards are recorded ones, what rewards kept is left out.

    Returns:
        the step it was saved after.

    Raises:
        AlignmentError: the checkpoint is of other parameters, or holds something else than this
            run would save.
    """
    if context.rewards is None:
        state = {name: part for name, part in state.items() if name != REWARDS}
    expected = {"step", "reference", "trainer", *_all_trained(context)}
    if set(state) - {REWARDS} != expected:
        raise AlignmentError(f"the checkpoint is of another method: it holds {sorted(state)}")
    step: int = state["step"]
    try:
        _restore_parts(trainer, context, state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AlignmentError(
            f"the checkpoint of step {step} cannot be restored: {type(error).__name__} {error}; "
            "resume with the version of the toolkit that wrote it"
        ) from error
    again, distributed = training_state(trainer, context, step), context.distributed
    difference = first_difference(dict(state), again) if distributed.is_main else None
    difference = distributed.broadcast(difference)
    if difference is not None:
        raise AlignmentError(
            f"the checkpoint of step {step} cannot be restored exactly: {difference} differs from "
            "what this run would save; resume with the version of the toolkit that wrote it"
        )
    return step


def _restore_parts(trainer: Trainer, context: TrainingContext, state: Mapping[str, Any]) -> None:
    for name, trained in _all_trained(context).items():
        _restore_trained(name, trained, state[name])
    reference = _reference(context)
    if reference is not None:
        reference.load_state_dict(state["reference"])
    trainer.load_state_dict(state["trainer"])
    restore_reward_states(context.rewards, context.distributed, state.get(REWARDS, ()))


def _all_trained(context: TrainingContext) -> dict[str, Trained]:
    named = {"model": context.trained, "critic": context.critic}
    return {name: it for name, it in named.items() if it is not None and it.optimizer is not None}


def _reference(context: TrainingContext) -> Reference | None:
    model = context.trained.model
    return model.reference if isinstance(model, PolicyWithReference) else None


def _trained_state(trained: Trained) -> dict[str, Any]:
    assert trained.optimizer is not None
    return {
        "weights": {n: held(p) for n, p in trainable(trained.model).items()},
        "optimizer": trained.optimizer.state_dict(),
    }


def _restore_trained(name: str, trained: Trained, state: Mapping[str, Any]) -> None:
    assert trained.optimizer is not None
    parameters = trainable(trained.model)
    if set(state["weights"]) != set(parameters):
        differing = sorted(set(state["weights"]) ^ set(parameters))[:3]
        raise AlignmentError(f"the checkpoint is of another {name}: {differing} differ")
    for key, parameter in parameters.items():
        assign_(held(parameter), state["weights"][key])
    trained.optimizer.load_state_dict(state["optimizer"])
