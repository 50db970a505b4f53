"""A run that exists: is the recipe the run's, but for what is asked of its outcome?"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from alignment.config.load import dump_making, dump_recipe, load_making, load_recipe
from alignment.config.pipeline import PipelineRecipe
from alignment.config.schema import Recipe
from alignment.runs.directory import RunDirectory
from alignment.runs.lineage import run_info
from alignment.types import UserInputError


def check_resumable(path: Path, recipe: Recipe | PipelineRecipe, resume: str) -> None:
    """Refuse to touch a run that is not this recipe's. What is expected of a run, and how a
    pipeline's models are compared, changes nothing of what it makes, and may differ.

    Raises:
        UserInputError: the name is taken and resuming is off, or its recipe differs (shown).
    """
    if resume == "never":
        raise UserInputError(
            f"the run {path} exists already and is not overwritten; choose another run.name, go "
            "on with it by --resume auto, or delete it"
        )
    stored = RunDirectory.open(path).recipe
    try:
        old = load_making(stored)
    except UserInputError:  # it has keys that are gone: shown as a difference
        old = stored.read_text(encoding="utf-8")
    new = dump_making(recipe)
    if old != new:
        changes = difflib.unified_diff(
            old.splitlines(), new.splitlines(), "the run's", "yours", lineterm="", n=1
        )
        raise UserInputError(
            f"the run {path} was made with another recipe:\n"
            + "\n".join(changes)
            + "\nchoose another run.name, or delete the run"
        )


def take_up_recipe(
    directory: RunDirectory, recipe: Recipe | PipelineRecipe, command: Sequence[str]
) -> bool:
    """Write the recipe down where it asks for something else than the run's does, which is kept
    as `recipe-N.yaml`.

    Returns:
        Whether it does.
    """
    text = dump_recipe(recipe)
    try:
        if dump_recipe(load_recipe(directory.recipe)) == text:
            return False
    except UserInputError:
        pass  # what the run's asks for is not right
    info = run_info(
        recipe=text,
        command=command,
        seed=recipe.run.seed,
    )
    root = directory.path.parent
    RunDirectory.create(root, directory.name, recipe_yaml=text, info=info, resume=True)
    return True
