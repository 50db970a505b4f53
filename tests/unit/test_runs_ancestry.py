"""`align lineage`: the tree of hand-made run folders, what is marked in it, and how quick it is."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from alignment.cli import app
from alignment.runs.ancestry import trace
from alignment.runs.outputs import Encoding, contents, write_finished
from alignment.types import UserInputError

RECIPE = "model: {{path: '{model}'}}\nalgorithm: {{type: {method}}}\n"


def lineage(*arguments: str | Path) -> list[str]:
    """The lines that the command prints."""
    result = CliRunner().invoke(app, ["lineage", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def make(
    path: Path,
    *,
    model: Path | str = "base-model",
    method: str = "sft",
    takes: tuple[tuple[str, Path, str], ...] = (),
    done: bool = True,
) -> Path:
    """A run's folder; `takes` are (setting, run, output)."""
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(RECIPE.format(model=model, method=method))
    outputs = {"model": "model", "data": "data.jsonl"}
    inputs = [
        {"key": key, "run": str(run), "output": what, "hash": contents(run / outputs[what]).hash}
        for key, run, what in takes
    ]
    hashes = {f"{key}_hash": key[0] * 64 for key in ("model", "tokenizer", "template", "data")}
    info = {"time": "2026-01-31T12:00:00+00:00", "inputs": inputs, **hashes}
    (path / "run.json").write_text(json.dumps(info))
    (path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    if done:
        (path / "model").mkdir()
        (path / "model" / "weights").write_text(path.name)
        write_finished(path, steps=60, encoding=Encoding("t" * 64, "t" * 64, 260))
    return path


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """sft -> reward model -> ppo, which takes both, in a folder of a pipeline."""
    path = tmp_path / "rlhf"
    path.mkdir()
    names = "".join(f"\n- {{name: {name}, recipe: r}}" for name in ("sft", "rm", "ppo"))
    (path / "recipe.yaml").write_text(f"run: {{name: rlhf}}\nstages:{names}\n")
    (path / "run.json").write_text('{"time": "2026-01-31T11:00:00+00:00"}')
    at = path / "stages"
    sft = make(at / "sft")
    start = ("model.path", sft, "model")
    rm = make(at / "rm", model=sft / "model", method="reward", takes=(start,))
    reward = ("rewards.0.path", rm, "model")
    make(at / "ppo", model=sft / "model", method="ppo", takes=(start, reward))
    return path


def hash8(run: Path) -> str:
    return contents(run / "model").hash[:8]


def test_parents_stand_below_and_the_base_model_at_the_end(pipeline: Path) -> None:
    at = pipeline / "stages"
    lines = [line.rstrip() for line in lineage(at / "ppo")]
    time_ = json.loads((at / "ppo" / "finished.json").read_text())["time"][:16].replace("T", " ")
    assert lines[0] == f"ppo  ppo, 60 steps, {time_}"
    found = f"made model {hash8(at / 'ppo')}  tokenizer tttttttt  template tttttttt"
    assert lines[1].endswith(f"{found}  from data dddddddd")
    assert lines[2].startswith("├── model.path: sft  sft, 60 steps, ")
    assert f"made model {hash8(at / 'sft')}" in lines[3]
    assert lines[4] == "│   └── model.path: base-model (base model)"
    assert lines[5].startswith("└── rewards.0.path: rm  reward, 60 steps, ")
    assert lines[7] == "    └── model.path: sft (described above)"
    assert len(lines) == 8


def test_a_pipeline_shows_all_its_stages(pipeline: Path) -> None:
    shutil.rmtree(pipeline / "stages" / "ppo")
    lines = lineage(pipeline)
    assert lines[0] == "rlhf  pipeline, 3 stages, not finished, 2026-01-31 11:00"
    assert [line[4:].split()[0] for line in lines if line[:1] in "├└"] == ["sft", "rm", "ppo"]
    assert lines[-1] == f"└── ppo (no run at {pipeline / 'stages' / 'ppo'})"


def test_a_run_that_is_on_its_way_says_so(tmp_path: Path) -> None:
    lines = lineage(make(tmp_path / "one", done=False))
    assert lines[0] == "one  sft, 2 steps, not finished, 2026-01-31 12:00"
    assert "from weights mmmmmmmm" in lines[1]


def test_a_parent_that_changed_is_marked(pipeline: Path) -> None:
    sft = pipeline / "stages" / "sft"
    before = hash8(sft)
    (sft / "model" / "weights").write_text("others")
    (line,) = [line for line in lineage(pipeline / "stages" / "rm") if "changed" in line]
    mark = f"[changed since: model {before} then, {hash8(sft)} now] sft"
    assert line.startswith(f"└── model.path: {mark}")


def test_a_parent_that_is_gone_is_marked(pipeline: Path) -> None:
    sft = pipeline / "stages" / "sft"
    before = hash8(sft)
    shutil.rmtree(sft)
    lines = lineage(pipeline / "stages" / "rm")
    assert lines[-1] == f"└── model.path: [missing: model {before}] sft (no run at {sft})"


def test_a_parent_without_its_model_is_marked(pipeline: Path) -> None:
    sft = pipeline / "stages" / "sft"
    shutil.rmtree(sft / "model")
    lines = lineage(pipeline / "stages" / "rm")
    assert lines[2].startswith("└── model.path: [missing: model ")
    assert "sft  sft, 60 steps" in lines[2]


def test_a_moved_pipeline_finds_its_stages(pipeline: Path, tmp_path: Path) -> None:
    moved = pipeline.rename(tmp_path / "elsewhere")
    assert not any("missing" in line or "changed" in line for line in lineage(moved))
    (moved / "stages" / "sft" / "model" / "weights").write_text("others")
    assert any("[missing: model" in line for line in lineage(moved / "stages" / "rm"))


def test_a_damaged_parent_is_named_and_the_rest_is_shown(pipeline: Path) -> None:
    (pipeline / "stages" / "sft" / "run.json").write_text("{")
    lines = lineage(pipeline / "stages" / "rm")
    assert lines[0].startswith("rm  reward, 60 steps")
    assert "run.json is damaged" in lines[2]


def test_runs_of_an_older_version_show_the_folders_they_noted(pipeline: Path) -> None:
    sft, rm = pipeline / "stages" / "sft", pipeline / "stages" / "rm"
    (rm / "run.json").write_text(json.dumps({"parents": [str(sft)]}))
    (rm / "finished.json").write_text('{"steps": 5}')
    lines = lineage(rm)
    assert lines[0] == "rm  reward, 5 steps"
    assert lines[1].startswith("└── run: sft  sft, 60 steps")


def test_runs_that_lead_to_each_other_end(tmp_path: Path) -> None:
    one = make(tmp_path / "one")
    two = make(tmp_path / "two", takes=(("model.path", one, "model"),))
    entry = {"key": "model.path", "run": str(two), "output": "model", "hash": "0" * 64}
    info = json.loads((one / "run.json").read_text()) | {"inputs": [entry]}
    (one / "run.json").write_text(json.dumps(info))
    assert lineage(one)[-1].endswith("one (described above)")


def test_many_generations_of_two_parents_each_are_read_once(tmp_path: Path) -> None:
    model, data = make(tmp_path / "m0"), make(tmp_path / "d0")
    (data / "data.jsonl").write_text("{}\n")
    for i in range(1, 21):
        takes = (("model.path", model, "model"), ("data.path", data, "data"))
        model, data = (make(tmp_path / f"{kind}{i}", takes=takes) for kind in "md")
        (data / "data.jsonl").write_text("{}\n")
    assert len(trace(model).nodes) == 21 + 20 + 1  # m0 to m20, d0 to d19, the base model


def test_json_has_every_run_once_and_nothing_cut(pipeline: Path) -> None:
    at = pipeline / "stages"
    data: dict[str, Any] = json.loads("\n".join(lineage(at / "ppo", "--json")))
    assert data["root"] == str(at / "ppo")
    assert set(data["nodes"]) == {*(str(at / n) for n in ("sft", "rm", "ppo")), "model:base-model"}
    root = data["nodes"][data["root"]]
    assert (root["name"], root["method"], root["steps"], root["finished"]) == (
        "ppo",
        "ppo",
        60,
        True,
    )
    assert root["made"] == {"model": contents(at / "ppo" / "model").hash}
    assert root["used"]["template"] == "t" * 64
    sft_hash = contents(at / "sft" / "model").hash
    assert root["parents"][0] == {
        "target": str(at / "sft"),
        "key": "model.path",
        "output": "model",
        "recorded": sft_hash,
        "current": sft_hash,
        "state": "unchanged",
    }


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "sft")
    with pytest.raises(UserInputError, match=r"there is no run at .*did you mean .*sft\?"):
        trace(tmp_path / "stf")
    assert CliRunner().invoke(app, ["lineage", str(tmp_path / "stf")]).exit_code == 2


def test_it_answers_in_under_a_second_without_torch(pipeline: Path) -> None:
    code = (
        "import sys; from alignment.cli import app; app(['lineage', sys.argv[1]], "
        "standalone_mode=False); "
        "sys.exit(3 if {'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules) else 0)"
    )
    command = [sys.executable, "-c", code, str(pipeline)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "ppo" in done.stdout
    # The processor's time, not the clock's: the machine may be busy.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
