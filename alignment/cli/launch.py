"""Start all processes of a run on this machine, pass signals on to them, and speak for them.

`accelerate launch` runs inside this process and starts one process for each rank. What a user sees
is what a run of one process shows: one message, and its exit code.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import typer
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

import alignment
from alignment.cli.common import EXIT_FAILED, EXIT_USER_INPUT, fail, lazy, usable_cores
from alignment.registry import unknown_name
from alignment.runs.events import EventLog
from alignment.runs.launched import LAUNCHER, OPTIONS, REPORTS, Report, read_reports
from alignment.types import UserInputError

DEFAULT_CONFIG = "ddp"
# Beside the package, in a checkout as in an installation.
_SHIPPED = Path(alignment.__file__).parent.parent / "recipes" / "accelerate"

# What accelerate starts more than one process for. `MULTI_CPU` is not among them: without MPI it
# starts one. `MULTI_GPU` starts them whether there are GPUs or not.
_STARTS_MANY = ("MULTI_GPU", "FSDP", "DEEPSPEED")
# What accelerate raises where it does not take its settings.
_REFUSALS = (ValueError, ImportError, SystemExit)
_CPU_ASKED = ("1", "true", "yes", "on")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to start.

    options: what to add to `align train RECIPE` to start the same again.
    """

    config: Path
    processes: int
    machines: int
    on_cpu: bool
    options: str


def plan_launch(accelerate: str | None, processes: int | None) -> Plan:
    """What `--accelerate NAME --processes N` means.

    Raises:
        UserInputError: there is no such configuration, it starts one process only, or nothing
            says how many to start.
    """
    if "RANK" in os.environ:
        raise UserInputError(
            "--processes: this process was started by a launcher already (RANK is set); leave "
            "--accelerate and --processes out there"
        )
    name = accelerate or DEFAULT_CONFIG
    path = _find(name)
    config = _read(path)
    kind = str(config.get("distributed_type", "NO"))
    if kind == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise UserInputError(
            f"--accelerate {name}: DeepSpeed is not installed: "
            "pip install 'alignment-toolkit[deepspeed]'"
        )
    if kind not in _STARTS_MANY:
        raise UserInputError(
            f"--accelerate {name}: accelerate starts one process for distributed_type {kind}; use "
            f"one of {', '.join(_STARTS_MANY)} (MULTI_GPU serves a machine without GPUs, too)"
        )
    wanted = processes or config.get("num_processes")
    if not isinstance(wanted, int) or wanted < 1:
        raise UserInputError(f"--accelerate {name}: say how many processes by --processes N")
    return Plan(
        config=path,
        processes=wanted,
        machines=int(config.get("num_machines") or 1),
        on_cpu=bool(config.get("use_cpu")),
        options=shlex.join(["--accelerate", name, "--processes", str(wanted)]),
    )


