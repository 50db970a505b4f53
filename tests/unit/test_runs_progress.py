"""What a run shows: plain lines word for word, a bar on a terminal, samples in a table."""

import io
import math
import re

import pytest
from rich.console import Console

from alignment.runs.progress import Progress, duration, show_samples, visible
from alignment.types import (
    Completion,
    Outcome,
    Prompt,
    RewardedCompletion,
    Rollout,
    StopReason,
)

SHOWN = {"reward/mean": "reward", "kl/mean": "kl"}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def plain():
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def test_plain_lines_word_for_word():
    clock, console = Clock(), plain()
    with Progress(60, SHOWN, console=console, clock=clock) as progress:
        for step in range(1, 13):
            clock.now += 4.9
            progress.update(step, {"reward/mean": 0.4123, "kl/mean": 0.0123, "other": 1.0})
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 12
    assert lines[-1] == "step 12/60  reward 0.41  kl 0.012  4.9 s/step  4 min left"


def test_a_resumed_run_counts_only_its_own_steps_into_the_rate():
    clock, console = Clock(), plain()
    with Progress(60, SHOWN, start=50, console=console, clock=clock) as progress:
        clock.now += 2.0
        progress.update(51, {})
    assert console.file.getvalue() == "step 51/60  2 s/step  18 s left\n"


def test_the_rate_follows_the_latest_steps():
    clock, console = Clock(), plain()
    with Progress(100, {}, console=console, clock=clock) as progress:
        clock.now += 1000
        progress.update(1, {})
        for step in range(2, 32):
            clock.now += 1
            progress.update(step, {})
    assert console.file.getvalue().splitlines()[-1] == "step 31/100  1 s/step  69 s left"


def test_odd_numbers_are_shown_as_they_are():
    console = plain()
    progress = Progress(3, {"a": "a", "b": "b", "c": "[c]"}, console=console)
    progress.update(1, {"a": math.nan, "b": -math.inf, "c": 12345.6})
    assert console.file.getvalue() == "step 1/3  a nan  b -inf  [c] 12346\n"


def test_a_terminal_gets_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress(4, SHOWN, console=console) as progress:
        progress.update(2, {"reward/mean": 0.5})
    text = console.file.getvalue()
    assert "step 2/4" in text
    assert "reward 0.5" in text
    assert "━" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (44.6, "45 s"), (240, "4 min"), (5399, "1 h 30 min"), (7800, "2 h 10 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def item(index, reward, text="done", outcome=Outcome.SCORED):
    prompt = Prompt((1,), f"prompt {index}", index)
    completion = Completion(index, 0, (2,), (-1.0,), StopReason.STOP, 0, text)
    return RewardedCompletion(prompt, completion, reward, outcome, {})


def shown(items, n):
    console = Console(file=io.StringIO(), width=100)
    show_samples(Rollout(tuple(items), group_size=1, step=4), n, console=console)
    return console.file.getvalue()


def prompts_in(text):
    return re.findall(r"prompt (\d)", text)


def test_samples_go_from_best_to_worst_and_failures_come_last():
    items = [item(0, 0.2), item(1, None, outcome=Outcome.CRASH), item(2, 0.9), item(3, 0.5)]
    assert prompts_in(shown(items, 9)) == ["2", "3", "0", "1"]
    assert prompts_in(shown(items[:1] + items[2:], 2)) == ["2", "0"]
    assert prompts_in(shown(items, 1)) == ["2"]
    assert prompts_in(shown([], 3)) == prompts_in(shown(items, 0)) == []
    assert "step 4" in shown(items, 1)
    assert "crash" in shown(items, 9)


def test_a_completion_cannot_steer_the_terminal():
    text = shown([item(0, 1.0, "a\x1b[2Jb\r\x07 [red]c[/red] é\u202e")], 1)
    assert not any(char in text for char in "\x1b\r\x07\u202e")
    assert "a\\x1b[2Jb\\r\\x07 [red]c[/red] é\\u202e" in text
    assert visible("two\nlines") == "two\nlines"
