"""What a run takes from other runs: found, compared with what is there now, checked to fit.

A run's `run.json` lists its inputs, one for each setting of its recipe that leads into the folder
of another run:

    "inputs": [{"key": "model.path", "run": "runs/x/stages/sft", "output": "model",
                "hash": SHA-256 of the output when the run started}]

Of what the other run does not list among its outputs, the files are noted too, as below, so that
they are read again only where they were touched.

What lies in no run is the user's own. The policy's model, the data and the like are hashed as they
were loaded; of further models, the files are:

    "models": [{"key": "algorithm.critic.path", "path": "/models/rm",
                "files": {"config.json": {"hash": SHA-256, "size": 734, "mtime_ns": ...}, ...}}]
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignment.config.schema import Recipe
from alignment.runs.directory import RunDirectory
from alignment.runs.files import readable_errors
from alignment.runs.outputs import (
    Encoding,
    FileStamp,
    contents,
    output_contents,
    output_hash,
    output_paths,
    read_finished,
    short_hash,
)
from alignment.types import UserInputError

# Where this run is kept, what is asked of it, and where its weights are put for a server.
_OWN_SECTIONS = ("run", "expect", "rollout")
_POLICY = "model.path"  # its weights are hashed in memory
_CACHE = "cache"  # the last part of settings that name what a run writes, too
_NOTED_BY_ITS_RUN = ("model", "data", "run")
_MODEL_CONFIGS = ("config.json", "adapter_config.json")


@dataclass(frozen=True, slots=True)
class ParentRecord:
    """One thing that a run takes from another run.

    key:      the setting that names it, such as model.path.
    run:      folder of the other run.
    output:   "model", "data", "run" for the whole folder, or the path of anything else in it.
    hash:     of the output, as it was found.
    encoding: how the other run turned text into tokens; None where that is not recorded.
    files:    the files that the hash is of, by name, where the other run notes none of them.
    """

    key: str
    run: str
    output: str
    hash: str
    encoding: Encoding | None = None
    files: Mapping[str, FileStamp] = field(default_factory=dict)

    def as_input(self) -> dict[str, Any]:
        """The entry of `run.json`."""
        entry = {"key": self.key, "run": self.run, "output": self.output, "hash": self.hash}
        files = {name: asdict(stamp) for name, stamp in self.files.items()}
        return {**entry, "files": files} if files else entry


def find_parents(recipe: Recipe) -> tuple[ParentRecord, ...]:
    """What the recipe takes from other runs, in the order of its settings.

    A setting counts if it is a path with a separator in it, exists, and lies in the folder of a
    run. So it makes no difference whether a pipeline put it there or a person. A `cache` does not
    count: it is filled while the run goes on, and changes no result. Files that are as the run of
    the recipe noted them at its start are not read again.

    Raises:
        AlignmentError: what it names cannot be read.
    """
    found = []
    known = _noted_files(Path(recipe.run.dir) / recipe.run.name)
    sections = recipe.model_dump(mode="json", exclude=set(_OWN_SECTIONS))
    for key, value in _texts(sections, ()):
        place = None if key.endswith(f".{_CACHE}") else place_in_a_run(value)
        if place is None:
            continue
        run, output = place
        made = output_contents(run, output, known.get((str(run), output), {}))
        if made is not None:
            encoding = None if _exchanges_text(sections, key) else encoding_of(run)
            files = {} if output in _NOTED_BY_ITS_RUN else made.files
            found.append(ParentRecord(key, str(run), output, made.hash, encoding, files))
    return tuple(found)


def _noted_files(run: Path) -> dict[tuple[str, str], Mapping[str, FileStamp]]:
    """(run, output) -> stamps, of the inputs that a run recorded; none where there is no run."""
    if not (run / "run.json").is_file():
        return {}
    recorded = recorded_inputs(RunDirectory(run).read_info())
    return {(parent.run, parent.output): parent.files for parent in recorded or ()}


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model besides the policy's that a run starts from, and that no run made.

    key:   the setting that names it, such as algorithm.critic.path.
    path:  its folder.
    files: the files in it, as they were found, by name.
    """

    key: str
    path: str
    files: Mapping[str, FileStamp]


def find_models(recipe: Recipe) -> tuple[ModelRecord, ...]:
    """The critic, reward models and judges that the recipe takes from folders of the user's.

    A setting counts if it is a path, and there is a model's configuration in that folder.

    Raises:
        AlignmentError: a file of one cannot be read.
    """
    files: dict[Path, Mapping[str, FileStamp]] = {}
    found = []
    for key, value in _texts(recipe.model_dump(mode="json", exclude=set(_OWN_SECTIONS)), ()):
        folder = None if key == _POLICY else _model_folder(key, value)
        if folder is not None:
            if folder not in files:
                files[folder] = _files_in(folder)
            found.append(ModelRecord(key, str(folder), files[folder]))
    return tuple(found)


