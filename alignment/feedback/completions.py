"""What a server's answer to a chat completion request means: a reply, or a typed failure, and
whether it is worth asking again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from alignment.feedback.chat_model import Failure, Reply

_MOST_CHARACTERS = 500  # of a server's message
_OK = range(200, 300)
_TIMED_OUT = (408, 504)
_CONFLICT_OR_BUSY = (409, 429)

# What servers call the end of a whole answer: OpenAI and vLLM; Together; text-generation-inference;
# Anthropic. Null where a server gives no reason.
_WHOLE = ("stop", None, "eos", "eos_token", "stop_sequence", "end_turn")
_CALLS = ("tool_calls", "function_call")  # in place of a text


@dataclass(frozen=True, slots=True)
class Attempt:
    """What one request came to.

    again:       whether the same request may succeed later.
    retry_after: seconds the server asks to wait before that; 0.0 where it does not say.
    """

    reply: Reply
    again: bool = False
    retry_after: float = 0.0


def failed(failure: Failure, detail: str, *, again: bool = False) -> Attempt:
    """An attempt that gave no reply."""
    return Attempt(Reply(None, failure, detail), again)


def read_answer(status: int, headers: Mapping[str, str], body: bytes) -> Attempt:
    """Read an HTTP answer.

    Asking again may help after 408, 409, 429 and 5xx, and where the server broke off in the middle
    of an answer; not after any other refusal, nor after an answer that is not a chat completion.

    Args:
        headers: with lower-case names, or of a mapping that ignores case.
    """
    if status in _OK:
        return _completion(body)
    detail = f"HTTP {status}: {_server_message(body)}"
    if status in _TIMED_OUT:
        failure, again = Failure.TIMEOUT, True
    elif status in _CONFLICT_OR_BUSY or status >= 500:
        failure, again = Failure.UNAVAILABLE, True
    else:
        failure, again = Failure.REFUSED, False
    wait = _retry_after(headers.get("retry-after", "")) if again else 0.0
    return Attempt(Reply(None, failure, detail), again, wait)


def _completion(body: bytes) -> Attempt:
    try:
        choice = json.loads(body)["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        text, refusal = message.get("content"), message.get("refusal")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return failed(Failure.GARBAGE, f"not a chat completion: {_shown(body)}")
    if not (isinstance(text, str) and _is_unicode(text)):
        text = None
    if reason == "length":  # a model that thinks first may not have come to its answer
        return Attempt(Reply(text or "", Failure.CUT_OFF, "the token limit came before the end"))
    if reason == "content_filter" or (refusal and not text):
        return failed(Failure.REFUSED, f"the server withheld its answer: {refusal or reason}")
    if reason not in (*_WHOLE, *_CALLS):
        detail = f"the server broke its answer off: finish_reason {reason!r}"
        return failed(Failure.UNAVAILABLE, detail, again=True)
    if text is None or reason in _CALLS:
        return failed(Failure.GARBAGE, f"a chat completion without a text: {_shown(body)}")
    return Attempt(Reply(text))


def _is_unicode(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell but no tokenizer or file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _server_message(body: bytes) -> str:
    """What a server says went wrong: `error.message`, `error`, `detail`, `message`, or all."""
    try:
        answer: Any = json.loads(body)
    except (ValueError, RecursionError):
        return _shown(body)
    if isinstance(answer, Mapping):
        answer = next(
            (answer[key] for key in ("error", "detail", "message") if answer.get(key)), answer
        )
    if isinstance(answer, Mapping):
        answer = answer.get("message") or answer
    return str(answer)[:_MOST_CHARACTERS]


def _shown(body: bytes) -> str:
    text = " ".join(body[: 2 * _MOST_CHARACTERS].decode(errors="replace").split())
    return repr(text[:_MOST_CHARACTERS])


def _retry_after(value: str) -> float:
    """Seconds in a Retry-After header (RFC 9110, section 10.2.3: seconds or a date)."""
    try:
        seconds = float(value)
    except ValueError:
        seconds = _seconds_until(value)
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _seconds_until(date: str) -> float:
    try:
        when = parsedate_to_datetime(date)
    except (ValueError, TypeError):
        return 0.0
    zoned = when if when.tzinfo else when.replace(tzinfo=UTC)
    return (zoned - datetime.now(UTC)).total_seconds()
