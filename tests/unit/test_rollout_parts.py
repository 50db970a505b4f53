"""The parts of the native engine: scheduler, cache, stop rule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from alignment.modeling.linear_cpu import Linear
from alignment.rollout.cache import EMPTY, PROMPT, GroupedCache
from alignment.rollout.packed import _available, packed_weights
from alignment.rollout.rows import Row, lay_out
from alignment.rollout.schedule import GROUP_ROWS, Scheduler
from alignment.rollout.stopping import StopRule, end_tokens
from alignment.types import Prompt, SamplingParams, StopReason, UserInputError


class Bytes:
    """A tokenizer of bytes: characters spread over several tokens."""

    eos_token_id = 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode(errors="replace")


def rows(*prompts: tuple[int, ...], n: int, limit: int = 4) -> list[Row]:
    asked = [Prompt(ids, "", i) for i, ids in enumerate(prompts)]
    return lay_out(asked, SamplingParams(max_new_tokens=limit, n=n), None)


def end(*ended: Row) -> None:
    for row in ended:
        row.stop_reason = StopReason.STOP


def test_equal_prompts_form_groups_of_limited_size() -> None:
    scheduler = Scheduler(rows((1, 2), (3,), (1, 2), n=5), 64, None)
    scheduler.admit()
    assert [(g.prompt_ids, len(g.rows)) for g in scheduler.groups] == [
        ((1, 2), GROUP_ROWS),
        ((1, 2), 2),
        ((3,), 5),
    ]


def test_rows_are_admitted_as_others_finish() -> None:
    scheduler = Scheduler(rows((1, 2), (3,), n=3), 2, None)
    assert [row.number for _, row in scheduler.admit()] == [0, 1]
    assert scheduler.admit() == []
    end(*scheduler.running)
    assert scheduler.retire() == []  # its prompt is still wanted
    first = scheduler.groups[0]
    group, row = scheduler.admit()[0]
    assert (group, row.number) == (first, 2)
    end(*scheduler.running)
    assert scheduler.retire()[0] is first


@pytest.mark.parametrize("budget", [6, 10, 12, 1000])
def test_the_budget_holds_at_every_step(budget: int) -> None:
    everything = rows((1, 2), (3,), (4, 5), n=3)
    scheduler = Scheduler(everything, 64, budget)
    seen = 0
    while scheduler.waiting or scheduler.running:
        seen += len(scheduler.admit())
        places = len(scheduler.groups) * max(g.largest_size for g in scheduler.groups)
        assert places <= budget
        assert scheduler.running
        if budget == 6:
            assert len(scheduler.running) == 1
        end(scheduler.running[0])
        scheduler.retire()
    assert seen == len(everything)


def test_a_budget_too_small_for_one_row_is_refused() -> None:
    with pytest.raises(UserInputError, match=r"kv_tokens is 5.* need 6 tokens"):
        Scheduler(rows((1, 2), n=1), 64, 5)


def filled_cache() -> GroupedCache:
    """Two groups, prompts of 3 and 2 tokens; a key is 10 * token number, a value its negative."""
    cache = GroupedCache(torch.device("cpu"))
    cache.rebuild([], 2, 8)
    cache.plan_prompts([0, 1], [3, 2], 3)
    keys = torch.tensor([[1.0, 2, 3], [4, 5, 99]]).view(2, 1, 3, 1) * 10
    assert cache.update(keys, -keys, 0)[0] is keys  # prompts attend to themselves
    cache.plan_tokens(
        np.array([0, 0, 1]), np.array([0, 1, 0]), np.array([7, 8, 9]), np.array([3, 3, 2])
    )
    cache.update(torch.tensor([70.0, 80, 90]).view(1, 1, 3, 1), torch.zeros(1, 1, 3, 1), 0)
    return cache


def stored(cache: GroupedCache) -> list[list[float]]:
    """Keys of each group, as attention sees them, without storing anything."""
    return cache._visible(cache._layers[0][0])[:, 0, :, 0].tolist()


def test_tokens_of_a_group_stand_side_by_side() -> None:
    cache = filled_cache()
    assert cache.owner[0, :6].tolist() == [PROMPT] * 3 + [7, 8, EMPTY]
    assert cache.position[0, :5].tolist() == [0, 1, 2, 3, 3]
    assert stored(cache) == [[10, 20, 30, 70, 80], [40, 50, 90, 0, 0]]
    allowed, positions = cache.visible(np.array([[8, 7], [9, -3]]))
    assert allowed.int().tolist() == [
        [[1, 1, 1, 0, 1], [1, 1, 1, 1, 0]],
        [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]],
    ]
    assert positions.tolist() == [[0, 1, 2, 3, 3], [0, 1, 2, 0, 0]]


def test_rebuilding_keeps_what_is_alive() -> None:
    cache = filled_cache()
    cache.rebuild([(1, [9]), (0, [8])], 3, 6)
    assert cache.owner.tolist() == [
        [PROMPT, PROMPT, 9, EMPTY, EMPTY, EMPTY],
        [PROMPT, PROMPT, PROMPT, 8, EMPTY, EMPTY],
        [PROMPT, EMPTY, EMPTY, EMPTY, EMPTY, EMPTY],
    ]
    kept = stored(cache)
    assert kept[0][:3] == [40, 50, 90]
    assert kept[1][:4] == [10, 20, 30, 80]


def test_a_prompt_is_copied_to_another_group() -> None:
    cache = filled_cache()
    assert cache.free_groups([0]) == [1]
    cache.copy_prompt(0, 1, 3)
    assert stored(cache)[1][:3] == [10, 20, 30]
    assert cache.owner[1].tolist() == [PROMPT] * 3 + [EMPTY] * 5


def test_stop_strings_over_several_tokens() -> None:
    rule = StopRule(frozenset(), ("\n\n", "é!"), Bytes())
    text = "a long beginning, and then é?é!".encode()
    complete = [rule.is_complete(list(text[: i + 1])) for i in range(len(text))]
    assert complete == [False] * (len(text) - 1) + [True]
    assert rule.is_complete(list(b"x\n\n"))
    assert not rule.is_complete(list(b"\n"))


def test_end_tokens_of_model_and_tokenizer() -> None:
    class Config:
        eos_token_id = (5, 6)

    class Model:
        generation_config = Config()

    assert end_tokens(Model(), Bytes()) == {0, 5, 6}
    assert end_tokens(object(), object()) == frozenset()


def test_packed_weights_multiply_alike_and_leave_no_trace() -> None:
    model = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 256, bias=False)).bfloat16()
    x = torch.randn(5, 256).bfloat16()
    with torch.no_grad():
        for _ in range(2):  # the second time with other weights: nothing stale is left
            with packed_weights(model):
                packed = model(x)
            assert torch.allclose(packed.float(), model(x).float(), rtol=0.02, atol=0.02)
            model[0].weight.mul_(-3)
    assert not any("forward" in vars(layer) for layer in model)
    with pytest.raises(ZeroDivisionError), packed_weights(model):
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in model)


@pytest.mark.skipif(not _available(), reason="no fast bfloat16 products here")
@pytest.mark.parametrize("kind", [nn.Linear, Linear])
def test_layers_as_they_are_loaded_are_packed(kind: type[nn.Linear]) -> None:
    layers = nn.ModuleList([kind(256, 128), kind(128, 256, bias=False)]).bfloat16()
    with packed_weights(layers):
        assert all("forward" in vars(layer) for layer in layers)


def test_packing_leaves_other_layers_alone() -> None:
    wide = nn.Linear(256, 128)
    hooked = nn.Linear(256, 128).bfloat16()
    hooked.forward = lambda x: x
    tiny = nn.Linear(4, 4).bfloat16()
    with packed_weights(nn.ModuleList([wide, hooked, tiny])):
        assert "forward" not in vars(wide)
        assert hooked(3) == 3
        assert "forward" not in vars(tiny)
    assert hooked(3) == 3
