"""Rollout files: what was sampled comes back, and the table reads like the design says."""

import json
import math
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from alignment.runs.samples import SampleRecorder, read_rollout, rollout_files, rollout_path
from alignment.types import (
    AlignmentError,
    Completion,
    Outcome,
    Prompt,
    RewardedCompletion,
    Rollout,
    Score,
    StopReason,
)


def rewarded(prompt_index, sample_index, reward=0.5, outcome=Outcome.CORRECT, parts=None):
    prompt = Prompt(
        token_ids=(1, 5, 2**31 - 1),
        text=f"What is {prompt_index}?\n<|im_end|>",
        index=prompt_index,
        row={"answer": "4", "messages": [{"role": "user", "content": "é"}]},
    )
    completion = Completion(
        prompt_index=prompt_index,
        sample_index=sample_index,
        token_ids=(7, 8),
        sampling_logprobs=(-0.5, float(np.float32(-1.1))),
        stop_reason=StopReason.STOP if sample_index else StopReason.LENGTH,
        policy_version=3,
        text="four \U0001f600",
    )
    return RewardedCompletion(prompt, completion, reward, outcome, parts or {})


@pytest.fixture
def rollout():
    parts = {"math": Score(1.0, Outcome.CORRECT, "4 == 4"), "len": Score(-0.25)}
    failed = {"math": Score(None, Outcome.TIMEOUT, "after 5 s"), "len": Score(0.1)}
    items = (
        rewarded(10, 0, parts=parts),
        rewarded(10, 1, reward=None, outcome=Outcome.TIMEOUT, parts=failed),
        rewarded(11, 0, reward=-math.inf, parts={"odd": Score(math.inf)}),
        rewarded(11, 1, reward=0.1, outcome=Outcome.UNPARSEABLE),
    )
    return Rollout(items, group_size=2, step=12)


def test_a_rollout_comes_back_equal(tmp_path, rollout):
    path = SampleRecorder(tmp_path / "rollouts").write(rollout, advantages=[1.0, None, -1.0, 0.0])
    assert path == tmp_path / "rollouts" / "step-000012.parquet"
    assert read_rollout(path) == rollout


def test_the_columns_are_those_documented(tmp_path, rollout):
    recorder = SampleRecorder(tmp_path)
    path = recorder.write(rollout, advantages=[1.0, None, -1.0, 0.0], extra={"kl": [1, 2, 3, 4]})
    rows = pq.read_table(path).to_pylist()
    assert [row["group"] for row in rows] == [0, 0, 1, 1]
    assert [row["prompt_index"] for row in rows] == [10, 10, 11, 11]
    assert [row["sample_index"] for row in rows] == [0, 1, 0, 1]
    assert [row["advantage"] for row in rows] == [1.0, None, -1.0, 0.0]
    assert [row["kl"] for row in rows] == [1, 2, 3, 4]
    assert [row["stop_reason"] for row in rows] == ["length", "stop"] * 2
    assert {row["step"] for row in rows} == {12}
    second = rows[1]
    assert second["prompt"] == "What is 10?\n<|im_end|>"
    assert second["completion"] == "four \U0001f600"
    assert second["prompt_ids"] == [1, 5, 2**31 - 1]
    assert second["completion_ids"] == [7, 8]
    assert second["reward"] is None
    assert second["outcome"] == "timeout"
    assert second["policy_version"] == 3
    assert json.loads(second["reward_parts"]) == {
        "math": {"value": None, "outcome": "timeout", "detail": "after 5 s"},
        "len": {"value": 0.1, "outcome": "scored", "detail": ""},
    }
    types = {field.name: str(field.type) for field in pq.read_schema(path)}
    assert types["prompt_ids"] == types["completion_ids"] == "list<element: int32>"
    assert types["sampling_logprobs"] == "list<element: float>"
    assert types["reward"] == types["advantage"] == "double"


