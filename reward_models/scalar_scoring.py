"""Scoring completions with a scalar model: which tokens it is shown, and what is read off it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alignment.data.chat import stop_token_ids
from alignment.data.encode import RowEncoder
from alignment.data.formats import Turns, prompt_of
from alignment.data.prompts import Style
from alignment.data.steps import text_step_ends
from alignment.data.text_form import FixedStyle, TextForm, read_text_form
from alignment.distributed import Distributed
from alignment.modeling.catalog import resolve
from alignment.modeling.heads import ScalarModel
from alignment.modeling.load import load_tokenizer, template_hash, tokenizer_hash
from alignment.modeling.scalar import SCORE_NORMALIZATION, load_scalar_model
from alignment.rewards.protocol import Item
from alignment.types import STEP_SEPARATOR, Outcome, Sample, Score, StopReason, UserInputError

Show = Callable[[Item], Sample]
Read = Callable[[Sequence[Sample]], list[float]]


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores items in the order given.

    show:    the tokens that the model sees of an item.
    read:    one number per sample.
    context: longest row that the model can read, in tokens; None where there is no limit.
    """

    show: Show
    read: Read
    context: int | None

    def __call__(self, items: Sequence[Item]) -> list[Score]:
        shown = [self._shown(item) for item in items]
        values = iter(self.read([one for one in shown if isinstance(one, Sample)]))
        return [
            Score(next(values)) if isinstance(one, Sample) else Score(None, Outcome.CRASH, one)
            for one in shown
        ]

    def _shown(self, item: Item) -> Sample | str:
        """The sample, or why the model cannot read it."""
        try:
            sample = self.show(item)
        except UserInputError as error:
            return str(error)
        length = len(sample.prompt_ids) + len(sample.completion_ids)
        if not sample.completion_ids:
            return "the completion is empty: it has no last token to score"
        if self.context is not None and length > self.context:
            return f"{length} tokens are more than the reward model's context of {self.context}"
        return sample


def load_reward_model(
    policy_tokenizer: Any,
    *,
    path: str,
    dtype: str,
    micro_batch_tokens: int,
    normalize: bool | Literal["auto"],
    policy_style: FixedStyle | None,
    on_mismatch: Literal["refuse", "retokenize"],
    style: Style,
    system: str | None,
) -> Scorer:
    """What the reward `reward_model` scores with; arguments as there.

    Args:
        policy_style: how the policy's own rows become tokens; None is not known.

    Raises:
        UserInputError: the model cannot be loaded, reads other tokens than the policy writes, or
            has no normalization where one is asked for.
    """
    mean, std = _normalization(path, normalize)
    reads = _reads(read_text_form(Path(resolve(path))), style, system)
    model, tokenizer = _load(path, dtype)

    def read(samples: Sequence[Sample]) -> list[float]:
        return [(score - mean) / std for score in model.scores(samples, micro_batch_tokens)]

    show = _show(path, tokenizer, policy_tokenizer, reads, policy_style, on_mismatch)
    return Scorer(show, read, _context(model))


def load_process_reward_model(
    policy_tokenizer: Any,
    *,
    path: str,
    dtype: str,
    micro_batch_tokens: int,
    separator: str | None,
    aggregate: str,
    policy_style: FixedStyle | None,
    on_mismatch: Literal["refuse", "retokenize"],
    style: Style,
    system: str | None,
) -> Scorer:
    """What the reward `process_reward_model` scores with; arguments as there.

    Args:
        policy_style: how the policy's own rows become tokens; None is not known.

    Raises:
        UserInputError: the model cannot be loaded, or reads other tokens than the policy writes.
    """
    recorded = read_text_form(Path(resolve(path)))
    reads = _reads(recorded, style, system)
    step_separator = separator or (recorded and recorded.separator) or STEP_SEPARATOR
    model, tokenizer = _load(path, dtype)

    def read(samples: Sequence[Sample]) -> list[float]:
        rows = model.values(samples, micro_batch_tokens, reads="after")
        found = []
        for sample, row in zip(samples, rows, strict=True):
            ends = step_ends(tokenizer, sample.completion_ids, step_separator)
            found.append(_AGGREGATES[aggregate](row[ends].sigmoid().tolist()))
        return found

    show = _show(path, tokenizer, policy_tokenizer, reads, policy_style, on_mismatch)
    return Scorer(show, read, _context(model))


def step_ends(tokenizer: Any, token_ids: Sequence[int], separator: str) -> list[int]:
    """The token of a completion that holds the last character of each of its steps.

    A completion without any (`alignment.data.steps.text_step_ends`) has one step, which ends in its
    last token.
    """
    text = _decode(tokenizer, token_ids)

    def spells(n_tokens: int, n_characters: int) -> bool:
        # Not by length: the first bytes of a character decode to a character as well.
        return _decode(tokenizer, token_ids[:n_tokens]).startswith(text[:n_characters])

    ends: list[int] = []
    for n_characters in text_step_ends(text, separator):
        low, high = 1, len(token_ids)  # the fewest tokens that spell so many characters
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if spells(middle, n_characters) else (middle + 1, high)
        ends.append(low - 1)
    return list(dict.fromkeys(ends)) or [len(token_ids) - 1]


