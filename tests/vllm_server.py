"""A stand-in for a vLLM server: its addresses and answers, over HTTP, with a tiny model behind.

The shapes of the answers are those of vLLM 0.32. Tokens are drawn a second way: a plain forward of
the whole sequence for each token, float64, sorting for what is cut off, and torch's generator.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM

Decode = Callable[[list[int]], str]


class VLLMStandIn:
    """Serves what it is given by `reload_weights`; nothing before that.

    failures:  answers given first, in place of the right ones, by address: a status each, or None
               for a connection that is dropped.
    most:      tokens after which a completion ends, whatever was asked for.
    seconds:   that a completion takes, besides.
    logprob:   said of the first token of the next completion, in place of what is right.
    requests:  addresses and bodies, in the order they came.
    """

    def __init__(self, decode: Decode, *, context: int = 256) -> None:
        self.decode, self.context = decode, context
        self.logprobs_mode = "processed_logprobs"
        self.version = "default"
        self.loads = 0
        self.model: Any = None
        self.failures: dict[str, list[int | None]] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.cache_is_free = True
        self.most = context
        self.restarts_after_loading = False
        self.seconds = 0.0
        self.logprob: list[float | None] = []
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def restart(self) -> None:
        """As a server that went down and came up again by itself."""
        self.version = "default"

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"] or 0)
                self._answer(json.loads(self.rfile.read(length) or b"{}"))

            def _answer(self, body: dict[str, Any]) -> None:
                path = self.path.partition("?")[0]
                with server._lock:
                    server.requests.append((path, body))
                    failing = server.failures.get(path)
                    failure = failing.pop(0) if failing else 200
                    if failure is None:
                        self.close_connection = True
                        return
                    if failure != 200:
                        found: Any = {"error": {"message": "asked to fail", "code": failure}}
                    else:
                        try:
                            found = _ANSWERS[path](server, body)
                        except Exception as error:
                            failure = 500
                            found = {"error": {"message": str(error), "code": 500}}
                if failure == 200 and path == "/v1/completions":
                    time.sleep(server.seconds)
                raw = json.dumps(found).encode()
                self.send_response(failure)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args: object) -> None:
                pass

        return Handler

    def models(self, body: dict[str, Any]) -> Any:
        return {"object": "list", "data": [{"id": "served", "max_model_len": self.context}]}

    def info(self, body: dict[str, Any]) -> Any:
        return {"vllm_config": {"model_config": {"logprobs_mode": self.logprobs_mode}}}

    def weight_info(self, body: dict[str, Any]) -> Any:
        return {"weight_version": self.version}

    def rpc(self, body: dict[str, Any]) -> Any:
        assert body["method"] == "reload_weights"
        path = body["kwargs"]["weights_path"]
        self.model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
        self.loads += 1
        if self.restarts_after_loading:
            self.restart()
        return {"results": [None]}

    def drop_cache(self, body: dict[str, Any]) -> Any:
        return {"success": self.cache_is_free}

    def set_version(self, body: dict[str, Any]) -> Any:
        self.version = body["new_version"]
        return {"success": True, "new_version": self.version}

    def completions(self, body: dict[str, Any]) -> Any:
        assert body["model"] == "served" and body["n"] == 1 and body["return_token_ids"]
        assert len(body["prompt"]) + body["max_tokens"] <= self.context
        assert body["repetition_penalty"] == 1.0
        assert body["presence_penalty"] == body["frequency_penalty"] == 0.0
        assert -(2**63) <= body["seed"] < 2**63 and body["ignore_eos"]
        tokens, logprobs, reason = self._sample(body)
        found = [None if math.isnan(value) else value for value in logprobs]
        if self.logprob:
            found[0] = self.logprob.pop()
        return {
            "choices": [
                {
                    "index": 0,
                    "text": self.decode(tokens),
                    "logprobs": {"token_logprobs": found},
                    "finish_reason": reason,
                    "token_ids": tokens,
                }
            ]
        }

    @torch.no_grad()
    def _sample(self, body: dict[str, Any]) -> tuple[list[int], list[float], str]:
        generator = torch.Generator().manual_seed(body["seed"])
        tokens: list[int] = []
        logprobs: list[float] = []
        while len(tokens) < min(body["max_tokens"], self.most):
            ids = torch.tensor([[*body["prompt"], *tokens]])
            logits = self.model(input_ids=ids, use_cache=False).logits[0, -1].double()
            if body["temperature"] == 0:
                token, logprob = int(logits.argmax()), float(logits.log_softmax(-1).max())
            else:
                kept = _kept(logits / body["temperature"], body).log_softmax(-1)
                broken = bool(kept.isnan().any())
                token = 5 if broken else int(kept.exp().multinomial(1, generator=generator))
                logprob = float(kept[token])
            tokens.append(token)
            logprobs.append(logprob)
            text = self.decode(tokens)
            if token in body["stop_token_ids"] or any(stop in text for stop in body["stop"]):
                return tokens, logprobs, "stop"
        return tokens, logprobs, "length"


def _kept(logits: torch.Tensor, body: dict[str, Any]) -> torch.Tensor:
    """Logits with what is cut off at minus infinity: the k likeliest, then the nucleus of them,
    then what min-p leaves."""
    order = logits.argsort(descending=True).tolist()
    if body["top_k"]:
        order = order[: body["top_k"]]
    mass = logits[order].softmax(-1)
    before = 0.0
    kept = []
    for token, share in zip(order, mass.tolist(), strict=True):
        if body["top_p"] < 1 and before >= body["top_p"]:
            break
        if share >= body["min_p"] * float(mass[0]):
            kept.append(token)
        before += share
    out = torch.full_like(logits, -math.inf)
    out[kept] = logits[kept]
    return out if not logits.isnan().any() else logits


_ANSWERS: dict[str, Callable[[VLLMStandIn, dict[str, Any]], Any]] = {
    "/v1/models": VLLMStandIn.models,
    "/server_info": VLLMStandIn.info,
    "/weight_info": VLLMStandIn.weight_info,
    "/collective_rpc": VLLMStandIn.rpc,
    "/reset_prefix_cache": VLLMStandIn.drop_cache,
    "/update_weight_version": VLLMStandIn.set_version,
    "/v1/completions": VLLMStandIn.completions,
}


@contextmanager
def vllm_server(decode: Decode, *, context: int = 256) -> Iterator[VLLMStandIn]:
    server = VLLMStandIn(decode, context=context)
    try:
        yield server
    finally:
        server.close()
