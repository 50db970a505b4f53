"""Lineage: what is recorded, what is blanked, and hashes that mean something."""

import datetime
import hashlib
import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from alignment.runs import lineage
from alignment.runs.files import file_hash
from alignment.runs.inputs import ParentRecord, recorded_inputs
from alignment.runs.lineage import data_hash, redact, run_info, text_hash
from alignment.types import AlignmentError

ARGUMENTS = {
    "recipe": "run: {}\n",
    "command": ["align", "train", "r.yaml", "--token", "abc"],
    "seed": 7,
    "model_hash": "m",
    "tokenizer_hash": "t",
    "template_hash": None,
    "data_hash": "d",
    "parents": [Path("runs/sft")],
}


def test_parents_are_those_of_the_inputs_and_further_ones_each_once():
    inputs = [
        ParentRecord(key, run, "model", "1" * 64)
        for key, run in (("model.path", "runs/a"), ("rewards.0.path", "runs/b"), ("x", "runs/a"))
    ]
    info = run_info(**ARGUMENTS | {"inputs": inputs, "parents": [Path("runs/b"), Path("runs/c")]})
    assert info["parents"] == ["runs/a", "runs/b", "runs/c"]
    assert info["inputs"][1] == {
        "key": "rewards.0.path",
        "run": "runs/b",
        "output": "model",
        "hash": "1" * 64,
    }
    assert recorded_inputs(json.loads(json.dumps(info))) == tuple(inputs)


def test_inputs_that_were_not_looked_for_are_told_from_none():
    assert recorded_inputs(run_info(**ARGUMENTS)) is None
    assert recorded_inputs(run_info(**ARGUMENTS | {"inputs": []})) == ()


def git(directory, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_run_info_holds_what_the_design_asks_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    info = run_info(**ARGUMENTS)
    assert json.loads(json.dumps(info, allow_nan=False)) == info
    assert info["seed"] == 7
    assert info["command"] == ["align", "train", "r.yaml", "--token", "***"]
    assert info["parents"] == ["runs/sft"]
    assert (info["model_hash"], info["tokenizer_hash"]) == ("m", "t")
    assert (info["template_hash"], info["data_hash"]) == (None, "d")
    assert info["recipe_hash"] == hashlib.sha256(b"run: {}\n").hexdigest()
    assert info["versions"]["torch"] == version("torch")
    assert set(info["versions"]) == {
        "alignment",
        "python",
        "torch",
        "transformers",
        "peft",
        "accelerate",
    }
    assert info["cpu_count"] >= 1
    assert info["git"] is None
    assert datetime.datetime.fromisoformat(info["time"]).utcoffset() == datetime.timedelta(0)


def test_the_git_commit_and_changes_are_recorded(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    monkeypatch.chdir(tmp_path)
    assert run_info(**ARGUMENTS)["git"] == {"commit": commit, "changed": False}
    (tmp_path / "a").write_text("2")
    assert run_info(**ARGUMENTS)["git"] == {"commit": commit, "changed": True}


def test_a_machine_without_git_is_no_error(monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    assert run_info(**ARGUMENTS)["git"] is None


def test_a_package_that_is_not_installed_is_none(monkeypatch):
    monkeypatch.setattr(lineage, "_PACKAGES", ("torch", "no-such-package-here"))
    assert run_info(**ARGUMENTS)["versions"]["no-such-package-here"] is None


@pytest.mark.parametrize(
    ("argument", "blanked"),
    [
        ("hub.token=abc", "hub.token=***"),
        ("--api-key=abc", "--api-key=***"),
        ("OPENAI_API_KEY=abc", "OPENAI_API_KEY=***"),
        ("db.password=a=b", "db.password=***"),
        ("aws_secret_access_key=x", "aws_secret_access_key=***"),
        ("x=hf_abcdefghijklmnop", "x=***"),
        ("sk-abcdefghijklmnop", "***"),
        ("https://me:pass@host/x", "https://me:***@host/x"),
        ("rollout.max_new_tokens=48", None),
        ("tokenizer.pad_token=<pad>", None),
        ("model.path=hf_models/tiny", None),
        ("https://host:8000/v1", None),
        ("recipes/risk-aware-training.yaml", None),
        ("algorithm.group_size=8", None),
    ],
)
def test_secrets_are_blanked_and_settings_are_not(argument, blanked):
    assert redact(["align", argument]) == ["align", blanked or argument]


def test_a_secret_after_its_option_is_blanked():
    command = ["align", "--hf-token", "abc", "token", "kept", "--max-tokens", "5"]
    assert redact(command) == ["align", "--hf-token", "***", "token", "kept", "--max-tokens", "5"]


def test_data_hash_is_the_sha_of_sorted_json_lines():
    rows = [{"b": 1, "a": "é"}, {"a": None}]
    text = '{"a": "\\u00e9", "b": 1}\n{"a": null}\n'
    assert data_hash(rows) == hashlib.sha256(text.encode()).hexdigest()
    assert data_hash(iter(rows)) == data_hash([{"a": "é", "b": 1}, {"a": None}])


@pytest.mark.parametrize(
    "other",
    [
        [{"a": 2}, {"a": 1}],
        [{"a": 1}],
        [{"a": 1}, {"a": 2}, {"a": 3}],
        [{"a": 1}, {"a": "2"}],
        [{"a": 1}, {"b": 2}],
    ],
)
def test_other_rows_have_another_hash(other):
    assert data_hash(other) != data_hash([{"a": 1}, {"a": 2}])


def test_bytes_arrays_and_dates_have_a_stable_form():
    row = {"b": b"x", "n": np.arange(2), "d": datetime.date(2020, 1, 2), "p": Path("a")}
    other = {"b": b"y", "n": [0, 1], "d": "2020-01-02", "p": "a"}
    assert data_hash([row]) == data_hash([dict(row)])
    assert data_hash([row]) != data_hash([other])
    assert data_hash([{**row, "b": 0}]) == data_hash([{**other, "b": 0}])


def test_a_row_without_a_stable_form_is_named():
    with pytest.raises(AlignmentError, match=r"row 1 cannot be hashed.*object"):
        data_hash([{"a": 1}, {"a": object()}])


def test_file_and_text_hash_are_plain_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert file_hash(tmp_path / "a") == text_hash("abc") == known
