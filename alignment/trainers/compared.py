"""What a pipeline's comparison rests on, and what each of its models is to the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from alignment.config.load import dump_making
from alignment.config.pipeline import CompareConfig, task_recipe
from alignment.config.schema import Recipe
from alignment.config.yaml12 import to_yaml
from alignment.runs.inputs import find_parents, place_in_a_run
from alignment.runs.lineage import text_hash
from alignment.runs.outputs import output_hash

Role = Literal["itself", "ancestor", "start"]
"""What a compared model is to the reference, or the reference to it: the model is the reference
itself; the model is an ancestor, which the reference was made from; the reference is the model that
this one's training started from. A model that is none of these has no role."""


def rests_on(
    config: CompareConfig,
    recipes: Mapping[str, Recipe],
    models: Mapping[str, str],
    reference: str | None,
) -> dict[str, str]:
    """Hashes of what decides on the results of a comparison, by what it is.

    What no run made (a hub model, a folder of the user's) counts by its name alone.

    Args:
        recipes: those of the stages.
        models: name -> path, of what is compared.
        reference: path of the model that distances are measured from.

    Raises:
        AlignmentError: what a run made cannot be read.
    """
    served_by = task_recipe(recipes)
    stage = served_by.run.name
    found = {
        "compare": text_hash(to_yaml(config.model_dump(mode="json"))),
        f"the recipe of {stage}": text_hash(dump_making(served_by)),
        **{f"{parent.key} of {stage}": parent.hash for parent in find_parents(served_by)},
        **{f"model {name}": _identity(path) for name, path in models.items()},
    }
    return found if reference is None else {**found, "the reference": _identity(reference)}


def roles(
    models: Mapping[str, str],
    reference: str | None,
    recipes: Mapping[str, Recipe],
    made: Mapping[str, str],
) -> dict[str, Role]:
    """What each compared model is to the reference, where it is something.

    Args:
        models: name -> path, of what is compared.
        reference: path of the model that distances are measured from.
        recipes: those of the stages.
        made: stage -> path of the model that it made.
    """
    if reference is None:
        return {}
    nearest_first = sorted(models, key=lambda name: models[name] != reference)
    own = _identity(reference)
    same = [name for name in nearest_first if _identity(models[name]) == own]
    path = models[same[0]] if same else reference
    found: dict[str, Role] = {
        name: "start" for name in models if name in recipes and recipes[name].model.path == path
    }
    ancestors, makers = set(), {made[name]: name for name in made}
    while path in makers:
        path = recipes[makers[path]].model.path
        ancestors.add(path)
    found |= {name: "ancestor" for name, own in models.items() if own in ancestors}
    return found | dict.fromkeys(same[:1], "itself")


def _identity(path: str) -> str:
    """Of a model that a run made the hash of what is there now, else what it is called."""
    place = place_in_a_run(path)
    return path if place is None else output_hash(*place) or path
