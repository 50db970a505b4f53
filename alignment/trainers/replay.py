"""One step of a run made again, from the nearest checkpoint and the samples it recorded.

What a step does follows from the state before it, the data, and what was sampled; all of that is on
disk. So the same program on the same machine comes to the same numbers, and where it does not, the
metrics that differ say where to look. Nothing is written into the run.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from alignment.config.load import load_recipe
from alignment.config.methods.base import needs_of
from alignment.config.schema import Recipe
from alignment.distributed import Distributed
from alignment.runs.checkpoint import checkpoint_problem, list_checkpoints, load_checkpoint
from alignment.runs.directory import RunDirectory
from alignment.runs.events import EventLog
from alignment.runs.inputs import refuse_changed_inputs, refuse_changed_start
from alignment.runs.metrics import read_metrics
from alignment.trainers.context import TrainingContext
from alignment.trainers.evaluation import Evaluator
from alignment.trainers.loop import Loop
from alignment.trainers.recorded import RecordedRollouts, without_sampling
from alignment.trainers.run import make_trainer
from alignment.trainers.sampler import generate
from alignment.trainers.setup import Loaded, assemble, load_parts
from alignment.trainers.state import restore_state
from alignment.types import (
    Completion,
    Prompt,
    RewardedCompletion,
    SamplingParams,
    UserInputError,
)

# Metrics of the machine, and those of evaluations, which are not made again.
_NOT_REPLAYED = ("time/", "memory/", "eval/")


@dataclass(frozen=True, slots=True)
class ReplayedMetric:
    """A number of the run's `metrics.jsonl` and the same made again; None where there is none."""

    name: str
    logged: float | None
    replayed: float | None

    @property
    def same(self) -> bool:
        """Equal to the last bit; not a number is equal to itself."""
        if self.logged is None or self.replayed is None:
            return False
        both_nan = math.isnan(self.logged) and math.isnan(self.replayed)
        return both_nan or self.logged == self.replayed


@dataclass(frozen=True, slots=True)
class ReplayedSample:
    """A recorded completion, and what the engine gives for the same prompt and counters now."""

    recorded: RewardedCompletion
    again: Completion

    @property
    def same(self) -> bool:
        """Token for token."""
        return self.first_difference is None

    @property
    def first_difference(self) -> int | None:
        """The first token position where the two differ; None where they are the same."""
        old, new = self.recorded.completion.token_ids, self.again.token_ids
        if old == new:
            return None
        pairs = enumerate(zip(old, new, strict=False))
        return next((at for at, (a, b) in pairs if a != b), min(len(old), len(new)))


@dataclass(frozen=True, slots=True)
class Replay:
    """A step made again.

    start:   the step whose checkpoint it was rebuilt from; 0 for the model as handed over.
    metrics: in the order in which they were logged.
    sample:  where one was asked for.
    """

    step: int
    start: int
    metrics: tuple[ReplayedMetric, ...]
    sample: ReplayedSample | None

    @property
    def differing(self) -> tuple[str, ...]:
        """The names of the metrics that are not the same."""
        return tuple(metric.name for metric in self.metrics if not metric.same)


def replay(path: Path | str, step: int, *, sample: int | None = None) -> Replay:
    """Make step `step` of the run at `path` again.

    Args:
        sample: the row of a completion in the step's file of samples, from 0; the engine samples
            the step's completions again, in the batches of the run, and this one is compared.

    Raises:
        UserInputError: there is no such run, step or sample, the run's recipe, model, data or
            samples are not there as they were.
    """
    run = RunDirectory.open(path)
    recipe = load_recipe(run.recipe)
    if not isinstance(recipe, Recipe):
        raise UserInputError(f"{run.path} is a pipeline; name a stage: {run.path}/stages/NAME")
    logged = _logged(run, step)
    samples = needs_of(recipe.algorithm).rollout or run.rollouts_dir.is_dir()
    recorded = RecordedRollouts(run) if samples else None
    row = None if sample is None else _row(recorded, step, sample)
    refuse_changed_inputs(run.path, f"the run {run.path}")
    torch.manual_seed(recipe.run.seed)
    # Graders are asked in no case, and the engine only for the sample.
    loaded = load_parts(without_sampling(recipe, keep_engine=row is not None))
    try:
        refuse_changed_start(run.path, loaded.recipe, asdict(loaded.fingerprints))
        with tempfile.TemporaryDirectory() as scratch:
            source = None if recorded is None else _Source(recorded, None if row is None else step)
            loop = _loop(run, loaded, source, step, Path(scratch))
            start = loop.start
            for earlier in range(start + 1, step):
                loop.step(earlier)
            _, metrics = loop.step(step)
    finally:
        if loaded.rewards is not None:
            loaded.rewards.close()
    again = None
    if row is not None and source is not None:
        again = ReplayedSample(row, source.completion_of(row))
    return Replay(step, start, _compared(logged, metrics), again)


