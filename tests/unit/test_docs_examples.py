"""The examples work: the package of docs/extending.md trains, the recipes of the README load."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from alignment.config import load_recipe
from alignment.runs.metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
FILE_NAME = re.compile(r"# (?P<file>[\w./-]+\.(?:py|yaml|toml))\n")


def write_files(page: str, root: Path) -> None:
    """Write the blocks of a page that begin with the name of a file."""
    for fence in FENCE.finditer((REPOSITORY / page).read_text(encoding="utf-8")):
        named = FILE_NAME.match(fence["text"])
        if named is not None:
            file = root / named["file"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(fence["text"], encoding="utf-8")


def commands(page: str) -> list[list[str]]:
    """The arguments of each `align` command in a page's blocks without a language."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    lines = [
        line
        for fence in FENCE.finditer(text)
        if not fence["language"]
        for line in fence["text"].replace("\\\n", "").splitlines()
    ]
    found = [shlex.split(line, comments=True) for line in lines]
    return [
        words[words.index("alignment") :] if "alignment" in words else words
        for words in found
        if words and words[0] in ("align", "accelerate")
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the page under their names, and its package, installed in `site`."""
    root = tmp_path_factory.mktemp("extending")
    write_files("docs/extending.md", root)
    metadata = (root / "pyproject.toml").read_text(encoding="utf-8")
    packages = '\n[tool.setuptools]\npackages = ["my_alignment"]\n'  # the page's folder has others
    (root / "pyproject.toml").write_text(metadata + packages, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    options = ["--no-build-isolation", "--no-index", "--target", str(root / "site"), str(root)]
    done = subprocess.run([*pip, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return root


def align(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    work = folder / "work"  # the package's own folder is elsewhere: what runs is what is installed
    work.mkdir(exist_ok=True)
    for file in folder.glob("*.yaml"):
        (work / file.name).write_bytes(file.read_bytes())
    for name in ("my_rewards.py", "my_verifier.py"):
        (work / name).write_bytes((folder / name).read_bytes())
    return subprocess.run(
        [str(Path(sysconfig.get_path("scripts")) / "align"), *arguments],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(folder / "site")},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_rewards_of_the_page_train(folder: Path) -> None:
    done = align(folder, "train", "my_rewards.yaml")
    assert done.returncode == 0, done.stderr
    records = read_metrics(folder / "work" / "runs" / "my-rewards" / "metrics.jsonl")
    steps = [record for record in records if record["step"] > 0]
    assert len(steps) == 2
    assert all(0.0 < record["reward/my_rewards:near"] < 1.0 for record in steps)
    assert all("reward/begins" in record for record in steps)


def test_a_mistyped_option_of_a_reward_of_the_page_is_refused(folder: Path) -> None:
    done = align(folder, "check", "my_rewards.yaml", "rewards.0.limt=3", "rewards.begins.text=7")
    assert done.returncode == 2
    assert "rewards.0.limt: unknown key; did you mean 'limit'?" in done.stderr
    assert "rewards.1.text: expected text, found 7" in done.stderr


def test_source_task_and_method_of_the_page_train(folder: Path) -> None:
    done = align(folder, "train", "best.yaml")
    assert done.returncode == 0, done.stderr
    records = read_metrics(folder / "work" / "runs" / "best" / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert "eval/brevity/short" in records[0] and "eval/brevity/short" in records[3]
    assert all(record["optim/moved_share"] > 0 for record in records[1:])


def test_every_recipe_and_override_of_the_readme_is_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files("README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.yaml").write_bytes((REPOSITORY / "recipes/tiny/sft.yaml").read_bytes())
    loaded = [
        load_recipe(words[2], [word for word in words[3:] if "=" in word])
        for words in commands("README.md")
        if words[1] in ("train", "check")
    ]
    assert len(loaded) >= 6
    assert {"near", "two-stages", "slow", "two"} <= {recipe.run.name for recipe in loaded}
