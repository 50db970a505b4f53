"""The worker pool, and the math reward that grades in it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignment.rewards.protocol import Item
from alignment.types import (
    AlignmentError,
    Completion,
    Outcome,
    Prompt,
    Score,
    StopReason,
    UserInputError,
)
from reward_models.math import MathReward
from reward_models.pool import WorkerPool

# Workers that evaluate any expression, so that each test can say what goes wrong in them.
EVAL = "builtins:eval"
PID = "__import__('os').getpid()"
TOWER = "9^{9^{9^{9^9}}}"


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(EVAL, workers=2, timeout_seconds=0.5) as pool:
        yield pool


def outcome(pool: WorkerPool, request: str) -> tuple[Any, Outcome | None]:
    reply = pool.run([request])[0]
    return reply.value, reply.failure


# --- the pool ------------------------------------------------------------------------------------


def test_replies_come_in_order_of_requests(pool: WorkerPool) -> None:
    replies = pool.run([f"{n} * 2" for n in range(50)])
    assert [reply.value for reply in replies] == list(range(0, 100, 2))
    assert pool.run([]) == []


def test_an_exception_is_a_crash_with_its_reason(pool: WorkerPool) -> None:
    replies = pool.run(["1 / 0", "1", "exit(0)"])
    assert [reply.failure for reply in replies] == [Outcome.CRASH, None, Outcome.CRASH]
    assert replies[0].detail.startswith("ZeroDivisionError")
    assert replies[2].detail.startswith("SystemExit")


def test_a_worker_that_dies_costs_one_sample_and_says_how(pool: WorkerPool) -> None:
    segfault = "__import__('signal').raise_signal(11)"
    replies = pool.run(["1", "__import__('os')._exit(7)", "2", segfault, "3"])
    assert [reply.value for reply in replies] == [1, None, 2, None, 3]
    assert replies[1].failure is replies[3].failure is Outcome.CRASH
    assert replies[1].detail == "the worker exited with code 7"
    assert replies[3].detail == "the worker was ended by SIGSEGV"


def test_a_computation_that_holds_the_interpreter_lock_is_ended(pool: WorkerPool) -> None:
    started = time.monotonic()
    replies = pool.run(["1", "9**9**9 % 10", "2"])
    assert [reply.failure for reply in replies] == [None, Outcome.TIMEOUT, None]
    assert time.monotonic() - started < 10


def test_waiting_without_computing_is_ended_by_the_clock() -> None:
    with WorkerPool("time:sleep", workers=1, timeout_seconds=0.1) as pool:
        assert [reply.failure for reply in pool.run([60, 0])] == [Outcome.TIMEOUT, None]


def test_memory_is_limited(pool: WorkerPool) -> None:
    reply = pool.run(["len(bytearray(10**11))"])[0]
    assert (reply.failure, reply.detail) == (Outcome.CRASH, "out of memory")
    assert outcome(pool, "5") == (5, None)


def test_workers_see_no_secrets_write_no_files_and_print_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    written = tmp_path / "written"
    with WorkerPool(EVAL, workers=1) as pool:
        assert outcome(pool, "'SECRET_TOKEN' in __import__('os').environ") == (False, None)
        assert outcome(pool, "print('{\"ok\": 1}') or 5") == (5, None)
        assert outcome(pool, "input()") == (None, Outcome.CRASH)
        write = f"__import__('pathlib').Path({str(written)!r}).write_text('x' * 10)"
        assert outcome(pool, write) == (None, Outcome.CRASH)
    assert not written.exists() or written.read_text() == ""


def test_a_worker_that_died_while_idle_is_replaced_without_blame(pool: WorkerPool) -> None:
    victim = pool.run([PID])[0].value
    os.kill(victim, signal.SIGKILL)
    time.sleep(0.05)
    replies = pool.run([PID] * 4)
    assert all(reply.failure is None and reply.value != victim for reply in replies)


def test_workers_are_reused_and_recycled() -> None:
    with WorkerPool(EVAL, workers=1, recycle_after=3) as pool:
        pids = [reply.value for reply in pool.run([PID] * 6)]
    assert pids[0] == pids[1] == pids[2] != pids[3] == pids[4] == pids[5]


def test_a_target_that_cannot_be_imported_is_an_error_with_a_remedy() -> None:
    with WorkerPool("no_such_module:grade") as pool, pytest.raises(AlignmentError) as caught:
        pool.run(["x"])
    assert "no_such_module:grade cannot start: ModuleNotFoundError" in str(caught.value)
    assert "installed" in str(caught.value)


@pytest.mark.parametrize("options", [{"workers": 0}, {"timeout_seconds": 0.0}])
def test_options_that_make_no_pool_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserInputError, match=next(iter(options))):
        WorkerPool(EVAL, **options)


def test_threads_share_a_pool(pool: WorkerPool) -> None:
    answers: dict[int, list[Any]] = {}

    def ask(base: int) -> None:
        replies = pool.run([f"{base} + {n}" for n in range(20)])
        answers[base] = [reply.value for reply in replies]

    threads = [threading.Thread(target=ask, args=(base,)) for base in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {base: [base + n for n in range(20)] for base in (0, 100, 200)}


def test_an_interrupted_batch_leaves_nothing_for_the_next(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(batch: Any) -> None:
        raise KeyboardInterrupt

    pool.run(["0"] * 4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pool, "_wait", interrupt)
        pool.run(["'stale'"])
    assert outcome(pool, "'fresh'") == ("fresh", None)


def test_a_forked_child_has_workers_of_its_own(pool: WorkerPool) -> None:
    parents = pool.run([PID])[0].value
    child = os.fork()
    if child == 0:  # leave without running the tests a second time
        status = 1
        try:
            reply = pool.run([PID])[0]
            pool.close()
            status = int(reply.failure is not None or reply.value == parents)
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert outcome(pool, PID) == (parents, None)


def test_close_ends_the_workers_and_run_starts_new_ones(pool: WorkerPool) -> None:
    old = pool.run([PID])[0].value
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(old, 0)
    assert outcome(pool, "1") == (1, None)


def test_a_pool_that_nobody_holds_ends_its_workers() -> None:
    pool = WorkerPool(EVAL, workers=1)
    worker = pool.run([PID])[0].value
    del pool
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


# --- mathematics ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def math() -> Iterator[MathReward]:
    reward = MathReward(workers=2, timeout_seconds=1.0)
    yield reward
    reward.close()


def make_item(gold: Any, text: str, index: int = 0) -> Item:
    completion = Completion(index, 0, (1,), (0.0,), StopReason.STOP, 0, text)
    return Prompt((1,), "p", index, {"answer": gold}), completion


def check(reward: MathReward, gold: Any, answer: str) -> Score:
    return reward([make_item(gold, f"so \\boxed{{{answer}}}")])[0]


# Each pair scored as equal by math-verify 0.9.0, alone or with its own way of finding answers.
WRONG_POSITIVES = [
    ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
    ("2^{-99}", "2^{-98}"),
    ("1,2,\\ldots,n", "1,3,\\ldots,2n-1"),
    ("1, 2, ..., n", "1, 3, ..., 2n-1"),
    ("10", "10\\%"),
    ("10", "10%"),
    ("\\frac{1}{3}", "0.333333"),
    ("3", "3 or 4"),
    ("3", "3 \\text{ or } 4"),
    ("55", "\\sum_{k=1}^{10}k"),
    ("x+\\frac{1}{2004!}", "x+\\frac{1}{2006!}"),
    ("\\{1, \\frac{1}{3}\\}", "\\{1, 0.333333\\}"),
    ("(2^{-99}, \\pi)", "(2^{-98}, \\pi)"),
    (
        "\\begin{pmatrix}\\frac{1}{3}\\\\2\\end{pmatrix}",
        "\\begin{pmatrix}0.333333\\\\2\\end{pmatrix}",
    ),
    ("Evelyn", "nylevE"),
]


@pytest.mark.parametrize(("gold", "answer"), WRONG_POSITIVES)
def test_known_wrong_positives_are_wrong(math: MathReward, gold: str, answer: str) -> None:
    given = check(math, gold, answer)
    assert (given.outcome, given.value) == (Outcome.WRONG, 0.0)


@pytest.mark.parametrize(("gold", "answer"), [(g, g) for g in dict(WRONG_POSITIVES)])
def test_and_the_right_answers_to_them_are_right(math: MathReward, gold: str, answer: str) -> None:
    assert check(math, gold, answer).outcome is Outcome.CORRECT


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("2^{-99}", "\\frac{1}{2^{99}}"),
        ("2\\sqrt{3}", "\\sqrt{12}"),
        ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"),
        ("x^2+3x+2", "(x+1)(x+2)"),
        ("\\sin(x)", "\\cos(\\frac{\\pi}{2} - x)"),
        ("\\frac{x}{2}", "0.5x"),
        ("3, 4", "4, 3"),
        ("\\{1, \\frac{1}{2}\\}", "\\{0.5, 1\\}"),
        ("(2\\sqrt{3}, 1)", "(\\sqrt{12}, 1)"),
        ("[0, \\frac{1}{2})", "[0, 0.5)"),
        ("(-\\infty,0)\\cup(1,\\infty)", "(1,\\infty)\\cup(-\\infty,0)"),
        ("x > 3", "3 < x"),
        ("x = 5\\sqrt{2}", "5\\sqrt{2}"),
        ("5\\sqrt{2}", "x = 5\\sqrt{2}"),
        ("1+2i", "2i+1"),
        ("12\\pi \\text{ cm}", "12\\pi"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\\\frac{4}{2}\\end{pmatrix}"),
        ("\\frac{1}{4}d^2", "\\frac{d^2}{4}"),
        ("\\tan x", "\\frac{\\sin x}{\\cos x}"),
        ("2\\Delta + 1", "1 + 2\\Delta"),
        ("\\text{(B)}", "B"),
        ("New York", "\\text{new york}"),
        ("$\\frac{1}{2}$", "0.5"),
        ("10\\%", "0.1"),
        ("We add.\n#### 1,200", "1200"),
        ("Thus \\boxed{\\pi} holds", "\\pi"),
        (0.5, "\\frac12"),
    ],
)
def test_equal_answers_are_correct(math: MathReward, gold: Any, answer: str) -> None:
    given = check(math, gold, answer)
    assert (given.outcome, given.value) == (Outcome.CORRECT, 1.0)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("\\pi", "3.14159"),
        ("\\infty", "-\\infty"),
        ("(2, 1)", "(1, 2)"),
        ("(2\\pi, 1)", "(1, 2\\pi)"),
        ("[0, \\pi)", "[0, \\pi]"),
        ("x < \\pi", "x > \\pi"),
        ("x", "y"),
        ("x = \\pi", "y = \\pi"),
        ("\\Delta", "\\delta"),
        ("2\\Delta + 1", "1 + 2\\delta"),
        ("f(x)", "f(x) + 1"),
        ("\\pi", "\\pi, 3"),
        ("x^2", "x^3"),
        ("\\frac{\\pi}{4}", "\\int_0^1 \\frac{1}{1+x^2} dx"),
        ("2x", "\\frac{d}{dx} x^2"),
        # Restating a computation whose value is a plain number:
        ("7", "3+4"),
        ("3", "6/2"),
        ("\\frac{1}{2}", "\\frac{2}{4}"),
        ("1024", "2^{10}"),
        ("10", "\\binom{5}{2}"),
        ("120", "5!"),
    ],
)
def test_other_answers_are_wrong(math: MathReward, gold: str, answer: str) -> None:
    given = check(math, gold, answer)
    assert (given.outcome, given.value) == (Outcome.WRONG, 0.0)


def test_a_tower_of_powers_costs_one_sample(math: MathReward) -> None:
    texts = ["\\boxed{\\sqrt{12}}", f"\\boxed{{{TOWER}}}", "\\boxed{2\\sqrt{3}}"]
    scores = math([make_item("2\\sqrt{3}", text) for text in texts])
    correct = Outcome.CORRECT
    assert [score.outcome for score in scores] == [correct, Outcome.TIMEOUT, correct]
    assert scores[1].value is None and TOWER in scores[1].detail


def test_math_works_from_another_thread(math: MathReward) -> None:
    found: list[Score] = []
    thread = threading.Thread(target=lambda: found.append(check(math, "2\\sqrt{3}", "\\sqrt{12}")))
    thread.start()
    thread.join()
    assert found[0].outcome is Outcome.CORRECT


def test_math_answers_are_not_run_as_python(math: MathReward, tmp_path: Path) -> None:
    target = tmp_path / "made"
    for attack in (
        f"__import__('os').mkdir('{target}')",
        f"\\text{{__import__('os').mkdir('{target}')}}",
        f"\\text{{S(\"__import__('os').mkdir('{target}')\")}}",
    ):
        assert check(math, "x^2", attack).outcome in (Outcome.WRONG, Outcome.UNPARSEABLE)
    assert not target.exists()


@pytest.mark.parametrize("text", ["I give up", "", "<think>\\boxed{1}", "\\boxed{\\pi"])
def test_no_answer_is_unparseable(math: MathReward, text: str) -> None:
    given = math([make_item("\\pi", text)])[0]
    assert (given.outcome, given.value) == (Outcome.UNPARSEABLE, 0.0)


def test_nonsense_in_the_box_is_unparseable(math: MathReward) -> None:
    assert check(math, "\\pi", "\\frac{{}").outcome is Outcome.UNPARSEABLE
    assert check(math, "\\pi", "x" * 5000).outcome is Outcome.UNPARSEABLE


@pytest.mark.parametrize("gold", ["\\foo{3", "", None, True, [1]])
def test_an_unreadable_reference_is_the_users_mistake(math: MathReward, gold: Any) -> None:
    with pytest.raises(UserInputError, match=r"prompt 12.*'answer'"):
        math([make_item(gold, "\\boxed{3}", 12)])


def test_a_missing_column_is_named(math: MathReward) -> None:
    reward = MathReward(answer_column="solution")
    with pytest.raises(UserInputError, match=r"lacks the column 'solution'.*columns: answer"):
        reward([make_item("3", "3")])


def test_unevaluated_answers_and_tolerance_are_options() -> None:
    reward = MathReward(workers=1, allow_unevaluated=True, relative_tolerance=1e-5)
    pairs = [("1024", "2^{10}"), ("3", "6/2"), ("\\frac{1}{3}", "0.333333"), ("\\pi", "3.14159")]
    assert [check(reward, *pair).outcome for pair in pairs] == [Outcome.CORRECT] * 4
    wrong = [("1024", "2^{11}"), ("55", "\\sum_{k=1}^{10}k"), ("\\frac{1}{3}", "0.333")]
    assert [check(reward, *pair).outcome for pair in wrong] == [Outcome.WRONG] * 3
    reward.close()
    with pytest.raises(UserInputError, match="relative_tolerance"):
        MathReward(relative_tolerance=-1.0)


def test_plain_numbers_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pool(*_: Any) -> Any:
        raise AssertionError("a worker was started")

    monkeypatch.setattr("subprocess.Popen", no_pool)
    reward = MathReward()
    assert [check(reward, "12", a).outcome for a in ("12", "13", "3+9")] == [
        Outcome.CORRECT,
        Outcome.WRONG,
        Outcome.WRONG,
    ]
