"""Pipeline recipes: several runs, where a later one starts from what an earlier one made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, model_validator
from pydantic_core import InitErrorDetails

from alignment.config.errors import nearest
from alignment.config.fields import Count, Section, problem, raise_problems
from alignment.config.schema import Expectation, Name, RunConfig, TaskConfig
from alignment.types import UserInputError

STAGE_OUTPUTS: dict[str, str] = {
    "model": "folder of the final weights",
    "run": "folder of the run",
}
"""What a later stage may refer to as "${stages.NAME.OUTPUT}"."""

_REFERENCE = re.compile(r"\$\{([^}]*)\}")


class StageConfig(Section):
    """One run of a pipeline."""

    name: Name
    """Name of the stage."""
    recipe: str
    """A recipe file, relative to the pipeline's, or the name of a shipped recipe."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Values to set in the recipe, by dotted key. "${stages.NAME.model}" and "${stages.NAME.run}"
    stand for what an earlier stage made."""


class CompareConfig(Section):
    """A comparison of the stages' models, and of the model the first one started from."""

    tasks: tuple[TaskConfig, ...]
    """What to compare them on."""
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
    try:
        return outputs[stage][output]
    except KeyError:
        raise UserInputError(
            f"${{{reference}}}: there is no such output; finished stages: "
            f"{', '.join(outputs) or 'none'}"
        ) from None


def _reference_problems(value: Any, stage: str, earlier: list[str]) -> Iterator[str]:
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