def launch(plan: Plan, arguments: Sequence[str], run: Path) -> None:
    """Start the ranks with `arguments` (of `align`) and wait for them.

    Args:
        run: folder of the run, for events of ranks that could not write their own.

    Raises:
        UserInputError: more processes than devices, or accelerate refuses the configuration.
        typer.Exit: the ranks stopped or failed; why has been printed.
    """
    _check_devices(plan)
    with tempfile.TemporaryDirectory(prefix="align-launch-") as folder:
        os.environ.update({REPORTS: folder, OPTIONS: plan.options, LAUNCHER: str(os.getpid())})
        # accelerate would give each process one thread.
        threads = max(1, usable_cores() * plan.machines // plan.processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        agent = _Agent(plan, arguments)
        asked = _wait_for(agent, Path(folder))
        reports = read_reports(Path(folder))
    _conclude(agent, reports, asked, run)


class _Agent(threading.Thread):
    """`accelerate launch`. In a thread, it leaves signals to this process's own handlers; torch's
    would end the ranks in the middle of a step.

    Attributes:
        error: what it raised, if it did.
    """

    def __init__(self, plan: Plan, arguments: Sequence[str]) -> None:
        super().__init__(name="accelerate", daemon=True)
        settings = ["--config_file", str(plan.config), "--num_processes", str(plan.processes)]
        if plan.machines == 1:  # any port that is free, so that two runs fit on one machine
            settings += ["--main_process_port", "0"]
        # When a rank dies, the others have so many seconds to say what they know before they are
        # told to end.
        settings += ["--monitor_interval", "1"]
        self._arguments = [*settings, "-m", "alignment", *arguments]
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            parser = lazy("accelerate.commands.launch:launch_command_parser")()
            start = lazy("accelerate.commands.launch:launch_command")
            # It reports what `_conclude` says in a sentence.
            logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
            start(parser.parse_args(self._arguments))
        except BaseException as error:
            self.error = error


def _wait_for(agent: _Agent, reports: Path) -> list[int]:
    """Run the agent to its end; returns the signals that asked it to stop.

    Each signal is passed on as SIGTERM to the ranks, which finish their step and save; a rank that
    was not ready for it ends at once.
    """
    sent: Counter[int] = Counter()
    with _noted_signals() as asked:
        agent.start()
        while agent.is_alive():
            agent.join(0.1)
            for rank in psutil.Process().children() if asked else ():
                for _ in asked[sent[rank.pid] :]:
                    with suppress(psutil.NoSuchProcess):
                        rank.send_signal(signal.SIGTERM)
                    sent[rank.pid] += 1
            if any(reports.iterdir()):
                _wake_stopped()
        return list(asked)


def _wake_stopped() -> None:
    """Once a rank has ended: a stopped one would keep the others' end waiting, since it does not
    hear that it is to end."""
    for rank in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if rank.status() == psutil.STATUS_STOPPED:
                rank.resume()


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number in numbers:
            signal.signal(number, before[number])


def _conclude(agent: _Agent, reports: list[Report], asked: list[int], run: Path) -> None:
    """Say once what the ranks found, and leave with the exit code of the first that failed."""
    if agent.error is None:
        if reports:  # they were asked to stop, and did
            fail(reports[0].message, reports[0].code)
        return
    codes = _exit_codes(agent.error)
    if not codes and not isinstance(agent.error, _REFUSALS):
        raise agent.error
    if not codes:
        raise UserInputError(f"accelerate cannot start the run: {agent.error}") from agent.error
    failed = [report for report in reports if report.code != 0]
    by_torch = [signal.SIGTERM]
    if any(report.hang for report in failed):
        by_torch.append(signal.SIGKILL)  # half a minute later, where a rank does not end for it
    killed = {rank: -code for rank, code in codes.items() if code < 0 and -code not in by_torch}
    if asked and not failed and not killed:
        fail(
            "stopped at once, in the middle of a step or before the first; give the same command "
            "again to go on from the last checkpoint",
            128 + asked[0],
        )
    for message in _messages(codes, killed, failed):
        typer.echo(f"align: {message}", err=True)
    if killed:
        _write_event(killed, run)
    user_input = failed and not killed and failed[0].code == EXIT_USER_INPUT
    raise typer.Exit(EXIT_USER_INPUT if user_input else EXIT_FAILED)


def _exit_codes(error: BaseException) -> dict[int, int]:
    """Rank -> exit code (negative: the signal that killed it) of the ranks that failed."""
    failures: Mapping[int, Any] = getattr(error, "failures", {})
    return {rank: failure.exitcode for rank, failure in sorted(failures.items())}


def _messages(
    codes: Mapping[int, int], killed: Mapping[int, int], failed: Sequence[Report]
) -> list[str]:
    """What killed ranks, and what the first that failed by itself said. What the others said
    follows from it, and stands in their event logs."""
    lines = [_obituary(rank, number) for rank, number in killed.items()]
    lines += [report.message for report in failed[:1]]
    if not lines:
        rank = min(codes, key=lambda rank: codes[rank] == -signal.SIGTERM)  # those only followed
        lines.append(f"rank {rank} ended with exit code {codes[rank]}; its error stands above")
    return lines


def _obituary(rank: int, number: int) -> str:
    name = signal.strsignal(number) or "unknown"
    hint = ", as a machine without memory left does" if number == signal.SIGKILL else ""
    return (
        f"rank {rank} was killed by signal {number} ({name}){hint}; give the same "
        "command again to go on from the last checkpoint"
    )


def _write_event(killed: Mapping[int, int], run: Path) -> None:
    """The dead cannot write; the ranks that could have ended by now."""
    if not run.is_dir():
        return
    log = EventLog(run / "events.jsonl")
    for rank, number in killed.items():
        log.write("error", _obituary(rank, number), logged=False, ranks=[rank], signal=number)
    log.close()


def _check_devices(plan: Plan) -> None:
    accelerator = lazy("torch:accelerator")
    on_cpu = plan.on_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in _CPU_ASKED
    if on_cpu or not accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for one, and says so
        return
    here = -(-plan.processes // plan.machines)
    devices = accelerator.device_count()
    if here > devices:
        raise UserInputError(
            f"--processes {plan.processes}: this machine has {devices} "
            f"{accelerator.current_accelerator().type} device(s), and each process needs one; give "
            f"--processes {devices * plan.machines}, or set ACCELERATE_USE_CPU=1 to run on the CPU"
        )


def _find(name: str) -> Path:
    shipped = {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if not path.is_file():
        known = unknown_name("accelerate configuration", name, list(shipped))
        raise UserInputError(f"--accelerate: {known}; or give the path of a YAML file")
    return path


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data = YAML(typ="safe").load(path)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserInputError(f"--accelerate {path}: it cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise UserInputError(f"--accelerate {path}: it holds no keys; see `accelerate config`")
    return data
