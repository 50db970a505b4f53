"""Rows of a source in the form that a method trains on, and in every form that tasks may want."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from alignment.config.methods.base import DataForm, needs_of
from alignment.config.schema import Recipe
from alignment.data.chat import check_stop_token_trained, stop_token_ids
from alignment.data.labelled import build_labelled
from alignment.data.pairs import build_pairs
from alignment.data.places import PlacedRows
from alignment.data.prompts import build_prompts
from alignment.data.report import DataReport, check_dropped
from alignment.data.samples import build_samples
from alignment.data.steps import build_steps
from alignment.trainers.context import TokenizedData
from alignment.types import UserInputError

_BUILDERS: Mapping[DataForm, Callable[..., tuple[Any, DataReport]]] = {
    "prompts": build_prompts,
    "samples": build_samples,
    "pairs": build_pairs,
    "labelled": build_labelled,
    "steps": build_steps,
}

# How a recipe names what is learned of a conversation, and how the data layer does.
_LOSS_ON = {"assistant": "assistant", "completion": "last_assistant"}


@dataclass(frozen=True, slots=True)
class TokenizedForms:
    """Tokenizes the rows of one recipe.

    context_length: of the model, in tokens; None where it has no limit.
    """

    recipe: Recipe
    tokenizer: Any
    context_length: int | None
    generation_config: Any

    def training(self, data: PlacedRows, warnings: list[str]) -> TokenizedData:
        """The rows in the form that the method needs; what is dropped is a warning.

        Raises:
            UserInputError: no row can be used, or fewer than `limits.dropped_rows` allows; a row is
                malformed; or the model's stop token would not be trained.
        """
        form = needs_of(self.recipe.algorithm).data
        if form == "samples" and self.recipe.data.style != "plain":
            stop_ids = stop_token_ids(self.tokenizer, self.generation_config)
            check_stop_token_trained(self.tokenizer, stop_ids)
        built, report = self._build(form, data)
        self._check(report, "training data", warnings)
        return TokenizedData(**{form: built})

    def held_out(self, data: PlacedRows, warnings: list[str]) -> TokenizedData:
        """The rows in every form that they have the columns for.

        The method's own form must be among them; the others serve evaluation alone, so that any
        task runs on any run whose data has what it needs. What is dropped of the method's own form
        is a warning; why another cannot be made is kept for the task that asks for it.

        Raises:
            UserInputError: no row can be used in the method's own form, or fewer than
                `limits.dropped_rows` allows; or a row is malformed.
        """
        if not data.rows:
            return TokenizedData()
        own = needs_of(self.recipe.algorithm).data
        forms: dict[str, Any] = {}
        why_not: dict[DataForm, str] = {}
        for form in _BUILDERS:
            try:
                forms[form], report = self._build(form, data)
            except UserInputError as error:
                if form == own:
                    raise
                why_not[form] = str(error)
                continue
            if form == own:
                self._check(report, "held-out data", warnings)
        return TokenizedData(**forms, why_not=why_not)

    def _check(self, report: DataReport, what: str, warnings: list[str]) -> None:
        if report.n_dropped or report.truncated:
            warnings.append(f"{what}: {report.summary()}")
        check_dropped(report, self.recipe.limits.dropped_rows, what)

    def _build(self, form: DataForm, data: PlacedRows) -> tuple[Any, DataReport]:
        options = self._options(form)
        return _BUILDERS[form](data.rows, self.tokenizer, places=data.places, **options)

    def _options(self, form: DataForm) -> dict[str, Any]:
        data = self.recipe.data
        options: dict[str, Any] = {"system": data.system, "style": data.style}
        if form == "prompts":
            return options | {"max_prompt_tokens": self._prompt_limit()}
        limits = [data.max_tokens, self.context_length]
        options |= {
            "max_tokens": min((limit for limit in limits if limit is not None), default=None),
            "too_long": data.too_long,
        }
        loss_on = getattr(self.recipe.algorithm, "loss_on", None)
        if form == "samples" and loss_on is not None:
            options["loss_on"] = _LOSS_ON[loss_on]
        separator = getattr(self.recipe.algorithm, "separator", None)
        if form == "steps" and separator is not None:
            options["separator"] = separator
        return options

    def _prompt_limit(self) -> int | None:
        """Longest prompt that leaves room for one token, or the recipe's own limit if lower."""
        room = self.context_length - 1 if self.context_length else None
        limits = [self.recipe.data.max_prompt_tokens, room]
        return min((limit for limit in limits if limit is not None), default=None)


def n_rows(data: TokenizedData, recipe: Recipe) -> int:
    """Rows of the form that the method trains on."""
    return len(getattr(data, needs_of(recipe.algorithm).data))
