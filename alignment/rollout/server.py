"""A vLLM server as the rollout engine sees it: requests, answers, and the weights it holds.

The server is one started with (vLLM 0.32 or later)

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs

The first switches on the addresses by which weights are exchanged, which is why such a server
belongs on a network of its own; the second makes its log-probabilities those of the distribution
that it sampled from, temperature and truncation included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx

from alignment.types import AlignmentError, UserInputError

_ATTEMPTS = 8  # over about a minute
_FIRST_ATTEMPTS = 3
_BACKOFF_SECONDS = 0.5
_CONNECT_SECONDS = 10.0
_LOWEST_LOGPROB = -9999.0  # what vLLM says of a token that was not possible
_START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs"


class ServerError(AlignmentError):
    """The server is away, or does not do what it was asked for."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One completion as the server gives it.

    token_ids: the stop token included.
    logprobs:  of each token under the distribution that it was sampled from.
    ended:     True where an end token or a stop string ended it; False at the limit of tokens.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool


class VLLMServer:
    """See the module. Safe to use from several threads.

    Args:
        url: of the server, such as http://localhost:8000.
        timeout_seconds: of one request.
        in_flight: most requests at the same time.

    Attributes:
        context: the most tokens that a prompt and its completion may have together there.

    Raises:
        UserInputError: the address cannot be right, nobody answers there, or the server was not
            started as it must be.
    """

    def __init__(self, url: str, *, timeout_seconds: float, in_flight: int) -> None:
        self._url = _checked(url)
        self._timeout_seconds = timeout_seconds
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout_seconds, connect=min(timeout_seconds, _CONNECT_SECONDS)),
            limits=httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight),
            trust_env=False,  # no proxy stands between a run and its server
        )
        self._attempts = _FIRST_ATTEMPTS
        try:
            served = self._send("GET", "/v1/models")["data"][0]
            self._model = str(served["id"])
            self.context = int(served["max_model_len"])
            config = self._send("GET", "/server_info?config_format=json")["vllm_config"]
            mode = config["model_config"]["logprobs_mode"]
            self.weight_version()
        except (ServerError, LookupError, TypeError, ValueError) as error:
            self._client.close()
            raise UserInputError(
                f"rollout.server.url: {self._url} is not a vLLM server that weights can be sent to "
                f"({error}); start one (vLLM 0.32 or later) with: {_START}"
            ) from error
        if mode != "processed_logprobs":
            self._client.close()
            raise UserInputError(
                f"rollout.server.url: the server's log-probabilities are {mode}, not those of the "
                f"distribution that it samples from; start it with: {_START}"
            )
        self._attempts = _ATTEMPTS

    def complete(self, request: Mapping[str, Any]) -> Sampled:
        """The one completion of a request of the completions API.

        Raises:
            ServerError: no answer, or one that is not a completion with its log-probabilities.
        """
        own = {"model": self._model, "n": 1, "logprobs": 0, "return_token_ids": True}
        answer = self._send("POST", "/v1/completions", {**request, **own})
        try:
            (choice,) = answer["choices"]
            tokens = tuple(int(token) for token in choice["token_ids"])
            found = choice["logprobs"]["token_logprobs"]
            logprobs = tuple(_logprob(value) for value in found)
            reason = choice["finish_reason"]
        except (LookupError, TypeError, ValueError) as error:
            raise ServerError(
                f"{self._url}: no completion with token ids and log-probabilities "
                f"({type(error).__name__} {error})"
            ) from error
        if reason not in ("stop", "length") or not tokens or len(tokens) != len(logprobs):
            raise ServerError(
                f"{self._url}: a completion of {len(tokens)} tokens with {len(logprobs)} "
                f"log-probabilities ended by {reason!r}"
            )
        return Sampled(tokens, logprobs, reason == "stop")

    def load_weights(self, folder: Path, version: str) -> None:
        """Load the weights in a folder, in Hugging Face format, in place of those it has.

        Returns once completions come from them. What was computed with the old ones is dropped.

        Args:
            version: what the server says from then on that it holds.

        Raises:
            ServerError: it does not, with what it says.
        """
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            # First: if what follows fails, nobody takes what the server has then for the weights of
            # before; and a server that restarts meanwhile has another version again.
            self._send("POST", "/update_weight_version", {"new_version": version})
            self._send("POST", "/collective_rpc", reload)
            dropped = self._send("POST", "/reset_prefix_cache")
            held = self.weight_version()
        except ServerError as error:
            raise ServerError(
                f"{error}; the weights in {folder} were not loaded. The server must serve a model "
                "of the same architecture and see that folder under the same path "
                "(rollout.server.weights_dir)"
            ) from error
        if not dropped.get("success"):
            raise ServerError(
                f"{self._url}: cannot drop what it computed with the old weights; something else "
                "is using this server"
            )
        if held != version:
            raise ServerError(
                f"{self._url}: holds other weights than it was just given: it was restarted, or "
                "another run uses it, too"
            )

    def weight_version(self) -> str:
        """What the server says that it holds."""
        return str(self._send("GET", "/weight_info")["weight_version"])

    def _send(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The JSON object that answers a request.

        A server that is away or busy, or drops a connection, is asked again: the same request has
        the same effect.
        """
        for attempt in range(1, self._attempts + 1):
            try:
                response = self._client.request(method, self._url + path, json=body)
            except httpx.ConnectTimeout as error:
                found = f"{type(error).__name__}: {error}"
            except httpx.TimeoutException as error:
                raise ServerError(
                    f"{self._url}{path}: no answer within {self._timeout_seconds:g} seconds "
                    "(rollout.server.timeout_seconds)"
                ) from error
            except httpx.HTTPError as error:
                found = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == httpx.codes.OK:
                    return _json_object(response, self._url + path)
                found = f"status {response.status_code}: {_message(response)}"
                if response.status_code not in (429, 502, 503, 504):
                    break
            if attempt < self._attempts:
                time.sleep(_BACKOFF_SECONDS * 2 ** (attempt - 1))
        raise ServerError(f"{self._url}{path}: {found}")


def _checked(url: str) -> str:
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UserInputError(f"rollout.server.url {url!r} is not an address: {error}") from error
    if address.scheme not in ("http", "https") or not address.host or address.userinfo:
        raise UserInputError(
            f"rollout.server.url: give a plain address like http://localhost:8000, without a user "
            f"or a password, which would end up in records (its host is {address.host!r})"
        )
    return url.rstrip("/").removesuffix("/v1")


def _logprob(value: float | None) -> float:
    """NaN for what is not finite, for which JSON has no word; the engine refuses it by name."""
    return math.nan if value is None or value <= _LOWEST_LOGPROB else float(value)


def _json_object(response: httpx.Response, address: str) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError as error:
        raise ServerError(f"{address}: an answer that is not JSON") from error
    if not isinstance(answer, dict):
        raise ServerError(f"{address}: an answer that is not a JSON object")
    return answer


def _message(response: httpx.Response) -> str:
    """What the server says is wrong, the first part of it."""
    try:
        text = str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        text = response.text
    return text.split(", please check the stack trace")[0][:500]