_AGGREGATES: Mapping[str, Callable[[list[float]], float]] = {
    "min": lambda scores: min(scores) if all(map(math.isfinite, scores)) else math.nan,
    "mean": lambda scores: math.fsum(scores) / len(scores),
    "last": lambda scores: scores[-1],
    "product": math.prod,
}


def _decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(
        list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def _load(path: str, dtype: str) -> tuple[ScalarModel, Any]:
    """The model on this process's device, and its tokenizer."""
    model = load_scalar_model(path, dtype=dtype).requires_grad_(False)
    return model.to(Distributed().device), load_tokenizer(path)


def _context(model: ScalarModel) -> int | None:
    limit: int | None = getattr(model.backbone.config, "max_position_embeddings", None)
    return limit


def _normalization(path: str, normalize: bool | Literal["auto"]) -> tuple[float, float]:
    """(mean, standard deviation) to take out of the scores."""
    file = Path(resolve(path)) / SCORE_NORMALIZATION
    if normalize is False or (normalize == "auto" and not file.is_file()):
        return 0.0, 1.0
    if not file.is_file():
        raise UserInputError(
            f"reward_model: normalize is true, but {path} has no {SCORE_NORMALIZATION}; train it "
            "with algorithm.normalize: true, or set normalize: false"
        )
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
        mean, std = float(stated["mean"]), float(stated["std"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserInputError(f"{file} is damaged ({error!r}); set normalize: false") from error
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise UserInputError(f"{file} says mean {mean}, std {std}; set normalize: false")
    return mean, std


def _reads(recorded: TextForm | None, style: Style, system: str | None) -> tuple[Style, str | None]:
    """(style, system message) of what the model reads: as asked for, or else as recorded."""
    if recorded is None or style not in ("auto", recorded.style):
        return style, system
    return recorded.style, recorded.system if system is None else system


def _show(
    path: str,
    tokenizer: Any,
    policy_tokenizer: Any,
    reads: tuple[Style, str | None],
    policy_style: FixedStyle | None,
    on_mismatch: Literal["refuse", "retokenize"],
) -> Show:
    """How items become what the model sees.

    Raises:
        UserInputError: the policy's tokens or conversations are not the model's, under `refuse`.
    """
    style, system = reads
    differing = _differences(policy_tokenizer, tokenizer)
    if policy_style is not None and style not in ("auto", policy_style):
        differing.append(f"another data.style ({style}, the policy's is {policy_style})")
    if not differing:
        return _sampled
    if on_mismatch == "refuse":
        raise UserInputError(
            f"the reward model {path} has {' and '.join(differing)}, so the policy's tokens would "
            "mean something else to it. Train both from the same base model with the same "
            "model.chat_template and data.style, or set on_mismatch: retokenize for this reward, "
            "which scores the text of a completion in place of its tokens"
        )
    return _Retokenizer(tokenizer, system, style)


def _differences(policy: Any, own: Any) -> list[str]:
    found = []
    if tokenizer_hash(policy) != tokenizer_hash(own):
        found.append(f"another tokenizer ({len(own)} tokens, the policy's has {len(policy)})")
    if template_hash(policy) != template_hash(own):
        found.append("another chat template than the policy")
    return found


def _sampled(item: Item) -> Sample:
    """The tokens as they were sampled."""
    prompt, completion = item
    marks = (True,) * len(completion.token_ids)
    return Sample(prompt.token_ids, completion.token_ids, marks)


class _Retokenizer:
    """Renders a row's prompt and a completion's text as the model's own tokenizer has them."""

    def __init__(self, tokenizer: Any, system: str | None, style: Style = "auto") -> None:
        self._encoder = RowEncoder(
            tokenizer,
            max_tokens=None,
            too_long="error",
            system=system,
            style=style,
            template_options=None,
        )
        self._ends = stop_token_ids(tokenizer)

    def __call__(self, item: Item) -> Sample:
        prompt, completion = item
        chat, where = self._encoder.chat, prompt.row_name
        turns = prompt_of(prompt.row, chat=chat, where=where)
        answer: Turns = completion.text
        if chat:
            answer = [{"role": "assistant", "content": completion.text}]
        whole = self._encoder.encode(turns, answer, loss_on="last_assistant", where=where)
        ids = whole.completion_ids
        if completion.stop_reason is StopReason.LENGTH and ids[-1] in self._ends:
            ids = ids[:-1]  # it never came to its end
        return Sample(whole.prompt_ids, ids, (True,) * len(ids))
