"""Sampling where memory does not hold as many rows at a time as were asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from alignment.modeling.memory import OutOfMemory, is_out_of_memory, release_memory
from alignment.rollout.rows import Row

logger = logging.getLogger(__name__)


def finish_rows(rows: Sequence[Row], max_rows: int, run: Callable[[list[Row], int], None]) -> int:
    """Bring every row to its end, fewer at a time where memory does not hold so many.

    What was unfinished then begins again, and comes out as it would have: a row's random numbers
    are its own.

    Args:
        run: brings rows to their end, so many at a time.

    Returns:
        how many rows at a time memory held.

    Raises:
        OutOfMemory: it does not hold one.
    """
    while True:
        unfinished = [row for row in rows if row.stop_reason is None]
        try:
            run(unfinished, max_rows)
            return max_rows
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if max_rows == 1:
                raise OutOfMemory(_too_large(unfinished, error)) from error
        release_memory()
        for row in unfinished:
            row.restart()
        before, max_rows = max_rows, max(min(max_rows, len(unfinished)) // 2, 1)
        logger.warning(
            "out of memory while sampling: at most %d rows at a time from now on instead of %d",
            max_rows,
            before,
        )


def _too_large(rows: Sequence[Row], error: Exception) -> str:
    longest = max(len(row.prompt_ids) + row.limit for row in rows)
    return (
        f"out of memory while sampling one completion at a time, of up to {longest} tokens with "
        f"its prompt ({str(error).splitlines()[0][:200]}). Lower rollout.max_new_tokens, take a "
        "smaller model or model.dtype bfloat16, or leave more memory to the run"
    )
