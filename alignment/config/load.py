"""From a file or the name of a shipped recipe to a checked recipe, and back to YAML."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import ValidationError

import alignment
from alignment.config.errors import user_error
from alignment.config.fields import Section, raise_problems
from alignment.config.overrides import parse_override, set_value
from alignment.config.pipeline import (
    PipelineRecipe,
    StageConfig,
    output_problems,
    resolve_references,
)
from alignment.config.schema import Recipe, TaskConfig
from alignment.config.yaml12 import Document, parse_document, to_yaml
from alignment.types import UserInputError

T = TypeVar("T", bound=Section)

_SUFFIXES = (".yaml", ".yml")
_NOT_RECIPES = ("accelerate", "constitutions")

# Beside the package, in a checkout as in an installation. Not found by importing `recipes`: a
# user's own folder or package of that name must not hide the shipped ones.
_SHIPPED = Path(alignment.__file__).parent.parent / "recipes"


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe | PipelineRecipe:
    """Load and check a recipe; one with `stages:` is a pipeline, whose stages are checked as well.

    Args:
        path_or_name: a YAML file, or the name of a shipped recipe such as smollm2-135m/grpo.
        overrides: `key.path=value` each, in order; values are YAML 1.2.

    Raises:
        UserInputError: everything that is wrong, with file, line and dotted path.
    """
    document, folder = _read(path_or_name)
    for text in overrides:
        key, value = parse_override(text)
        set_value(document, key, value, f"override {text!r}")
    if "stages" in document.data:
        return _load_pipeline(document, folder)
    return _validate(Recipe, document)


def parse_recipe(text: str, source: str = "recipe") -> Recipe | PipelineRecipe:
    """As `load_recipe`, from the YAML text itself."""
    document = parse_document(text, source)
    if "stages" in document.data:
        return _load_pipeline(document, None)
    return _validate(Recipe, document)


def load_stage(
    pipeline: PipelineRecipe,
    name: str,
    outputs: Mapping[str, Mapping[str, str]] | None = None,
) -> Recipe:
    """The recipe of one stage, with the stage's settings in place.

    The run is named after the stage and kept in the pipeline's folder; its seed is the pipeline's
    unless the stage sets `run.seed`.

    Args:
        outputs: stage -> output -> value, for the "${stages.NAME.OUTPUT}" in the settings. None
            leaves them as they stand, to check a pipeline before it runs.

    Raises:
        UserInputError: the stage's recipe or settings are wrong.
    """
    stage = next((stage for stage in pipeline.stages if stage.name == name), None)
    if stage is None:
        known = ", ".join(stage.name for stage in pipeline.stages)
        raise UserInputError(f"the pipeline has no stage {name!r}; it has {known}")
    return _load_stage(pipeline, stage, outputs)


def load_task(name: str, settings: Sequence[str] = ()) -> TaskConfig:
    """An evaluation task by its registered name, with options from `key=value` texts.

    Raises:
        UserInputError: there is no such task, or it has no such option.
    """
    document = Document({"type": name}, f"task {name!r}")
    for text in settings:
        key, value = parse_override(text)
        set_value(document, key, value, f"task {name!r}, setting {text!r}")
    return _validate(TaskConfig, document)


def dump_recipe(recipe: Recipe | PipelineRecipe) -> str:
    """YAML of the recipe with every default written out; it loads back to an equal recipe."""
    return to_yaml(recipe.model_dump(mode="json"))


def dump_making(recipe: Recipe | PipelineRecipe) -> str:
    """As `dump_recipe`, of what decides on what a run makes: without what is only asked of that
    once it is there, `expect`, and of a pipeline `compare` and its stages' `expect`."""
    if isinstance(recipe, Recipe):
        return dump_recipe(recipe.model_copy(update={"expect": ()}))
    stages = tuple(
        stage.model_copy(update={"set": {k: v for k, v in stage.set.items() if k != "expect"}})
        for stage in recipe.stages
    )
    return dump_recipe(recipe.model_copy(update={"stages": stages, "compare": None, "expect": ()}))