def _model_folder(key: str, text: str) -> Path | None:
    """The folder of a model outside of any run that a setting leads to."""
    path = _existing_path(text) if "/" in text or key.endswith(".path") else None
    if path is None or place_in_a_run(text) is not None:
        return None
    return path if any((path / name).is_file() for name in _MODEL_CONFIGS) else None


def _files_in(folder: Path, known: Mapping[str, FileStamp] | None = None) -> dict[str, FileStamp]:
    """Stamps of the files that lie in a folder itself, as a model's do: what is below it (the
    checkpoints of another trainer) is not loaded."""
    files: dict[str, FileStamp] = {}
    with readable_errors("read", folder):
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for name in names:
        if not name.startswith("."):
            files |= contents(folder / name, known or {}).files
    return files


def _exchanges_text(sections: Mapping[str, Any], key: str) -> bool:
    """Whether the run only talks with what stands there, so that tokens need not be the same: a
    judge, or a reward model that tokenizes anew."""
    parts = key.split(".")
    if parts[0] == "rewards":
        reward: Mapping[str, Any] = sections["rewards"][int(parts[1])]
        return reward.get("on_mismatch") == "retokenize"
    return parts[:2] == ["algorithm", "judge"]


def encoding_of(run: Path) -> Encoding | None:
    """How a run turned text into tokens: as recorded at its end, or else at its start.

    Raises:
        AlignmentError: its record is damaged.
    """
    finished = read_finished(run)
    if finished is not None and finished.encoding is not None:
        return finished.encoding
    info = RunDirectory(run).read_info()
    tokenizer, template = info.get("tokenizer_hash"), info.get("template_hash")
    return None if tokenizer is None and template is None else Encoding(tokenizer, template)


def recorded_inputs(info: Mapping[str, Any]) -> tuple[ParentRecord, ...] | None:
    """The inputs listed in a `run.json`; None where it is of a version that listed none."""
    if "inputs" not in info:
        return None
    return tuple(
        ParentRecord(**{**entry, "files": _stamps(entry.get("files", {}))})
        for entry in info["inputs"]
    )


def _stamps(files: Mapping[str, Mapping[str, Any]]) -> dict[str, FileStamp]:
    return {name: FileStamp(**stamp) for name, stamp in files.items()}


def refuse_changed_inputs(run: Path, name: str) -> bool:
    """Compare what a run started from, finished or not, with what its parents hold now.

    What is gone is no change: a finished run stands without its parents.

    Args:
        name: of the run in messages, such as "stage 'rl'".

    Returns:
        Whether there was a record to compare with; without one, nothing is known.

    Raises:
        UserInputError: something changed, so that the run belongs to what is no more.
        AlignmentError: a record cannot be read.
    """
    recorded = recorded_inputs(RunDirectory(run).read_info())
    changes = []
    for parent in recorded or ():
        now = output_hash(Path(parent.run), parent.output, parent.files)
        if now not in (None, parent.hash):
            changes.append(
                f"{parent.key} is the {parent.output} of {parent.run}, which was "
                f"{short_hash(parent.hash)} when {name} started and is {short_hash(now)} now"
            )
    if changes:
        raise UserInputError(
            f"{name} was made from what has changed since: {'; '.join(changes)}. It is neither "
            f"used as it is nor overwritten: delete {run} to run it again, or choose another "
            "run.name"
        )
    return recorded is not None


def refuse_changed_start(run: Path, recipe: Recipe, now: Mapping[str, str]) -> None:
    """Compare what a run is about to go on with, with what it started from.

    Args:
        recipe: as it was loaded: what it names no more is not compared.
        now: hashes of its "model", "tokenizer", "template" and "data" as they were just loaded.

    Raises:
        UserInputError: something changed; the message names it.
        AlignmentError: the run's record cannot be read.
    """
    source = recipe.data.options.get("path", recipe.data.type)
    names = {
        "model": f"model.path, {recipe.model.path}",
        "tokenizer": f"the tokenizer of {recipe.model.path}",
        "template": f"the chat template of {recipe.model.chat_template or recipe.model.path}",
        "data": f"the rows of data, {source}",
    }
    info = RunDirectory.open(run).read_info()
    changes = [
        f"{name}, {short_hash(before)} when it started and {short_hash(now[key])} now"
        for key, name in names.items()
        if (before := info.get(f"{key}_hash")) is not None and before != now[key]
    ]
    changes += _changed_models(recipe, info)
    if changes:
        raise UserInputError(
            f"the run {run} cannot go on: what it started from has changed since: "
            f"{'; '.join(changes)}. Put it back as it was, choose another run.name, or delete the "
            "run"
        )


