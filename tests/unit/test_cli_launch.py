"""Starting many processes: what is refused before any starts, and what is said once for all."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from alignment.cli import launch as launch_module
from alignment.cli.launch import Plan, _conclude, launch, plan_launch
from alignment.cli.train import own_arguments
from alignment.runs.events import read_events
from alignment.runs.launched import LAUNCHER, OPTIONS, REPORTS, Report, read_reports, report
from alignment.types import UserInputError

SHIPPED = ("ddp", "fsdp2", "zero2", "zero3")
FAILED_TO_START = ValueError("You need to manually pass in `--num_processes`")


@pytest.fixture(autouse=True)
def not_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", REPORTS, OPTIONS, LAUNCHER):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_is_found_by_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_module, "find_spec", lambda package: package)  # installed or not
    plan = plan_launch(name, 2)
    assert plan.config.name == f"{name}.yaml"
    assert (plan.processes, plan.machines) == (2, 1)
    assert plan.options == f"--accelerate {name} --processes 2"
    text = plan.config.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert 'mixed_precision: "no"' in text  # the toolkit keeps its own fp32 masters


def test_without_a_name_it_is_ddp() -> None:
    assert plan_launch(None, 3).options == "--accelerate ddp --processes 3"


def test_a_file_says_how_many_where_the_command_does_not(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("distributed_type: MULTI_GPU\nnum_processes: 16\nnum_machines: 2\n")
    plan = plan_launch(str(file), None)
    assert (plan.processes, plan.machines) == (16, 2)
    assert plan_launch(str(file), 4).processes == 4


@pytest.mark.parametrize(
    ("text", "processes", "said"),
    [
        (None, 2, "did you mean 'fsdp2'?"),
        ("distributed_type: MULTI_GPU\n", None, "--processes N"),
        (
            "distributed_type: MULTI_CPU\nnum_processes: 2\n",
            2,
            "use one of MULTI_GPU, FSDP, DEEPSPEED",
        ),
        ("num_processes: 2\n", 2, "starts one process for distributed_type NO"),
        ("- 1\n", 2, "holds no keys"),
    ],
)
def test_what_starts_nothing_is_refused(
    text: str | None, processes: int | None, said: str, tmp_path: Path
) -> None:
    name = "fsdp"
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
        name = str(tmp_path / "mine.yaml")
    with pytest.raises(UserInputError, match=r"--accelerate") as error:
        plan_launch(name, processes)
    assert said in str(error.value)


def test_a_missing_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "find_spec", lambda package: None)
    with pytest.raises(
        UserInputError, match=r"--accelerate zero3: .*alignment-toolkit\[deepspeed\]"
    ):
        plan_launch("zero3", 2)


def test_a_rank_does_not_start_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserInputError, match="started by a launcher already"):
        plan_launch("ddp", 2)


@pytest.mark.parametrize(("machines", "advice"), [(1, "--processes 2"), (2, "--processes 4")])
def test_more_processes_than_devices_are_refused(
    machines: int, advice: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    devices = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        current_accelerator=lambda: SimpleNamespace(type="cuda"),
    )
    monkeypatch.setattr(launch_module, "lazy", lambda target: devices)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(UserInputError, match=r"has 2 cuda device\(s\)") as error:
        launch(Plan(Path("x"), 5 * machines, machines, False, ""), [], tmp_path)
    assert advice in str(error.value)


def test_the_options_that_start_processes_are_not_handed_on() -> None:
    given = ["train", "--accelerate", "ddp", "r", "--processes=2", "a.b=1", "--resume", "never"]
    assert own_arguments(given) == ["train", "r", "a.b=1", "--resume", "never"]


def test_a_wrong_recipe_is_refused_before_torch_is_there() -> None:
    code = (
        "import sys\n"
        "sys.argv[1:] = ['train', 'tiny/sft', '--processes', '2', 'optim.lrr=1']\n"
        "from alignment.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as left:\n"
        "    assert left.code == 2 and 'torch' not in sys.modules, left.code\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'lr'?" in done.stderr


def conclude(
    tmp_path: Path,
    error: BaseException | None,
    *reports: tuple[int, int, str],
    asked: tuple[int, ...] = (),
) -> int:
    """Exit code after the ranks' reports (rank, code, message)."""
    said = [Report(*report, time=float(i)) for i, report in enumerate(reports)]
    agent: Any = SimpleNamespace(error=error)
    try:
        _conclude(agent, said, list(asked), tmp_path)
    except typer.Exit as left:
        return left.exit_code
    return 0