def load_making(path: Path) -> str:
    """`dump_making` of the recipe in a run's folder, with what later versions of the toolkit have
    added at its default. What it asked for need not be right.

    Raises:
        UserInputError: the recipe is not one of this version's.
    """
    document, folder = _read(path)
    document.data.pop("expect", None)
    if "stages" not in document.data:
        return dump_making(_validate(Recipe, document))
    document.data.pop("compare", None)
    return dump_making(_load_pipeline(document, folder))


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the toolkit: name -> file."""
    files = (path for path in _SHIPPED.rglob("*") if path.suffix in _SUFFIXES)
    names = {path.relative_to(_SHIPPED).with_suffix("").as_posix(): path for path in files}
    return {
        name: path
        for name, path in sorted(names.items())
        if name.partition("/")[0] not in _NOT_RECIPES
    }


def _read(path_or_name: str | Path) -> tuple[Document, Path | None]:
    """The parsed recipe, and the folder of its file; None for a shipped recipe."""
    path = Path(path_or_name)
    shipped = shipped_recipes()
    if not path.is_file() and str(path_or_name) in shipped:
        source = shipped[str(path_or_name)]
        text = source.read_text(encoding="utf-8")
        return parse_document(text, f"{path_or_name}.yaml"), None
    if path.is_dir():
        inside = path / "recipe.yaml"
        hint = f"; did you mean {str(inside)!r}?" if inside.is_file() else ""
        raise UserInputError(f"recipe {str(path)!r} is a folder, not a file{hint}")
    if not path.is_file():
        raise UserInputError(_no_such_recipe(path, str(path_or_name), list(shipped)))
    try:
        return parse_document(path.read_text(encoding="utf-8"), str(path)), path.parent
    except UnicodeDecodeError as error:
        raise UserInputError(
            f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise UserInputError(f"{path}: cannot be read: {error.strerror}") from error


def _no_such_recipe(path: Path, name: str, shipped: list[str]) -> str:
    wanted = name.removesuffix(".yaml").removeprefix("recipes/")
    near = difflib.get_close_matches(wanted, shipped, n=1, cutoff=0.5)
    if not near and path.parent.is_dir():
        files = [entry.name for entry in path.parent.iterdir() if entry.suffix in _SUFFIXES]
        near = [
            str(path.parent / found) for found in difflib.get_close_matches(path.name, files, n=1)
        ]
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return (
        f"there is no recipe file {str(path)!r} and no shipped recipe {name!r}{hint} Shipped: "
        f"{', '.join(shipped) or 'none'}"
    )


def _validate(model: type[T], document: Document) -> T:
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        raise user_error(error, document) from error


def _load_pipeline(document: Document, folder: Path | None) -> PipelineRecipe:
    _anchor_stage_files(document.data["stages"], folder)
    pipeline = _validate(PipelineRecipe, document)
    recipes: dict[str, Recipe] = {}
    for index, stage in enumerate(pipeline.stages):
        lines = {key: document.origin(("stages", index, "set", key)) for key in stage.set}
        try:
            recipes[stage.name] = _load_stage(pipeline, stage, None, lines)
        except UserInputError as error:
            raise UserInputError(f"stage {stage.name!r} of {document.source}: {error}") from error
    try:
        raise_problems("pipeline", output_problems(pipeline, recipes))
    except ValidationError as error:
        raise user_error(error, document) from error
    return pipeline


def _anchor_stage_files(stages: Any, folder: Path | None) -> None:
    """Make the stages' recipe files absolute: the pipeline is kept elsewhere once it has run."""
    for stage in stages if isinstance(stages, list) else ():
        recipe = stage.get("recipe") if isinstance(stage, dict) else None
        if isinstance(recipe, str) and folder is not None and (folder / recipe).is_file():
            stage["recipe"] = str((folder / recipe).resolve())


def _load_stage(
    pipeline: PipelineRecipe,
    stage: StageConfig,
    outputs: Mapping[str, Mapping[str, str]] | None,
    origins: Mapping[str, str] = MappingProxyType({}),
) -> Recipe:
    document, _ = _read(stage.recipe)
    if "stages" in document.data:
        raise UserInputError(
            f"stage {stage.name!r}: {stage.recipe} is itself a pipeline; name a recipe of one run"
        )
    settings = {
        "run.seed": pipeline.run.seed,
        **stage.set,
        "run.name": stage.name,
        "run.dir": f"{pipeline.run.dir}/{pipeline.run.name}/stages",
    }
    for key, value in settings.items():
        resolved = value if outputs is None else resolve_references(value, outputs)
        set_value(document, key, resolved, origins.get(key, f"stage {stage.name!r}, set {key}"))
    return _validate(Recipe, document)
