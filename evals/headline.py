"""The head of a run's report: what was run, and its numbers in brief."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals.browser import printable
from evals.rundata import RunData, lookup, number

ENDS = 5  # steps averaged at either end of the run for its headline numbers
MAX_TILES = 5

# In order of importance, with what to call them.
_TRAINING = (
    ("reward/mean", "Training reward"),
    ("loss", "Training loss"),
    ("accuracy", "Pairs or steps judged right"),
    ("token_accuracy", "Training token accuracy"),
    ("kl/mean", "KL to the reference, nats per token"),
)
_EVAL = (
    ("accuracy", "accuracy"),
    ("ece", "calibration error"),
    ("first_error_accuracy", "first errors found"),
    ("perplexity", "perplexity"),
    ("kl", "KL, nats per completion"),
)


@dataclass(frozen=True, slots=True)
class Tile:
    """One headline number."""

    label: str
    value: str
    note: str


def subtitle(run: RunData) -> str:
    """Method, model and size in one line."""
    kind = lookup(run.recipe, "algorithm.type")
    words = [str(kind) if kind else ("pipeline" if run.stages else "run")]
    model = lookup(run.recipe, "model.path")
    if model:
        words.append(str(model))
    steps = sum(row["step"] > 0 for row in run.metrics)  # step 0 is an evaluation before training
    if steps:
        words.append(_count(steps, "step"))
    if run.stages:
        words.append(_count(len(run.stages), "stage"))
    return " · ".join(words)


def facts(run: RunData) -> list[tuple[str, str]]:
    """(label, value) of what was run, from what, and with which versions."""
    versions = lookup(run.info, "versions")
    listed = versions.items() if isinstance(versions, Mapping) else ()
    parents = lookup(run.info, "parents")
    last_event = run.events[-1] if run.events else {}
    found = [
        ("Started (UTC)", utc_time(lookup(run.info, "time"))),
        ("Last event (UTC)", utc_time(lookup(last_event, "time"))),
        ("Command", _command(lookup(run.info, "command"))),
        ("Seed", lookup(run.info, "seed")),
        ("Data", _one_line(lookup(run.recipe, "data"))),
        ("Rewards", _one_line(lookup(run.recipe, "rewards"))),
        ("Starts from", ", ".join(map(str, parents)) if isinstance(parents, list) else None),
        ("Resumed", _times(lookup(run.info, "resumes"))),
        ("Versions", ", ".join(f"{name} {version}" for name, version in listed if version)),
    ]
    return [(label, printable(value)) for label, value in found if value not in (None, "")]


def _times(resumes: Any) -> str | None:
    return _count(len(resumes), "time") if isinstance(resumes, list) and resumes else None


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def _command(command: Any) -> str | None:
    return " ".join(map(str, command)) if isinstance(command, list) else command


def _one_line(value: Any) -> str | None:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_one_line(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(str(_one_line(item)) for item in value)
    return None if value is None else str(value)


def tiles(run: RunData) -> list[Tile]:
    """Held-out scores and training metrics at the beginning and at the end."""
    found = [*_eval_tiles(run)]
    for metric, label in _TRAINING:
        values = _column(run, metric)
        # A policy-gradient loss says nothing by itself; where there is a reward, that is shown.
        if values and not (metric == "loss" and "reward/mean" in run.metrics[-1]):
            found.append(_ends_tile(label, values))
    return found[:MAX_TILES]


def _column(run: RunData, metric: str) -> list[float]:
    """The numbers of a metric, which may have a prefix of one word before its name."""
    names = {name for row in run.metrics for name in row if not name.startswith("eval/")}
    named = [name for name in sorted(names) if name.partition("/")[2] == metric]
    found = metric if metric in names else next(iter(named), metric)
    return [value for row in run.metrics if (value := number(row.get(found))) is not None]


def _ends_tile(label: str, values: Sequence[float]) -> Tile:
    """How a metric began and how it ended, averaged over a few steps where there are enough."""
    if len(values) == 1:
        return Tile(label, f"{values[0]:.3g}", "one step")
    n = ENDS if len(values) >= 2 * ENDS else 1
    note = f"mean of the first and of the last {n} steps" if n > 1 else "first and last step"
    return Tile(label, f"{_mean(values[:n]):.3g} → {_mean(values[-n:]):.3g}", note)


def _eval_tiles(run: RunData) -> Iterable[Tile]:
    for task in sorted({one.task for one in run.evals}):
        steps = [one for one in run.evals if one.task == task and one.step is not None]
        gold = next((one.labels["gold"] for one in steps if "gold" in one.labels), None)
        wanted = _EVAL if gold is None else ((gold, f"gold {gold}"), *_EVAL)
        for metric, label in wanted:
            found = [one for one in steps if metric in one.metrics]
            if not found:
                continue
            first, last = found[0], found[-1]
            value = f"{last.metrics[metric]:.3g}"
            if len(found) > 1:
                value = f"{first.metrics[metric]:.3g} → {value}"
            ends = last.intervals.get(metric)
            interval = f", 95% interval {ends[0]:.3g} to {ends[1]:.3g}" if ends else ""
            yield Tile(f"Held-out {label} ({task})", value, f"step {last.step}{interval}")


def utc_time(value: Any) -> str:
    """An ISO time to the second; the project writes UTC."""
    return printable(value or "")[:19].replace("T", " ")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
