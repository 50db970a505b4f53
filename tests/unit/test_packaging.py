"""What a user installs: the wheel holds what it must, and works without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

import alignment

REPOSITORY = Path(__file__).parents[2]
SHIPPED = ("alignment", "reward_models", "evals", "recipes")
NOT_SHIPPED = ("tests", "benchmarks", "docs", "notebooks")
WHERE = (
    "import alignment, evals, recipes, reward_models as r; print(alignment.__file__, r.__file__)"
)
LAZY = """
import sys, alignment
heavy = {"torch", "transformers", "pydantic"} & set(sys.modules)
assert not heavy, heavy
alignment.load_recipe, alignment.UserInputError, alignment.register
assert "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves files behind, and takes in those of others."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / file, source)
    for folder in (*SHIPPED, *NOT_SHIPPED):
        if (REPOSITORY / folder).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / folder, source / folder, ignore=ignored)
    pip("wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(built))
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    return target


def pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def python(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder` with the wheel and its dependencies, and without the checkout.

    -S leaves out the .pth files, through which an editable installation would be found.
    """
    dependencies = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    path = os.pathsep.join([str(installed), *dependencies])
    return subprocess.run(
        [sys.executable, "-S", "-P", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "ALIGNMENT_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_wheel_holds_the_packages_and_their_files_and_nothing_else(wheel: Path) -> None:
    files = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(REPOSITORY).as_posix()
        for package in SHIPPED
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".pyo")
    }
    assert {name for name in files if ".dist-info/" not in name} == expected
    assert {"alignment/py.typed", "reward_models/py.typed", "evals/py.typed"} <= files
    assert "evals/templates/report.html.jinja" in files
    assert "recipes/tiny/sft.yaml" in files
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in files)


def test_the_wheel_announces_the_command_and_the_plug_ins(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    package = PathDistribution(info)
    points = {(point.group, point.name): point.value for point in package.entry_points}
    assert package.version == alignment.__version__
    assert points["console_scripts", "align"] == "alignment.cli:main"
    assert points["alignment.reward", "math"] == "reward_models.math:MathReward"
    assert points["alignment.report", "html"] == "evals.report:html_report"


def test_the_installed_package_works_in_another_folder(installed: Path, tmp_path: Path) -> None:
    where = python(installed, tmp_path, "-c", WHERE)
    assert where.returncode == 0, where.stderr
    assert all(Path(file).is_relative_to(installed) for file in where.stdout.split())

    for arguments, expected in (
        (["--help"], "Post-training alignment"),
        (["recipes", "list"], "tiny/sft"),
        (["check", "tiny/sft"], "tiny-sft: the recipe is valid"),
        (["check", "tiny/grpo"], "1 x regex (pattern: [0-9], mode: search)"),
    ):
        done = python(installed, tmp_path, "-m", "alignment", *arguments)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def test_the_installed_package_trains(installed: Path, tmp_path: Path) -> None:
    steps = ["algorithm.steps=1", "expect=[]"]
    done = python(installed, tmp_path, "-m", "alignment", "train", "tiny/sft", *steps)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "tiny-sft" / "report.html").is_file()


def test_importing_the_package_imports_nothing_heavy(installed: Path, tmp_path: Path) -> None:
    done = python(installed, tmp_path, "-c", LAZY)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there() -> None:
    for name in alignment.__all__:
        assert getattr(alignment, name) is not None
    assert set(alignment.__all__) <= set(dir(alignment))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = alignment.nothing