def failures(**codes: int) -> BaseException:
    """What torch raises where ranks `rN` ended with these codes."""
    error = RuntimeError("a wall of text")
    error.failures = {  # type: ignore[attr-defined]
        int(name[1:]): SimpleNamespace(exitcode=code) for name, code in codes.items()
    }
    return error


def test_what_all_ranks_found_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = failures(r0=2, r1=2)
    assert conclude(tmp_path, error, (1, 2, "no such model"), (0, 2, "no such model")) == 2
    assert capsys.readouterr().err == "align: no such model\n"


def test_the_first_failure_counts_and_not_what_follows_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = failures(r0=1, r1=2)
    assert conclude(tmp_path, error, (1, 2, "bad row"), (0, 1, "lost rank 1")) == 2
    assert capsys.readouterr().err == "align: bad row\n"


def test_a_killed_rank_is_named_and_in_the_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = failures(r0=1, r1=-signal.SIGKILL)
    assert conclude(tmp_path, error, (0, 1, "rank 0 lost rank 1")) == 1
    said = capsys.readouterr().err
    assert "rank 1 was killed by signal 9" in said
    assert "rank 0 lost rank 1" in said
    (event,) = read_events(tmp_path / "events.jsonl")
    assert event["kind"] == "error"
    assert "rank 1 was killed by signal 9" in event["message"]
    assert (event["ranks"], event["signal"]) == ([1], 9)


def test_a_rank_that_hangs_was_not_killed_for_want_of_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch kills it where it does not end by itself once another rank has."""
    error, hang = failures(r0=1, r1=-signal.SIGKILL), "rank 0 waited for rank 1"
    agent: Any = SimpleNamespace(error=error)
    with pytest.raises(typer.Exit) as left:
        _conclude(agent, [Report(0, 1, hang, 0.0, hang=True)], [], tmp_path)
    assert left.value.exit_code == 1
    assert capsys.readouterr().err == f"align: {hang}\n"
    assert not (tmp_path / "events.jsonl").exists()


def test_a_rank_without_a_message_is_named_and_not_the_one_ended_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert conclude(tmp_path, failures(r0=-signal.SIGTERM, r1=1)) == 1
    assert "rank 1 ended with exit code 1; its error stands above" in capsys.readouterr().err


def test_ranks_that_were_asked_to_stop_and_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = "stopped after step 3 of 8, which is saved; to go on: align train R --processes 2"
    assert conclude(tmp_path, None, (0, 0, stopped), (1, 0, stopped), asked=(15,)) == 0
    assert capsys.readouterr().err == f"align: {stopped}\n"


def test_ranks_that_were_asked_to_stop_before_they_could_save(tmp_path: Path) -> None:
    assert conclude(tmp_path, failures(r0=-15, r1=-15), asked=(signal.SIGTERM,)) == 143


def test_what_accelerate_refuses_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="accelerate cannot start the run: You need"):
        conclude(tmp_path, FAILED_TO_START)
    with pytest.raises(AttributeError):  # nobody expected that: with its traceback
        conclude(tmp_path, AttributeError("no such attribute"))


def test_a_report_reaches_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not report("nobody started this process", 2)
    monkeypatch.setenv(REPORTS, str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    assert report("why", 2)
    (found,) = read_reports(tmp_path)
    assert (found.rank, found.code, found.message, found.hang) == (1, 2, "why", False)
    assert report("it hangs", 1, hang=True)
    assert [found.hang for found in read_reports(tmp_path)] == [True]
