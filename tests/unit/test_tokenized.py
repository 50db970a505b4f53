"""Rows of a recipe as tokens: what becomes of those that cannot be used, held-out ones included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import bytes_only

from alignment.config.load import load_recipe
from alignment.config.schema import Recipe, TaskConfig
from alignment.data.places import PlacedRows, Places
from alignment.distributed import Distributed
from alignment.runs.events import EventLog, read_events
from alignment.trainers.evaluation import eval_context, make_task
from alignment.trainers.setup import assemble, load_parts
from alignment.trainers.tokenized import TokenizedForms
from alignment.types import UserInputError


def forms(method: str, *overrides: str) -> TokenizedForms:
    recipe = load_recipe(f"tiny/{method}", overrides)
    assert isinstance(recipe, Recipe)
    return TokenizedForms(recipe, bytes_only(), context_length=None, generation_config=None)


def held_out(*rows: dict[str, Any]) -> PlacedRows:
    """The lines 5, 10, 15, ... of a file."""
    return PlacedRows(rows, Places(range(5, 5 * len(rows) + 5, 5), "pairs.jsonl"))


PAIR = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
SAME = {"prompt": "hi", "chosen": "yes", "rejected": "yes"}


def test_held_out_rows_that_are_dropped_are_counted() -> None:
    warnings: list[str] = []
    data = forms("dpo").held_out(held_out(PAIR, SAME, PAIR), warnings)
    assert len(data.pairs) == 2
    (warning,) = warnings
    assert warning.startswith("held-out data: 2 of 3 rows kept; 1 dropped, chosen and rejected are")
    assert "pairs.jsonl:10" in warning
    with pytest.raises(UserInputError, match=r"held-out data: 1 of 3 rows \(33\.3%\) cannot be"):
        forms("dpo", "limits.dropped_rows=0.3").held_out(held_out(PAIR, SAME, PAIR), warnings)


def test_forms_that_only_tasks_want_warn_of_nothing_and_say_why_they_are_not_there() -> None:
    warnings: list[str] = []
    data = forms("kto").held_out(held_out({**PAIR, "margin": 1.0}, PAIR), warnings)
    assert [one.desirable for one in data.labelled] == [True, False, True, False]
    assert not len(data.pairs) and not warnings
    assert "pairs.jsonl:10 has no margin, and other rows have one" in data.why_not["pairs"]
    assert "needs 'completions' and 'labels'" in data.why_not["steps"]
    assert not {"labelled", "prompts"} & data.why_not.keys()


def test_without_held_out_rows_there_is_nothing_to_say() -> None:
    warnings: list[str] = []
    data = forms("kto").held_out(held_out(), warnings)
    assert not (data.prompts or data.labelled or data.why_not or warnings)


def test_a_held_out_row_that_is_malformed_for_the_method_is_an_error() -> None:
    with pytest.raises(UserInputError, match=r"^pairs\.jsonl:5: needs 'chosen' and 'rejected'"):
        forms("dpo").held_out(held_out({"prompt": "hi"}), [])


def test_a_run_warns_of_them_and_a_task_names_the_reason(tmp_path: Path) -> None:
    """Of nine rows two are trained on: held out are a blank one, and others of both kinds."""
    blank = {"prompt": "?", "chosen": "yes", "rejected": " "}
    rows = [{**PAIR, "margin": 1}] * 3 + [PAIR] * 3 + [blank] * 3
    file = tmp_path / "pairs.jsonl"
    lines = [json.dumps(row | {"split_key": n}) + "\n" for n, row in enumerate(rows)]
    file.write_text("".join(lines), encoding="utf-8")
    recipe = load_recipe("tiny/kto", [f"data={{type: file, path: '{file}', held_out: 7}}"])
    assert isinstance(recipe, Recipe)
    events = EventLog(tmp_path / "events.jsonl")
    context = assemble(load_parts(recipe), Distributed(), events, cache=tmp_path)
    messages = [event["message"] for event in read_events(tmp_path / "events.jsonl")]
    (held_out_message,) = (one for one in messages if one.startswith("held-out data: "))
    assert "a side has a blank response" in held_out_message
    with pytest.raises(UserInputError, match=r"no held-out preference pairs.* has no margin"):
        make_task(TaskConfig(type="preference")).run(eval_context(context))
