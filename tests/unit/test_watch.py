"""The watch of a rank: who hangs, who is dead, and what an exchange's error says of the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from alignment.activity import ACTIVITY, doing, exchanging
from alignment.runs import watch as watch_module
from alignment.runs.events import EventLog
from alignment.runs.launched import LAUNCHER, REPORTS, read_reports
from alignment.runs.watch import (
    HEARTBEATS,
    Beat,
    Verdict,
    Watch,
    beat_path,
    clear_heartbeats,
    hang,
)
from alignment.types import AlignmentError

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer"
LIMIT = 60.0


def beat(rank: int, *, exchanges: int, idle: float = 100.0, exchanging: bool = False) -> Beat:
    return Beat(
        rank=rank,
        host="elsewhere",
        pid=1,
        written=1e9 + 100,
        step=7,
        phase="grading" if rank else "update",
        detail=f"detail of {rank}",
        since=1e9,
        idle=idle,
        exchanges=exchanges,
        exchanging=exchanging,
    )


def ended_process() -> int:
    """The id of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_rank_that_nobody_is_behind_hangs_itself() -> None:
    verdict = hang(beat(1, exchanges=4), [beat(0, exchanges=5)], limit=LIMIT, world_size=2)
    assert verdict is not None
    assert verdict.ranks == (1,)
    assert verdict.message.startswith(
        "rank 1 hangs in grading of step 7 (detail of 1) since 01:46:40 UTC"
    )


def test_a_rank_that_waits_names_those_that_have_not_come_as_far() -> None:
    own = beat(0, exchanges=5, exchanging=True)
    others = [beat(1, exchanges=4), beat(2, exchanges=5, exchanging=True)]
    verdict = hang(own, others, limit=LIMIT, world_size=3)
    assert verdict is not None
    assert verdict.ranks == (1,)
    assert verdict.message == (
        "rank 0 waited in update of step 7 (detail of 0) for 1.67 minutes (limits.hang_minutes is "
        "1) for rank 1, which is in grading of step 7 (detail of 1) since 01:46:40 UTC"
    )


def test_a_rank_that_waits_for_one_that_moves_is_patient() -> None:
    own = beat(0, exchanges=5, exchanging=True, idle=9999.0)
    moves, stuck = beat(1, exchanges=4, idle=LIMIT - 1), beat(2, exchanges=4)
    assert hang(own, [stuck, moves], limit=LIMIT, world_size=3) is None
    ended = replace(moves, ended="ValueError: no")
    assert hang(own, [stuck, ended], limit=LIMIT, world_size=3) is not None


def test_where_all_have_arrived_it_is_the_connection() -> None:
    own, other = (beat(rank, exchanges=5, exchanging=True) for rank in (0, 1))
    verdict = hang(own, [other], limit=LIMIT, world_size=2)
    assert verdict is not None
    assert "look at the connection" in verdict.message


def test_where_all_have_arrived_it_is_the_rank_whose_watch_stands_still() -> None:
    own, stopped, waits = (beat(rank, exchanges=5, exchanging=True) for rank in (0, 1, 2))
    others = [replace(stopped, silent=LIMIT / 2 + 1), replace(waits, silent=2.0)]
    verdict = hang(own, others, limit=LIMIT, world_size=3)
    assert verdict is not None
    assert verdict.ranks == (1,)
    assert verdict.message.endswith(
        " for rank 1, which is in grading of step 7 (detail of 1) since 01:46:40 UTC and has given "
        "no sign of life since 01:48:20 UTC: process 1 on elsewhere is stopped, or in a call that "
        "lets no other thread run"
    )


def test_a_rank_that_waits_for_nobody_hangs_itself_though_another_is_silent() -> None:
    silent = replace(beat(1, exchanges=5), silent=LIMIT)
    verdict = hang(beat(0, exchanges=5), [silent], limit=LIMIT, world_size=2)
    assert verdict is not None
    assert verdict.ranks == (0,)


def test_alone_it_is_the_run_that_hangs() -> None:
    verdict = hang(beat(0, exchanges=5), [], limit=LIMIT, world_size=1)
    assert verdict is not None
    assert verdict.message.startswith("the run hangs in update of step 7")


def watch(run: Path, hang_minutes: float = 30.0, world_size: int = 2) -> Watch:
    events = EventLog(run / "events.jsonl")
    return Watch(run, events, rank=0, world_size=world_size, hang_minutes=hang_minutes)


def other_rank(run: Path, pid: int | None = None, **changes: object) -> None:
    """The heartbeat of rank 1 on this machine."""
    mine = json.loads(beat_path(run, 0).read_text())
    own = mine | {"rank": 1, "pid": os.getpid() if pid is None else pid} | changes
    beat_path(run, 1).write_text(json.dumps(own))


def test_a_heartbeat_is_there_while_the_run_is(tmp_path: Path) -> None:
    with watch(tmp_path):
        assert beat_path(tmp_path, 0).is_file()
    assert not (tmp_path / HEARTBEATS).exists()


def test_alone_a_run_writes_no_heartbeat(tmp_path: Path) -> None:
    with watch(tmp_path, world_size=1):
        assert list(tmp_path.iterdir()) == []


def test_an_exchange_that_fails_names_the_dead_rank(tmp_path: Path) -> None:
    gone = ended_process()
    with (
        pytest.raises(AlignmentError, match="rank 1, which is dead") as error,
        watch(tmp_path),
        doing("update"),
    ):
        ACTIVITY.step = 3
        other_rank(tmp_path, gone, phase="grading", step=3, detail="reward 'math'")
        raise RuntimeError(GLOO)
    said = str(error.value)
    assert said.startswith("rank 0, in update of step 3, lost the connection to rank 1")
    assert f"in grading of step 3 (reward 'math') (process {gone} on " in said
    assert isinstance(error.value.__cause__, RuntimeError)


