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

from alignment.config.load import load_recipe
from alignment.config.schema import Recipe, TaskConfig
from alignment.runs.directory import RunDirectory
from alignment.runs.files import readable_errors
from alignment.runs.metrics import read_metrics
from alignment.trainers.evaluation import evaluate_model
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

    recipe: where data, rewards and sampling come from.
    step:   training steps that the run has made of it; 0 for a model as it was handed over.
    """

    model: str
    recipe: Recipe
    step: int
    folder: Path | None


def evaluate(
    target: str,
    tasks: Sequence[TaskConfig],
    *,
    data_from: Recipe | None = None,
    base: bool = False,
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
        seed: of the samples; equal seeds give every model the same random numbers.
        out: folder whose `evals/` takes the results; by default the run's. Those of a model that
            is no run's are not saved without it.
        overwrite: replace results of that name.

    Raises:
        UserInputError: the target has no model or no data, or results of that name are there.
    """
    subject = _subject(target, data_from, base=base)
    folder = subject.folder if out is None else out / "evals"
    places = {} if folder is None else _places(folder, tasks, seed, subject.step)
    taken = [path for path in places.values() if path.exists()]
    if taken and not overwrite:
        raise UserInputError(
            f"the evaluation {taken[0]} exists already and is not overwritten; align report shows "
            "it; give --overwrite to make it again, --set name=NAME to call this one otherwise, or "
            "another --out"
        )
    results = evaluate_model(subject.recipe, subject.model, tasks, seed=seed)
    for name, path in places.items():
        with readable_errors("save the evaluation", path):
            results[name].save(path)
    return Evaluated(results, folder)


def _places(folder: Path, tasks: Sequence[TaskConfig], seed: int, step: int) -> dict[str, Path]:
    """Where the summary of each task goes."""
    return {
        task.name or task.type: folder / f"{evaluation_name(task, seed)}-step-{step:06d}.json"
        for task in tasks
    }


def evaluation_name(task: TaskConfig, seed: int) -> str:
    """Such as `verifiable,samples=2,seed=0`: what is called the same was asked for alike.

    Options come in alphabetical order, those only that were given; `align compare` pairs what has
    one name in both runs.
    """
    options = ",".join(f"{key}={_text(task.options[key])}" for key in sorted(task.options))
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
        return _Subject(target, data_from, 0, None)
    run = RunDirectory.open(path)
    own = load_recipe(run.recipe)
    if not isinstance(own, Recipe):
        raise UserInputError(f"{target} is a pipeline; name one of its stages: {target}/stages/")
    recipe = data_from or own
    if base:
        revision = {"revision": own.model.revision}
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=revision)})
        return _Subject(own.model.path, recipe, 0, run.evals_dir)
    steps = max((record["step"] for record in read_metrics(run.metrics)), default=0)
    return _Subject(find_model(target).path, recipe, steps, run.evals_dir)
