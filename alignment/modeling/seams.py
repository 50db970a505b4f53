"""Where a packed row is cut: the pieces that attend in one call each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbours in a packed row that attend in one call.

    length: its tokens.
    prompt: (piece, tokens) where an earlier piece begins with the prompt of its first completions,
            which they look at too; None where it begins with a prompt of its own.
    causal: whether it is one sequence that looks at all of its past, so that no mask is needed.
    """

    length: int
    prompt: tuple[int, int] | None
    causal: bool


Seams = tuple[Piece, ...]
"""A packed row, from its first token to its last."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a piece stands in its row.

    start, end: of its tokens.
    carried:    start and end of the prompt that it carries from an earlier piece.
    causal:     as of the piece.
    """

    start: int
    end: int
    carried: tuple[int, int] | None
    causal: bool

    @property
    def n_carried(self) -> int:
        return 0 if self.carried is None else self.carried[1] - self.carried[0]

    def keys(self, x: Tensor, n: int) -> Tensor:
        """The first `n` keys `[..., n, D]` of the piece, of a row's `[..., L, D]`: those of the
        carried prompt, then its own."""
        if self.carried is None:
            return x[..., self.start : self.start + n, :]
        home, end = self.carried
        own = x[..., self.start : self.start + n - (end - home), :]
        return torch.cat((x[..., home:end, :], own), dim=-2)

    def add_to_keys(self, x: Tensor, gradient: Tensor) -> None:
        """Add what is of the first keys `[..., n, D]` of the piece to the row's `[..., L, D]`."""
        n = self.n_carried
        if self.carried is not None:
            x[..., self.carried[0] : self.carried[1], :] += gradient[..., :n, :]
        x[..., self.start : self.start + gradient.shape[-2] - n, :] += gradient[..., n:, :]


def places(seams: Seams) -> Iterator[Place]:
    """Of a row's pieces, in order."""
    starts: list[int] = []
    start = 0
    for piece in seams:
        starts.append(start)
        carried = None
        if piece.prompt is not None:
            home, n = piece.prompt
            carried = (starts[home], starts[home] + n)
        yield Place(start, start + piece.length, carried, piece.causal)
        start += piece.length
