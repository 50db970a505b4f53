"""What a reward is, and how a plain function in trl's calling convention becomes one.

A reward looks at a batch of (prompt, completion) pairs and answers with one `Score` per pair. The
rules for what happens when it misbehaves are the same for every reward (`run_reward`):

* it raises: the batch is retried one pair at a time, and each pair that raises again is an
  `Outcome.CRASH` whose detail is the exception. The others keep their scores;
* it returns NaN or an infinity: `Outcome.CRASH` for that pair;
* it returns None for a pair: the reward does not apply to it, and is left out of the sum;
* it returns the wrong number of scores, or something that is not a number: a `RewardError`, since
  no later batch will be any better.

A crash is never a score of zero: the sample is left out of the loss, and counted.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Protocol

from alignment.types import AlignmentError, Completion, Outcome, Prompt, Score, UserInputError

Item = tuple[Prompt, Completion]


class Reward(Protocol):
    """Scores completions.

    Rewards that tell right from wrong set the attribute `is_verifier = True`; those that hold
    processes or files have a method `close()`; those that read token ids have a method
    `bind(tokenizer)`, called once with the policy's tokenizer, and with `policy_style` where it
    names that: "chat" or "plain", as the policy's rows are rendered. None of them is required.

    A reward that keeps something from one batch to the next (a running mean) has `state_dict()` and
    `load_state_dict(state)`, as torch's modules do: its state is then part of every checkpoint, and
    evaluations leave it as it was. It is a tree of tensors, arrays, numbers and text
    (`alignment.runs.state_tree`). What a reward keeps without them is lost when a run is resumed.
    """

    def __call__(self, items: Sequence[Item], /) -> Sequence[Score | None]:
        """One score per item, in order. None: this reward does not apply to that item."""
        ...


class RewardError(UserInputError):
    """A reward is programmed wrongly. The message names the reward, the sample and the remedy."""


def run_reward(
    name: str, reward: Callable[[Sequence[Item]], Any], items: Sequence[Item]
) -> list[Score | None]:
    """Call a reward under the rules of this module: one checked score (or None) per item.

    Raises:
        RewardError: wrong count or type of the scores.
        AlignmentError: any that the reward itself raised, unchanged.
    """
    if not items:
        return []
    try:
        returned = reward(items)
    except AlignmentError:
        raise
    except Exception as error:
        if len(items) == 1:
            return [_crash(f"reward {name!r} raised {_describe(error)}")]
        return [score for item in items for score in run_reward(name, reward, [item])]
    values = _as_list(name, returned)
    if len(values) != len(items):
        raise RewardError(
            f"reward {name!r} returned {len(values)} scores for {len(items)} completions; "
            "return exactly one per completion, in the same order (None where it does not apply)"
        )
    return [_as_score(name, value, item) for value, item in zip(values, items, strict=True)]


class FunctionReward:
    """A function in trl's convention, as a `Reward`.

    `function(prompts: list[str], completions: list[str], **columns) -> list[float | None]`, called
    with keywords. The columns are those of the data rows, each a list with one value per
    completion (None where a row lacks the column); `completion_ids` is a list of lists of ints.
    A function without `**kwargs` gets only what it names. The recipe's options are passed on as
    they are, and win over a column of the same name. It may return `Score` objects as well.

    Errors and odd return values are treated as `run_reward` says.
    """

    def __init__(self, name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        if not callable(function):
            raise RewardError(
                f"reward {name!r} is {type(function).__name__}, which cannot be called; "
                "name a function or a class as 'module:attribute'"
            )
        self.name = name
        self.is_verifier: bool = getattr(function, "is_verifier", False)
        self.function = function
        self._options = dict(options)
        self._signature = _signature(function)
        if self._signature is not None:
            self._refuse_unknown_options(self._signature)

    def __call__(self, items: Sequence[Item], /) -> list[Score | None]:
        return run_reward(self.name, self._call, items)

    def _call(self, items: Sequence[Item]) -> Any:
        arguments: dict[str, Any] = {
            "prompts": [prompt.text for prompt, _ in items],
            "completions": [completion.text for _, completion in items],
            "completion_ids": [list(completion.token_ids) for _, completion in items],
        }
        for column in sorted({key for prompt, _ in items for key in prompt.row}):
            arguments.setdefault(column, [prompt.row.get(column) for prompt, _ in items])
        arguments.update(self._options)
        if self._signature is not None:
            arguments = _accepted(self._signature, arguments)
            self._refuse_missing_columns(self._signature, arguments, items[0][0])
        return self.function(**arguments)

    def _refuse_unknown_options(self, signature: inspect.Signature) -> None:
        unknown = sorted(set(self._options) - set(_accepted(signature, self._options)))
        if unknown:
            known = ", ".join(str(parameter) for parameter in signature.parameters.values())
            raise RewardError(
                f"reward {self.name!r} has no option {unknown[0]!r}; its function takes ({known})"
            )

    def _refuse_missing_columns(
        self, signature: inspect.Signature, arguments: Mapping[str, Any], prompt: Prompt
    ) -> None:
        try:
            signature.bind(**arguments)
        except TypeError as error:
            columns = ", ".join(sorted(prompt.row)) or "none"
            raise RewardError(
                f"reward {self.name!r} cannot be called for {prompt.row_name}: {error}. "
                f"Columns of its row: {columns}. Rename a column, give the argument as an option, "
                "or give it a default"
            ) from error


def _accepted(signature: inspect.Signature, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a function with this signature can be given by keyword."""
    parameters = signature.parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return dict(arguments)
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {parameter.name for parameter in parameters if parameter.kind in by_keyword}
    return {name: value for name, value in arguments.items() if name in named}


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have none
        return None


def _as_list(name: str, returned: Any) -> list[Any]:
    """A list out of whatever a reward returned: a sequence, an array or a tensor."""
    if hasattr(returned, "tolist"):
        returned = returned.tolist()
    if isinstance(returned, Sequence) and not isinstance(returned, str | bytes):
        return list(returned)
    raise RewardError(
        f"reward {name!r} returned {type(returned).__name__} where a list of scores was expected; "
        "return one number (or None, or Score) per completion"
    )


def _as_score(name: str, value: Any, item: Item) -> Score | None:
    if value is None or isinstance(value, Score):
        return _finite(name, value) if value is not None else None
    if hasattr(value, "item"):  # a numpy scalar or a tensor of one element
        value = value.item()
    if not isinstance(value, Real):
        prompt, completion = item
        raise RewardError(
            f"reward {name!r} returned {value!r} ({type(value).__name__}) for sample "
            f"{completion.sample_index} of prompt {prompt.index}; return a number, None or a Score"
        )
    return _finite(name, Score(float(value)))


def _finite(name: str, score: Score) -> Score:
    if score.value is None or math.isfinite(score.value):
        return score
    return _crash(f"reward {name!r} returned {score.value}")


def _crash(detail: str) -> Score:
    return Score(None, Outcome.CRASH, detail)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]
