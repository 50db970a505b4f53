"""Everything a resumed run needs, as one tree: taken from the parts of a run, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from alignment.modeling.policy import PolicyWithReference
from alignment.modeling.reference import Reference, trainable
from alignment.trainers.context import Trained, Trainer, TrainingContext
from alignment.types import AlignmentError


def training_state(trainer: Trainer, context: TrainingContext, step: int) -> dict[str, Any]:
    """Everything a resumed run needs, as one tree."""
    reference = _reference(context)
    return {
        "step": step,
        **{name: _trained_state(trained) for name, trained in _all_trained(context).items()},
        "reference": reference.state_dict() if reference else {},
        "trainer": trainer.state_dict(),
    }


@torch.no_grad()
def restore_state(trainer: Trainer, context: TrainingContext, state: Mapping[str, Any]) -> int:
    """Put a saved state back, strictly.

    Returns:
        the step it was saved after.

    Raises:
        AlignmentError: the checkpoint is of other parameters.
    """
    expected = {"step", "reference", "trainer", *_all_trained(context)}
    if set(state) != expected:
        raise AlignmentError(f"the checkpoint is of another method: it holds {sorted(state)}")
    for name, trained in _all_trained(context).items():
        _restore_trained(name, trained, state[name])
    reference = _reference(context)
    if reference is not None:
        reference.load_state_dict(state["reference"])
    trainer.load_state_dict(state["trainer"])
    step: int = state["step"]
    return step


def _all_trained(context: TrainingContext) -> dict[str, Trained]:
    named = {"model": context.trained, "critic": context.critic}
    return {name: it for name, it in named.items() if it is not None and it.optimizer is not None}


def _reference(context: TrainingContext) -> Reference | None:
    model = context.trained.model
    return model.reference if isinstance(model, PolicyWithReference) else None


def _trained_state(trained: Trained) -> dict[str, Any]:
    assert trained.optimizer is not None
    return {
        "weights": {n: p.detach() for n, p in trainable(trained.model).items()},
        "optimizer": trained.optimizer.state_dict(),
    }


def _restore_trained(name: str, trained: Trained, state: Mapping[str, Any]) -> None:
    assert trained.optimizer is not None
    parameters = trainable(trained.model)
    if set(state["weights"]) != set(parameters):
        differing = sorted(set(state["weights"]) ^ set(parameters))[:3]
        raise AlignmentError(f"the checkpoint is of another {name}: {differing} differ")
    for key, parameter in parameters.items():
        parameter.copy_(state["weights"][key])
    trained.optimizer.load_state_dict(state["optimizer"])
