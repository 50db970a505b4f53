"""Completions that a run recorded, in place of an engine's and of the rewards' verdicts on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment.config.load import load_recipe
from alignment.config.methods.base import needs_of
from alignment.config.schema import Recipe
from alignment.runs.directory import RunDirectory
from alignment.runs.inputs import ParentRecord, encoding_of
from alignment.runs.outputs import Encoding, output_hash, short_hash
from alignment.runs.samples import read_rollout, rollout_path
from alignment.types import Prompt, RewardedCompletion, SamplingParams, UserInputError

OPTION = "--rollouts-from"
MARK = "rollouts_from"
"""The entry of `run.json` that names the run whose rollouts another one is trained on."""

# Settings that decide which prompts a step draws, and so have to be the same in both runs.
_SAME_DRAWS = ("prompts_per_step", "dynamic_sampling", "max_refills")


class RecordedRollouts:
    """Gives each prompt of a step the completions and grades that a run recorded for it.

    It stands where engine and rewards would (`rollout.collect.Complete`), so that everything after
    them happens as in the run, dynamic sampling included. Each rank asks for its own prompts, which
    need not be those that a rank of the run had.

    Args:
        run: the run that recorded them.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._step: int | None = None
        self._items: list[RewardedCompletion] = []
        self._groups: Mapping[int, list[RewardedCompletion]] = {}

    def __call__(
        self, prompts: Sequence[Prompt], params: SamplingParams
    ) -> list[RewardedCompletion]:
        """The `params.n` completions of each prompt, recorded at `params.step`.

        Raises:
            UserInputError: the step is not recorded, or its prompts or their number of
                completions are others.
        """
        self._read(params.step)
        return [
            replace(item, prompt=prompt)
            for prompt in prompts
            for item in self._group(prompt, params)
        ]

    def items(self, step: int) -> Sequence[RewardedCompletion]:
        """All completions of a step in the order of the rows of its file.

        Raises:
            UserInputError: the step is not recorded.
        """
        self._read(step)
        return self._items

    def require_steps(self, last: int) -> None:
        """Refuse where one of the steps 1 to `last` is not recorded.

        Raises:
            UserInputError: naming the first one.
        """
        missing = [step for step in range(1, last + 1) if not self._path(step).is_file()]
        if missing:
            more = f" (and of {len(missing) - 1} more steps)" if len(missing) > 1 else ""
            raise UserInputError(
                f"{self.run.path} has no samples of step {missing[0]}{more}, and {last} steps are "
                "to be trained; lower algorithm.steps, or name a run that recorded them all"
            )

    def require_tokens(self, encoding: Encoding) -> None:
        """Refuse a run of another tokenizer, whose ids mean something else.

        Raises:
            UserInputError: the tokenizers are known to differ.
        """
        theirs = encoding_of(self.run.path)
        if theirs is None or None in (theirs.tokenizer, encoding.tokenizer):
            return
        if theirs.tokenizer != encoding.tokenizer:
            raise UserInputError(
                f"the completions of {self.run.path} were sampled with another tokenizer "
                f"({short_hash(theirs.tokenizer)}) than this run has "
                f"({short_hash(encoding.tokenizer)}); use one tokenizer in both"
            )

    def as_inputs(self) -> tuple[ParentRecord, ...]:
        """The run as an input of another; none before it is finished, when it has no hash."""
        value = output_hash(self.run.path, "run")
        if value is None:
            return ()
        return (ParentRecord(OPTION, str(self.run.path), "run", value),)

    def _path(self, step: int) -> Path:
        return rollout_path(self.run.rollouts_dir, step)

    def _read(self, step: int) -> None:
        if step == self._step:
            return
        path = self._path(step)
        if not path.is_file():
            raise UserInputError(f"{self.run.path} has no samples of step {step}: no file {path}")
        rollout = read_rollout(path)
        self._items = [*rollout.items, *rollout.dropped]
        groups = defaultdict(list)
        for item in self._items:
            groups[item.prompt.index].append(item)
        self._groups, self._step = groups, step

    def _group(self, prompt: Prompt, params: SamplingParams) -> Sequence[RewardedCompletion]:
        where = f"step {params.step} of {self.run.path}"
        group = self._groups.get(prompt.index)
        if group is None:
            raise UserInputError(
                f"{where} has no completions for prompt {prompt.index}, which is drawn in it here; "
                "prompts_per_step and dynamic sampling have to be those of that run (what dynamic "
                "sampling dropped was not recorded by earlier versions)"
            )
        if group[0].prompt.token_ids != prompt.token_ids:
            raise UserInputError(
                f"prompt {prompt.index} in {where} has other tokens than the one drawn here; data, "
                "chat template and run.seed, which gives the order, have to be those of the run"
            )
        if [item.completion.sample_index for item in group] != list(range(params.n)):
            raise UserInputError(
                f"{where} has {len(group)} completions of each prompt, and {params.n} are wanted "
                "here; the number of completions a prompt has to be that of the run"
            )
        return group


def rollouts_for(run: Path, recipe: Recipe) -> RecordedRollouts:
    """The rollouts of `run`, for a run of `recipe` to train on.

    Raises:
        UserInputError: there is no such run, the method samples nothing, or a setting that decides
            which prompts are drawn differs.
    """
    directory = RunDirectory.open(run)
    if not needs_of(recipe.algorithm).rollout:
        raise UserInputError(f"{OPTION} {run}: the recipe's method samples nothing; leave it out")
    theirs = load_recipe(directory.recipe)
    if not isinstance(theirs, Recipe):
        raise UserInputError(f"{OPTION} {run} is a pipeline; name a stage: {run}/stages/NAME")
    for name in _SAME_DRAWS:
        mine, other = (getattr(r.algorithm, name, None) for r in (recipe, theirs))
        if mine is not None and other is not None and mine != other:
            raise UserInputError(
                f"algorithm.{name} is {mine} in the recipe and {other} in {run}, so that the steps "
                "draw other prompts; set it to the same"
            )
    return RecordedRollouts(directory)


def refuse_other_source(info: Mapping[str, Any], name: str, source: Path | None) -> None:
    """Refuse to go on with a run on completions from elsewhere than it began with.

    Args:
        info: its `run.json`.
        name: of the run in messages.
        source: where they would come from now: a run, or None for the engine.

    Raises:
        UserInputError: saying what it began with.
    """
    began = info.get(MARK)
    if began is None and source is not None:
        raise UserInputError(
            f"{name} samples its own completions; leave out {OPTION}, or choose another run.name"
        )
    if began is not None and (source is None or Path(began).resolve() != source.resolve()):
        raise UserInputError(
            f"{name} is trained on the rollouts of {began}; to go on, give {OPTION} {began}"
        )


def without_sampling(recipe: Recipe, *, keep_engine: bool = False) -> Recipe:
    """The recipe as it is loaded where nothing is sampled or graded: no rewards, and the engine
    that asks for no GPU or server.

    Methods that may go without rewards keep them, for what they do depends on that. Where the
    policy is the judge, it is asked all the same, and keeps its engine.

    Args:
        keep_engine: leave the recipe's own engine in it in any case.
    """
    changes: dict[str, object] = {}
    if needs_of(recipe.algorithm).rewards != "optional":
        changes["rewards"] = ()
    judge = getattr(recipe.algorithm, "judge", None)
    asked = keep_engine or (judge is not None and judge.kind == "policy")
    if recipe.rollout is not None and not asked:
        changes["rollout"] = recipe.rollout.model_copy(update={"engine": "native", "server": None})
    return recipe.model_copy(update=changes)
