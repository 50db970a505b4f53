"""Lay samples out for one forward pass: shared prompts once, no padding where none is needed.

A *unit* is a prompt with some of its completions. A unit is laid out as the prompt's tokens
followed by each completion's input tokens; a completion looks at the prompt and at itself, never
at its neighbours, and its positions continue the prompt's. Where attention cuts a row at its
seams (`alignment.modeling.attention`), all units stand in one row, without padding. Where it takes
a block mask, they are put into rows first-fit: attention costs `rows x row_length^2`, and rows end
in padding.

The last token of a completion predicts nothing that is scored, so it is not an input; the first
is predicted by the prompt's last token, which all completions of the unit share. A head that reads
*after* each token (a reward model) does look at the last one: see `Reads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alignment.modeling.attention import Seams
from alignment.types import AlignmentError, Sample

# Rows longer than this are not built from several units, and a unit is split when it would
# exceed it: attention inside a row is quadratic, and a prompt is cheap to compute twice compared
# with a row twice as long.
ROW_TOKENS = 1024


Reads = Literal["before", "after"]
"""Which hidden state belongs to a completion token: the one that predicts it, or its own."""


@dataclass(frozen=True, slots=True)
class Packed:
    """One forward pass. `R` rows of `L` tokens, `M` scored completion tokens of `B` samples.

    input_ids, position_ids: `[R, L]` (padding has id 0 and looks at itself only).
    allowed:     bool `[R, L, K]`, or None for plain rows, where `real` is all a model needs.
    key_positions: `[R or 1, K]`, position of each key of `allowed` in its sequence.
    seams:       where the one row is cut; the keys of `allowed` are then the positions of a token's
                 own sample, else the tokens of its row.
    real:        bool `[R, L]`, False at padding.
    source:      `[M]`, flat index into `R * L` of the token whose hidden state is read.
    target_ids:  `[M]`, the completion token it belongs to.
    rows, cols:  `[M]`, where it belongs in the `[B, T]` result.
    """

    input_ids: Tensor
    position_ids: Tensor
    allowed: Tensor | None
    key_positions: Tensor
    seams: Seams | None
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
    samples: Sequence[Sample],
    token_budget: int,
    *,
    share_prompts: bool = True,
    together: int = 1,
) -> list[list[int]]:
    """Split samples into micro-batches of at most `token_budget` computed tokens.

    Samples of one prompt stay together as far as the budget and the row length allow. What is
    longer than the budget gets a micro-batch of its own. The plan depends on the samples only.

    Args:
        together: samples 0 to k-1, k to 2k-1, ... are never parted: a loss needs them at once (2
            for pairs in the order chosen, rejected).

    Returns:
        lists of sample indices; every sample occurs once.
    """
    most = min(token_budget, ROW_TOKENS)
    blocks: list[tuple[tuple[int, ...], int]]
    if together > 1:
        starts = range(0, len(samples), together)
        blocks = [_block(samples, range(s, s + together), most, share_prompts) for s in starts]
    elif share_prompts:
        blocks = [(u.members, u.length) for u in _units(samples, range(len(samples)), most)]
    else:
        blocks = [_block(samples, range(i, i + 1), most, False) for i in range(len(samples))]
    batches: list[list[int]] = []
    room = 0
    for members, length in blocks:
        if length > room:
            batches.append([])
            room = token_budget
        batches[-1].extend(members)
        room -= length
    return batches


def pack(
    samples: Sequence[Sample],
    *,
    device: torch.device | str = "cpu",
    reads: Reads = "before",
    cut_at_seams: bool = False,
    window: int | None = None,
) -> Packed:
    """Pack samples with shared prompts into rows with a block mask, or into one that is cut.

    Args:
        cut_at_seams: one row of all units, for `packed_attention`.
        window: how far back the model's layers look at most where some do not look at everything.
    """
    _check(samples)
    units = _units(samples, range(len(samples)), ROW_TOKENS, reads)
    rows = [units] if cut_at_seams else _fill_rows(units)
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
                n_inputs = _n_inputs(samples[member], reads)
                end = cursor + n_inputs
                ids[r, cursor:end] = torch.tensor(completion[:n_inputs], dtype=torch.long)
                positions[r, cursor:end] = len(unit.prompt) + torch.arange(n_inputs)
                part_of[r, cursor:end] = part
                base = r * length
                if reads == "before":
                    source.append(torch.tensor([base + prompt_end - 1]))
                source.append(base + torch.arange(cursor, end))
                target.extend(completion)
                at_row.extend([member] * len(completion))
                at_col.append(torch.arange(len(completion)))
                cursor = end
            start += unit.length
    if cut_at_seams:
        key_positions = torch.arange(int(positions.max()) + 1)[None]
        allowed = key_positions[:, None, :] <= positions[:, :, None]
        is_windowed = window is not None and key_positions.numel() > window
        seams = Seams([_lengths(samples, unit, reads) for unit in units], is_windowed)
    else:
        key_positions, allowed, seams = positions, _block_mask(unit_of, part_of), None
    return Packed(
        input_ids=ids.to(device),
        position_ids=positions.to(device),
        allowed=allowed.to(device),
        key_positions=key_positions.to(device),
        seams=seams,
        real=(unit_of >= 0).to(device),
        source=torch.cat(source).to(device),
        target_ids=torch.tensor(target, device=device),
        rows=torch.tensor(at_row, device=device),
        cols=torch.cat(at_col).to(device),
    )


def pad(
    samples: Sequence[Sample], *, device: torch.device | str = "cpu", reads: Reads = "before"
) -> Packed:
    """One right-padded row a sample: for architectures where no custom mask is valid."""
    _check(samples)
    first = -1 if reads == "before" else 0
    lengths = [len(s.prompt_ids) + _n_inputs(s, reads) for s in samples]
    length = max(lengths)
    positions = torch.arange(length).repeat(len(samples), 1).to(device)
    ids = torch.zeros(len(samples), length, dtype=torch.long)
    for r, sample in enumerate(samples):
        tokens = (*sample.prompt_ids, *sample.completion_ids)
        ids[r, : lengths[r]] = torch.tensor(tokens[: lengths[r]])
    present = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
    source = [
        r * length + len(s.prompt_ids) + first + torch.arange(len(s.completion_ids))
        for r, s in enumerate(samples)
    ]
    return Packed(
        input_ids=ids.to(device),
        position_ids=positions,
        allowed=None,
        key_positions=positions,
        seams=None,
        real=present.to(device),
        source=torch.cat(source).to(device),
        target_ids=torch.tensor([t for s in samples for t in s.completion_ids], device=device),
        rows=torch.tensor(
            [r for r, s in enumerate(samples) for _ in s.completion_ids], device=device
        ),
        cols=torch.cat([torch.arange(len(s.completion_ids)) for s in samples]).to(device),
    )


def _block_mask(unit_of: Tensor, part_of: Tensor) -> Tensor:
    """bool `[R, L, L]`: causal, inside a unit, there to the prompt (part 0) and its own part."""
    length = unit_of.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same_unit = unit_of[:, :, None] == unit_of[:, None, :]
    key_part = part_of[:, None, :]
    return causal & same_unit & ((key_part == 0) | (key_part == part_of[:, :, None]))


def _lengths(samples: Sequence[Sample], unit: _Unit, reads: Reads) -> tuple[int, ...]:
    """Tokens of a unit's prompt and of each of its completions."""
    return (len(unit.prompt), *(_n_inputs(samples[m], reads) for m in unit.members))


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


