"""Messages name a row as the user's file counts it, with held-out rows and blank lines between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import bytes_only

from alignment.config.schema import DataConfig
from alignment.data.labelled import build_labelled
from alignment.data.order import split_held_out
from alignment.data.pairs import build_pairs
from alignment.data.places import PlacedRows
from alignment.data.prompts import build_prompts
from alignment.data.samples import build_samples
from alignment.data.steps import build_steps
from alignment.trainers.setup import load_rows
from alignment.types import UserInputError

STEPS = {"completions": ["1 = 1"], "labels": [True]}
GOOD = {"completion": "a", "chosen": "yes", "rejected": "no", "margin": 1.0, **STEPS}
BUILDERS: dict[str, Callable[..., Any]] = {
    "prompts": build_prompts,
    "samples": build_samples,
    "pairs": build_pairs,
    "labelled": build_labelled,
    "steps": build_steps,
}
BROKEN = {"prompts": "prompt", "samples": "completion", "pairs": "margin", "steps": "labels"}


def config(path: Path, **options: Any) -> DataConfig:
    return DataConfig.model_validate({"type": "file", "path": str(path), "held_out": 8, **options})


def loaded(path: Path, bad: dict[str, Any]) -> tuple[PlacedRows, int]:
    """The training part of 20 rows, and the number in the file, counting from 0, of its last row,
    which has `bad` in it. Held-out rows stand before it; in JSON lines, blank lines do as well."""
    # The split goes by split_key, so that what else is wrong with a row does not move it.
    rows = [{"split_key": n, "prompt": f"question {n}", **GOOD} for n in range(20)]
    number = split_held_out(rows, 8, seed=0)[0][-1]
    rows[number] |= bad
    if path.suffix == ".jsonl":
        path.write_text("\n" + "".join(json.dumps(row) + "\n\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    train, held_out = load_rows(config(path))
    assert (len(train.rows), len(held_out.rows)) == (12, 8)
    assert train.rows[-1] == rows[number]
    assert number > 11
    return train, number


def build(form: str, data: PlacedRows, **options: Any) -> Any:
    return BUILDERS[form](data.rows, bytes_only(), places=data.places, **options)


@pytest.mark.parametrize(("form", "column"), BROKEN.items())
def test_a_malformed_row_is_named_by_its_line(tmp_path: Path, form: str, column: str) -> None:
    path = tmp_path / "data.jsonl"
    data, number = loaded(path, {column: {}})
    line = 2 * number + 2  # after the first, blank line, each row is followed by one
    assert json.loads(path.read_text().split("\n")[line - 1])[column] == {}
    with pytest.raises(UserInputError) as caught:
        build(form, data)
    assert str(caught.value).startswith(f"{path}:{line}: ")


@pytest.mark.parametrize("form", ["pairs", "labelled"])
def test_a_row_of_another_file_is_named_by_its_number(tmp_path: Path, form: str) -> None:
    path = tmp_path / "data.json"
    data, number = loaded(path, {"chosen": 3})
    with pytest.raises(UserInputError) as caught:
        build(form, data)
    assert str(caught.value).startswith(f"{path}, row {number} (counting from 0): ")


def test_a_row_of_a_csv_file_is_named_by_the_line_it_begins_on(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('prompt,completion\n\n"two\nlines",a\n"three\n\nlines",b\nd,c\n')
    train, _ = load_rows(config(path, held_out=0))
    assert [train.places.name(i) for i in range(3)] == [f"{path}:3", f"{path}:5", f"{path}:8"]
    with pytest.raises(UserInputError, match=rf"^{path}:3: needs 'chosen' and 'rejected'"):
        build("pairs", train)
    path.write_text('prompt,completion\n"two\nlines",a\n"one\ncell"\n')
    with pytest.raises(UserInputError, match=rf"^{path}:4: 1 values for 2 columns"):
        load_rows(config(path, held_out=0))


def test_dropped_rows_are_named_as_well(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    data, number = loaded(path, {"chosen": "no"})
    reasons = build("pairs", data)[1].reasons()
    assert reasons == [f"1 dropped, chosen and rejected are the same ({path}:{2 * number + 2})"]
    data, number = loaded(tmp_path / "data.json", {"chosen": "no"})
    reasons = build("pairs", data)[1].reasons()
    place = f"{tmp_path / 'data.json'}, row {number}"
    assert reasons == [f"1 dropped, chosen and rejected are the same ({place})"]


@pytest.mark.parametrize("form", ["prompts", "samples", "pairs", "labelled", "steps"])
def test_a_blank_message_of_the_users_is_dropped_and_counted(tmp_path: Path, form: str) -> None:
    path = tmp_path / "data.jsonl"
    blank = [{"role": "system", "content": "s"}, {"role": "user", "content": " \n"}]
    data, number = loaded(path, {"prompt": blank})
    (reason,) = build(form, data)[1].reasons()
    assert reason.endswith(f"dropped, a user's message is blank ({places_of(form, path, number)})")


def places_of(form: str, path: Path, number: int) -> str:
    """Of the blank row; a labelled pair is two answers to it."""
    line = 2 * number + 2
    return f"{path}:{line}, {line}" if form == "labelled" else f"{path}:{line}"


def test_a_row_without_the_others_margin_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    data, number = loaded(path, {"margin": None})
    with pytest.raises(UserInputError, match=rf"^{path}:{2 * number + 2} has no margin"):
        build("pairs", data)


def test_a_limit_takes_the_first_rows_of_the_training_part(tmp_path: Path) -> None:
    data, _ = loaded(tmp_path / "data.json", {})
    short, held_out = load_rows(config(tmp_path / "data.json", limit=3))
    assert list(short.rows) == list(data.rows[:3])
    assert list(short.places.numbers) == list(data.places.numbers[:3])
    assert sorted([*data.places.numbers, *held_out.places.numbers]) == list(range(20))
    for part in (data, held_out):
        numbers = [int(row["prompt"].split()[1]) for row in part.rows]
        assert numbers == list(part.places.numbers)
