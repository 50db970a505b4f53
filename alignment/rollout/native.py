"""The toolkit's own rollout engine: shared prompts, continuous batching, counted randomness.

The loop of `_run` is the whole idea:

1. admit waiting rows into the room there is; compute each new prompt once;
2. draw the first token of the rows that came in, from what follows their prompt;
3. run the model on the newest token of every running row, and draw the next;
4. take out the rows that are finished, and go on until nobody waits or runs.

`schedule.py` decides who runs, `cache.py` holds keys and values, `attention.py` reads a prompt's
keys once for all its rows, `sampling.py` draws.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from alignment.activity import doing
from alignment.modeling.backbone import Backbone
from alignment.modeling.finite import explained
from alignment.rollout.attention import RowLayout, grouped, heads_per_key, repeat_for_heads
from alignment.rollout.cache import NOBODY, GroupedCache, capacity_for
from alignment.rollout.hf import HFEngine
from alignment.rollout.live import LiveModel
from alignment.rollout.memory import finish_rows
from alignment.rollout.mode import sampling_mode
from alignment.rollout.packed import packed_weights
from alignment.rollout.rows import Row, extend
from alignment.rollout.sampling import IntArray
from alignment.rollout.schedule import Group, Scheduler
from alignment.rollout.stopping import StopRule
from alignment.types import Completion, Prompt, SamplingParams

logger = logging.getLogger(__name__)

_STEPS_TO_PACK = 16


class NativeEngine:
    """Samples completions from a live causal LM; see `RolloutEngine` for the contract.

    The model is used as it is, with the weights it has at the time of the call: nothing is cast,
    and nothing is kept between calls. Rows are independent of each other: in fp32 a completion
    is the same whatever else is sampled with it, and whatever `max_rows` and `kv_tokens` are.

    Args:
        model: a transformers causal LM, or a peft model around one.
        tokenizer: decodes completions.
        max_rows: completions that run at the same time; fewer once memory did not hold as many.
        kv_tokens: token places the cache may have; None: as many as `max_rows` rows need.
        stop_token_ids: ids that end a completion; None: those of the model and the tokenizer.
        prefill_tokens: prompt tokens (padding included) computed in one forward.
        share_attention: read a prompt's keys once for all its rows. Where the model's attention
            does not allow it, or if False, each group is a padded batch row instead: the same
            results, more slowly.
        pack_weights: on a CPU in bfloat16, sample from weights rearranged for fast products (a
            second copy, dropped at the end of each call).

    Attributes:
        fallback_reason: why this architecture goes through `HFEngine` instead, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_rows: int = 64,
        kv_tokens: int | None = None,
        stop_token_ids: Sequence[int] | None = None,
        prefill_tokens: int = 4096,
        share_attention: bool = True,
        pack_weights: bool = True,
    ) -> None:
        self._live = LiveModel(model, tokenizer, stop_token_ids)
        self.max_rows = max_rows
        self._kv_tokens = kv_tokens
        self._prefill_tokens = prefill_tokens
        self._share_attention = share_attention
        self._pack_weights = pack_weights
        self.fallback_reason = self._live.backbone.plain_reason
        self._fallback: HFEngine | None = None
        if self.fallback_reason is not None:
            logger.warning(
                "native engine: %s; sampling goes through transformers' generate",
                self.fallback_reason,
            )
            self._fallback = HFEngine(
                model, tokenizer, max_rows=max_rows, stop_token_ids=sorted(self._live.stop_ids)
            )

    @property
    def counter_based(self) -> bool:
        """Whether a completion depends only on weights, prompt and counters."""
        return self._fallback is None or self._fallback.counter_based

    def weights_updated(self, policy_version: int) -> None:
        """Completions from now on carry this version. There is nothing else to do: nothing
        derived from the weights outlives a call of `generate`."""
        self._live.policy_version = policy_version
        if self._fallback is not None:
            self._fallback.weights_updated(policy_version)

    @doing("sampling")
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """Sample `params.n` completions for each prompt, in prompt-major order.

        Raises:
            UserInputError: parameters that define no distribution, a prompt that is empty or
                fills the context, or a budget too small for one row.
            NonFiniteError: the model's logits are not finite.
            OutOfMemory: memory does not hold one row.
        """
        if self._fallback is not None:
            completions = self._fallback.generate(prompts, params)
            self.max_rows = self._fallback.max_rows
            return completions
        rows = self.lay_out(prompts, params)
        self.run(rows, params)
        return self._live.completions(rows)

    def lay_out(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Row]:
        """The rows that `generate` brings to an end with `run`."""
        return self._live.rows(prompts, params)

    def run(self, rows: Sequence[Row], params: SamplingParams) -> None:
        """Sample rows, in place, until each has a stop reason."""
        model, rule = self._live.model, self._live.stop_rule(params)

        def finish(unfinished: list[Row], max_rows: int) -> None:
            _Run(
                self._live.backbone,
                Scheduler(unfinished, max_rows, self._kv_tokens),
                params,
                rule,
                share_attention=self._share_attention,
                prefill_tokens=self._prefill_tokens,
            ).finish()

        with (
            explained(model, f"step {params.step}, sampling"),
            sampling_mode(model),
            self._fast_weights(rows),
        ):
            self.max_rows = finish_rows(rows, self.max_rows, finish)

    def _fast_weights(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        """Rearranging the weights pays after about ten steps."""
        steps = max((row.limit for row in rows), default=0)
        pays = self._pack_weights and steps >= _STEPS_TO_PACK
        return packed_weights(self._live.model) if pays else nullcontext()


class _Run:
    """One call of `generate`: the rows, their cache, and the steps that bring them to an end."""

    def __init__(
        self,
        backbone: Backbone,
        scheduler: Scheduler,
        params: SamplingParams,
        rule: StopRule,
        *,
        share_attention: bool,
        prefill_tokens: int,
    ) -> None:
        self._backbone = backbone
        self._scheduler = scheduler
        self._params = params
        self._rule = rule
        self._prefill_tokens = prefill_tokens
        self._cache = GroupedCache(backbone.device)
        shared = heads_per_key(backbone.causal_lm, backbone.config)
        self._heads_per_key = shared if share_attention else None

    def finish(self) -> None:
        """Run until every row has ended."""
        scheduler = self._scheduler
        while scheduler.waiting or scheduler.running:
            admitted = scheduler.admit()
            self._open([group for group in scheduler.groups if group.index < 0])
            if admitted:
                logits = torch.stack([cast(Tensor, g.first_logits) for g, _ in admitted])
                self._extend([row for _, row in admitted], logits)
            if scheduler.running:
                self._make_room()
                self._extend(scheduler.running, self._next_logits())

    # -- prompts ---------------------------------------------------------------------------

    def _open(self, new: list[Group]) -> None:
        """Give new groups a place in the cache, and their prompt's keys and values."""
        if not new:
            return
        self._place(new)
        holders = {g.prompt_ids: g for g in self._scheduler.groups if g.first_logits is not None}
        missing: dict[tuple[int, ...], Group] = {}
        for group in new:
            if group.prompt_ids not in holders:
                missing.setdefault(group.prompt_ids, group)
        for batch in _batches(list(missing.values()), self._prefill_tokens):
            self._prefill(batch)
        holders |= missing
        for group in new:
            holder = holders[group.prompt_ids]
            if holder is not group:
                self._cache.copy_prompt(holder.index, group.index, len(group.prompt_ids))
                group.first_logits = holder.first_logits

    def _place(self, new: list[Group]) -> None:
        """Give each new group an index, enlarging the cache if need be."""
        old = [group for group in self._scheduler.groups if group.index >= 0]
        free = self._cache.free_groups([group.index for group in old])
        longest = max(len(group.prompt_ids) for group in new)
        if len(free) < len(new) or self._cache.capacity < longest:
            self._rebuild(old, len(new), longest)
            free = list(range(len(old), len(old) + len(new)))
        for group, index in zip(new, free, strict=False):
            group.index = index

    def _prefill(self, groups: list[Group]) -> None:
        """Compute prompts `[P, L]`, right-padded: causality keeps the padding out of sight."""
        lengths = [len(group.prompt_ids) for group in groups]
        width = max(lengths)
        ids = np.zeros((len(groups), width), dtype=np.int64)
        for row, group in enumerate(groups):
            ids[row, : lengths[row]] = group.prompt_ids
        positions = torch.arange(width, device=self._backbone.device).expand(len(groups), width)
        causal = positions[:, :, None] >= positions[:, None, :]
        self._cache.plan_prompts([group.index for group in groups], lengths, width)
        hidden = self._backbone.hidden(
            self._tensor(ids),
            positions,
            self._backbone.masks(causal, positions, positions),
            past_key_values=self._cache,
        )
        last = hidden[torch.arange(len(groups)), torch.tensor(lengths) - 1]
        for group, logits in zip(groups, self._backbone.logits(last), strict=True):
            group.first_logits = logits

    # -- tokens ----------------------------------------------------------------------------

    def _next_logits(self) -> Tensor:
        """fp32 `[R, V]`: what follows the newest token of each running row."""
        groups = [group for group in self._scheduler.groups if group.rows]
        rows = self._scheduler.running
        sizes = [len(group.rows) for group in groups]
        index = np.repeat([group.index for group in groups], sizes)
        column = np.concatenate([np.arange(size) for size in sizes])
        number = np.array([row.number for row in rows])
        position = np.array([row.next_position for row in rows])
        token = np.array([row.tokens[-1] for row in rows])

        rectangle = (self._cache.n_groups, max(sizes))
        numbers = np.full(rectangle, NOBODY)
        positions = np.zeros(rectangle, dtype=np.int64)
        numbers[index, column], positions[index, column] = number, position
        layout = self._layout(rectangle, index * max(sizes) + column)
        if self._heads_per_key is None:
            tokens = np.zeros(rectangle, dtype=np.int64)
            tokens[index, column] = token
            self._cache.plan_tokens(index, column, number, position, layout.place)
            hidden = self._backbone.hidden(
                self._tensor(tokens),
                self._tensor(positions),
                self._masks(numbers, positions),
                past_key_values=self._cache,
            )
            return self._backbone.logits(layout.collect(hidden.flatten(0, 1)))
        self._cache.plan_tokens(index, column, number, position)
        with grouped(self._backbone.config):
            masks = repeat_for_heads(self._masks(numbers, positions), self._heads_per_key)
            hidden = self._backbone.hidden(
                self._tensor(token)[None],
                self._tensor(position)[None],
                masks,
                past_key_values=self._cache,
                rows=layout,
            )
        return self._backbone.logits(hidden[0])

    def _masks(self, numbers: IntArray, positions: IntArray) -> Tensor | dict[str, Tensor]:
        allowed, key_positions = self._cache.visible(numbers)
        return self._backbone.masks(allowed, self._tensor(positions), key_positions)

    def _layout(self, rectangle: tuple[int, int], place: IntArray) -> RowLayout:
        places = rectangle[0] * rectangle[1]
        if np.array_equal(place, np.arange(places)):
            return RowLayout(*rectangle, place=None, filler=None)
        filler = np.zeros(places, dtype=np.int64)
        filler[place] = np.arange(len(place))
        return RowLayout(*rectangle, place=self._tensor(place), filler=self._tensor(filler))

    def _extend(self, rows: list[Row], logits: Tensor) -> None:
        """Draw each row's next token from its logits `[N, V]`; take out the rows that end."""
        extend(rows, logits, self._params, self._rule)
        if self._scheduler.retire():
            self._cache.free_groups([group.index for group in self._scheduler.groups])

    # -- memory ----------------------------------------------------------------------------

    def _make_room(self) -> None:
        groups = self._scheduler.groups
        alive = [group.cached_tokens for group in groups]
        if self._cache.wants_compaction(alive, [len(group.rows) for group in groups]):
            self._rebuild(groups, 0, 0)

    def _rebuild(self, kept: list[Group], n_new: int, longest_new: int) -> None:
        """Keep what is alive, and make room for `n_new` groups and each row's next token."""
        needed = max([longest_new, *(group.cached_tokens + len(group.rows) for group in kept)])
        useful = max(group.largest_size for group in self._scheduler.groups)
        self._cache.rebuild(
            [(group.index, [row.number for row in group.rows]) for group in kept],
            len(kept) + n_new,
            min(capacity_for(needed), useful),
        )
        for index, group in enumerate(kept):
            group.index = index

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._backbone.device)


def _batches(groups: list[Group], tokens: int) -> list[list[Group]]:
    """Groups whose prompts, padded to the longest, have at most `tokens` tokens (or one group)."""
    batches: list[list[Group]] = []
    for group in sorted(groups, key=lambda group: len(group.prompt_ids)):
        length = len(group.prompt_ids)  # the longest so far
        if batches and (len(batches[-1]) + 1) * length <= tokens:
            batches[-1].append(group)
        else:
            batches.append([group])
    return batches
