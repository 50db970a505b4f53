"""Critics, reward models and judges of the user's own: recorded, and noticed when they change."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ppo_runs
import pytest

from alignment.config import Recipe, dump_recipe, load_recipe
from alignment.modeling.tiny import build_tiny
from alignment.runs import lineage, outputs
from alignment.runs.directory import RunDirectory
from alignment.runs.inputs import find_models, refuse_changed_start
from alignment.runs.lineage import run_info
from alignment.trainers.ppo import PPOTrainer
from alignment.types import AlignmentError, UserInputError

HASHES = {"model": "m", "tokenizer": "t", "template": "c", "data": "d"}


@pytest.fixture(autouse=True)
def _no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """What git says is none of these tests' business, and takes it a second."""
    monkeypatch.setattr(lineage, "_git", lambda directory: None)


def folder(path: Path) -> Path:
    """A model's folder, with texts for weights."""
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_text("1")
    return path


def ppo(tmp_path: Path, *overrides: str) -> Recipe:
    """With a critic, a reward model and a policy in folders of the user's."""
    recipe = load_recipe(
        "tiny/ppo",
        [
            f"run.dir={tmp_path / 'runs'}",
            f"model.path={tmp_path / 'base'}",
            f"algorithm.critic.path={tmp_path / 'rm'}",
            f"rewards=[{{type: length, count: 3}}, {{type: reward_model, path: '{tmp_path}/rm'}}]",
            *overrides,
        ],
    )
    assert isinstance(recipe, Recipe)
    return recipe


def begin(recipe: Recipe, *, records: bool = True) -> Path:
    """The folder of a run that has started."""
    text = dump_recipe(recipe)
    known: dict[str, Any] = {f"{name}_hash": value for name, value in HASHES.items()}
    models = find_models(recipe) if records else None
    info = run_info(recipe=text, command=[], seed=0, inputs=[], models=models, **known)
    return RunDirectory.create(recipe.run.dir, recipe.run.name, recipe_yaml=text, info=info).path


def change(path: Path, text: str) -> None:
    """Change a file as time passes: its time of last change differs."""
    path.write_text(text)
    later = path.stat().st_mtime_ns + 5_000_000_000
    os.utime(path, ns=(later, later))


@pytest.fixture
def rm(tmp_path: Path) -> Path:
    folder(tmp_path / "base")
    return folder(tmp_path / "rm")


def test_models_outside_of_runs_are_found(tmp_path: Path, rm: Path) -> None:
    (rm / "checkpoint-500").mkdir()
    (rm / "checkpoint-500" / "optimizer.pt").write_text("large")
    (rm / ".hidden").write_text("")
    found = find_models(ppo(tmp_path))
    assert [(model.key, model.path) for model in found] == [
        ("algorithm.critic.path", str(rm)),
        ("rewards.1.path", str(rm)),
    ]
    for model in found:
        assert {name: stamp.size for name, stamp in model.files.items()} == {
            "config.json": 2,
            "model.safetensors": 1,
        }


def test_models_of_runs_of_the_catalogue_and_of_the_hub_are_not(
    tmp_path: Path, rm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = begin(ppo(tmp_path))
    settings = f"algorithm.critic.path={folder(run / 'model')}"  # an input, compared as one
    for path in ("tiny-random", "org/name"):
        rewards = f"rewards=[{{type: reward_model, path: {path}}}]"
        assert find_models(ppo(tmp_path, settings, rewards)) == ()
    rewards = "rewards=[{type: reward_model, path: rm}]"
    (found,) = find_models(ppo(tmp_path, settings, rewards))
    assert (found.key, found.path) == ("rewards.0.path", "rm")


@pytest.mark.parametrize(
    ("file", "text"),
    [("model.safetensors", "2"), ("config.json", '{"rope_theta": 1}'), ("added.json", "{}")],
)
def test_a_changed_model_is_refused_by_its_keys_and_files(
    tmp_path: Path, rm: Path, file: str, text: str
) -> None:
    recipe = ppo(tmp_path)
    run = begin(recipe)
    refuse_changed_start(run, recipe, HASHES)
    change(rm / file, text)
    with pytest.raises(UserInputError) as caught:
        refuse_changed_start(run, recipe, HASHES)
    assert str(caught.value) == (
        f"the run {run} cannot go on: what it started from has changed since: "
        f"algorithm.critic.path, {rm} ({file}); rewards.1.path, {rm} ({file}). Put it back as it "
        "was, choose another run.name, or delete the run"
    )


def test_what_is_the_same_gone_or_not_loaded_is_no_change(tmp_path: Path, rm: Path) -> None:
    recipe = ppo(tmp_path)
    run = begin(recipe)
    change(rm / "model.safetensors", "1")  # the same again, later
    refuse_changed_start(run, recipe, HASHES)
    change(rm / "model.safetensors", "2")
    bare = recipe.model_copy(update={"rewards": ()})  # as where nothing is graded
    with pytest.raises(UserInputError, match=r"changed since: algorithm.critic.path, [^;]*$"):
        refuse_changed_start(run, bare, HASHES)
    rm.rename(tmp_path / "elsewhere")
    refuse_changed_start(run, recipe, HASHES)


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path, rm: Path) -> None:
    recipe = ppo(tmp_path)
    run = begin(recipe, records=False)
    assert "models" not in RunDirectory(run).read_info()
    change(rm / "model.safetensors", "2")
    refuse_changed_start(run, recipe, HASHES)


def test_a_model_is_read_once_and_not_again_where_nothing_touched_it(
    tmp_path: Path, rm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    original = outputs.file_hash

    def hashed(path: Path) -> str:
        reads.append(path.name)
        return original(path)

    monkeypatch.setattr(outputs, "file_hash", hashed)
    recipe = ppo(tmp_path)
    run = begin(recipe)
    assert sorted(reads) == ["config.json", "model.safetensors"]
    refuse_changed_start(run, recipe, HASHES)
    assert len(reads) == 2


# -- whole runs -------------------------------------------------------------------------------


@pytest.fixture
def _fails_in_its_first_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def step(self: PPOTrainer, step: int) -> Any:
        raise AlignmentError("the power is out")

    monkeypatch.setattr(PPOTrainer, "step", step)
    yield


@pytest.mark.usefixtures("_fails_in_its_first_step")
def test_a_resumed_run_refuses_another_reward_model(tmp_path: Path) -> None:
    rm = build_tiny(tmp_path / "rm", seed=1)
    settings = (
        f"algorithm.critic.path={rm}",
        f"rewards=[{{type: reward_model, path: '{rm}', dtype: float32}}]",
    )
    for _ in range(2):  # the second start finds nothing wrong
        with pytest.raises(AlignmentError, match="the power is out"):
            ppo_runs.run(tmp_path / "runs", *settings)
    info = json.loads((tmp_path / "runs" / "ppo" / "run.json").read_text())
    assert [model["key"] for model in info["models"]] == ["algorithm.critic.path", "rewards.0.path"]
    other = build_tiny(tmp_path / "other", seed=2)
    (other / "model.safetensors").replace(rm / "model.safetensors")
    with pytest.raises(UserInputError, match=r"rewards.0.path, .*/rm \(model.safetensors\)"):
        ppo_runs.run(tmp_path / "runs", *settings)
