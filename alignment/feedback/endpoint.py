"""A language model behind an OpenAI-compatible HTTP endpoint.

Each conversation is one `POST {base_url}/chat/completions`, several at a time. What happens to it:

* a reply in the cache is taken from there, and nothing is sent;
* connection errors, time-outs and the statuses 408, 409, 429 and 5xx are tried again after
  `backoff_seconds * 2**k`, times a jitter in [0.5, 1], or after what Retry-After asks for;
* any other status is a refusal with the server's message, and an answer that is not a chat
  completion is garbage: neither gets better by asking again;
* once several conversations in a row found nobody there, the rest of the call is not tried.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx2 as httpx

from alignment.activity import ACTIVITY
from alignment.feedback.cache import ReplyCache
from alignment.feedback.chat_model import Conversation, Failure, Reply, derived_seed, occurrences
from alignment.feedback.completions import Attempt, failed, read_answer
from alignment.types import UserInputError

_MOST_BYTES = 16 * 2**20  # of an answer
_CACHE_FORMAT = 1  # raised when the meaning of the cache's keys changes
_NOBODY_THERE = 8  # conversations in a row


class EndpointChatModel:
    """See the module. Safe to use from several threads.

    Args:
        base_url: what comes before `/chat/completions`, such as http://localhost:8000/v1.
        model: the model's name there.
        api_key_variable: the environment variable with the key; where it is not set, no key is
            sent. The key itself is in no message, log, recipe or cache.
        timeout_seconds: of one attempt. A server that sends its answer bit by bit is cut off, too.
        retries: attempts after the first.
        backoff_seconds: see the module.
        max_wait_seconds: longest wait between attempts; a server that asks for a longer one
            is not asked again.
        max_in_flight: requests at the same time.
        cache: file for replies; None: none is kept. Only usable replies are stored. A reply
            belongs to address, model, messages, sampling parameters and seed.
        token_limit_key: what the server calls the limit of new tokens.

    Raises:
        UserInputError: an address, a number or a key that cannot be right.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_variable: str = "OPENAI_API_KEY",
        timeout_seconds: float = 60.0,
        retries: int = 4,
        backoff_seconds: float = 0.5,
        max_wait_seconds: float = 60.0,
        max_in_flight: int = 8,
        cache: Path | str | None = None,
        token_limit_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
    ) -> None:
        self._base_url = _checked_url(base_url)
        self._model = model
        self.name = f"{model} at {self._base_url}"
        _check_numbers(timeout_seconds, retries, backoff_seconds, max_wait_seconds, max_in_flight)
        self._key = _key_of(api_key_variable)
        self._timeout_seconds = timeout_seconds
        self._retries = retries
        self._backoff_seconds = backoff_seconds
        self._max_wait_seconds = max_wait_seconds
        self._max_in_flight = max_in_flight
        self._token_limit_key = token_limit_key
        self._cache = None if cache is None else ReplyCache(cache)
        self._client = httpx.Client(
            timeout=timeout_seconds,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=max_in_flight),
            headers={"Authorization": f"Bearer {self._key}"} if self._key else None,
        )

    def reply(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[Reply]:
        """One reply for each conversation, in order; see `ChatModel`.

        The first occurrence of a conversation is sent with `seed` itself, a further one with a
        seed derived from it.

        Raises:
            UserInputError: the cache cannot be read.
        """
        bodies = [
            {
                "model": self._model,
                "messages": [dict(message) for message in conversation],
                self._token_limit_key: max_new_tokens,
                "temperature": temperature,
                "seed": derived_seed(seed, repeat) if repeat else seed,
                "stream": False,
            }
            for conversation, (_, repeat) in zip(
                conversations, occurrences(conversations), strict=True
            )
        ]
        call = _Call()
        with ThreadPoolExecutor(self._max_in_flight) as threads:
            futures = [threads.submit(self._answer, body, call) for body in bodies]
            try:
                return [future.result() for future in futures]
            except BaseException:
                call.interrupted.set()
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def close(self) -> None:
        """Close the connections and the cache."""
        self._client.close()
        if self._cache is not None:
            self._cache.close()

    def _answer(self, body: dict[str, Any], call: _Call) -> Reply:
        """The reply to one request: from the cache, or else from the server."""
        try:
            content = json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            return Reply(None, Failure.REFUSED, f"the request cannot be written as JSON: {error}")
        key = _cache_key(self._base_url, body)
        text = self._cache.get(key) if self._cache else None
        if text is not None:
            return Reply(text)
        if call.nobody_there:
            return Reply(None, Failure.UNREACHABLE, f"not tried: nobody answers at {self.name}")
        reply = self._persist(content, random.Random(key), call)
        call.count(reply)
        if self._cache is None or reply.failure or reply.text is None:
            return reply
        return Reply(self._cache.put(key, reply.text))

    def _persist(self, content: bytes, jitter: random.Random, call: _Call) -> Reply:
        """Attempt after attempt until one settles it."""
        n_attempts = 0
        while True:
            attempt = self._attempt(content)
            n_attempts += 1
            wait = self._backoff_seconds * 2 ** (n_attempts - 1) * jitter.uniform(0.5, 1.0)
            wait = max(min(wait, self._max_wait_seconds), attempt.retry_after)
            too_long = wait > self._max_wait_seconds
            if not attempt.again or n_attempts > self._retries or too_long:
                break
            if call.pause(wait):
                break
        return self._described(attempt.reply, n_attempts)

    def _attempt(self, content: bytes) -> Attempt:
        deadline = time.monotonic() + self._timeout_seconds
        late = f"no answer within {self._timeout_seconds:g} seconds"
        body = bytearray()
        try:
            with self._client.stream(
                "POST",
                f"{self._base_url}/chat/completions",
                content=content,
                headers={"Content-Type": "application/json"},
            ) as response:
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > _MOST_BYTES:
                        return failed(Failure.GARBAGE, f"an answer of over {_MOST_BYTES} bytes")
                    if time.monotonic() > deadline:
                        return failed(Failure.TIMEOUT, late, again=True)
            return read_answer(response.status_code, response.headers, bytes(body))
        except httpx.TimeoutException as error:
            return failed(Failure.TIMEOUT, f"{late} ({type(error).__name__})", again=True)
        except httpx.DecodingError as error:
            return failed(Failure.GARBAGE, f"an answer that cannot be decompressed: {error}")
        except httpx.HTTPError as error:
            return failed(Failure.UNREACHABLE, f"{type(error).__name__}: {error}", again=True)

    def _described(self, reply: Reply, n_attempts: int) -> Reply:
        """A failed reply that names the endpoint and what was tried, and never the key."""
        if not reply.failure:
            return reply
        tried = f" (attempts: {n_attempts})" if n_attempts > 1 else ""
        detail = f"{self.name}: {reply.detail}{tried}"
        if self._key:
            detail = detail.replace(self._key, "***")
        return Reply(reply.text, reply.failure, detail)


class _Call:
    """What the requests of one call know of each other.

    interrupted: set where the caller no longer waits for replies.
    """

    def __init__(self) -> None:
        self.interrupted = threading.Event()
        self._lock = threading.Lock()
        self._lost_in_a_row = 0

    @property
    def nobody_there(self) -> bool:
        return self._lost_in_a_row >= _NOBODY_THERE

    def pause(self, seconds: float) -> bool:
        """Wait; True where the caller gave up meanwhile."""
        return self.interrupted.wait(seconds)

    def count(self, reply: Reply) -> None:
        ACTIVITY.move()
        with self._lock:
            lost = reply.failure is Failure.UNREACHABLE
            self._lost_in_a_row = self._lost_in_a_row + 1 if lost else 0


def _cache_key(base_url: str, body: dict[str, Any]) -> str:
    """SHA-256 of everything a reply depends on."""
    text = json.dumps([_CACHE_FORMAT, base_url, body], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _checked_url(base_url: str) -> str:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise UserInputError(f"base_url {base_url!r} is not an address: {error}") from error
    if url.userinfo or url.query:
        raise UserInputError(
            "base_url holds a user name, a password or a query, which would end up in records; "
            "give the plain address, and the key in the environment variable api_key_variable"
        )
    if url.scheme not in ("http", "https") or not url.host:
        raise UserInputError(
            f"base_url {base_url!r} is not an http address; give one like http://localhost:8000/v1"
        )
    return base_url.rstrip("/").removesuffix("/chat/completions")


def _check_numbers(
    timeout_seconds: float,
    retries: int,
    backoff_seconds: float,
    max_wait_seconds: float,
    max_in_flight: int,
) -> None:
    for name, value, valid, allowed in (
        ("timeout_seconds", timeout_seconds, timeout_seconds > 0, "more than 0"),
        ("retries", retries, retries >= 0, "0 or more"),
        ("backoff_seconds", backoff_seconds, backoff_seconds >= 0, "0 or more"),
        ("max_wait_seconds", max_wait_seconds, max_wait_seconds >= 0, "0 or more"),
        ("max_in_flight", max_in_flight, max_in_flight >= 1, "1 or more"),
    ):
        if not valid:
            raise UserInputError(f"{name} is {value}; it must be {allowed}")


def _key_of(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserInputError(
            f"the environment variable {variable} holds characters that no key has, such as line "
            "breaks; set it to the key alone"
        )
    return key
