"""What rewards keep between batches, as part of a checkpoint.

Each rank grades samples of its own, so that a running mean, say, is another on each. A checkpoint
holds one state where those of all ranks are equal, and else one for each rank, which only as many
ranks can take up again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignment.distributed import Distributed
from alignment.rewards.compose import CompositeReward
from alignment.runs.state_tree import decode_tree, encode_tree, first_difference
from alignment.types import AlignmentError

REWARDS = "rewards"
"""What the state of a run calls it."""


def reward_states(rewards: CompositeReward | None, distributed: Distributed) -> dict[str, Any]:
    """The entry `rewards` for the state of a run, or nothing where no reward keeps a state; every
    rank calls this."""
    own = rewards.state_dict() if rewards is not None else {}
    if not own:
        return {}
    states = [own] if distributed.world_size == 1 else _of_all_ranks(own, distributed)
    equal = all(first_difference(states[0], other) is None for other in states[1:])
    return {REWARDS: states[:1] if equal else states}


def restore_reward_states(
    rewards: CompositeReward | None, distributed: Distributed, states: Sequence[Any]
) -> None:
    """Give each rank what it kept.

    Args:
        states: none, or the entry that `reward_states` made.

    Raises:
        AlignmentError: other rewards keep a state than did then, one does not take its own, or the
            ranks are of another number and had different states.
    """
    if rewards is None:
        return
    if len(states) > 1 and len(states) != distributed.world_size:
        raise AlignmentError(
            f"the checkpoint holds a state of the rewards for each of {len(states)} processes, and "
            f"the run has {distributed.world_size}; go on with {len(states)} processes"
        )
    own = states[distributed.rank % len(states)] if states else {}
    rewards.load_state_dict(own)


def _of_all_ranks(own: dict[str, Any], distributed: Distributed) -> list[Any]:
    """Tensors pass through the memory of the machines."""
    tree = encode_tree(own)
    tensors = {name: tensor.cpu() for name, tensor in tree.tensors.items()}
    return [decode_tree(*parts) for parts in distributed.gather([(tree.document, tensors)])]
