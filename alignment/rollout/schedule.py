"""Which rows run: a queue of waiting samples, groups that share a prompt, and a token budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from alignment.rollout.rows import Row
from alignment.types import UserInputError

# Rows that read one copy of their prompt's keys and values. Their own tokens stand side by side
# in the same stretch of cache, and each row's attention passes over its siblings' tokens as
# well: more rows save reads of the prompt and cost arithmetic on siblings. On a CPU, with prompts
# of 200 tokens, eight rows beat one, sixteen and more at every length of completion up to 150.
GROUP_ROWS = 8


@dataclass(eq=False)
class Group:
    """Running rows of one prompt that share its keys and values.

    index:        the group's place in the cache, given when its prompt has been computed.
    first_logits: `[V]`, what follows the prompt: every row draws its first token from it.
    """

    prompt_ids: tuple[int, ...]
    rows: list[Row] = field(default_factory=list)
    index: int = -1
    first_logits: Tensor | None = None

    @property
    def cached_tokens(self) -> int:
        """Tokens in the cache that are alive: a row's newest is not in it yet."""
        return len(self.prompt_ids) + sum(len(row.tokens) - 1 for row in self.rows)

    @property
    def largest_size(self) -> int:
        """Tokens in the cache if every running row reaches its limit."""
        return len(self.prompt_ids) + sum(row.limit for row in self.rows)


class Scheduler:
    """First come, first served, under a number of rows and a number of cached tokens.

    Samples of equal prompts stand together in the queue, so a prompt is computed once: its group
    stays, even without running rows, while samples of the same prompt wait. A row is admitted
    only if everything running could reach its limit within the budget, so nothing admitted is
    ever thrown out again.

    Args:
        rows: all rows, in the order of the output.
        max_rows: rows running at the same time.
        kv_tokens: token places the cache may have (groups times the largest group), None for any.

    Raises:
        UserInputError: a row that would not fit even alone.
    """

    def __init__(self, rows: Sequence[Row], max_rows: int, kv_tokens: int | None) -> None:
        alone = max((len(row.prompt_ids) + row.limit for row in rows), default=0)
        if kv_tokens is not None and alone > kv_tokens:
            raise UserInputError(
                f"rollout.kv_tokens is {kv_tokens}, but one prompt with its completion can need "
                f"{alone} tokens; raise kv_tokens or lower max_new_tokens"
            )
        by_prompt: dict[tuple[int, ...], list[Row]] = {}
        for row in rows:
            by_prompt.setdefault(row.prompt_ids, []).append(row)
        self.waiting = deque(row for same in by_prompt.values() for row in same)
        self.groups: list[Group] = []
        self._max_rows = max_rows
        self._kv_tokens = kv_tokens

    @property
    def running(self) -> list[Row]:
        """Running rows, group by group."""
        return [row for group in self.groups for row in group.rows]

    def admit(self) -> list[tuple[Group, Row]]:
        """Move as many waiting rows as fit into groups, new ones (index -1) where needed."""
        admitted: list[tuple[Group, Row]] = []
        n_running = len(self.running)
        while self.waiting and n_running + len(admitted) < self._max_rows:
            row = self.waiting[0]
            group = self._group_with_room(row) or Group(row.prompt_ids)
            if not self._fits(group, row):
                break
            if group not in self.groups:
                self.groups.append(group)
            group.rows.append(self.waiting.popleft())
            admitted.append((group, row))
        return admitted

    def retire(self) -> list[Group]:
        """Take finished rows out. Returns the groups that nothing needs any more."""
        for group in self.groups:
            group.rows = [row for row in group.rows if row.stop_reason is None]
        awaited = self.waiting[0].prompt_ids if self.waiting else None
        done = [g for g in self.groups if not g.rows and g.prompt_ids != awaited]
        self.groups = [g for g in self.groups if g not in done]
        return done

    def _group_with_room(self, row: Row) -> Group | None:
        for group in self.groups:
            if group.prompt_ids == row.prompt_ids and len(group.rows) < GROUP_ROWS:
                return group
        return None

    def _fits(self, group: Group, row: Row) -> bool:
        if self._kv_tokens is None:
            return True
        others = [g for g in self.groups if g is not group]
        largest = max([group.largest_size + row.limit, *(g.largest_size for g in others)])
        return (len(others) + 1) * largest <= self._kv_tokens