def _changed_models(recipe: Recipe, info: Mapping[str, Any]) -> Iterator[str]:
    """The further models that are not as a `run.json` has them. Earlier versions listed none."""
    keys = {key for key, _ in _texts(recipe.model_dump(mode="json"), ())}
    for model in info.get("models", ()):
        before = _stamps(model["files"])
        folder = Path(model["path"])
        if model["key"] not in keys or not folder.is_dir():
            continue
        now = _files_in(folder, before)
        names = [
            name
            for name in sorted(before | now)
            if name not in before or name not in now or before[name].hash != now[name].hash
        ]
        if names:
            yield f"{model['key']}, {folder} ({', '.join(names)})"


def check_compatible(child: Encoding, parents: Sequence[ParentRecord]) -> None:
    """Refuse parents that turned text into other tokens than this run does.

    A model knows only the tokens and the conversation format that it was trained on, and nothing
    fails where it gets others: it is just bad. What is not recorded is not compared, and of what is
    neither a run's model nor its data nothing is known.

    Raises:
        UserInputError: every mismatch, with its reason.
    """
    problems = [problem for parent in parents for problem in _mismatches(child, parent)]
    if problems:
        raise UserInputError("\n".join(problems))


def _mismatches(child: Encoding, parent: ParentRecord) -> Iterator[str]:
    theirs = parent.encoding
    if parent.output not in ("model", "data") or theirs is None:
        return
    role, reason = _role(parent)
    start = f"{parent.key}: {role} {parent.run} has"
    if _differ(theirs.tokenizer, child.tokenizer):
        yield (
            f"{start} another tokenizer ({short_hash(theirs.tokenizer)}) than this run "
            f"({short_hash(child.tokenizer)}){_sizes(theirs, child)}; {reason}. Use one tokenizer "
            f"throughout: start both from the same base model{_way_out(parent)}"
        )
    if _differ(theirs.template, child.template):
        yield (
            f"{start} another chat template ({short_hash(theirs.template)}) than this run "
            f"({short_hash(child.template)}); {reason}. Set model.chat_template to the same in "
            "both, or in neither (a model's folder holds the template that it was trained with)"
            f"{_way_out(parent)}"
        )


def _way_out(parent: ParentRecord) -> str:
    """Rows are text: what stands against them is how they came about, which a copy does not say."""
    if parent.output != "data":
        return ""
    data = output_paths(Path(parent.run))["data"]
    return (
        f". If these texts are to be read so (a reward model of another family learns from them), "
        f"copy {data} to a place outside of any run, and set {parent.key} to the copy"
    )


def _role(parent: ParentRecord) -> tuple[str, str]:
    """What the parent is to this run, and why both have to read text in the same way."""
    section = parent.key.partition(".")[0]
    if parent.output == "data":
        return "the data of", "its texts were made with that one, and would be read with this one"
    if section == "model":
        return (
            "the model of",
            "what it learned is tied to the one it was trained with, and would be lost",
        )
    names = {"rewards": "the reward model of", "algorithm": "the model of"}
    role = "the critic of" if "critic" in parent.key else names.get(section, "the model of")
    return role, "it would be given tokens that mean something else to it"


def _differ(theirs: str | None, ours: str | None) -> bool:
    return theirs is not None and ours is not None and theirs != ours


def _sizes(theirs: Encoding, ours: Encoding) -> str:
    if theirs.vocab_size is None or ours.vocab_size is None:
        return ""
    if theirs.vocab_size == ours.vocab_size:
        return f", of the same {ours.vocab_size} tokens in number"
    return f", {theirs.vocab_size} tokens and not {ours.vocab_size}"


def _texts(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in nested settings."""
    if isinstance(value, str):
        yield ".".join(path), value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _texts(item, (*path, str(index)))


def place_in_a_run(text: str) -> tuple[Path, str] | None:
    """(run, output) that a path leads to; None where the text is no path into a run."""
    if "/" not in text and os.sep not in text:  # a name, though there may be a folder called so
        return None
    path = _existing_path(text)
    if path is None:
        return None
    for folder in (path, *path.parents):
        if all((folder / name).is_file() for name in ("run.json", "recipe.yaml")):
            if path == folder:
                return folder, "run"
            inside = (out for out, at in output_paths(folder).items() if path.is_relative_to(at))
            return folder, next(inside, path.relative_to(folder).as_posix())
    return None


def _existing_path(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # no text that could be a path
        return None