def test_an_exchange_that_fails_says_why_the_other_rank_ended(tmp_path: Path) -> None:
    said = "which ended in preparation: ValueError: no"
    with pytest.raises(AlignmentError, match=said), watch(tmp_path):
        other_rank(tmp_path, ended="ValueError: no")
        raise RuntimeError(GLOO)


@pytest.mark.parametrize("error", [ValueError("no"), RuntimeError("size mismatch")])
def test_an_error_of_this_rank_stays_what_it_is(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error), match=str(error)), watch(tmp_path):
        other_rank(tmp_path, ended_process())
        raise error
    left = json.loads(beat_path(tmp_path, 0).read_text())
    assert left["ended"] == f"{type(error).__name__}: {error}"  # for the others to read


def test_what_an_earlier_start_left_is_cleared(tmp_path: Path) -> None:
    with pytest.raises(ValueError), watch(tmp_path):
        raise ValueError
    assert beat_path(tmp_path, 0).is_file()
    clear_heartbeats(tmp_path)
    assert not beat_path(tmp_path, 0).exists()


def test_a_silent_rank_on_another_machine_is_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = watch(tmp_path)
    far = beat(1, exchanges=0)
    assert not own._is_lost(far)  # it has just been seen for the first time
    monkeypatch.setattr(watch_module, "SILENT_SECONDS", 0.05)
    time.sleep(0.1)
    assert own._is_lost(far)
    assert not own._is_lost(replace(far, written=far.written + 2))


def test_a_rank_that_cannot_even_write_grows_idle(tmp_path: Path) -> None:
    own = watch(tmp_path)
    own._write()
    other_rank(tmp_path, idle=5.0)
    (first,) = own._others()
    assert first.idle == pytest.approx(5.0, abs=0.09)
    time.sleep(0.1)
    (stale,) = own._others()
    assert 5.1 <= stale.idle < 9.0
    assert 0.1 <= stale.silent < 4.0
    other_rank(tmp_path, idle=0.0, written=time.time())
    (fresh,) = own._others()
    assert fresh.idle < 0.09


HANGING = """
import sys, time
from pathlib import Path
from alignment.activity import ACTIVITY, doing
from alignment.runs.events import EventLog
from alignment.runs.watch import Watch
run = Path(sys.argv[1])
with Watch(run, EventLog(run / "events.jsonl"), rank=0, world_size=1, hang_minutes=0.01):
    for _ in range(12):  # longer than the limit, but it moves
        time.sleep(0.1)
        ACTIVITY.move()
    ACTIVITY.begin(2, "step")
    with doing("grading", "reward 'slow' on sample 1 of prompt 5"):
        time.sleep(60)
"""


def test_a_hanging_process_says_where_and_ends(tmp_path: Path) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGING, str(tmp_path)], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 1
    assert time.monotonic() - began < 30
    place = "grading of step 2 (reward 'slow' on sample 1 of prompt 5)"
    assert done.stderr.startswith(f"align: the run hangs in {place}")
    assert done.stderr.count("\n") == 1
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (event["kind"], event["rank"]) == ("hang", 0)
    assert (event["phase"], event["step"]) == ("grading", 2)
    assert event["detail"] == "reward 'slow' on sample 1 of prompt 5"
    assert 0.6 <= event["seconds"] < 10
    stacks = (tmp_path / "hang-rank0.txt").read_text()
    assert stacks.startswith("the run hangs")
    assert 'File "<string>", line 14 in <module>' in stacks  # the sleep


@pytest.mark.parametrize("kind", ["hang", "error"])
def test_the_launcher_learns_whether_it_was_a_hang(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reports").mkdir()
    monkeypatch.setenv(REPORTS, str(tmp_path / "reports"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit):
        watch(tmp_path)._end(Verdict(kind, "rank 0 waited for rank 1", (1,)))
    (found,) = read_reports(tmp_path / "reports")
    assert (found.hang, found.code) == (kind == "hang", 1)


def test_a_rank_does_not_outlive_its_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(LAUNCHER, str(os.getppid()))
    assert watch(tmp_path)._judge() is None
    monkeypatch.setenv(LAUNCHER, str(ended_process()))
    verdict = watch(tmp_path)._judge()
    assert verdict is not None
    assert "the launcher of rank 0 is gone" in verdict.message


def test_only_lost_ranks_are_looked_for_without_a_limit(tmp_path: Path) -> None:
    own = watch(tmp_path, hang_minutes=0.0)
    ACTIVITY.restart()
    ACTIVITY.moved -= 1e6
    assert own._judge() is None


def test_the_note_is_of_the_innermost_phase() -> None:
    ACTIVITY.restart()
    with doing("rollout"):
        with doing("grading", "reward 'a'"):
            assert (ACTIVITY.phase, ACTIVITY.detail) == ("grading", "reward 'a'")
        assert (ACTIVITY.phase, ACTIVITY.detail) == ("rollout", "")
    assert ACTIVITY.phase == "preparation"
    with pytest.raises(ValueError), doing("update"):
        raise ValueError
    assert ACTIVITY.phase == "update"  # where it went wrong


def test_an_exchange_is_counted_and_noted() -> None:
    ACTIVITY.restart()
    with exchanging():
        assert (ACTIVITY.exchanges, ACTIVITY.exchanging) == (1, True)
    assert (ACTIVITY.exchanges, ACTIVITY.exchanging) == (1, False)
    assert asdict(ACTIVITY)["step"] == 0
