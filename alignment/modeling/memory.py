"""Where memory does not hold what goes through a model at once: smaller micro-batches, or an error
that names what does not fit.

A failed pass leaves nothing behind but what it held in memory, so the caller lets go of that
(`release_memory`) and tries again with less.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from alignment.modeling.shards import Shards, lockstep, rows_of
from alignment.types import AlignmentError, Sample

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Every device has words of its own: CUDA and MPS ("out of memory"), cuBLAS, the CPU's allocator.
_SIGNS = ("out of memory", "alloc_failed", "can't allocate memory", "not enough memory")


class OutOfMemory(AlignmentError):
    """Memory did not hold one pass through a model.

    Attributes:
        samples: what went through it, where they were samples to score or to train on.
    """

    event = "out_of_memory"

    def __init__(self, message: str, samples: Sequence[Sample] = ()) -> None:
        super().__init__(message)
        self.samples = samples


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is an allocator's, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


@contextmanager
def memory_for(samples: Sequence[Sample]) -> Iterator[None]:
    """Turn an allocator's error of the block into one that names these samples' size.

    Raises:
        OutOfMemory: with what else can be done.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        longest = max(len(s.prompt_ids) + len(s.completion_ids) for s in samples)
        which = (
            f"one sample of {longest} tokens"
            if len(samples) == 1
            else f"{len(samples)} samples at once, the longest of {longest} tokens"
        )
        raise OutOfMemory(
            f"out of memory on {which} ({_reason(error)}). Lower optim.micro_batch_tokens if "
            "several samples went through the model at once, else shorten them "
            "(rollout.max_new_tokens, or the limits of the data); or set "
            "model.gradient_checkpointing, train an adapter (model.lora), take a smaller model",
            samples,
        ) from error


def release_memory() -> None:
    """Free what a failed pass has left behind.

    Call it outside the `except` block: the exception's frames hold the pass's tensors.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class TokenCap:
    """How many tokens a model bears at once, once memory did not hold as many as were asked for.

    Attributes:
        tokens: None while everything has fitted.
    """

    tokens: int | None = None

    def __call__(self, asked: int) -> int:
        """The token budget to plan with where `asked` is wanted."""
        return asked if self.tokens is None else min(asked, self.tokens)

    def lower(self, asked: int, error: OutOfMemory, *, together: int = 1) -> None:
        """Halve the budget after a micro-batch that did not fit; call it while handling `error`.

        Args:
            asked: the budget that was wanted.
            together: so many neighbours are never parted.

        Raises:
            OutOfMemory: `error`, where nothing smaller is left to try.
        """
        before = self(asked)
        if len(error.samples) <= together or before == 1:
            raise error
        self.tokens = max(min(before, _size(error.samples)) // 2, 1)
        logger.warning(
            "out of memory on %d samples: micro-batches have at most %d tokens from now on "
            "instead of %d",
            len(error.samples),
            self.tokens,
            before,
        )


class Planned(Protocol):
    """A model that says what makes a micro-batch."""

    cap: TokenCap
    shards: Shards

    def plan(
        self, samples: Sequence[Sample], token_budget: int, *, together: int = 1
    ) -> list[list[int]]: ...


def micro_batched(
    model: Planned,
    samples: Sequence[Sample],
    token_budget: int,
    run: Callable[[list[Sample]], T],
    *,
    together: int = 1,
) -> Iterator[tuple[T, list[int]]]:
    """`run` of each micro-batch, and the indices of its samples; for passes without gradients.

    Where memory does not hold one, it and all that follow are cut smaller, and stay so. Not where
    weights are sharded: the other ranks wait in the pass that failed.

    Raises:
        OutOfMemory: it does not hold the smallest one either.
    """
    batches = model.plan(samples, model.cap(token_budget), together=together)
    batches = lockstep(model.shards, batches)
    while batches:
        rows = rows_of(samples, batches[0])
        try:
            with memory_for(rows):
                result = run(rows)
        except OutOfMemory as error:
            if model.shards.lockstep:
                raise
            model.cap.lower(token_budget, error, together=together)
        else:
            batch = batches.pop(0)
            if batch:
                yield result, batch
            continue
        release_memory()
        left = [i for batch in batches for i in batch]
        smaller = model.plan([samples[i] for i in left], model.cap(token_budget), together=together)
        batches = [[left[place] for place in batch] for batch in smaller]


def _size(samples: Sequence[Sample]) -> int:
    """Tokens of a micro-batch, a shared prompt's once."""
    prompts = {sample.prompt_ids for sample in samples}
    return sum(map(len, prompts)) + sum(len(sample.completion_ids) for sample in samples)


def _reason(error: BaseException) -> str:
    """The allocator's own words, in short."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
