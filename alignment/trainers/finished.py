"""The model that a user names: that of a finished run, or any other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alignment.config.load import load_recipe
from alignment.config.pipeline import PipelineRecipe
from alignment.config.schema import Recipe
from alignment.runs.directory import RunDirectory
from alignment.runs.outputs import FINISHED
from alignment.trainers.going_on import command_to_go_on
from alignment.types import UserInputError


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model's path (or catalogue name, or hub id), and the recipe of the run that made it; None
    where it is not a run's."""

    path: str
    recipe: Recipe | None


def find_model(name: str) -> NamedModel:
    """The model of the run in folder `name`, of a pipeline's last stage, or else of that name.

    Raises:
        UserInputError: the run has no model.
    """
    folder = Path(name)
    if not (folder / "recipe.yaml").is_file():
        return NamedModel(name, None)
    run = RunDirectory.open(folder)
    recipe = load_recipe(run.recipe)
    if isinstance(recipe, PipelineRecipe):
        return find_model(str(run.path / "stages" / recipe.stages[-1].name))
    if run.model_dir.is_dir():
        return NamedModel(str(run.model_dir), recipe)
    if (run.path / FINISHED).is_file():
        raise UserInputError(f"{name} made data, not a model; name a run that trains one")
    raise UserInputError(
        f"{name} has no model yet, because the run is not finished; go on with it by "
        f"{command_to_go_on(run)}"
    )
