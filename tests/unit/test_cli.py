"""The command line: what each command calls, what it prints, and how it exits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from alignment import __version__, registry
from alignment.cli import app, doctor
from alignment.cli.chat import converse
from alignment.cli.common import guarded, table
from alignment.config import Recipe
from alignment.types import AlignmentError, UserInputError

RECIPE = """\
# Fine-tunes a toy.
run: {name: toy-run}
model: {path: m}
data: {type: toy, size: 5}
algorithm: {type: sft, steps: 10, samples_per_step: 4}
optim: {lr: 1e-4}
"""
PIPELINE = """\
run: {name: both}
stages:
- {name: one, recipe: recipe.yaml}
- {name: two, recipe: recipe.yaml, set: {model.path: "${stages.one.model}"}}
"""


def toy(size: int) -> None: ...


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registered, "source", {"toy": toy})
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    Path("both.yaml").write_text(PIPELINE)


def align(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Put a module with one function in place; returns the list of its calls."""

    def replace(target: str, result: Any = None) -> list[Any]:
        made: list[Any] = []

        def function(*args: Any, **kwargs: Any) -> Any:
            made.append((args, kwargs))
            if isinstance(result, BaseException):
                raise result
            return result

        name, _, attribute = target.partition(":")
        module = types.ModuleType(name)
        setattr(module, attribute, function)
        monkeypatch.setitem(sys.modules, name, module)
        return made

    return replace


def test_train_runs_a_recipe(calls: Callable[..., list[Any]], monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/align", "train", "recipe.yaml"])
    made = calls("alignment.trainers.run:train")
    result = align("train", "recipe.yaml", "optim.lr=1e-5", "run.seed=4")
    assert result.exit_code == 0, result.output
    ((recipe,), keywords) = made[0]
    assert isinstance(recipe, Recipe)
    assert (recipe.optim.lr, recipe.run.seed) == (1e-5, 4)
    assert keywords == {
        "resume": "auto",
        "command": ["align", "train", "recipe.yaml"],
        "rollouts_from": None,
    }


def test_train_runs_a_pipeline(calls: Callable[..., list[Any]]) -> None:
    made = calls("alignment.trainers.pipeline:run_pipeline")
    result = align("train", "both.yaml", "--resume", "never")
    assert result.exit_code == 0, result.output
    assert made[0][0][0].run.name == "both"
    assert made[0][1]["resume"] == "never"


def test_train_resumes_from_a_folder_that_exists(
    calls: Callable[..., list[Any]], tmp_path: Path
) -> None:
    made = calls("alignment.trainers.run:train")
    assert align("train", "recipe.yaml", "--resume", str(tmp_path)).exit_code == 0
    assert made[0][1]["resume"] == str(tmp_path)
    result = align("train", "recipe.yaml", "--resume", "alwyas")
    assert result.exit_code == 2
    assert "--resume 'alwyas': there is no such folder; give auto, never or" in result.stderr
    assert len(made) == 1


def test_a_dry_run_prints_what_would_run_and_trains_nothing(tmp_path: Path) -> None:
    result = align("train", "recipe.yaml", "optim.lr=3e-5", "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("# 4 samples a step, 1 update a step; 10 steps = 40 samples\n")
    again = tmp_path / "again.yaml"
    again.write_text(result.stdout)
    assert align("train", "again.yaml", "--dry-run").stdout == result.stdout


def test_check_says_what_the_recipe_would_do() -> None:
    result = align("check", "recipe.yaml", "model.lora.rank=8")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "toy-run: the recipe is valid"
    assert "model      m: LoRA of rank 8 in bfloat16, masters in float32" in lines
    assert "data       toy (size: 5)" in lines
    assert "counts     4 samples a step, 1 update a step; 10 steps = 40 samples" in lines


def test_check_goes_through_a_pipelines_stages() -> None:
    result = align("check", "both.yaml")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("both: a valid pipeline of 2 stages")
    assert "model      ${stages.one.model}: all weights" in result.stdout


def test_a_wrong_recipe_is_exit_code_two_and_no_traceback() -> None:
    result = align("check", "recipe.yaml", "optim.lrr=1")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("align: override 'optim.lrr=1': optim.lrr: unknown key; did")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserInputError("your data is empty"), 2, "align: your data is empty\n"),
        (AlignmentError("the loss was not finite"), 1, "align: the loss was not finite\n"),
        (KeyboardInterrupt(), 130, "align: interrupted\n"),
    ],
)
def test_exit_codes(
    calls: Callable[..., list[Any]], error: BaseException, code: int, message: str
) -> None:
    calls("alignment.trainers.run:train", error)
    result = align("train", "recipe.yaml")
    assert result.exit_code == code
    assert result.stderr == message


