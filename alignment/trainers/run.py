"""One run, from a checked recipe to saved weights and verified expectations."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from alignment import registry
from alignment.activity import doing
from alignment.config.load import dump_recipe
from alignment.config.methods.base import needs_of
from alignment.config.schema import Recipe
from alignment.distributed import Distributed
from alignment.modeling.export import save_policy
from alignment.modeling.heads import ScalarModel
from alignment.modeling.scalar import save_scalar_model
from alignment.runs.checkpoint import latest_checkpoint, load_checkpoint
from alignment.runs.directory import RunDirectory
from alignment.runs.events import EventLog
from alignment.runs.expect import verify_run
from alignment.runs.files import readable_errors
from alignment.runs.inputs import (
    ModelRecord,
    ParentRecord,
    check_compatible,
    find_models,
    find_parents,
    refuse_changed_inputs,
    refuse_changed_start,
)
from alignment.runs.lineage import run_info
from alignment.runs.made import MadeData
from alignment.runs.metrics import read_metrics
from alignment.runs.outputs import FINISHED, Encoding, write_finished
from alignment.runs.rewind import rewind
from alignment.runs.watch import Watch
from alignment.trainers.context import Trainer, TrainingContext
from alignment.trainers.evaluation import make_evaluator
from alignment.trainers.failure import recorded_failure
from alignment.trainers.going_on import check_named_checkpoint
from alignment.trainers.locked import locked
from alignment.trainers.loop import Loop, stop_requests
from alignment.trainers.recorded import (
    MARK,
    RecordedRollouts,
    refuse_other_source,
    rollouts_for,
    without_sampling,
)
from alignment.trainers.same_recipe import check_resumable, take_up_recipe
from alignment.trainers.setup import Loaded, assemble, load_parts
from alignment.trainers.state import restore_state
from alignment.types import AlignmentError, UserInputError


def train(
    recipe: Recipe,
    *,
    resume: str = "auto",
    command: Sequence[str] = (),
    rollouts_from: Path | None = None,
    signals: list[int] | None = None,
) -> RunDirectory:
    """Train a recipe to the end and leave `runs/NAME/`.

    Args:
        resume: `auto` goes on with a run of this name and recipe; `never` refuses a name that
            exists; anything else is a checkpoint folder of the run, to go on from.
        command: what to note as the command in `run.json`.
        rollouts_from: a run whose recorded rollouts are trained on, in place of sampling.
        signals: what a SIGINT or SIGTERM is put into that came too late to stop the run.

    Raises:
        UserInputError: the recipe, its data or model, or the run's name are not usable.
        AlignmentError: training stopped for a stated reason, or expectations failed at the end.
    """
    distributed = Distributed()
    path = Path(recipe.run.dir) / recipe.run.name
    # Rank 0 looks, for all: a moment later it makes the folder.
    exists = distributed.broadcast(path.exists())
    signals = [] if signals is None else signals
    start = _Start(
        recipe, path, resume, tuple(command), rollouts_from, distributed, exists, signals
    )
    check_named_checkpoint(path, resume)
    if exists:
        check_resumable(path, recipe, resume)
        refuse_changed_inputs(path, f"the run {path}")
        refuse_other_source(RunDirectory(path).read_info(), f"the run {path}", rollouts_from)
        if (path / FINISHED).is_file():
            return _take_finished(start)
    with ExitStack() as held:
        return _train(start, held)


@dataclass(frozen=True, slots=True)
class _Start:
    """One start of a run.

    path:   its folder.
    exists: whether the folder was there before.
    The others are as of `train`.
    """

    recipe: Recipe
    path: Path
    resume: str
    command: Sequence[str]
    rollouts_from: Path | None
    distributed: Distributed
    exists: bool
    signals: list[int]

    @property
    def recipe_yaml(self) -> str:
        return dump_recipe(self.recipe)

    def events(self) -> EventLog:
        """Each rank has its own."""
        rank, main = self.distributed.rank, RunDirectory(self.path).events
        own = self.path / f"events-rank{rank}.jsonl"
        return EventLog(main if self.distributed.is_main else own)

    def watch(self, events: EventLog, folder: Path | None) -> Watch:
        """Of this rank."""
        return Watch(
            folder,
            events,
            rank=self.distributed.rank,
            world_size=self.distributed.world_size,
            hang_minutes=self.recipe.limits.hang_minutes,
        )


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What a run starts from; `models` are looked for where it starts for the first time."""

    loaded: Loaded
    parents: Sequence[ParentRecord]
    models: Sequence[ModelRecord] | None
    recorded: RecordedRollouts | None


