"""A package of plug-ins, installed, and used from a recipe as if it were built in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RECIPE = """\
run: {name: plugged}
model: {path: tiny-random}
data: {type: counting, size: 10}
algorithm: {type: best_of_n, steps: 3, n: 8}
rewards:
  - {type: vowels, share: 0.5}
optim: {lr: 1e-4}
"""


def install(target: Path, entry_points: dict[str, dict[str, str]], name: str) -> None:
    """Write what an installer writes: the metadata of a package, with its entry points."""
    info = target / f"{name.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    lines = []
    for group, points in entry_points.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed packages that holds the plug-in package."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    target = tmp_path / "site"
    install(target, project["entry-points"], project["name"])
    shutil.copytree(HERE / "src" / "align_example", target / "align_example")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return target


def check(site: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alignment", "check", "recipe.yaml", *overrides],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_recipe_uses_the_plugged_in_reward_source_and_trainer(site: Path) -> None:
    result = check(site)
    assert result.returncode == 0, result.stderr
    assert "counting (size: 10)" in result.stdout
    assert "1 x vowels (share: 0.5)" in result.stdout
    assert "3 steps, the best of 8" in result.stdout


def test_keys_of_plugged_in_sections_are_checked_like_any_other(site: Path) -> None:
    result = check(site, "rewards.0.shar=1", "algorithm.N=3", "data.size=ten", "data.start=0.5")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "align: recipe.yaml: 4 problems",
        "override 'data.size=ten': data.size: expected a whole number, found \"ten\" (text)",
        "override 'data.start=0.5': data.start: expected a whole number, found 0.5",
        "override 'algorithm.N=3': algorithm.N: unknown key; did you mean 'n'? "
        "Allowed: type, steps, n",
        "override 'rewards.0.shar=1': rewards.0.shar: unknown key; did you mean 'share'? "
        "Allowed: share, case, type, weight, name",
    ]


def test_plugged_in_values_are_checked(site: Path) -> None:
    result = check(site, "rewards.0.case=uper", "algorithm.n=1")
    assert result.returncode == 2
    assert "rewards.0.case: expected 'any' or 'lower', found \"uper\"" in result.stderr
    assert "algorithm.n: expected a number of at least 2, found 1" in result.stderr


def test_a_near_miss_of_a_plugged_in_name_is_suggested(site: Path) -> None:
    result = check(site, "rewards.0.type=vowel")
    assert result.returncode == 2
    assert "unknown reward 'vowel'; did you mean 'vowels'?" in result.stderr


@pytest.mark.parametrize(
    ("group", "name", "path"),
    [
        ("alignment.reward", "vowels", "rewards.0.type"),
        ("alignment.source", "counting", "data.type"),
        ("alignment.trainer", "best_of_n", "algorithm.type"),
    ],
)
def test_two_packages_with_one_name_are_rejected(
    site: Path, group: str, name: str, path: str
) -> None:
    install(site, {group: {name: "other_package.module:Thing"}}, "other-package")
    result = check(site)
    assert result.returncode == 2
    assert f"{path}: the {group.removeprefix('alignment.')} name {name!r} is claimed twice" in (
        result.stderr
    )
    assert "other_package.module:Thing" in result.stderr


def test_a_plug_in_that_takes_a_built_in_name_is_rejected(site: Path) -> None:
    install(site, {"alignment.trainer": {"grpo": "other_package.module:Thing"}}, "other-package")
    result = check(site, "algorithm={type: grpo, steps: 1, prompts_per_step: 2, group_size: 2}")
    assert result.returncode == 2
    assert "the trainer name 'grpo' is claimed twice" in result.stderr


def test_a_plug_in_that_cannot_be_imported_says_why(site: Path) -> None:
    install(site, {"alignment.reward": {"broken": "align_example.nowhere:Thing"}}, "broken-package")
    result = check(site, "rewards=[{type: broken}]")
    assert result.returncode == 2
    assert "rewards.0.type: reward 'broken': 'align_example.nowhere:Thing'" in result.stderr
    assert "No module named 'align_example.nowhere'" in result.stderr