def test_an_unexpected_error_keeps_its_traceback(calls: Callable[..., list[Any]]) -> None:
    calls("alignment.trainers.run:train", ZeroDivisionError("what?"))
    result = align("train", "recipe.yaml")
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_broken_pipe_to_a_worker_is_not_swallowed(
    calls: Callable[..., list[Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    calls("alignment.trainers.run:train", BrokenPipeError("the worker is gone"))
    result = align("train", "recipe.yaml")
    assert result.exit_code == 1
    assert "the worker is gone" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["trian"], ["check"], ["check", "r.yaml", "--fast"], ["eval"]]
)
def test_a_wrong_command_line_is_exit_code_two(arguments: list[str]) -> None:
    assert align(*arguments).exit_code == 2


def test_version() -> None:
    assert align("--version").stdout == f"{__version__}\n"


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shipped" / "tiny"
    folder.mkdir(parents=True)
    (folder / "sft.yaml").write_text(RECIPE)
    monkeypatch.setattr("alignment.config.load._SHIPPED", folder.parent)
    return folder


@pytest.mark.usefixtures("shipped")
def test_recipes_are_listed_shown_and_copied(tmp_path: Path) -> None:
    assert align("recipes", "list").stdout == "tiny/sft  Fine-tunes a toy.\n"
    assert align("recipes", "show", "tiny/sft").stdout == RECIPE
    assert align("recipes", "copy", "tiny/sft", "mine.yaml").stdout == "mine.yaml\n"
    assert Path("mine.yaml").read_text() == RECIPE
    (tmp_path / "folder").mkdir()
    assert align("recipes", "copy", "tiny/sft", "folder").exit_code == 0
    assert (tmp_path / "folder" / "sft.yaml").read_text() == RECIPE


@pytest.mark.usefixtures("shipped")
def test_a_copy_never_overwrites() -> None:
    Path("mine.yaml").write_text("precious")
    result = align("recipes", "copy", "tiny/sft", "mine.yaml")
    assert result.exit_code == 2
    assert result.stderr == "align: mine.yaml exists and is not overwritten; give another name\n"
    assert Path("mine.yaml").read_text() == "precious"
    assert align("recipes", "copy", "tiny/sft", "no/such/folder.yaml").exit_code == 2


@pytest.mark.usefixtures("shipped")
def test_an_unknown_shipped_recipe_is_answered_with_the_nearest() -> None:
    result = align("recipes", "show", "tiny/stf")
    assert result.exit_code == 2
    assert "unknown recipe 'tiny/stf'; did you mean 'tiny/sft'?" in result.stderr


@dataclass
class Expectation:
    text: str
    passed: bool
    detail: str


def test_verify_passes_and_fails(calls: Callable[..., list[Any]]) -> None:
    good = Expectation("kl/mean < 1", True, "0.2 < 1")
    bad = Expectation("reward/mean > 1", False, "0.5 > 1")
    made = calls("alignment.runs.expect:verify_run", [good])
    result = align("verify", "runs/a")
    assert (result.exit_code, result.stdout) == (0, "pass  kl/mean < 1  0.2 < 1\n")
    assert made[0][0] == (Path("runs/a"),)
    calls("alignment.runs.expect:verify_run", [good, bad])
    result = align("verify", "runs/a")
    assert result.exit_code == 1
    assert "FAIL  reward/mean > 1  0.5 > 1" in result.stdout
    assert result.stderr == "align: 1 of 2 expectations failed\n"
    calls("alignment.runs.expect:verify_run", [])
    assert align("verify", "runs/a").stdout == "the recipe expects nothing\n"


@dataclass
class Evaluated:
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def quiz(ks: tuple[int, ...] = (1,), samples: int = 4) -> None: ...


def test_eval_checks_the_tasks_and_prints_their_metrics(
    calls: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry._registered, "task", {"quiz": quiz, "exam": quiz})
    outcome = Evaluated({"accuracy": 0.51234, "n": 40.0}, {"accuracy": (0.4, 0.625)})
    found = types.SimpleNamespace(results={"quiz": outcome}, folder=Path("runs/a/evals"))
    made = calls("alignment.trainers.evaluate:evaluate", found)
    result = align(
        *("eval", "runs/a", "--task", "quiz", "--task", "exam"),
        *("--set", "ks=[1, 4]", "--samples", "8", "--recipe", "recipe.yaml"),
    )
    assert result.exit_code == 0, result.output
    rows = "quiz  accuracy  0.5123  [0.4, 0.625]\nquiz  n         40\n"
    assert result.stdout == f"{rows}saved in {Path('runs/a/evals')}\n"
    ((target, tasks), keywords) = made[0]
    assert target == "runs/a"
    assert [task.type for task in tasks] == ["quiz", "exam"]
    assert tasks[1].options == {"ks": [1, 4], "samples": 8}
    assert keywords["data_from"].run.name == "toy-run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "quizz"], "task 'quizz': type: unknown task 'quizz'; did you mean 'quiz'?"),
        (["--task", "quiz", "--set", "k=1"], "setting 'k=1': k: unknown key; did you mean 'ks'?"),
        (["--task", "quiz", "--set", "ks"], "override 'ks': write key.path=value"),
        (["--task", "quiz", "--recipe", "both.yaml"], "--recipe both.yaml: a pipeline"),
    ],
)
def test_eval_refuses_what_it_cannot_run(
    calls: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setitem(registry._registered, "task", {"quiz": quiz})
    made = calls("alignment.trainers.evaluate:evaluate")
    result = align("eval", "runs/a", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert made == []


def test_report_prints_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "get", lambda kind, name: {("report", "html"): _page}[kind, name])
    assert align("report", "runs/a").stdout == f"{Path('runs/a/report.html')}\n"


def _page(run: Path) -> Path:
    return run / "report.html"


@dataclass
class Entry:
    name: str
    summary: str
    licence: str
    parameters: int
    download_mb: int


def test_models_are_listed_and_fetched(
    calls: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = calls("alignment.modeling.catalog:fetch", Path("/cache/here"))
    module = sys.modules["alignment.modeling.catalog"]
    entries = [
        Entry("big", "a large one", "MIT", 1_500_000_000, 900),
        Entry("small", "a small one", "Apache-2.0", 100_000, 0),
    ]
    monkeypatch.setattr(module, "catalog", lambda: entries, raising=False)
    monkeypatch.setattr(
        module, "cached", lambda name: Path("/c") if name == "small" else None, raising=False
    )
    assert align("models", "list").stdout.splitlines() == [
        "name   size     licence     state               what it is",
        "big    1500.0M  MIT         900 MB to download  a large one",
        "small  0.1M     Apache-2.0  here                a small one",
    ]
    assert align("models", "fetch", "big").stdout == f"{Path('/cache/here')}\n"
    assert made == [(("big",), {})]


def test_chat_remembers_until_reset(calls: Callable[..., list[Any]]) -> None:
    seen: list[list[dict[str, str]]] = []

    def reply(messages: list[dict[str, str]]) -> str:
        seen.append([dict(message) for message in messages])
        return f"answer {len(seen)}"

    made = calls("alignment.trainers.chat:chat", reply)
    result = align("chat", "runs/a", stdin="hello\n\nmore\n/reset\nagain\n/quit\nnever\n")
    assert result.exit_code == 0, result.output
    assert made == [(("runs/a",), {})]
    assert result.stdout == "answer 1\nanswer 2\nanswer 3\n"
    assert [[message["content"] for message in messages] for messages in seen] == [
        ["hello"],
        ["hello", "answer 1", "more"],
        ["again"],
    ]
    converse(reply, iter([]))  # the end of input ends


def test_doctor_reports_problems_with_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = doctor.Finding("memory", "8 GiB")
    bad = doctor.Finding("disk", "0.1 GiB free", "free some space")
    monkeypatch.setattr(doctor, "EXAMINATIONS", (lambda: iter([fine]),))
    result = align("doctor")
    assert (result.exit_code, result.stdout) == (0, "memory  8 GiB\n\nno problems found\n")
    monkeypatch.setattr(doctor, "EXAMINATIONS", (lambda: iter([fine, bad]),))
    result = align("doctor")
    assert result.exit_code == 1
    assert "problem: disk: 0.1 GiB free\n  remedy: free some space" in result.stdout


def test_a_table_is_aligned() -> None:
    assert table([("a", "bb", "c"), ("aaa", "b", "")]) == "a    bb  c\naaa  b"
    assert table([]) == ""


def test_guarded_passes_arguments_through() -> None:
    seen = []
    guarded(lambda *args, **kwargs: seen.append((args, kwargs)))(1, b=2)
    assert seen == [((1,), {"b": 2})]


def run(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=cwd, capture_output=True, text=True
    )


HELP = """
import sys
from alignment.cli import main
try:
    main()
except SystemExit as end:
    heavy = {"torch", "transformers", "pydantic", "numpy", "ruamel.yaml", "rich"}
    print("HEAVY", sorted(heavy & set(sys.modules)), end.code)
"""


def test_help_is_instant_and_imports_nothing_heavy(tmp_path: Path) -> None:
    best = float("inf")
    for _ in range(3):  # the machine may be busy: the best of three
        start = time.perf_counter()
        result = run(HELP, "--help", cwd=tmp_path)
        best = min(best, time.perf_counter() - start)
        assert "train" in result.stdout
        assert "HEAVY [] 0" in result.stdout, result.stdout
    assert best < 0.5


def test_checking_and_dry_running_import_no_torch(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "r.yaml").write_text(RECIPE.replace("toy, size: 5", "file, path: rows.jsonl"))
    for arguments in (["check", "r.yaml"], ["train", "r.yaml", "--dry-run"]):
        result = run(HELP, *arguments, cwd=tmp_path)
        assert "HEAVY ['pydantic', 'ruamel.yaml'] 0" in result.stdout, result.stdout + result.stderr


def test_rewards_beside_the_recipe_are_found_and_the_module_runs(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "mine.py").write_text("def score(completions): return [0.0 for _ in completions]\n")
    recipe = RECIPE.replace("toy, size: 5", "file, path: rows.jsonl").replace(
        "{type: sft, steps: 10, samples_per_step: 4}",
        "{type: grpo, steps: 1, prompts_per_step: 2, group_size: 2}",
    )
    (tmp_path / "r.yaml").write_text(
        recipe + "rollout: {max_new_tokens: 4}\nrewards: [{type: 'mine:score'}]\n"
    )
    for command in (
        [sys.executable, "-m", "alignment"],
        [sys.executable, "-P", "-c", "from alignment.cli import main; main()"],
    ):
        result = subprocess.run(
            [*command, "check", "r.yaml"], cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert "1 x mine:score" in result.stdout


@pytest.mark.skipif(os.name != "posix", reason="pipes and signals of POSIX")
def test_a_reader_that_leaves_early_is_met_with_silence(tmp_path: Path) -> None:
    program = "import time\nfrom alignment.cli import app\nimport typer\n" + (
        "from alignment.cli.common import guarded\n"
        "other = typer.Typer(pretty_exceptions_enable=False)\n"
        "def spam():\n"
        "    for _ in range(100000):\n"
        "        typer.echo('x' * 100)\n"
        "other.command()(guarded(spam))\n"
        "other()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=30) == 1
    assert process.stderr.read() == ""
    process.stderr.close()