def _train(start: _Start, held: ExitStack) -> RunDirectory:
    """Load, take up or create the folder, train and finish.

    Args:
        held: what is let go of in the end, the run's lock among it.
    """
    recipe, distributed, events = start.recipe, start.distributed, start.events()
    torch.manual_seed(recipe.run.seed)
    if start.exists:
        held.enter_context(locked(start.path, distributed, events))
    # A new run has no folder yet: nothing is left behind where it cannot begin.
    with start.watch(events, start.path if start.exists else None):
        inputs = _load(start)
    loaded = inputs.loaded
    if loaded.rewards is not None:
        held.callback(loaded.rewards.close)
    directory = _open_directory(start, inputs)
    if not start.exists:
        held.enter_context(locked(directory.path, distributed, events))
    try:
        with recorded_failure(directory, events), start.watch(events, directory.path):
            context = replace(
                assemble(loaded, distributed, events, cache=directory.cache_dir),
                recorded=inputs.recorded,
            )
            trainer = make_trainer(context)
            if inputs.recorded is not None:
                inputs.recorded.require_steps(trainer.total_steps)
            evaluator = make_evaluator(context, directory.evals_dir)
            step = _resume(directory, trainer, context, start.resume) if start.exists else 0
            context.events.write("start", f"training from step {step}", step=step)
            loop = Loop(trainer, context, directory, evaluator, step)
            with stop_requests(start.signals):
                loop.run(start.signals)
                _finish(directory, context, trainer, _encoding(loaded))
    except UserInputError:
        if distributed.is_main and not start.exists:
            _withdraw(directory)
        raise
    return directory


def _load(start: _Start) -> _Inputs:
    """Everything that the recipe names, checked against what the run and its inputs recorded."""
    recipe, source = start.recipe, start.rollouts_from
    recorded = None if source is None else rollouts_for(source, recipe)
    with doing("loading", "what earlier runs made"):
        parents = find_parents(recipe)
    # Evaluations sample and grade in any case.
    samples = recorded is None or recipe.eval.tasks
    loaded = load_parts(recipe if samples else without_sampling(recipe))
    if start.exists:
        refuse_changed_start(start.path, loaded.recipe, asdict(loaded.fingerprints))
    check_compatible(_encoding(loaded), parents)
    if recorded is not None:
        recorded.require_tokens(_encoding(loaded))
    models = None
    if start.distributed.is_main and not start.exists:
        with doing("loading", "hashes of the other models that the recipe names"):
            models = find_models(loaded.recipe)
    return _Inputs(loaded, parents, models, recorded)


def _encoding(loaded: Loaded) -> Encoding:
    """How the run's text becomes tokens."""
    prints = loaded.fingerprints
    return Encoding(prints.tokenizer, prints.template, len(loaded.tokenizer))


def make_trainer(context: TrainingContext) -> Trainer:
    """The trainer of the recipe's method."""
    trainer: Trainer = registry.get("trainer", algorithm_type(context.recipe))(context)
    return trainer


def algorithm_type(recipe: Recipe) -> str:
    """The name of the recipe's method."""
    name: str = recipe.algorithm.type  # type: ignore[attr-defined]  # every section has one
    return name


def _open_directory(start: _Start, inputs: _Inputs) -> RunDirectory:
    """Rank 0 creates or takes up the folder; the others use it."""
    run, prints, recorded = start.recipe.run, inputs.loaded.fingerprints, inputs.recorded
    if start.distributed.is_main:
        info = run_info(
            recipe=start.recipe_yaml,
            command=start.command,
            seed=run.seed,
            inputs=[*inputs.parents, *(recorded.as_inputs() if recorded else ())],
            models=inputs.models,
            model_hash=prints.model,
            tokenizer_hash=prints.tokenizer,
            template_hash=prints.template,
            data_hash=prints.data,
        )
        if recorded is not None:
            info[MARK] = str(recorded.run.path)
        RunDirectory.create(
            run.dir, run.name, recipe_yaml=start.recipe_yaml, info=info, resume=start.exists
        )
    start.distributed.barrier()
    return RunDirectory.open(start.path)


