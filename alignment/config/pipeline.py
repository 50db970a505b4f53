"""Pipeline recipes: several runs, where a later one starts from what an earlier one made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator
from pydantic_core import InitErrorDetails

from alignment.config.errors import nearest
from alignment.config.fields import Count, Path, Section, problem, raise_problems
from alignment.config.methods.base import compares_with_reference, needs_of
from alignment.config.options import build
from alignment.config.schema import Expectation, Name, Recipe, RunConfig, TaskConfig
from alignment.types import UserInputError

STAGE_OUTPUTS: dict[str, str] = {
    "model": "folder of the final weights",
    "data": "file of the data set it made",
    "run": "folder of the run",
}
"""What a later stage may refer to as "${stages.NAME.OUTPUT}"."""

BASE = "base"
"""In a comparison, the model that the first stage starts from."""

_REFERENCE = re.compile(r"\$\{([^}]*)\}")


class StageConfig(Section):
    """One run of a pipeline."""

    name: Name
    """Name of the stage."""
    recipe: str
    """A recipe file, relative to the pipeline's, or the name of a shipped recipe."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Values to set in the recipe, by dotted key. "${stages.NAME.model}", "${stages.NAME.data}" and
    "${stages.NAME.run}" stand for what an earlier stage made."""


class CompareConfig(Section):
    """A comparison of the stages' models, and of the model the first one started from."""

    tasks: tuple[TaskConfig, ...]
    """What to compare them on."""
    models: tuple[str, ...] | None = None
    """Stages to compare, in this order, and `base`, the model that the first stage starts from;
    null takes base and every stage that trains a policy."""
    reference: str | None = None
    """Model that tasks measure the distance from, such as "${stages.sft.model}"; null is none."""
    seed: Count = 0
    """Seed of the samples; the same for every model."""


class PipelineRecipe(Section):
    """Several runs in order."""

    run: RunConfig
    """What the pipeline is called; its stages are kept inside its folder."""
    stages: tuple[StageConfig, ...]
    """The runs."""
    compare: CompareConfig | None = None
    """How to compare what came out; null skips it."""
    expect: tuple[Expectation, ...] = ()
    """What must hold of the comparison's metrics."""

    @model_validator(mode="after")
    def _stages_fit(self) -> PipelineRecipe:
        raise_problems("pipeline", self._problems())
        return self

    def _problems(self) -> Iterator[InitErrorDetails]:
        if not self.stages:
            yield problem(("stages",), "a pipeline needs at least one stage")
        earlier: list[str] = []
        for index, stage in enumerate(self.stages):
            if stage.name in earlier:
                yield problem(
                    ("stages", index, "name"), f"another stage is called {stage.name!r}; rename one"
                )
            for key, value in stage.set.items():
                for message in _reference_problems(value, stage.name, earlier):
                    yield problem(("stages", index, "set", key), message)
            earlier.append(stage.name)
        if self.compare is not None:
            for path, message in _compare_problems(self.compare, earlier):
                yield problem(("compare", *path), message)
        elif self.expect:
            message = "there is no comparison whose metrics these could be; add compare, or remove"
            yield problem(("expect",), f"{message} them (a stage has an expect of its own)")


def makes_policy(recipe: Recipe) -> bool:
    """Whether a run of the recipe leaves a language model: no reward model, and not data alone."""
    return needs_of(recipe.algorithm).makes_policy


def compared_models(pipeline: PipelineRecipe, recipes: Mapping[str, Recipe]) -> tuple[str, ...]:
    """What is compared, in order: names of stages, and `base`.

    Args:
        recipes: those of the stages, by name.
    """
    if pipeline.compare is not None and pipeline.compare.models is not None:
        return pipeline.compare.models
    return (BASE, *(name for name, recipe in recipes.items() if makes_policy(recipe)))


def task_recipe(recipes: Mapping[str, Recipe]) -> Recipe:
    """Where a comparison's held-out data, rewards and sampling come from: the last stage with a
    policy that has rewards, or the last that trains a policy where none has.

    Args:
        recipes: those of the stages, by name; one of them makes a policy.
    """
    latest_first = list(recipes.values())[::-1]
    with_policy = [r for r in latest_first if needs_of(r.algorithm).model == "policy"]
    with_rewards = [recipe for recipe in with_policy if recipe.rewards]
    return [*with_rewards, *filter(makes_policy, with_policy)][0]


def output_problems(
    pipeline: PipelineRecipe, recipes: Mapping[str, Recipe]
) -> Iterator[InitErrorDetails]:
    """References to outputs that a stage's method does not make, and a comparison that could not be
    made of what comes out: better known before the stages have run.

    Args:
        recipes: those of the stages, by name.
    """
    for index, stage in enumerate(pipeline.stages):
        for key, value in stage.set.items():
            for name, output in _stage_references(value):
                message = _not_made(output, name, recipes[name])
                if message is None and (key, output) == ("model.path", "model"):
                    message = _no_start(name, recipes[name], recipes[stage.name])
                if message is not None:
                    yield problem(("stages", index, "set", key), message)
    if pipeline.compare is None:
        return
    for name, _ in _stage_references(pipeline.compare.reference):
        if not makes_policy(recipes[name]):
            message = f"stage {name!r} makes no policy to measure from; name one that does"
            yield problem(("compare", "reference"), message)
    if not any(map(makes_policy, recipes.values())):
        message = "no stage trains a policy, so there is nothing to compare; remove it"
        yield problem(("compare",), message)
        return
    for index, name in enumerate(pipeline.compare.models or ()):
        if name != BASE and not makes_policy(recipes[name]):
            message = f"stage {name!r} trains no policy that could be compared; leave it out"
            yield problem(("compare", "models", index), message)
    yield from _task_problems(pipeline.compare, task_recipe(recipes))


