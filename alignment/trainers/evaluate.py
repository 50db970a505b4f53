"""`align eval`: which model is evaluated, and where its results are saved.

They go into `evals/` of the run, or of another folder, as evaluations in training do, so that
`align compare` and `align report` find them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config.checks import COMPARING_TASKS
from alignment.config.load import load_recipe
from alignment.config.methods.base import needs_of
from alignment.config.model import ModelConfig
from alignment.config.schema import Recipe, TaskConfig
from alignment.runs.directory import RunDirectory
from alignment.runs.files import readable_errors
from alignment.runs.metrics import read_metrics
from alignment.trainers.evaluation import evaluate_model, made_by
from alignment.trainers.finished import find_model
from alignment.types import UserInputError

# What a file's name can say of a task's options; a hash stands for anything else.
_READABLE = re.compile(r"[\w.,=+\-\[\]]{1,100}")


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What `align eval` found: results by task, and the folder that they are saved in, if any."""

    results: Mapping[str, Any]
    folder: Path | None


@dataclass(frozen=True, slots=True)
class _Subject:
    """A model to evaluate.

    model:     as the recipe describes it that names or made it.
    recipe:    where data, rewards and sampling come from.
    trained:   by what recipe it was, or will have been: its loss says how it ranks completions.
    reference: what it is compared with, where nothing else is asked for: where its run started.
    step:      training steps that the run has made of it; 0 for a model as it was handed over.
    """

    model: ModelConfig
    recipe: Recipe
    trained: Recipe
    reference: ModelConfig | None
    step: int
    folder: Path | None


def evaluate(
    target: str,
    tasks: Sequence[TaskConfig],
    *,
    data_from: Recipe | None = None,
    base: bool = False,
    reference: str | None = None,
    seed: int = 0,
    out: Path | None = None,
    overwrite: bool = False,
) -> Evaluated:
    """Run tasks on a run's model or on any other, and save the results as `evals/NAME-step-NNNNNN`.

    The name is the task's with its options and the seed (`evaluation_name`), the step that of the
    run's last one, or 0.

    Args:
        target: a finished run's folder, or a model with `data_from`.
        data_from: recipe for data, rewards and sampling; by default the run's own.
        base: evaluate the model that the run started from.
        reference: run or model that the policy is compared with, by tasks that do; by default the
            model that the run started from, if its method compares with one.
        seed: of the samples; equal seeds give every model the same random numbers.
        out: folder whose `evals/` takes the results; by default the run's. Those of a model that
            is no run's are not saved without it.
        overwrite: replace results of that name.

    Raises:
        UserInputError: the target has no model or no data, it cannot be compared with the
            reference, or results of that name are there.
    """
    subject = _subject(target, data_from, base=base)
    folder = subject.folder if out is None else out / "evals"
    names = {
        task.name or task.type: evaluation_name(task, seed, reference=reference) for task in tasks
    }
    places = {} if folder is None else _places(folder, names, subject.step)
    taken = [path for path in places.values() if path.exists()]
    if taken and not overwrite:
        raise UserInputError(
            f"the evaluation {taken[0]} exists already and is not overwritten; align report shows "
            "it; give --overwrite to make it again, --set name=NAME to call this one otherwise, or "
            "another --out"
        )
    compares = any(task.type in COMPARING_TASKS for task in tasks)
    results = evaluate_model(
        subject.recipe,
        subject.model,
        tasks,
        seed=seed,
        reference=_reference(subject, reference) if reference or compares else None,
        algorithm=subject.trained.algorithm,
    )
    for name, path in places.items():
        with readable_errors("save the evaluation", path):
            results[name].save(path)
    return Evaluated(results, folder)


def _places(folder: Path, names: Mapping[str, str], step: int) -> dict[str, Path]:
    """Where the summary of each task goes."""
    return {task: folder / f"{name}-step-{step:06d}.json" for task, name in names.items()}


def evaluation_name(task: TaskConfig, seed: int, *, reference: str | None = None) -> str:
    """Such as `verifiable,samples=2,seed=0`: what is called the same was asked for alike.

    Options come in alphabetical order, those only that were given, with a reference that was given
    among them; `align compare` pairs what has one name in both runs.
    """
    given = dict(task.options) | ({} if reference is None else {"reference": reference})
    options = ",".join(f"{key}={_text(given[key])}" for key in sorted(given))
    if options and not _READABLE.fullmatch(options):
        options = hashlib.sha256(options.encode()).hexdigest()[:8]
    return ",".join(filter(None, (task.name or task.type, options, f"seed={seed}")))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def _subject(target: str, data_from: Recipe | None, *, base: bool) -> _Subject:
    path = Path(target)
    if not (path / "recipe.yaml").is_file():
        if base:
            raise UserInputError(
                f"--base: {target} is not a run, which would have started from one"
            )
        if data_from is None:
            raise UserInputError(
                f"{target} is not a run, so there is no data to evaluate on; add --recipe RECIPE"
            )
        model = _named(data_from.model, target)
        return _Subject(model, data_from, data_from, None, 0, None)
    run = RunDirectory.open(path)
    own = load_recipe(run.recipe)
    if not isinstance(own, Recipe):
        raise UserInputError(f"{target} is a pipeline; name one of its stages: {target}/stages/")
    recipe = data_from or own
    if needs_of(recipe.algorithm).model != needs_of(own.algorithm).model:
        raise UserInputError(
            f"--recipe: one of {target} and the recipe {recipe.run.name!r} trains a policy and the "
            "other a model with a scalar head; give a recipe of the same kind"
        )
    compares = needs_of(own.algorithm).model == "policy" and own.model.reference.mode != "none"
    start = own.model if compares else None
    if base:
        return _Subject(own.model, recipe, own, start, 0, run.evals_dir)
    steps = max((record["step"] for record in read_metrics(run.metrics)), default=0)
    model = made_by(own.model, find_model(target).path)
    return _Subject(model, recipe, own, start, steps, run.evals_dir)


def _named(section: ModelConfig, path: str) -> ModelConfig:
    """The section for a model that may be another than its own, whose revision is no one else's."""
    revision = section.revision if path == section.path else None
    return section.model_copy(update={"path": path, "revision": revision})


def _reference(subject: _Subject, asked: str | None) -> ModelConfig | None:
    """What the subject is compared with: what was asked for, or where its run started."""
    if asked is None:
        return subject.reference
    if needs_of(subject.recipe.algorithm).model != "policy":
        raise UserInputError(
            f"--reference {asked}: {subject.model.path} is a model with a scalar head, which is "
            "compared with nothing; leave it out"
        )
    found = find_model(asked)
    if found.recipe is not None:
        return made_by(found.recipe.model, found.path)
    return _named(subject.model, asked)