def _resume(
    directory: RunDirectory, trainer: Trainer, context: TrainingContext, resume: str
) -> int:
    """Restore the newest valid checkpoint (or the named one), and drop what came after it."""
    path: Path | None = Path(resume)
    if resume == "auto":
        # Rank 0 looks, for all: a folder shared by machines may show each of them something else.
        warn = partial(context.events.write, "warning")
        is_main = context.distributed.is_main
        newest = latest_checkpoint(directory.checkpoints_dir, warn=warn) if is_main else None
        path = context.distributed.broadcast(newest)
    step = 0
    if path is not None:
        step = restore_state(trainer, context, load_checkpoint(path))
    context.distributed.barrier()  # from here on, no rank reads what rank 0 removes
    if context.distributed.is_main:
        rewind(directory, step if path else -1)  # step 0 is the evaluation at the start
        source = path.name if path else "the start: no checkpoint was saved"
        context.events.write("resume", f"resumed from {source}", step=step)
    context.distributed.barrier()
    return step


def _withdraw(directory: RunDirectory) -> None:
    """Take back the folder of a run that could not begin, so that a mended recipe finds its name
    free. A run that made a step stays."""
    if all(record["step"] < 1 for record in read_metrics(directory.metrics)):
        shutil.rmtree(directory.path)


def _finish(
    directory: RunDirectory, context: TrainingContext, trainer: Trainer, encoding: Encoding
) -> None:
    """Save the model, check expectations, write the report."""
    is_main, trains = context.distributed.is_main, needs_of(context.recipe.algorithm).trains
    model = context.trained.model.whole_model(keep=is_main) if trains else None
    if not is_main:
        return
    if trains:
        _save_model(directory, context, trainer, model)
        made = "the model"
    else:
        made = f"{MadeData(directory.made_dir).join(directory.data)} rows in {directory.data.name}"
    steps = trainer.total_steps
    context.events.write("end", f"finished after {steps} steps: {made}")
    write_finished(directory.path, steps=steps, encoding=encoding)
    write_report(directory)
    check_expectations(directory)


@doing("saving the model")
def _save_model(
    directory: RunDirectory, context: TrainingContext, trainer: Trainer, model: Any
) -> None:
    """The weights, and what a trainer with a method `extra_files(folder)` puts beside them.

    Args:
        model: with all its weights.
    """
    extra_files = getattr(trainer, "extra_files", None)
    with readable_errors("save the model to", directory.model_dir):
        if isinstance(model, ScalarModel):
            save_scalar_model(model, context.tokenizer, directory.model_dir)
        else:
            save_policy(model, context.tokenizer, directory.model_dir)
        if callable(extra_files):
            extra_files(directory.model_dir)


def _take_finished(start: _Start) -> RunDirectory:
    """Do what a kill after `finished.json` may have cut off, and judge the run as at its end, by
    what is expected of it now.

    Raises:
        AlignmentError: something expected did not come.
    """
    directory = RunDirectory.open(start.path)
    Console().print(f"{directory.path} is finished already; nothing to train", soft_wrap=True)
    if start.distributed.is_main:
        changed = take_up_recipe(directory, start.recipe, start.command)
        if changed or not directory.report.is_file():
            write_report(directory)
        check_expectations(directory)
    return directory


def write_report(directory: RunDirectory) -> None:
    """Write `report.html`, where a report of that kind is installed, and say where it is."""
    if "html" in registry.names("report"):
        path = registry.get("report", "html")(directory.path)
        Console().print(f"report: {path}", soft_wrap=True)


def check_expectations(directory: RunDirectory) -> None:
    """Print what the recipe expected and what came.

    Raises:
        AlignmentError: something expected did not come; everything is saved all the same.
    """
    results = verify_run(directory.path)
    for result in results:
        mark = "met" if result.passed else "NOT MET"
        Console().print(
            f"expect {mark}: {result.text}  ({result.detail})", markup=False, soft_wrap=True
        )
    n_failed = sum(not result.passed for result in results)
    if n_failed:
        raise AlignmentError(
            f"{n_failed} of {len(results)} expectations of the recipe were not met; the run is "
            f"complete and saved in {directory.path}. Change what makes it fall short and choose "
            "another run.name; or lower the expectations (expect in the recipe) and give the "
            "command again, which trains nothing again"
        )
