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

from alignment.modeling.seams import Piece, Seams, places
from alignment.types import AlignmentError, Sample

# Rows longer than this are not built from several units, and a unit is split when it would
# exceed it: attention inside a row is quadratic, and a prompt is cheap to compute twice compared
# with a row twice as long.
ROW_TOKENS = 1024

# Pieces of a row that is cut at its seams are put together up to this length: attention inside a
# piece is quadratic, and a call of it for each short completion costs more than it saves.
PIECE_TOKENS = 512


Reads = Literal["before", "after"]
"""Which hidden state belongs to a completion token: the one that predicts it, or its own."""


@dataclass(frozen=True, slots=True)
class Packed:
    """One forward pass. `R` rows of `L` tokens, `M` scored completion tokens of `B` samples.

    input_ids, position_ids: `[R, L]` (padding has id 0 and looks at itself only).
    allowed:     bool `[R, L, K]`, or None for plain rows, where `real` is all a model needs.
    key_positions: `[R, K]` (`[1, L, K]` with seams), position of each key in its sequence.
    seams:       where the one row is cut; the keys of `allowed` are then those of a token's piece.
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
    reads: Reads = "before",
    share_prompts: bool = True,
    together: int = 1,
) -> list[list[int]]:
    """Split samples into micro-batches of at most `token_budget` computed tokens.

    Samples of one prompt stay together as far as the budget and the row length allow. What is
    longer than the budget gets a micro-batch of its own. The plan depends on the samples only.

    Args:
        reads: what the pass will read; `after`, a completion's last token is an input too.
        together: samples 0 to k-1, k to 2k-1, ... are never parted: a loss needs them at once (2
            for pairs in the order chosen, rejected).

    Returns:
        lists of sample indices; every sample occurs once.
    """
    most = min(token_budget, ROW_TOKENS)
    blocks: list[tuple[tuple[int, ...], int]]
    if together > 1:
        starts = range(0, len(samples), together)
        blocks = [
            _block(samples, range(s, s + together), most, share_prompts, reads) for s in starts
        ]
    elif share_prompts:
        blocks = [(u.members, u.length) for u in _units(samples, range(len(samples)), most, reads)]
    else:
        blocks = [_block(samples, range(i, i + 1), most, False, reads) for i in range(len(samples))]
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
    key_positions, seams = positions, None
    if cut_at_seams:
        reach = length if window is None else window
        seams = _cut([_lengths(samples, unit, reads) for unit in units], reach)
        allowed, key_positions = _piece_masks(seams, unit_of[0], part_of[0], positions[0])
    else:
        allowed = _block_mask(unit_of, part_of)
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


def _cut(units: Sequence[tuple[int, ...]], reach: int) -> Seams:
    """Cut a row of units (tokens of the prompt, then of each completion) into pieces.

    Args:
        reach: how far back every layer looks.
    """
    pieces: list[Piece] = []

    for prompt, first, *others in units:
        # A prompt that later pieces carry begins its piece.
        whole = prompt + first + sum(others)
        last = pieces[-1] if pieces else None
        if last is not None and last.length + whole <= PIECE_TOKENS:
            pieces[-1] = Piece(last.length + whole, last.prompt, causal=False)
            continue
        home = len(pieces)
        pieces.append(Piece(prompt + first, None, causal=prompt + first <= reach))
        for length in others:
            last = pieces[-1]
            if last.length + length <= PIECE_TOKENS:
                pieces[-1] = Piece(last.length + length, last.prompt, causal=False)
            elif length:
                pieces.append(Piece(length, (home, prompt), causal=False))
    return tuple(pieces)


def _piece_masks(
    seams: Seams, unit_of: Tensor, part_of: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """bool `[1, L, W]`, which keys of its piece each token may look at, and their positions.

    Args:
        unit_of, part_of, positions: of each token, `[L]`.
    """
    cuts = list(places(seams))
    keys = []  # of each piece, as places in the row
    for cut in cuts:
        own = torch.arange(cut.start, cut.end)
        keys.append(own if cut.carried is None else torch.cat((torch.arange(*cut.carried), own)))
    width = max(map(len, keys))
    allowed = torch.zeros(len(unit_of), width, dtype=torch.bool)
    key_positions = torch.zeros(len(unit_of), width, dtype=torch.long)
    for own, cut in zip(keys, cuts, strict=True):
        start, end = cut.start, cut.end
        queries = torch.arange(start, end)[:, None]
        visible = (part_of[own] == 0) | (part_of[own] == part_of[queries])
        allowed[start:end, : len(own)] = (
            (own <= queries) & (unit_of[own] == unit_of[queries]) & visible
        )
        key_positions[start:end, : len(own)] = positions[own]
    return allowed[None], key_positions[None]


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
    samples: Sequence[Sample],
    indices: Sequence[int],
    most: int,
    share_prompts: bool,
    reads: Reads,
) -> tuple[tuple[int, ...], int]:
    """Samples that stay together, and the tokens they cost."""
    if share_prompts:
        units = _units(samples, indices, most, reads)
    else:
        units = [_unit(samples, (i,), reads) for i in indices]
    return tuple(indices), sum(unit.length for unit in units)


def _unit(samples: Sequence[Sample], members: tuple[int, ...], reads: Reads) -> _Unit:
    prompt = samples[members[0]].prompt_ids
    inputs = sum(_n_inputs(samples[m], reads) for m in members)
    return _Unit(prompt, members, len(prompt) + inputs)


def _units(
    samples: Sequence[Sample], indices: Sequence[int], most: int, reads: Reads
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
