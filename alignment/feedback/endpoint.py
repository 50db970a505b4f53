"""A language model behind an OpenAI-compatible HTTP endpoint.

Each conversation is one `POST {base_url}/chat/completions`, several at a time. What happens to it:

* a reply in the cache is taken from there, and nothing is sent;
* an attempt that has no whole answer by its deadline is given up, whatever it waits for then;
* connection errors, time-outs and the statuses 408, 409, 429 and 5xx are tried again after
  `backoff_seconds * 2**k`, times a jitter in [0.5, 1], or after what Retry-After asks for;
* any other status is a refusal with the server's message, and an answer that is not a chat
  completion is garbage: neither gets better by asking again;
* once several conversations in a row found nobody there, the rest of the call is not tried.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import httpx2 as httpx

from alignment.activity import ACTIVITY
from alignment.config.methods.feedback import NOT_A_VARIABLE, VARIABLE_NAME
from alignment.feedback.cache import ReplyCache
from alignment.feedback.chat_model import Conversation, Failure, Reply, derived_seed, occurrences
from alignment.feedback.completions import Attempt, failed, read_answer
from alignment.feedback.event_loop import run_to_end
from alignment.types import UserInputError

_MOST_BYTES = 16 * 2**20  # of an answer
_CACHE_FORMAT = 1  # raised when the meaning of the cache's keys changes
_NOBODY_THERE = 8  # conversations in a row
_NOT_ALLOWED = (401, 403)


class EndpointChatModel:
    """See the module. Safe to use from several threads.

    Args:
        base_url: what comes before `/chat/completions`, such as http://localhost:8000/v1.
        model: the model's name there.
        api_key_variable: the environment variable with the key; where it is not set, no key is
            sent. The key itself is in no message, log, recipe or cache.
        timeout_seconds: of one attempt, from looking the address up to the last byte.
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
        self._no_key = f"no key was sent: the environment variable {api_key_variable} is not set"
        self._timeout_seconds = timeout_seconds
        self._retries = retries
        self._backoff_seconds = backoff_seconds
        self._max_wait_seconds = max_wait_seconds
        self._max_in_flight = max_in_flight
        self._token_limit_key = token_limit_key
        self._cache = None if cache is None else ReplyCache(cache)
        self._tls = httpx.create_ssl_context()

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
        return run_to_end(self._replies(bodies)) if bodies else []

    def close(self) -> None:
        """Close the cache."""
        if self._cache is not None:
            self._cache.close()

    async def _replies(self, bodies: Sequence[dict[str, Any]]) -> list[Reply]:
        async with self._client() as client:
            call = _Call(client, self._max_in_flight)
            tasks = [asyncio.create_task(self._answer(body, call)) for body in bodies]
            try:
                return await asyncio.gather(*tasks)
            finally:  # where one raised or the call was interrupted, others are still under way
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)

    def _client(self) -> httpx.AsyncClient:
        keep = self._max_in_flight
        return httpx.AsyncClient(
            timeout=None,  # an attempt has a deadline of its own
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=keep),
            headers={"Authorization": f"Bearer {self._key}"} if self._key else None,
            verify=self._tls,
        )

    async def _answer(self, body: dict[str, Any], call: _Call) -> Reply:
        """The reply to one request: from the cache, or else from the server."""
        try:
            content = json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            return Reply(None, Failure.REFUSED, f"the request cannot be written as JSON: {error}")
        key = _cache_key(self._base_url, body)
        async with call.slots:
            # The cache may wait for other processes; attempts under way must not, meanwhile.
            text = await asyncio.to_thread(self._cache.get, key) if self._cache else None
            if text is not None:
                return Reply(text)
            if call.nobody_there:
                return Reply(None, Failure.UNREACHABLE, f"not tried: nobody answers at {self.name}")
            reply = await self._persist(content, random.Random(key), call.client)
            call.count(reply)
        if self._cache is None or reply.failure or reply.text is None:
            return reply
        return Reply(await asyncio.to_thread(self._cache.put, key, reply.text))

    async def _persist(
        self, content: bytes, jitter: random.Random, client: httpx.AsyncClient
    ) -> Reply:
        """Attempt after attempt until one settles it."""
        n_attempts = 0
        while True:
            attempt = await self._attempt(content, client)
            n_attempts += 1
            wait = self._backoff_seconds * 2 ** (n_attempts - 1) * jitter.uniform(0.5, 1.0)
            wait = max(min(wait, self._max_wait_seconds), attempt.retry_after)
            too_long = wait > self._max_wait_seconds
            if not attempt.again or n_attempts > self._retries or too_long:
                break
            await _pause(wait)
        return self._described(attempt.reply, n_attempts)

    async def _attempt(self, content: bytes, client: httpx.AsyncClient) -> Attempt:
        """One request, given up at its deadline whatever it waits for then."""
        ACTIVITY.move()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await self._post(content, client)
        except TimeoutError:
            late = f"no answer within {self._timeout_seconds:g} seconds"
            return failed(Failure.TIMEOUT, late, again=True)
        except httpx.DecodingError as error:
            return failed(Failure.GARBAGE, f"an answer that cannot be decompressed: {error}")
        except httpx.HTTPError as error:
            return failed(Failure.UNREACHABLE, _with_cause(error), again=True)

    async def _post(self, content: bytes, client: httpx.AsyncClient) -> Attempt:
        body = bytearray()
        async with client.stream(
            "POST",
            f"{self._base_url}/chat/completions",
            content=content,
            headers={"Content-Type": "application/json"},
        ) as response:
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > _MOST_BYTES:
                    return failed(Failure.GARBAGE, f"an answer of over {_MOST_BYTES} bytes")
        attempt = read_answer(response.status_code, response.headers, bytes(body))
        if response.status_code in _NOT_ALLOWED and not self._key:
            return failed(Failure.REFUSED, f"{attempt.reply.detail}; {self._no_key}")
        return attempt

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
    """What the requests of one call share.

    slots: taken by the conversations that are under way.
    """

    def __init__(self, client: httpx.AsyncClient, max_in_flight: int) -> None:
        self.client = client
        self.slots = asyncio.Semaphore(max_in_flight)
        self._lost_in_a_row = 0

    @property
    def nobody_there(self) -> bool:
        return self._lost_in_a_row >= _NOBODY_THERE

    def count(self, reply: Reply) -> None:
        ACTIVITY.move()
        lost = reply.failure is Failure.UNREACHABLE
        self._lost_in_a_row = self._lost_in_a_row + 1 if lost else 0


async def _pause(seconds: float) -> None:
    await asyncio.sleep(seconds)


def _with_cause(error: Exception) -> str:
    """An error with what it came from, such as "ConnectError: [Errno 111] Connection refused"."""
    cause: BaseException = error
    while (before := cause.__cause__ or cause.__context__) is not None:
        cause = before
    if isinstance(cause, BaseExceptionGroup):  # of several addresses
        cause = cause.exceptions[-1]
    return f"{type(error).__name__}: {cause}"


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
    if not VARIABLE_NAME.fullmatch(variable):
        raise UserInputError(f"api_key_variable: {NOT_A_VARIABLE}")
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserInputError(
            f"the environment variable {variable} holds characters that no key has, such as line "
            "breaks; set it to the key alone"
        )
    return key
