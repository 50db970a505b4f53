"""A recipe's rewards, tried on a few completions before a model is trained on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.config.load import load_recipe
from alignment.config.schema import Recipe
from alignment.data.encode import RowEncoder
from alignment.data.formats import Turns, demonstration_of, detect, preference_of, prompt_of
from alignment.data.places import PlacedRows
from alignment.data.text_form import fixed_style
from alignment.rewards.protocol import Item
from alignment.trainers.setup import load_policy_tokenizer, load_rows, make_rewards
from alignment.types import Completion, Prompt, RewardedCompletion, StopReason, UserInputError


def try_rewards(
    name: str, *, rows: int = 1, prompt: str | None = None, completion: str | None = None
) -> list[tuple[str, RewardedCompletion]]:
    """Grade completions as a run would whose policy had written them to their end.

    Args:
        name: a recipe, or a run's folder, whose recipe it is then.
        rows: of the training data, how many of the first to take.
        prompt: take this in place of the data's rows.
        completion: grade this as the answer to each; None grades those of the data: a row's
            completion, or both sides of a preference.

    Returns:
        (what it is, grade) of each completion.

    Raises:
        UserInputError: the recipe is a pipeline, or has no rewards; a row has no completion; or a
            reward cannot be used.
    """
    recipe = _recipe(name)
    rewards = make_rewards(recipe)
    if rewards is None:
        raise UserInputError(f"{name} has no rewards; name a recipe that has some")
    try:
        tokenizer = load_policy_tokenizer(recipe.model)
        rewards.bind(tokenizer, policy_style=fixed_style(recipe.data.style, tokenizer))
        items: dict[str, Item] = {}
        for where, row in _rows(recipe, rows, prompt, completion):
            items |= _items(recipe, tokenizer, row, completion, where, len(items))
        return list(zip(items, rewards.grade(list(items.values())), strict=True))
    finally:
        rewards.close()


def _recipe(name: str) -> Recipe:
    of_run = Path(name) / "recipe.yaml"
    recipe = load_recipe(of_run if of_run.is_file() else name)
    if not isinstance(recipe, Recipe):
        raise UserInputError(f"{name} is a pipeline; name the recipe, or the run, of one stage")
    return recipe


def _rows(
    recipe: Recipe, n_rows: int, prompt: str | None, completion: str | None
) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, row) of each row to grade an answer to."""
    if prompt is not None and completion is None:
        raise UserInputError("a prompt without a completion; give both, or neither")
    if prompt is not None:
        return [("the prompt given", {"prompt": prompt})]
    data: PlacedRows = load_rows(recipe.data)[0]
    return [(data.places.name(i), row) for i, row in enumerate(data.rows[:n_rows])]


def _items(
    recipe: Recipe,
    tokenizer: Any,
    row: Mapping[str, Any],
    completion: str | None,
    where: str,
    first: int,
) -> dict[str, Item]:
    """By name, what to grade of a row; prompts are numbered from `first`."""
    encoder = RowEncoder(
        tokenizer,
        max_tokens=None,
        too_long="error",
        system=recipe.data.system,
        style=recipe.data.style,
        template_options=None,
    )
    prompt, answers = _answers(row, completion, encoder.chat, where)
    items: dict[str, Item] = {}
    for index, (name, answer) in enumerate(answers.items(), start=first):
        sample = encoder.encode(prompt, answer, loss_on="last_assistant", where=where)
        ids = sample.completion_ids
        items[f"{where}{name}"] = (
            Prompt(sample.prompt_ids, tokenizer.decode(sample.prompt_ids), index, row, place=where),
            Completion(
                prompt_index=index,
                sample_index=0,
                token_ids=ids,
                sampling_logprobs=(0.0,) * len(ids),
                stop_reason=StopReason.STOP,
                policy_version=0,
                text=tokenizer.decode(ids, skip_special_tokens=True),
            ),
        )
    return items


def _answers(
    row: Mapping[str, Any], completion: str | None, chat: bool, where: str
) -> tuple[Turns, dict[str, Turns]]:
    """What a row asks, and by name the answers to grade."""
    given: Turns | None = completion
    if chat and completion is not None:
        given = [{"role": "assistant", "content": completion}]
    if detect(row, where=where) == "preference":
        prompt, chosen, rejected = preference_of(row, chat=chat, where=where)
        sides = {", chosen": chosen, ", rejected": rejected}
        return prompt, sides if given is None else {"": given}
    prompt = prompt_of(row, chat=chat, where=where)
    if given is None:
        context, own = demonstration_of(row, chat=chat, where=where)
        given = own if context else own[len(prompt) :]
    return prompt, {"": given}