def _n_inputs(sample: Sample, reads: Reads) -> int:
    """How many of a completion's tokens go into the model."""
    return len(sample.completion_ids) - (1 if reads == "before" else 0)


def _block(
    samples: Sequence[Sample], indices: Sequence[int], most: int, share_prompts: bool
) -> tuple[tuple[int, ...], int]:
    """Samples that stay together, and the tokens they cost."""
    if share_prompts:
        units = _units(samples, indices, most)
    else:
        units = [_unit(samples, (i,), "before") for i in indices]
    return tuple(indices), sum(unit.length for unit in units)


def _unit(samples: Sequence[Sample], members: tuple[int, ...], reads: Reads) -> _Unit:
    prompt = samples[members[0]].prompt_ids
    inputs = sum(_n_inputs(samples[m], reads) for m in members)
    return _Unit(prompt, members, len(prompt) + inputs)


def _units(
    samples: Sequence[Sample], indices: Sequence[int], most: int, reads: Reads = "before"
) -> list[_Unit]:
    """Group samples by prompt, in order of first appearance, at most `most` tokens a unit."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i in indices:
        by_prompt.setdefault(samples[i].prompt_ids, []).append(i)
    units: list[_Unit] = []
    for prompt, members in by_prompt.items():
        taken: list[int] = []
        length = len(prompt)
        for m in members:
            inputs = _n_inputs(samples[m], reads)
            if taken and length + inputs > most:
                units.append(_unit(samples, tuple(taken), reads))
                taken, length = [], len(prompt)
            taken.append(m)
            length += inputs
        units.append(_unit(samples, tuple(taken), reads))
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
