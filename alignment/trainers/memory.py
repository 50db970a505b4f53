"""What memory did not hold in a step, as events: the smaller sizes a process goes on with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from alignment.trainers.context import TrainingContext


@contextmanager
def memory_events(context: TrainingContext, step: int) -> Iterator[None]:
    """Write an `out_of_memory` event for each size that memory made smaller inside."""
    before = _sizes(context)
    try:
        yield
    finally:
        for name, size in _sizes(context).items():
            if size < before[name]:
                context.events.write(
                    "out_of_memory",
                    f"step {step}: out of memory: {name} is {size} instead of {before[name]} for "
                    "the rest of this process; what did not fit was done again in smaller parts",
                    step=step,
                    setting=name,
                    old=before[name],
                    new=size,
                )


def _sizes(context: TrainingContext) -> dict[str, int]:
    """How much goes through each model at once."""
    asked = context.recipe.optim.micro_batch_tokens
    sizes = {"optim.micro_batch_tokens": context.trained.model.cap(asked)}
    if context.critic is not None:
        sizes["optim.micro_batch_tokens of the critic"] = context.critic.model.cap(asked)
    rows = getattr(context.sampler, "max_rows", None)
    if rows is not None:
        sizes["rollout.max_rows"] = rows
    return sizes
