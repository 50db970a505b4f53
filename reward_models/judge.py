"""A language model behind an endpoint as a reward: it grades each answer on a scale."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from alignment.config.methods.feedback import EnvironmentVariable
from alignment.data.formats import Turns, prompt_of
from alignment.feedback.chat_model import Failure, Reply, transcript
from alignment.feedback.endpoint import EndpointChatModel
from alignment.rewards.protocol import Item
from alignment.types import Outcome, Prompt, Score, UserInputError

_RUBRIC = "The answer does what was asked, is correct, and is clear and to the point."

_SHOWN = """An answer to a conversation is graded.

[What a good answer is like]
{rubric}

[Conversation]
{conversation}

[Answer]
{answer}

Grade the answer from {low:g} (worst) to {high:g} (best). Reply with the number and nothing else."""

_NUMBER = r"(-?(?:\d+(?:\.\d+)?|\.\d+))"
_GRADE = re.compile(rf"(?:(?i:score|grade|rating)(?:\s*:\s*|\s+))?{_NUMBER}(?:\s*/\s*{_NUMBER})?")
_BEFORE = " \t\r\n*_`\"'()[]"
_AFTER = _BEFORE + "."  # before a number a point belongs to it
_COLUMNS = ("prompt", "question", "messages")


class JudgeReward:
    """The grade that a language model gives the completion, a number on `scale`.

    The judge sees the rubric, the row's prompt (or, without one, the rendered prompt) and the
    completion. A judge that cannot be reached, refuses or gives no grade is a grader that failed
    (`timeout`, `crash`), never a bad grade. Several requests are under way at the same time.

    Args:
        base_url: address of an OpenAI-compatible API, such as http://localhost:8000/v1.
        model: the judge's name there.
        rubric: what a good answer is like.
        scale: lowest and highest grade.
        api_key_variable: the environment variable with the API key; no key is sent where it is
            not set.
        max_new_tokens: room for the judge's reply.
        temperature: of the judge's reply; 0 is greedy.
        seed: of the judge's reply.
        timeout_seconds: time for one request.
        retries: further attempts after a time-out, a broken connection, or a server that is busy.
        max_in_flight: requests at the same time.
        token_limit_key: what the server calls the limit of new tokens.
        cache: file that keeps the judge's replies, so that the same answer is graded once.

    Raises:
        UserInputError: an address or a number that cannot be right, a scale that is empty.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        rubric: str = _RUBRIC,
        scale: tuple[float, float] = (1.0, 10.0),
        api_key_variable: EnvironmentVariable = "OPENAI_API_KEY",
        max_new_tokens: int = 16,
        temperature: float = 0.0,
        seed: int = 0,
        timeout_seconds: float = 60.0,
        retries: int = 4,
        max_in_flight: int = 8,
        token_limit_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        cache: Path | None = None,
    ) -> None:
        if not scale[0] < scale[1]:
            raise UserInputError(
                f"the judge's scale goes from {scale[0]:g} to {scale[1]:g}; give the lowest grade "
                "and then the highest"
            )
        self._rubric = rubric
        self._scale = scale
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._seed = seed
        self._judge = EndpointChatModel(
            base_url,
            model,
            api_key_variable=api_key_variable,
            timeout_seconds=timeout_seconds,
            retries=retries,
            max_in_flight=max_in_flight,
            token_limit_key=token_limit_key,
            cache=cache,
        )

    def __call__(self, items: Sequence[Item], /) -> list[Score]:
        shown = [self._show(prompt, completion.text) for prompt, completion in items]
        different = list(dict.fromkeys(shown))  # equal answers get one grade
        replies = self._judge.reply(
            [[{"role": "user", "content": text}] for text in different],
            max_new_tokens=self._max_new_tokens,
            temperature=self._temperature,
            seed=self._seed,
        )
        scores = dict(zip(different, map(self._score, replies), strict=True))
        return [scores[text] for text in shown]

    def close(self) -> None:
        """Close the connections and the cache."""
        self._judge.close()

    def _show(self, prompt: Prompt, answer: str) -> str:
        question = _question(prompt)
        return _SHOWN.format(
            rubric=self._rubric.strip(),
            conversation=question if isinstance(question, str) else transcript(question),
            answer=answer.strip(),
            low=self._scale[0],
            high=self._scale[1],
        )

    def _score(self, reply: Reply) -> Score:
        if reply.failure or reply.text is None:
            failed = Outcome.TIMEOUT if reply.failure is Failure.TIMEOUT else Outcome.CRASH
            return Score(None, failed, f"judge, {reply.failure.value}: {reply.detail}")
        grade = parse_grade(reply.text, self._scale)
        if grade is None:
            low, high = self._scale
            detail = f"judge, no grade from {low:g} to {high:g} in {reply.text[:200]!r}"
            return Score(None, Outcome.CRASH, detail)
        return Score(grade, Outcome.SCORED, f"judge: {reply.text.strip()[:200]}")


def parse_grade(text: str, scale: tuple[float, float]) -> float | None:
    """The grade in a judge's reply, or None.

    That is a number on the scale ("7", "7/10") as the whole reply, or in a last line "Score: 7".
    """
    stripped = (line.lstrip(_BEFORE).rstrip(_AFTER) for line in text.splitlines())
    lines = [line for line in stripped if line]
    found = _GRADE.fullmatch(lines[-1]) if lines else None
    if found is None or (len(lines) > 1 and not lines[-1][0].isalpha()):
        return None
    grade, of = float(found[1]), found[2]
    low, high = scale
    if not low <= grade <= high or (of is not None and float(of) != high):
        return None
    return grade


def _question(prompt: Prompt) -> Turns:
    if any(column in prompt.row for column in _COLUMNS):
        return prompt_of(prompt.row, chat=True, where=prompt.row_name)
    return prompt.text
