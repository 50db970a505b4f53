"""Moments that go into AdamW are those of the masters, whole, wherever these lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alignment.modeling.optimizer import check_moments
from alignment.modeling.shards import Fragment, Kept
from alignment.types import AlignmentError


def moments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    both = {name: torch.zeros(shape, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.tensor(3.0), **both}


MASTERS: dict[str, Kept] = {
    "whole": torch.zeros(2, 3),
    "low": torch.zeros(4, dtype=torch.bfloat16),
    "elsewhere": Fragment(torch.zeros(0), 0, torch.Size((5,))),
    "part": Fragment(torch.zeros(7), 14, torch.Size((3, 7))),
}
FITTING = {
    "whole": moments((2, 3)),
    "low": moments((4,), torch.bfloat16),
    "elsewhere": moments((5,)),
    "part": moments((3, 7)),
}


def test_moments_of_all_masters_pass_and_so_do_none() -> None:
    check_moments(FITTING, MASTERS)
    check_moments({}, MASTERS)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("whole", moments((3, 2))),
        ("whole", moments((2, 3)) | {"step": torch.tensor(3)}),
        ("low", moments((4,))),
        ("elsewhere", moments((0,))),
        ("part", moments((7,))),
        ("part", {}),
        ("unknown", moments((2, 3))),
    ],
)
def test_others_are_refused(name: str, other: dict[str, Tensor]) -> None:
    with pytest.raises(AlignmentError, match="is of other parameters than those that are trained"):
        check_moments(FITTING | {name: other}, MASTERS)


def test_moments_of_some_masters_are_refused() -> None:
    some = {name: FITTING[name] for name in ("whole", "low")}
    with pytest.raises(AlignmentError, match="is of other parameters than those that are trained"):
        check_moments(some, MASTERS)