def _task_problems(compare: CompareConfig, recipe: Recipe) -> Iterator[InitErrorDetails]:
    """Options that contradict each other, or the recipe that the tasks are served by."""
    if not compare.tasks:
        yield problem(("compare", "tasks"), "names no task to compare on; list one, or more")
    for index, config in enumerate(compare.tasks):
        at = ("compare", "tasks", index)
        try:
            task = build("task", config.type, config.options)
        except UserInputError as error:
            yield problem(at, str(error))
            continue
        check_needs = getattr(task, "check_needs", None)
        if not callable(check_needs):
            continue
        try:
            check_needs(
                rewards=[reward.name or reward.type for reward in recipe.rewards],
                held_out=recipe.data.held_out,
                reference=compare.reference is not None,
                ranks_alone=not compares_with_reference(recipe.algorithm),
            )
        except UserInputError as error:
            yield problem(
                at, f"{error} (its data and rewards are those of stage {recipe.run.name!r})"
            )


def _stage_references(value: Any) -> Iterator[tuple[str, str]]:
    """(stage, output) of every reference in a value."""
    for reference in references(value):
        stage, _, output = reference.removeprefix("stages.").rpartition(".")
        yield stage, output


def _not_made(output: str, name: str, recipe: Recipe) -> str | None:
    made = needs_of(recipe.algorithm).makes
    if output in ("run", made):
        return None
    return f"stage {name!r} makes no {output}; write ${{stages.{name}.{made}}}, or name another"


def _no_start(name: str, theirs: Recipe, ours: Recipe) -> str | None:
    made, wanted = needs_of(theirs.algorithm).model, needs_of(ours.algorithm).model
    if (made, wanted) != ("scalar", "policy"):
        return None
    return (
        f"stage {name!r} makes a reward model, which is no policy to start from; name a stage "
        "that makes one"
    )


def _compare_problems(compare: CompareConfig, stages: Sequence[str]) -> Iterator[tuple[Path, str]]:
    if BASE in stages:
        yield (), f"a stage is called {BASE!r}, as the model that the first one starts from is"
    for message in _reference_problems(compare.reference, None, stages):
        yield ("reference",), message
    if compare.models == ():
        yield ("models",), "names nothing to compare; leave it out to compare all"
    known = (BASE, *stages)
    for index, name in enumerate(compare.models or ()):
        if name not in known:
            hint = nearest(name, known) or ";"
            message = f"no stage is called {name!r}{hint} there are {', '.join(known)}"
            yield ("models", index), message
        if name in (compare.models or ())[:index]:
            yield ("models", index), f"{name!r} is named twice; keep one"


def references(value: Any) -> Iterator[str]:
    """The inside of every "${...}" in a value, however deep."""
    if isinstance(value, str):
        yield from _REFERENCE.findall(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from references(item)


def resolve_references(value: Any, outputs: Mapping[str, Mapping[str, str]]) -> Any:
    """`value` with every "${stages.NAME.OUTPUT}" replaced by `outputs[NAME][OUTPUT]`.

    Raises:
        UserInputError: the stage has no such output yet.
    """
    if isinstance(value, str):
        return _REFERENCE.sub(lambda match: _output(match.group(1), outputs), value)
    if isinstance(value, Mapping):
        return {key: resolve_references(item, outputs) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [resolve_references(item, outputs) for item in value]
    return value


def _output(reference: str, outputs: Mapping[str, Mapping[str, str]]) -> str:
    _, _, rest = reference.partition(".")
    stage, _, output = rest.rpartition(".")
    if stage not in outputs:
        raise UserInputError(
            f"${{{reference}}}: there is no such output; finished stages: "
            f"{', '.join(outputs) or 'none'}"
        )
    if output not in outputs[stage]:
        raise UserInputError(
            f"${{{reference}}}: stage {stage!r} made no {output}; it made "
            f"{', '.join(outputs[stage])}"
        )
    return outputs[stage][output]


def _reference_problems(value: Any, stage: str | None, earlier: Sequence[str]) -> Iterator[str]:
    for reference in references(value):
        head, _, rest = reference.partition(".")
        name, _, output = rest.rpartition(".")
        if head != "stages" or not name or not output:
            yield f"${{{reference}}} is not of the form ${{stages.NAME.model}}"
        elif name == stage:
            yield f"${{{reference}}} refers to the stage itself; only earlier stages have outputs"
        elif name not in earlier:
            known = f"earlier stages: {', '.join(earlier)}" if earlier else "this is the first"
            hint = nearest(name, earlier) or ";"
            yield f"${{{reference}}}: no earlier stage is called {name!r}{hint} {known}"
        elif output not in STAGE_OUTPUTS:
            hint = nearest(output, list(STAGE_OUTPUTS)) or ";"
            known = ", ".join(f"{key} ({what})" for key, what in STAGE_OUTPUTS.items())
            yield f"${{{reference}}}: a stage has no output {output!r}{hint} it has {known}"
