"""Files, generated problems and hub data sets become rows, or say what is wrong with them."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignment import registry
from alignment.data.arithmetic import arithmetic
from alignment.data.order import split_held_out
from alignment.data.procedural import reasoning_gym
from alignment.data.sources import file, hub
from alignment.types import UserInputError

ROWS = [{"prompt": "a, b", "answer": "1"}, {"prompt": "line\nbreak\u2028x", "answer": "2"}]


def _write(path: Path) -> Path:
    if path.suffix == ".jsonl":
        path.write_text(
            "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS) + "\n\n", "utf-8"
        )
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif path.suffix == ".csv":
        path.write_text('prompt,answer\n"a, b",1\n"line\nbreak\u2028x",2\n', encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_file_reads_every_format(suffix: str, tmp_path: Path) -> None:
    path = _write(tmp_path / f"rows.{suffix}")
    assert file(str(path)) == ROWS
    odd = path.rename(tmp_path / "rows.data")
    assert file(str(odd), format=suffix) == ROWS  # type: ignore[arg-type]  # a literal at run time
    with pytest.raises(UserInputError, match="set format"):
        file(str(odd))


def test_file_paths_are_relative_and_know_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert file("rows.jsonl") == file("~/rows.jsonl") == ROWS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": ]\n', r"a\.jsonl:3: not valid JSON at column 7"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl:2: a row is an object"),
        ("a.jsonl", "\n", "holds no rows"),
        ("a.json", "", "holds no rows"),
        ("a.json", '[\n{"a": 1},\n{"a" 2}]', r"a\.json:3: not valid JSON"),
        ("a.json", '{"a": 1}', "give a list of objects"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv:3: 1 values for 2 columns"),
        ("a.csv", "a,a\n1,2\n", "appears twice"),
        ("a.csv", "a,b\n", "holds no rows"),
        ("a.parquet", "nonsense", "not a readable parquet file"),
    ],
)
def test_file_names_what_is_malformed(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserInputError, match=message):
        file(str(tmp_path / name))


def test_file_names_the_line_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(UserInputError, match=r"a\.jsonl:2: not UTF-8"):
        file(str(tmp_path / "a.jsonl"))


def test_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="does not exist"):
        file(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserInputError, match="is a directory"):
        file(str(tmp_path))


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = str(_write(tmp_path / "rows.jsonl"))
    renamed = file(path, columns={"answer": "completion"})
    assert renamed[0] == {"prompt": "a, b", "completion": "1"}
    with pytest.raises(UserInputError, match="no column 'nope'"):
        file(path, columns={"nope": "prompt"})
    with pytest.raises(UserInputError, match="which exists"):
        file(path, columns={"answer": "prompt"})


def test_hub_offline_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = importlib.import_module("datasets")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserInputError, match=r"'org/name'.*no route[\s\S]*HF_HUB_OFFLINE"):
        hub("org/name", "train")


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = importlib.import_module("datasets")
    made = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: made)
    assert hub("org/name", "train", columns={"prompt": "question"})[0]["question"] == "a, b"


def test_arithmetic_rows_are_right_and_worked() -> None:
    rows = arithmetic("mixed", operands=4, low=-3, high=9, size=300, seed=3)
    assert len({row["expression"] for row in rows}) == 300
    for row in rows:
        assert eval(row["expression"]) == int(row["answer"])
        steps = row["completion"].split("\n")
        assert len(steps) == 3
        for step in steps:
            before, after = step.split(" = ")
            assert eval(before) == eval(after)
        assert steps[-1].endswith(f"= {row['answer']}")
        assert row["question"] == f"What is {row['expression']}?"
    (by_hand,) = arithmetic("multiply", low=7, high=7)
    assert by_hand["question"] == "What is 7 * 7?"
    assert by_hand["answer"] == "49"
    assert by_hand["completion"] == "7 * 7 = 49"


def test_arithmetic_mirror_images_are_never_split() -> None:
    rows = arithmetic()
    kept, held = split_held_out(rows, 40, seed=0)

    def unordered(indices: list[int]) -> set[tuple[int, ...]]:
        expressions = [rows[index]["expression"] for index in indices]
        return {tuple(sorted(map(int, one.split(" + ")))) for one in expressions}

    assert len(held) == 40
    assert not unordered(kept) & unordered(held)
    assert len(unordered(kept) | unordered(held)) == 210  # unordered pairs of 1..20
    mixed = {row["expression"]: row["split_key"] for row in arithmetic("mixed", 3, 1, 3)}
    assert mixed["1 + 2 * 3"] == mixed["3 * 2 + 1"] == mixed["2 * 3 + 1"]
    assert mixed["3 - 2 + 1"] == mixed["1 + 3 - 2"] != mixed["1 - 3 + 2"]


def test_arithmetic_is_deterministic_and_seeded() -> None:
    assert arithmetic(size=50, seed=1) == arithmetic(size=50, seed=1)
    assert arithmetic(size=50, seed=1) != arithmetic(size=50, seed=2)
    assert len(arithmetic()) == 400
    assert len(arithmetic(low=1, high=10**9, size=500)) == 500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operands": 1}, "operands is 1"),
        ({"low": 5, "high": 4}, "swap them"),
        ({"size": 401}, "distinct problems"),
        ({"size": 0}, "size is 0"),
        ({"question": "how much?"}, "no {expression}"),
        ({"high": 10**6}, "set size"),
    ],
)
def test_arithmetic_refuses_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        arithmetic(**options)


def test_reasoning_gym_rows_can_be_scored_by_the_task() -> None:
    rows = reasoning_gym("leg_counting", size=3, seed=4, options={"max_animals": 4})
    gym = importlib.import_module("reasoning_gym")
    for row in rows:
        scorer = gym.create_dataset(row["task"], **row["options"])
        assert scorer.score_answer(row["answer"], row["entry"]) == 1.0
        assert scorer.score_answer("-1", row["entry"]) < 1.0
        assert len(row["entry"]["metadata"]["animals"]) <= 4
    assert rows == reasoning_gym("leg_counting", size=3, seed=4, options={"max_animals": 4})
    with pytest.raises(UserInputError, match="did you mean 'leg_counting'"):
        reasoning_gym("leg_count")
    with pytest.raises(UserInputError, match="does not take the options"):
        reasoning_gym("leg_counting", options={"wings": 3})


def test_every_source_is_registered_with_a_checkable_signature() -> None:
    assert {"file", "hub", "arithmetic", "reasoning_gym"} <= set(registry.names("source"))
    for name in ("file", "hub", "arithmetic", "reasoning_gym"):
        parameters = inspect.signature(registry.get("source", name)).parameters.values()
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
        assert all(p.annotation is not p.empty for p in parameters)


def test_sources_import_no_torch() -> None:
    code = (
        "import sys\n"
        "from alignment import registry\n"
        "[registry.get('source', n) for n in ('file', 'hub', 'arithmetic', 'reasoning_gym')]\n"
        "import alignment.data.formats, alignment.data.chat, alignment.data.samples\n"
        "assert not {'torch', 'transformers', 'datasets', 'reasoning_gym'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