class _Source:
    """Recorded completions; at one step, the engine samples them again besides.

    Args:
        again: that step; None for no step.
    """

    def __init__(self, recorded: RecordedRollouts, again: int | None) -> None:
        self._recorded = recorded
        self._again = again
        self._completions: list[Completion] = []
        self.context: TrainingContext | None = None

    def __call__(
        self, prompts: Sequence[Prompt], params: SamplingParams
    ) -> list[RewardedCompletion]:
        items = self._recorded(prompts, params)
        if params.step == self._again:
            assert self.context is not None
            version = self._recorded.items(params.step)[0].completion.policy_version
            self.context.engine.weights_updated(version)
            self._completions += generate(self.context, prompts, params)
        return items

    def completion_of(self, row: RewardedCompletion) -> Completion:
        """The completion that was sampled again for a recorded one, by whatever rank."""
        assert self.context is not None
        counters = (row.completion.prompt_index, row.completion.sample_index)
        everyones = self.context.distributed.gather(self._completions)
        return next(c for c in everyones if (c.prompt_index, c.sample_index) == counters)


def _loop(
    run: RunDirectory, loaded: Loaded, source: _Source | None, step: int, scratch: Path
) -> Loop:
    """A loop that stands where the newest usable checkpoint before `step` was saved."""
    if run.cache_dir.is_dir():  # replies of a judge, who then need not be asked again
        shutil.copytree(run.cache_dir, scratch / "cache")
    context = assemble(loaded, Distributed(), EventLog(os.devnull), cache=scratch / "cache")
    context = replace(context, recorded=source)
    if source is not None:
        source.context = context
    trainer = make_trainer(context)
    checkpoint = _nearest(run, step)
    start = 0
    if checkpoint is not None:
        start = restore_state(trainer, context, load_checkpoint(checkpoint))
    return Loop(trainer, context, run, Evaluator(context, scratch), start)


def _nearest(run: RunDirectory, step: int) -> Path | None:
    """The newest whole checkpoint of a step before `step`; None where there is none."""
    for saved, path in reversed(list_checkpoints(run.checkpoints_dir)):
        if saved < step and checkpoint_problem(path) is None:
            return path
    return None


def _logged(run: RunDirectory, step: int) -> dict[str, Any]:
    records = {record["step"]: record for record in read_metrics(run.metrics)}
    if step < 1 or step not in records:
        steps = [at for at in records if at > 0]
        there = f"it has made steps {min(steps)} to {max(steps)}" if steps else "it has made none"
        raise UserInputError(f"{run.path} has no step {step}; {there}")
    return records[step]


def _row(recorded: RecordedRollouts | None, step: int, sample: int) -> RewardedCompletion:
    if recorded is None:
        raise UserInputError("--sample: the run's method samples nothing; leave it out")
    items = recorded.items(step)
    if not 0 <= sample < len(items):
        raise UserInputError(
            f"--sample {sample}: step {step} has the samples 0 to {len(items) - 1}, which are the "
            "rows of its file in rollouts/"
        )
    return items[sample]


def _compared(logged: dict[str, Any], metrics: dict[str, float]) -> tuple[ReplayedMetric, ...]:
    names = [name for name in [*logged, *metrics] if name != "step"]
    return tuple(
        ReplayedMetric(name, logged.get(name), metrics.get(name))
        for name in dict.fromkeys(names)
        if not name.startswith(_NOT_REPLAYED)
    )
