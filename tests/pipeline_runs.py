"""Runs with pretended models, and pipelines of pretended stages."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignment.config import PipelineRecipe, Recipe, dump_recipe, load_recipe
from alignment.config.load import parse_recipe
from alignment.config.model import ModelConfig
from alignment.runs.directory import RunDirectory
from alignment.runs.inputs import (
    find_parents,
)
from alignment.runs.lineage import run_info
from alignment.runs.outputs import Encoding, write_finished
from alignment.trainers import pipeline as pipeline_module

T, C, OTHER = "a" * 64, "b" * 64, "c" * 64
ENCODING = Encoding(T, C, 260)


def sft(folder: Path, name: str, *overrides: str) -> Recipe:
    recipe = load_recipe("tiny/sft", [f"run.dir={folder}", f"run.name={name}", *overrides])
    assert isinstance(recipe, Recipe)
    return recipe


def change(path: Path, text: str) -> None:
    """Change a file as time passes: its time of last change differs."""
    path.write_text(text)
    later = path.stat().st_mtime_ns + 5_000_000_000
    os.utime(path, ns=(later, later))


def begin(recipe: Recipe, **hashes: str | None) -> RunDirectory:
    """The folder of a run that has started."""
    text = dump_recipe(recipe)
    known: dict[str, Any] = {"model_hash": "0" * 64, "data_hash": "d" * 64}
    known |= {"tokenizer_hash": T, "template_hash": C, **hashes}
    info = run_info(recipe=text, command=[], seed=0, inputs=find_parents(recipe), **known)
    return RunDirectory.create(recipe.run.dir, recipe.run.name, recipe_yaml=text, info=info)


def finish(run: RunDirectory, weights: str, data: str | None = None) -> RunDirectory:
    """What a run leaves, with a text for weights."""
    run.model_dir.mkdir()
    (run.model_dir / "model.safetensors").write_text(weights)
    if data is not None:
        run.data.write_text(data)
    write_finished(run.path, steps=3, encoding=ENCODING)
    return run


PIPELINE = """
run: {{name: pipe, dir: '{folder}'}}
stages:
  - {{name: first, recipe: tiny/sft}}
  - {{name: aside, recipe: tiny/sft}}
  - name: last
    recipe: tiny/sft
    set: {{model.path: "${{stages.first.model}}"}}
compare: {{tasks: [{{type: held_out_loss}}]}}
"""


class Stages:
    """Stands in for training and evaluation: notes what was asked for, leaves a run's files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[str] = []
        self.compared: list[tuple[str, str | None]] = []
        self.models: list[ModelConfig] = []
        self.weights: dict[str, str] = {}
        self.hangs = False
        self.error: Exception | None = None
        self.references: list[ModelConfig | None] = []
        monkeypatch.setattr(pipeline_module, "train", self.train)
        monkeypatch.setattr(pipeline_module, "evaluate_model", self.evaluate)
        monkeypatch.setattr(pipeline_module, "write_report", lambda directory: None)
        monkeypatch.setattr(pipeline_module, "check_expectations", lambda directory: None)
        tables = SimpleNamespace(get=lambda *_: self.tables)
        monkeypatch.setattr(pipeline_module, "registry", tables)
        monkeypatch.setattr(pipeline_module, "gc", SimpleNamespace(collect=lambda: None))

    def train(self, recipe: Recipe, **_: Any) -> RunDirectory:
        path = Path(recipe.run.dir) / recipe.run.name
        if (path / "finished.json").is_file():
            return RunDirectory.open(path)
        self.trained.append(recipe.run.name)
        run = begin(recipe)
        return finish(run, self.weights.get(recipe.run.name, recipe.run.name))

    def evaluate(
        self, recipe: Recipe, model: ModelConfig, tasks: Any, *, seed: int, reference: Any
    ) -> dict[str, Any]:
        if self.hangs:
            time.sleep(60)
        if self.error is not None:
            raise self.error
        self.models.append(model)
        self.references.append(reference)
        self.compared.append((model.path, reference and reference.path))
        loss = float(len(self.compared))
        return {task.name or task.type: SimpleNamespace(metrics={"loss": loss}) for task in tasks}

    @staticmethod
    def tables(results: dict[str, Any], folder: Path, task: str, _: Any) -> str:
        (folder / "evals").mkdir(exist_ok=True)
        first = folder / "comparison.json"
        (folder / f"comparison-{task}.json" if first.exists() else first).write_text(task)
        for name, result in results.items():
            for suffix in ("json", "jsonl"):
                text = str(result.metrics["loss"])
                (folder / "evals" / f"{name}-{task}.{suffix}").write_text(text)
        return f"a table of {task}"


def pipeline(folder: Path, old: str = "", new: str = "") -> PipelineRecipe:
    text = PIPELINE.format(folder=folder)
    assert old in text
    recipe = parse_recipe(text.replace(old, new))
    assert isinstance(recipe, PipelineRecipe)
    return recipe


def remove(run: Path) -> None:
    for path in sorted(run.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    run.rmdir()
