"""What models and trainers do about sharded weights, as far as one process shows it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from alignment.modeling.policy import PolicyWithReference
from alignment.modeling.shards import (
    Fragment,
    Skeleton,
    Whole,
    assign_,
    copied,
    first_elements,
    lockstep,
    own_part,
    rows_of,
    zero_loss,
)
from alignment.types import AlignmentError, Sample


class OthersHaveMore(Whole):
    """Some rank has work for three passes."""

    def passes(self, n: int) -> int:
        return max(n, 3)


def test_a_rank_with_less_to_do_makes_up_for_it() -> None:
    assert lockstep(OthersHaveMore(), [[0, 1]]) == [[0, 1], [], []]
    assert lockstep(OthersHaveMore(), []) == [[], [], []]
    assert lockstep(Whole(), [[0, 1]]) == [[0, 1]]


def test_an_empty_micro_batch_scores_a_dummy_without_a_loss() -> None:
    samples = [Sample((3, 4), (5, 6), (True, True))]
    assert rows_of(samples, [0]) == samples
    (dummy,) = rows_of(samples, [])
    assert not any(dummy.loss_mask)


def test_i04_dummies_leave_no_trace_in_scores() -> None:
    policy = PolicyWithReference(tiny_model(), None)
    samples = [Sample((3, 4), (5, 6, 7), (True,) * 3)]
    (alone,) = policy.logprobs(samples, 64)
    policy.shards = OthersHaveMore()
    (together,) = policy.logprobs(samples, 64)
    assert torch.equal(alone, together)
    assert policy.logprobs([], 64) == []


def test_zero_loss_reaches_what_was_computed_and_moves_nothing() -> None:
    weight = torch.ones(2, requires_grad=True)
    loss = zero_loss(weight * torch.tensor([float("inf"), 1.0]), None, torch.ones(2))
    loss.backward()
    assert float(loss) == 0.0
    assert weight.grad is not None
    plain = torch.ones(2, requires_grad=True)
    zero_loss(plain * 3.0).backward()
    assert plain.grad is not None and plain.grad.tolist() == [0.0, 0.0]


def test_i22_a_skeleton_is_filled_with_weights_and_keeps_ties() -> None:
    model = tiny_model(tie_word_embeddings=True)
    skeleton = Skeleton(model)
    weights = {name: p.detach() + 1.0 for name, p in model.named_parameters()}
    copy = skeleton.filled(weights)
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    assert dict(copy.named_parameters()).keys() == weights.keys()
    for name, parameter in copy.named_parameters():
        assert torch.equal(parameter, weights[name])
    assert torch.equal(model.lm_head.weight + 1.0, copy.lm_head.weight)  # the model is as it was


def test_a_value_of_another_shape_is_refused() -> None:
    with pytest.raises(AlignmentError, match=r"\(1, 3\) was saved .* \(2, 3\)"):
        assign_(torch.zeros(2, 3), torch.zeros(1, 3))


def test_first_elements_are_a_copy() -> None:
    weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    first = first_elements(weight, 4)
    assert first.tolist() == [0.0, 1.0, 2.0, 3.0]
    with torch.no_grad():
        weight.zero_()
    assert first.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_fragment_is_a_run_of_elements() -> None:
    """Of 0 to 5 in two rows, elements 2 to 4, across the end of the first."""
    fragment = Fragment(torch.zeros(3), 2, torch.Size([2, 3]))
    assign_(fragment, torch.arange(6.0).reshape(2, 3))
    assert own_part(fragment).tolist() == [2.0, 3.0, 4.0]
    assert [first_elements(fragment, n).tolist() for n in (2, 4, 9)] == [
        [],
        [2.0, 3.0],
        [2.0, 3.0, 4.0],
    ]
    with pytest.raises(AlignmentError, match=r"\(3, 2\) was saved .* \(2, 3\)"):
        assign_(fragment, torch.zeros(3, 2))
    another = copied(fragment, torch.bfloat16)
    own_part(fragment).zero_()
    assert own_part(another).tolist() == [2.0, 3.0, 4.0]
    assert own_part(another).dtype == torch.bfloat16
