"""Where a run comes from, as a graph: its parents, theirs, and the base models at the ends.

Read from the folders alone (`recipe.yaml`, `run.json`, `finished.json`); torch is not imported, and
no file is hashed whose stamp is still good (`outputs.contents`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from alignment.config.yaml12 import parse_document
from alignment.runs.directory import RunDirectory
from alignment.runs.files import readable_errors
from alignment.runs.inputs import ParentRecord, recorded_inputs
from alignment.runs.metrics import read_metrics
from alignment.runs.outputs import Finished, output_hash, read_finished
from alignment.types import AlignmentError

State = Literal["unchanged", "changed", "missing", "unrecorded"]


@dataclass(frozen=True, slots=True)
class Link:
    """What a run takes from somewhere.

    target:   key of the node it comes from.
    key:      the setting that names it; None where that was not recorded.
    output:   "model", "data", "run", or a path in the run's folder.
    recorded: its hash when the run started.
    current:  its hash now; None if it is gone.
    state:    what follows from the two; `unrecorded` where there is no earlier hash.
    """

    target: str
    key: str | None
    output: str
    recorded: str | None
    current: str | None
    state: State


@dataclass(frozen=True, slots=True)
class Node:
    """A run, a pipeline, or a model that no run made.

    name:     the run's name, or the model's.
    path:     the run's folder; None of a model.
    method:   type of its algorithm.
    steps:    so far.
    finished: whether it came to its end.
    time:     of its end, or else of its start (ISO 8601).
    used:     hashes of what it started from: "model", "tokenizer", "template", "data".
    made:     hashes of its outputs as it recorded them: "model", "data".
    parents:  what it takes from other runs, and its base model.
    stages:   keys of a pipeline's stages, in order.
    problem:  why nothing more is known of it.
    """

    name: str
    kind: Literal["run", "pipeline", "model", "missing"]
    path: str | None = None
    method: str | None = None
    steps: int | None = None
    finished: bool = False
    time: str | None = None
    used: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, str] = field(default_factory=dict)
    parents: tuple[Link, ...] = ()
    stages: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Ancestry:
    """Nodes by key; a run's key is its absolute folder. A run that several use is there once."""

    root: str
    nodes: Mapping[str, Node]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "root": self.root,
            "nodes": {key: asdict(node) for key, node in self.nodes.items()},
        }


def trace(path: Path | str) -> Ancestry:
    """The ancestry of a run, of a pipeline's stage, or of all stages of a pipeline.

    Ancestors that cannot be read are nodes with a `problem`.

    Raises:
        UserInputError: there is no run at `path`.
    """
    run = RunDirectory.open(path)
    nodes: dict[str, Node] = {}
    root = _key(run.path)
    _add(root, nodes)
    return Ancestry(root, nodes)


def _key(path: Path) -> str:
    return str(path.resolve())


def _add(key: str, nodes: dict[str, Node]) -> None:
    """Add the run in the folder `key`, then everything it leads to that is not there yet."""
    path = Path(key)
    nodes[key] = Node(path.name, "missing", key)  # what leads back here ends here
    if not path.exists():
        return
    try:
        nodes[key], ends = _read(path)
    except AlignmentError as error:
        nodes[key] = Node(path.name, "missing", key, problem=str(error))
        return
    for name, end in ends.items():
        nodes.setdefault(name, end)
    for target in (*nodes[key].stages, *(link.target for link in nodes[key].parents)):
        if target not in nodes:
            _add(target, nodes)


def _read(path: Path) -> tuple[Node, dict[str, Node]]:
    """The node of a run, and those of the models that no run made."""
    run = RunDirectory.open(path)
    info, finished = run.read_info(), read_finished(path)
    with readable_errors("read", run.recipe):
        text = run.recipe.read_text(encoding="utf-8")
    recipe = parse_document(text, str(run.recipe)).data
    if "stages" in recipe:
        return _pipeline(path, recipe, info, finished), {}
    links = tuple(_links(path, info))
    base = None if _starts_from_a_run(recipe, links) else _setting(recipe, "model", "path")
    hashes = {key: info.get(f"{key}_hash") for key in ("model", "tokenizer", "template", "data")}
    ends = {}
    if isinstance(base, str):
        ends[f"model:{base}"] = Node(base, "model")
        links = (Link(f"model:{base}", "model.path", "model", None, None, "unrecorded"), *links)
    node = Node(
        name=path.name,
        kind="run",
        path=str(path),
        method=_setting(recipe, "algorithm", "type"),
        steps=_steps(run, finished),
        finished=finished is not None,
        time=(finished.time if finished is not None else None) or info.get("time"),
        used={key: value for key, value in hashes.items() if value is not None},
        made={} if finished is None else {k: made.hash for k, made in finished.outputs.items()},
        parents=links,
    )
    return node, ends


def _pipeline(
    path: Path, recipe: Mapping[str, Any], info: Mapping[str, Any], finished: Finished | None
) -> Node:
    names = [str(_setting({"stage": stage}, "stage", "name")) for stage in recipe["stages"] or ()]
    return Node(
        name=path.name,
        kind="pipeline",
        path=str(path),
        finished=finished is not None,
        time=(finished.time if finished is not None else None) or info.get("time"),
        stages=tuple(_key(path / "stages" / name) for name in names),
    )


def _links(path: Path, info: Mapping[str, Any]) -> Iterator[Link]:
    recorded = recorded_inputs(info)
    for parent in recorded or ():
        target, current = _find(path, parent)
        if current is None:
            state: State = "missing"
        else:
            state = "unchanged" if current == parent.hash else "changed"
        yield Link(_key(target), parent.key, parent.output, parent.hash, current, state)
    if recorded is None:  # of a version that noted the folders alone
        for folder in info.get("parents", ()):
            state = "unrecorded" if Path(folder).is_dir() else "missing"
            yield Link(_key(Path(folder)), None, "run", None, None, state)


def _find(path: Path, parent: ParentRecord) -> tuple[Path, str | None]:
    """The parent's folder, and the hash of its output now.

    Folders are recorded as seen from where the run was started. Seen from elsewhere, or after a
    move, the parent is looked for beside the run, and believed if the hash is the one recorded.
    """
    recorded = Path(parent.run)
    if recorded.is_dir():
        return recorded, output_hash(recorded, parent.output, parent.files)
    beside = path.parent / recorded.name
    current = output_hash(beside, parent.output, parent.files) if beside.is_dir() else None
    return (beside, current) if current == parent.hash else (recorded, None)


def _starts_from_a_run(recipe: Mapping[str, Any], links: tuple[Link, ...]) -> bool:
    if any(link.key == "model.path" for link in links):
        return True
    model = _setting(recipe, "model", "path")
    return isinstance(model, str) and any(
        Path(model).resolve().is_relative_to(link.target) for link in links if link.key is None
    )


def _steps(run: RunDirectory, finished: Finished | None) -> int | None:
    if finished is not None and finished.steps is not None:
        return finished.steps
    records = read_metrics(run.metrics)
    return int(records[-1]["step"]) if records else None


def _setting(recipe: Mapping[str, Any], section: str, key: str) -> Any:
    value = recipe.get(section)
    return value.get(key) if isinstance(value, Mapping) else None
