"""metrics.jsonl and events.jsonl: valid JSON, each step once, torn lines survived."""

import errno
import io
import json
import logging
import math
import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignment.runs.events import EventLog, read_events
from alignment.runs.metrics import MetricSums, MetricsWriter, read_metrics
from alignment.types import AlignmentError, Outcome


def strict_lines(path):
    """Every line, by a reader that refuses what JSON does not have."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_means_divide_once_by_the_sum_of_counts():
    """Micro-batches of 1 and 3 tokens: the mean is 11/4, not the mean of means (5 + 2) / 2."""
    sums = MetricSums()
    sums.add("loss", 5.0, 1)
    other = MetricSums()
    other.add("loss", 6.0, 3)
    other.add("reward", 0.5)
    other.add_max("length", 7)
    sums.add_max("length", 9)
    sums.merge(other)
    assert sums.result() == {"loss": 2.75, "reward": 0.5, "length": 9}


def test_a_mean_over_nothing_is_left_out():
    sums = MetricSums()
    sums.add("kl", 0.0, 0)
    assert sums.result() == {}


def test_a_nan_in_a_maximum_stays():
    for values in ([math.nan, 1.0], [1.0, math.nan], [1.0, math.nan, 2.0]):
        sums = MetricSums()
        for value in values:
            sums.add_max("x", value)
        assert math.isnan(sums.result()["x"])


def test_a_name_is_a_mean_or_a_maximum():
    sums = MetricSums()
    sums.add("a", 1.0)
    sums.add_max("b", 1.0)
    with pytest.raises(AlignmentError, match="'a' is a mean"):
        sums.add_max("a", 1.0)
    with pytest.raises(AlignmentError, match="'b' is a maximum"):
        sums.add("b", 1.0)
    with pytest.raises(AlignmentError, match="count of -1"):
        sums.add("a", 1.0, -1)
    with pytest.raises(AlignmentError, match="count of nan"):
        sums.add("a", 1.0, math.nan)


@given(
    st.lists(st.tuples(st.integers(-100, 100), st.integers(1, 9)), min_size=1, max_size=8),
    st.integers(0, 8),
)
def test_merging_does_not_depend_on_the_split(observations, cut):
    halves = [MetricSums(), MetricSums()]
    for place, (total, count) in enumerate(observations):
        halves[place >= cut].add("x", total, count)
    halves[0].merge(halves[1])
    exact = Fraction(sum(t for t, _ in observations), sum(c for _, c in observations))
    assert halves[0].result()["x"] == pytest.approx(float(exact), rel=1e-15)


def test_written_metrics_are_strict_json_and_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write(1, {"loss": 0.1, "n": 3, "flag": True, "np": np.float32(0.5)})
    writer.write(2, {"loss": math.nan, "kl": math.inf, "low": -math.inf, "t": torch.tensor(2.0)})
    assert strict_lines(path) == [
        {"step": 1, "loss": 0.1, "n": 3, "flag": 1, "np": 0.5},
        {
            "step": 2,
            "loss": None,
            "kl": None,
            "low": None,
            "t": 2.0,
            "nonfinite": {"loss": "nan", "kl": "inf", "low": "-inf"},
        },
    ]
    back = read_metrics(path)[1]
    assert math.isnan(back["loss"])
    assert (back["kl"], back["low"], back["t"]) == (math.inf, -math.inf, 2.0)
    assert "nonfinite" not in back


def test_a_line_is_on_file_before_the_next_step(tmp_path):
    writer = MetricsWriter(tmp_path / "m")
    writer.write(1, {"a": 1.0})
    assert len(read_metrics(tmp_path / "m")) == 1


def test_no_file_is_no_metrics(tmp_path):
    assert read_metrics(tmp_path / "m") == []


@pytest.mark.parametrize("step", [2, 1, 0])
def test_steps_must_grow_and_the_error_names_the_remedy(tmp_path, step):
    MetricsWriter(tmp_path / "m").write(2, {})
    for writer in (MetricsWriter(tmp_path / "m"), MetricsWriter(tmp_path / "m")):
        with pytest.raises(AlignmentError, match="truncate_after"):
            writer.write(step, {})


@pytest.mark.parametrize(
    ("metrics", "message"), [({"step": 1}, "'step'"), ({"nonfinite": 1}, "'nonfinite'")]
)
def test_reserved_names_are_refused(tmp_path, metrics, message):
    with pytest.raises(AlignmentError, match=message):
        MetricsWriter(tmp_path / "m").write(1, metrics)


@pytest.mark.parametrize("value", ["0.5", None, [1.0]])
def test_a_value_that_is_no_number_is_refused_and_nothing_is_written(tmp_path, value):
    writer = MetricsWriter(tmp_path / "m")
    with pytest.raises(AlignmentError, match=r"'loss' is .* no number"):
        writer.write(1, {"loss": value})
    assert read_metrics(tmp_path / "m") == []


def test_every_torn_last_line_is_left_out_and_overwritten(tmp_path):
    """Cut the file at every byte: what is read is the whole lines, and writing goes on."""
    whole = tmp_path / "whole"
    writer = MetricsWriter(whole)
    writer.write(1, {"a": 1.0})
    writer.write(2, {"a": 2.0})
    content = whole.read_bytes()
    first = content.index(b"\n") + 1
    for cut in range(len(content)):
        path = tmp_path / "cut"
        path.write_bytes(content[:cut])
        complete = 2 if cut >= len(content) - 1 else 1 if cut >= first - 1 else 0
        assert len(read_metrics(path)) == complete
        resumed = MetricsWriter(path)
        resumed.write(complete + 1, {"a": 9.0})
        assert [record["step"] for record in strict_lines(path)] == list(range(1, complete + 2))


def test_damage_to_a_line_with_its_line_end_is_an_error_with_the_line(tmp_path):
    for rest in ('{"step": 3}\n', '{"st', ""):
        (tmp_path / "m").write_text('{"step": 1}\n{"st\n' + rest)
        with pytest.raises(AlignmentError, match="line 2"):
            read_metrics(tmp_path / "m")


def test_a_file_of_something_else_is_not_written_to(tmp_path):
    (tmp_path / "m").write_text('{"a": 1}\n')
    with pytest.raises(AlignmentError, match="no metrics file"):
        MetricsWriter(tmp_path / "m")


def test_truncate_after_drops_later_steps_only(tmp_path):
    path = tmp_path / "m"
    writer = MetricsWriter(path)
    for step in (1, 2, 3, 4):
        writer.write(step, {"a": step / 3, "b": math.nan})
    before = path.read_text().splitlines()
    assert writer.truncate_after(2) == 2
    assert path.read_text().splitlines() == before[:2]
    assert writer.truncate_after(2) == 0
    writer.write(3, {"a": 0.0})
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    assert writer.truncate_after(0) == 3
    writer.write(1, {})
    writer.close()
    assert strict_lines(path) == [{"step": 1}]


def test_a_failed_truncate_leaves_the_file_and_the_writer_usable(tmp_path, monkeypatch):
    path = tmp_path / "m"
    writer = MetricsWriter(path)
    for step in (1, 2):
        writer.write(step, {})
    with monkeypatch.context() as patch:

        def fail(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "replace", fail)
        with pytest.raises(AlignmentError, match="disk is full"):
            writer.truncate_after(1)
    writer.write(3, {})
    assert [record["step"] for record in strict_lines(path)] == [1, 2, 3]


def test_a_write_that_fails_half_way_leaves_whole_lines(tmp_path, monkeypatch):
    """The disk takes five bytes of a line and then is full."""
    path = tmp_path / "m"
    writer = MetricsWriter(path)
    writer.write(1, {"a": 1.0})

    def five_bytes_then_full(line):
        writer._file._file.write(line[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer._file, "_write_all", five_bytes_then_full)
        with pytest.raises(AlignmentError, match="disk is full"):
            writer.write(2, {"a": 2.0})
    writer.write(2, {"a": 2.0})
    assert [record["step"] for record in strict_lines(path)] == [1, 2]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(AlignmentError, match="does not exist"):
        MetricsWriter(tmp_path / "no" / "m")


def test_events_hold_time_kind_message_and_fields(tmp_path):
    log = EventLog(tmp_path / "e")
    log.write("checkpoint", "saved", step=3, path=tmp_path, outcome=Outcome.CRASH, x=math.nan)
    log.write("resume", "from step 3", steps=(1, 2), nested={"a": math.inf})
    log.close()
    first, second = strict_lines(tmp_path / "e")
    assert first["time"].endswith("+00:00")
    assert (first["kind"], first["message"], first["step"]) == ("checkpoint", "saved", 3)
    assert (first["outcome"], first["x"]) == ("crash", "nan")
    assert str(tmp_path) in first["path"]
    assert (second["steps"], second["nested"]) == ([1, 2], {"a": "inf"})
    assert read_events(tmp_path / "e") == [first, second]


def test_events_before_there_is_a_folder_are_written_once_there_is_one(tmp_path):
    path = tmp_path / "run" / "events.jsonl"
    log = EventLog(path)
    log.write("warning", "early")
    assert not path.parent.exists()
    path.parent.mkdir()
    log.write("start", "now")
    log.close()
    assert [event["message"] for event in read_events(path)] == ["early", "now"]
    EventLog(tmp_path / "never" / "events.jsonl").close()


def test_the_null_device_takes_events():
    log = EventLog(os.devnull)
    log.write("warning", "nobody reads this")
    log.close()


def test_opening_a_whole_file_does_not_touch_it(tmp_path, monkeypatch):
    """Another process may append at that moment; only a torn file is mended."""
    MetricsWriter(tmp_path / "m").write(1, {})
    before = (tmp_path / "m").stat()
    opened = []
    monkeypatch.setattr("builtins.open", lambda *a, **k: opened.append(a[1]) or io.BytesIO())
    MetricsWriter(tmp_path / "m")
    monkeypatch.undo()
    assert opened == ["ab"]
    assert (tmp_path / "m").stat().st_mtime_ns == before.st_mtime_ns


def test_warnings_reach_the_logger_and_the_rest_does_not(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "alignment")
    log = EventLog(tmp_path / "e")
    log.write("checkpoint", "saved 100%s")
    log.write("warning", "kl is high: 100%s")
    log.write("error", "stopping")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "kl is high: 100%s"),
        ("ERROR", "stopping"),
    ]


def test_an_event_field_cannot_replace_the_time(tmp_path):
    with pytest.raises(AlignmentError, match="'time'"):
        EventLog(tmp_path / "e").write("warning", "x", time=1)