def test_what_was_dropped_is_recorded_apart(tmp_path, rollout):
    """Rows at the end that are not kept, without values in the columns of what was trained on."""
    dropped = (rewarded(12, 0, reward=0.0), rewarded(12, 1, reward=0.0))
    rollout = replace(rollout, dropped=dropped)
    extra = {"kl": [1, 2, 3, 4]}
    path = SampleRecorder(tmp_path).write(rollout, advantages=[1.0, None, -1.0, 0.0], extra=extra)
    assert read_rollout(path) == rollout
    rows = pq.read_table(path).to_pylist()
    assert [row["kept"] for row in rows] == [True] * 4 + [False] * 2
    assert [row["group"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert [row["prompt_index"] for row in rows] == [10, 10, 11, 11, 12, 12]
    assert [row["advantage"] for row in rows] == [1.0, None, -1.0, 0.0, None, None]
    assert [row["kl"] for row in rows] == [1, 2, 3, 4, None, None]


def test_everything_in_a_file_without_the_column_kept_was_kept(tmp_path, rollout):
    path = SampleRecorder(tmp_path).write(rollout)
    pq.write_table(pq.read_table(path).drop_columns(["kept"]), path)
    assert read_rollout(path) == rollout


def test_an_empty_rollout_and_an_empty_completion_come_back(tmp_path):
    empty = Rollout((), group_size=4, step=1)
    assert read_rollout(SampleRecorder(tmp_path).write(empty)) == empty
    item = rewarded(0, 0)
    item = replace(item, completion=replace(item.completion, token_ids=(), sampling_logprobs=()))
    rollout = Rollout((item,), group_size=1, step=2)
    assert read_rollout(SampleRecorder(tmp_path).write(rollout)) == rollout


def test_odd_texts_and_rows_do_not_stop_a_run(tmp_path):
    item = rewarded(0, 0)
    prompt = replace(item.prompt, text="\ud800", row={"x": np.arange(2), "y": {1}})
    rollout = Rollout((replace(item, prompt=prompt),), group_size=1, step=1)
    back = read_rollout(SampleRecorder(tmp_path).write(rollout)).items[0].prompt
    assert back.text == "?"
    assert back.row == {"x": [0, 1], "y": "{1}"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"advantages": [1.0]}, "'advantage' has 1 values for 4"),
        ({"extra": {"kl": [1.0]}}, "'kl' has 1 values for 4"),
        ({"extra": {"reward": [1, 2, 3, 4]}}, "column 'reward' already"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path, rollout, arguments, message):
    with pytest.raises(AlignmentError, match=message):
        SampleRecorder(tmp_path).write(rollout, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_step_written_again_replaces_its_file(tmp_path, rollout):
    recorder = SampleRecorder(tmp_path)
    recorder.write(rollout)
    shorter = replace(rollout, items=rollout.items[:2])
    path = recorder.write(shorter)
    assert read_rollout(path) == shorter
    assert list(tmp_path.iterdir()) == [path]


def test_truncate_after_removes_later_steps_and_leftovers(tmp_path, rollout):
    recorder = SampleRecorder(tmp_path)
    for step in (1, 2, 3):
        recorder.write(replace(rollout, step=step))
    (tmp_path / ".tmp-step-000003.parquet-00").write_text("torn")
    recorder.truncate_after(1)
    assert list(tmp_path.iterdir()) == [rollout_path(tmp_path, 1)]
    assert rollout_files(tmp_path) == [(1, rollout_path(tmp_path, 1))]
    assert SampleRecorder(tmp_path / "none").truncate_after(1) == []


def test_damaged_and_foreign_files_are_named(tmp_path, rollout):
    path = SampleRecorder(tmp_path).write(rollout)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(AlignmentError, match=r"step-000012\.parquet is damaged"):
            read_rollout(path)
    with pytest.raises(AlignmentError, match="does not exist"):
        read_rollout(tmp_path / "none.parquet")
