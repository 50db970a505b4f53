"""The folder of one run: where its files are, how it begins, how it is opened again."""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.runs.files import (
    TEMPORARY_PREFIX,
    readable_errors,
    remove_leftovers,
    sync_directory,
    write_atomic,
)
from alignment.types import AlignmentError, UserInputError

_TAKEN_ERRNOS = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
_UNUSABLE_ERRNOS = (errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """`runs/NAME/`: what a run wrote, at names that do not change.

    The object only knows paths; `create` begins a run and `open` finds one.
    """

    path: Path

    @classmethod
    def create(
        cls,
        root: Path | str,
        name: str,
        *,
        recipe_yaml: str,
        info: Mapping[str, Any],
        resume: bool = False,
    ) -> RunDirectory:
        """Begin the run `root/name`, with its `recipe.yaml` and `run.json`.

        The folder appears under its name complete or not at all. With `resume`, a folder that
        exists is taken up again: `info` is appended to the `resumes` of its `run.json`, and a
        recipe that differs replaces the old one, which is kept as `recipe-1.yaml` (2, 3, ...).

        Raises:
            UserInputError: the name is no folder name, or exists and `resume` is off; `root` is no
                folder, or not one that can be written to.
            AlignmentError: the folder cannot be made or written, with the reason.
        """
        _check_name(name)
        path = Path(root) / name
        if path.is_dir() and resume:
            return _take_up(cls(path), recipe_yaml, info)
        if os.path.lexists(path):
            raise _taken(path)
        with _usable_root("create the folder", Path(root)):
            Path(root).mkdir(parents=True, exist_ok=True)
        _create_whole(path, recipe_yaml, info)
        return cls(path)

    @classmethod
    def open(cls, path: Path | str) -> RunDirectory:
        """The run at `path`.

        Raises:
            UserInputError: there is none, with the nearest name next to it.
        """
        run = cls(Path(path))
        if not run.path.is_dir():
            raise UserInputError(f"there is no run at {run.path}{_near_runs(run.path)}")
        missing = [file.name for file in (run.recipe, run.info) if not file.is_file()]
        if missing:
            raise UserInputError(
                f"{run.path} is not a run: it has no {' and no '.join(missing)}; give the folder "
                "that `align train` made"
            )
        return run

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def info(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def rollouts_dir(self) -> Path:
        return self.path / "rollouts"

    @property
    def made_dir(self) -> Path:
        return self.path / "made"

    @property
    def data(self) -> Path:
        """The data set that the run made, where its method makes one."""
        return self.path / "data.jsonl"

    @property
    def cache_dir(self) -> Path:
        """What can be computed again."""
        return self.path / "cache"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model_dir(self) -> Path:
        return self.path / "model"

    @property
    def evals_dir(self) -> Path:
        return self.path / "evals"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def read_info(self) -> dict[str, Any]:
        """The contents of `run.json`.

        Raises:
            AlignmentError: it cannot be read, or is damaged.
        """
        with readable_errors("read", self.info):
            text = self.info.read_text(encoding="utf-8")
        try:
            info = json.loads(text)
        except ValueError as error:
            raise AlignmentError(
                f"{self.info} is damaged ({error}); mend it, or begin another run"
            ) from error
        if not isinstance(info, dict):
            raise AlignmentError(f"{self.info} does not hold a JSON object; begin another run")
        return info


@contextlib.contextmanager
def _usable_root(doing: str, root: Path) -> Iterator[None]:
    """As `readable_errors`; a root that cannot hold a run at all is the user's mistake."""
    try:
        with readable_errors(doing, root):
            yield
    except AlignmentError as error:
        if getattr(error.__cause__, "errno", None) in _UNUSABLE_ERRNOS:
            raise UserInputError(f"run.dir: {error}") from error
        raise


def _create_whole(path: Path, recipe_yaml: str, info: Mapping[str, Any]) -> None:
    """Build the folder under a temporary name, and give it its own by one rename."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{secrets.token_hex(4)}")
    run = RunDirectory(temporary)
    with readable_errors("create the run", path):
        try:
            with _usable_root("create a run in", path.parent):
                temporary.mkdir()
            write_atomic(run.recipe, recipe_yaml)
            write_atomic(run.info, _as_json(info))
            os.rename(temporary, path)  # fails where another process took the name meanwhile
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _TAKEN_ERRNOS:
                raise _taken(path) from error
            raise
        sync_directory(path.parent)


def _take_up(run: RunDirectory, recipe_yaml: str, info: Mapping[str, Any]) -> RunDirectory:
    run = RunDirectory.open(run.path)
    old_info = run.read_info()
    for folder in (run.path, run.evals_dir):
        remove_leftovers(folder)
    with readable_errors("read", run.recipe):
        old_recipe = run.recipe.read_text(encoding="utf-8")
    if old_recipe != recipe_yaml:
        number = 1 + len(list(run.path.glob("recipe-*.yaml")))
        write_atomic(run.path / f"recipe-{number}.yaml", old_recipe)
        write_atomic(run.recipe, recipe_yaml)
    resumes = [*old_info.get("resumes", []), dict(info)]
    write_atomic(run.info, _as_json(old_info | {"resumes": resumes}))
    return run


def _as_json(info: Mapping[str, Any]) -> str:
    return json.dumps(dict(info), indent=2, allow_nan=False) + "\n"


def _check_name(name: str) -> None:
    if name.startswith(".") or not name.strip() or any(char in name for char in '/\\\0:*?"<>|\n'):
        raise UserInputError(
            f"run.name {name!r} cannot be a folder name; use letters, digits, '-', '_' and '.', "
            "beginning with a letter or digit"
        )


def _taken(path: Path) -> UserInputError:
    return UserInputError(
        f"the run {path} exists already and is not overwritten; choose another run.name, go on "
        "with it by --resume auto, or delete it"
    )


def _near_runs(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if (entry / "run.json").is_file()]
    except OSError:
        return "; give the folder that `align train` made"
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {path.parent / near[0]}?"
    return f"; the runs in {path.parent} are: {', '.join(sorted(names)) or 'none'}"
