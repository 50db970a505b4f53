"""Lay samples out for one forward pass: shared prompts once, no padding where none is needed.

A *unit* is a prompt with some of its completions. A unit is laid out as the prompt's tokens
followed by each completion's input tokens; a completion looks at the prompt and at itself, never
at its neighbours, and its positions continue the prompt's. Units are put into rows first-fit, so
that attention costs `rows x row_length^2` rather than `tokens^2`.

The last token of a completion predicts nothing that is scored, so it is not an input; the first
is predicted by the prompt's last token, which all completions of the unit share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignment.types import AlignmentError, Sample

# Rows longer than this are not built from several units, and a unit is split when it would
# exceed it: attention inside a row is quadratic, and a prompt is cheap to compute twice compared
# with a row twice as long.
ROW_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Packed:
    """One forward pass. `R` rows of `L` tokens, `M` scored completion tokens of `B` samples.

    input_ids, position_ids: `[R, L]` (padding has id 0 and looks at itself only).
    allowed:     bool `[R, L, L]`, or None for plain rows, where `real` is all a model needs.
    real:        bool `[R, L]`, False at padding.
    source:      `[M]`, flat index into `R * L` of the token whose hidden state predicts.
    target_ids:  `[M]`, the completion token predicted.
    rows, cols:  `[M]`, where it belongs in the `[B, T]` result.
    """

    input_ids: Tensor
    position_ids: Tensor
    allowed: Tensor | None
    real: Tensor
    source: Tensor
    target_ids: Tensor
    rows: Tensor
    cols: Tensor

    @property
    def n_tokens(self) -> int:
        """Tokens computed, padding included."""
        return self.input_ids.numel()


@dataclass(frozen=True, slots=True)
class _Unit:
    prompt: tuple[int, ...]
    members: tuple[int, ...]  # indices of samples
    length: int


def plan_micro_batches(
    samples: Sequence[Sample], token_budget: int, *, share_prompts: bool = True
) -> list[list[int]]:
    """Split samples into micro-batches of at most `token_budget` computed tokens.

    Samples of one prompt stay together as far as the budget and the row length allow. A sample
    longer than the budget gets a micro-batch of its own. The plan depends on the samples only.

    Returns:
        lists of sample indices; every sample occurs once.
    """
    if share_prompts:
        units = _units(samples, range(len(samples)), min(token_budget, ROW_TOKENS))
    else:
        units = [_unit(samples, (i,)) for i in range(len(samples))]
    batches: list[list[int]] = []
    room = 0
    for unit in units:
        if unit.length > room:
            batches.append([])
            room = token_budget
        batches[-1].extend(unit.members)
        room -= unit.length
    return batches


def pack(samples: Sequence[Sample], *, device: torch.device | str = "cpu") -> Packed:
    """Pack samples with shared prompts into rows with a block mask."""
    _check(samples)
    rows = _fill_rows(_units(samples, range(len(samples)), ROW_TOKENS))
    length = max(sum(unit.length for unit in row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    # Two labels a token: its unit, and inside the unit the completion (0 is the prompt). Padding
    # carries unit -1, and each padding token its own completion, so it sees nothing but itself.
    unit_of = torch.full((len(rows), length), -1, dtype=torch.long)
    part_of = torch.arange(1, length + 1).repeat(len(rows), 1)
    source: list[Tensor] = []
    target: list[int] = []
    at_row: list[int] = []
    at_col: list[Tensor] = []
    for r, row in enumerate(rows):
        start = 0
        for u, unit in enumerate(row):
            prompt_end = start + len(unit.prompt)
            ids[r, start:prompt_end] = torch.tensor(unit.prompt)
            positions[r, start:prompt_end] = torch.arange(len(unit.prompt))
            unit_of[r, start : start + unit.length] = u
            part_of[r, start:prompt_end] = 0
            cursor = prompt_end
            for part, member in enumerate(unit.members, start=1):
                completion = samples[member].completion_ids
                n_inputs = len(completion) - 1
                end = cursor + n_inputs
                ids[r, cursor:end] = torch.tensor(completion[:-1], dtype=torch.long)
                positions[r, cursor:end] = len(unit.prompt) + torch.arange(n_inputs)
                part_of[r, cursor:end] = part
                base = r * length
                source.append(torch.tensor([base + prompt_end - 1]))
                source.append(base + torch.arange(cursor, end))
                target.extend(completion)
                at_row.extend([member] * len(completion))
                at_col.append(torch.arange(len(completion)))
                cursor = end
            start += unit.length
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same_unit = unit_of[:, :, None] == unit_of[:, None, :]
    key_part = part_of[:, None, :]
    visible = (key_part == 0) | (key_part == part_of[:, :, None])
    return Packed(
        input_ids=ids.to(device),
        position_ids=positions.to(device),
        allowed=(causal & same_unit & visible).to(device),
        real=(unit_of >= 0).to(device),
        source=torch.cat(source).to(device),
        target_ids=torch.tensor(target, device=device),
        rows=torch.tensor(at_row, device=device),
        cols=torch.cat(at_col).to(device),
    )


def pad(samples: Sequence[Sample], *, device: torch.device | str = "cpu") -> Packed:
    """One right-padded row a sample: for architectures where no custom mask is valid."""
    _check(samples)
    lengths = [len(s.prompt_ids) + len(s.completion_ids) - 1 for s in samples]
    length = max(lengths)
    ids = torch.zeros(len(samples), length, dtype=torch.long)
    for r, sample in enumerate(samples):
        ids[r, : lengths[r]] = torch.tensor((*sample.prompt_ids, *sample.completion_ids[:-1]))
    present = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
    source = [
        r * length + len(s.prompt_ids) - 1 + torch.arange(len(s.completion_ids))
        for r, s in enumerate(samples)
    ]
    return Packed(
        input_ids=ids.to(device),
        position_ids=torch.arange(length).repeat(len(samples), 1).to(device),
        allowed=None,
        real=present.to(device),
        source=torch.cat(source).to(device),
        target_ids=torch.tensor([t for s in samples for t in s.completion_ids], device=device),
        rows=torch.tensor(
            [r for r, s in enumerate(samples) for _ in s.completion_ids], device=device
        ),
        cols=torch.cat([torch.arange(len(s.completion_ids)) for s in samples]).to(device),
    )


def _check(samples: Sequence[Sample]) -> None:
    if not samples:
        raise AlignmentError("there are no samples to score")
    for i, sample in enumerate(samples):
        if not sample.prompt_ids or not sample.completion_ids:
            side = "completion" if sample.prompt_ids else "prompt"
            raise AlignmentError(
                f"sample {i} has an empty {side}: a first token cannot be predicted from nothing; "
                "drop the sample, or start its prompt with the BOS token"
            )


def _unit(samples: Sequence[Sample], members: tuple[int, ...]) -> _Unit:
    prompt = samples[members[0]].prompt_ids
    inputs = sum(len(samples[m].completion_ids) - 1 for m in members)
    return _Unit(prompt, members, len(prompt) + inputs)


def _units(samples: Sequence[Sample], indices: Sequence[int], most: int) -> list[_Unit]:
    """Group samples by prompt, in order of first appearance, at most `most` tokens a unit."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i in indices:
        by_prompt.setdefault(samples[i].prompt_ids, []).append(i)
    units: list[_Unit] = []
    for prompt, members in by_prompt.items():
        taken: list[int] = []
        length = len(prompt)
        for m in members:
            inputs = len(samples[m].completion_ids) - 1
            if taken and length + inputs > most:
                units.append(_unit(samples, tuple(taken)))
                taken, length = [], len(prompt)
            taken.append(m)
            length += inputs
        units.append(_unit(samples, tuple(taken)))
    return units


def _fill_rows(units: list[_Unit]) -> list[list[_Unit]]:
    """First-fit decreasing into rows as long as the longest unit needs, or half of ROW_TOKENS."""
    capacity = max(max(unit.length for unit in units), ROW_TOKENS // 2)
    rows: list[list[_Unit]] = []
    room: list[int] = []
    for unit in sorted(units, key=lambda u: -u.length):
        fits = next((r for r, left in enumerate(room) if left >= unit.length), None)
        if fits is None:
            rows.append([])
            room.append(capacity)
            fits = len(rows) - 1
        rows[fits].append(unit)
        room[fits] -= unit.length
    return rows
