"""Compare two runs by the evaluations they saved: only where both solved the same problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from alignment.types import UserInputError
from evals.compare import compare, render_text
from evals.results import EvalRecord, EvalResult
from evals.rundata import EvalSummary, read_run


def compare_runs(
    first: Path | str, second: Path | str, tasks: Sequence[str] = (), *, seed: int = 0
) -> str:
    """Tables of two runs' last evaluations, task by task, with paired differences.

    Registered as report "compare_runs".

    Args:
        first: a run's folder, or another that `align eval` saved in.
        second: another's, or the same.
        tasks: names of tasks, as the recipes have them, or with the options and the seed that
            `align eval` was given (`verifiable,samples=2,seed=0`); by default all that both have.
        seed: of the bootstrap and of drawn sign flips.

    Raises:
        UserInputError: not two run folders, no such task in both, an evaluation that cannot be
            read, or other problems in one of them.
    """
    names = str(first), str(second)
    found = [_last_evals(Path(name)) for name in names]
    common = [task for task in found[0] if task in found[1]]
    for task in tasks:
        if task not in common:
            raise UserInputError(f"no evaluation {task!r} in both runs. {_listing(names, found)}")
    if not common:
        raise UserInputError(f"the runs have no evaluation in common. {_listing(names, found)}")
    tables = []
    for task in tasks or common:
        one, other = (EvalResult.load(evals[task].path) for evals in found)
        _refuse_other_problems(task, one.records, other.records)
        labels = [
            f"{name}, step {evals[task].step}" for name, evals in zip(names, found, strict=True)
        ]
        if labels[0] == labels[1]:
            labels[1] += " again"
        comparison = compare(dict(zip(labels, (one, other), strict=True)), seed=seed)
        tables.append(render_text(replace(comparison, task=task)))
    return "\n\n".join(tables)


def _last_evals(run: Path) -> dict[str, EvalSummary]:
    """The last evaluation by each task."""
    data = read_run(run)
    if data.stages or "stages" in data.recipe:
        raise UserInputError(f"{run} is a pipeline; name a stage: {run}/stages/NAME")
    # What cannot be read may be the last evaluation: an earlier one must not stand in for it.
    damaged = [text for text in data.problems if (run / "evals" / text.split(": ")[0]).is_file()]
    if damaged:
        raise UserInputError(
            f"{run}/evals cannot be read: {'; '.join(damaged)}; restore the file, or remove it to "
            "compare the evaluations before it"
        )
    return {one.task: one for one in data.evals if one.step is not None}


def _listing(names: Sequence[str], found: Sequence[Mapping[str, EvalSummary]]) -> str:
    have = "; ".join(
        f"{name} has {', '.join(evals) or 'none'}" for name, evals in zip(names, found, strict=True)
    )
    return (
        f"Saved evaluations: {have}. Evaluate both alike by align eval, with the same options and "
        "seed, or give both recipes the same eval.tasks"
    )


def _refuse_other_problems(
    task: str, first: Sequence[EvalRecord], second: Sequence[EvalRecord]
) -> None:
    """Pairs must be pairs: the same problems, read alike.

    Where an evaluation sampled nothing, the texts that it scored are told apart by their number of
    tokens, which is all that is saved of them.
    """
    one, other = _problems(first), _problems(second)
    apart = len(one.keys() ^ other.keys())
    differing = sum(one[problem] != other[problem] for problem in one.keys() & other.keys())
    if apart:
        reason = f"{apart} problems are in one of them only ({len(one)} and {len(other)} in all)"
    elif differing:
        reason = f"{differing} of {len(one)} problems read otherwise in the other"
    else:
        return
    raise UserInputError(
        f"{task}: the two runs were evaluated on different problems, so that no difference between "
        f"them can be paired: {reason}. Use the same data, data.held_out and options of the task, "
        "and the same tokenizer, chat template and system message in both"
    )


def _problems(records: Sequence[EvalRecord]) -> dict[int | str, tuple[str, int]]:
    return {
        one.problem_id: (one.prompt_text, one.n_tokens if one.stop_reason is None else 0)
        for one in records
    }
