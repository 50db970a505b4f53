"""What a run records at its start: versions, code, seed, hashes of what went in, parent runs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignment import __version__
from alignment.runs.events import utc_now
from alignment.runs.inputs import ModelRecord, ParentRecord
from alignment.types import AlignmentError

REDACTED = "***"

_PACKAGES = ("torch", "transformers", "peft", "accelerate")
_GIT_SECONDS = 5.0

# Keys whose value is a secret: their last word says so. `max_new_tokens` is not one of them, and
# neither are the names of special tokens.
_SECRET_KEY = re.compile(
    r"(^|[-_.])(token|api[-_]?key|secret([-_]key)?|access[-_]?key|password|passwd|credentials?)$",
    re.IGNORECASE,
)
_SPECIAL_TOKEN = re.compile(r"(pad|eos|bos|unk|mask|sep|cls|stop|end|image)_token$", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{8,}|gh[opsur]_[A-Za-z0-9]{8,}"
    r"|github_pat_[A-Za-z0-9_]{8,}|AKIA[A-Z0-9]{16}|xox[abprs]-[A-Za-z0-9-]{8,})"
)
_URL_PASSWORD = re.compile(r"(://[^/\s:@]*):[^/\s@]+@")


def run_info(
    *,
    recipe: str,
    command: Sequence[str],
    seed: int,
    model_hash: str | None = None,
    tokenizer_hash: str | None = None,
    template_hash: str | None = None,
    data_hash: str | None = None,
    inputs: Sequence[ParentRecord] | None = None,
    models: Sequence[ModelRecord] | None = None,
    parents: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """What `run.json` holds.

    Args:
        recipe: the text of the resolved recipe; its hash is recorded.
        command: the arguments the program was started with. Secrets in them are blanked.
        model_hash, tokenizer_hash, template_hash, data_hash: of what the run starts from, or None
            where there is no such thing.
        inputs: what the run takes from other runs; None leaves it unrecorded.
        models: what it takes from folders of models besides; None leaves it unrecorded.
        parents: folders of further runs that this one starts from, besides those of `inputs`.
    """
    runs = [*(parent.run for parent in inputs or ()), *map(str, parents)]
    recorded: dict[str, Any] = {}
    if inputs is not None:
        recorded["inputs"] = [parent.as_input() for parent in inputs]
    if models is not None:
        recorded["models"] = [asdict(model) for model in models]
    return {
        "time": utc_now(),
        "command": redact(command),
        "seed": seed,
        "recipe_hash": text_hash(recipe),
        "model_hash": model_hash,
        "tokenizer_hash": tokenizer_hash,
        "template_hash": template_hash,
        "data_hash": data_hash,
        "parents": list(dict.fromkeys(runs)),
        **recorded,
        "versions": _versions(),
        "platform": platform.platform(),
        "cpu_count": _cpu_count(),
        "git": _git(Path.cwd()),
    }


def data_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 over rows in their order: equal rows give an equal hash on every machine.

    The order of keys inside a row does not count. Bytes count by their digest; dates, paths and
    arrays by their text or list form.

    Raises:
        AlignmentError: a row holds something without a stable form.
    """
    digest = hashlib.sha256()
    for number, row in enumerate(rows):
        try:
            line = json.dumps(dict(row), sort_keys=True, default=_stable)
        except (TypeError, ValueError) as error:
            raise AlignmentError(
                f"data row {number} cannot be hashed: {error}; keep rows to text, numbers, lists "
                "and mappings"
            ) from error
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def text_hash(text: str) -> str:
    """SHA-256 of a text, as of a chat template."""
    return hashlib.sha256(text.encode()).hexdigest()


def redact(command: Sequence[str]) -> list[str]:
    """The arguments with secrets replaced by `***`.

    A secret is told by its key (`--token X`, `hub.token=X`, `OPENAI_API_KEY=X`), by its own look
    (`hf_...`, `sk-...`), or by its place in a URL (`https://user:secret@host`).
    """
    redacted: list[str] = []
    previous = ""
    for argument in command:
        key, equals, _ = argument.partition("=")
        if previous.startswith("-") and _is_secret_key(previous):
            redacted.append(REDACTED)
        elif equals and _is_secret_key(key):
            redacted.append(f"{key}={REDACTED}")
        else:
            blanked = _SECRET_VALUE.sub(REDACTED, argument)
            redacted.append(_URL_PASSWORD.sub(rf"\1:{REDACTED}@", blanked))
        previous = argument
    return redacted


def _is_secret_key(key: str) -> bool:
    key = key.lstrip("-")
    return bool(_SECRET_KEY.search(key)) and not _SPECIAL_TOKEN.search(key)


def _stable(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": hashlib.sha256(value).hexdigest()}
    for form in ("tolist", "isoformat", "__fspath__"):  # arrays, dates, paths
        if hasattr(value, form):
            return getattr(value, form)()
    raise TypeError(f"a {type(value).__name__} has no stable form")


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "alignment": __version__,
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _cpu_count() -> int:
    """Cores this process may use, where the system says so."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else (os.cpu_count() or 1)


def _git(directory: Path) -> dict[str, Any] | None:
    """Commit of the repository around `directory`, and whether tracked files differ from it."""
    commit = _git_output(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git_output(directory, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if changes is None else bool(changes)}


def _git_output(directory: Path, *arguments: str) -> str | None:
    try:
        process = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},  # look, don't touch the index
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()
