"""A local chat completion server that misbehaves on demand, for tests."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


class ChatServer:
    """Answers request k with behaviour k of `script`, and those after the last with the last.

    bodies, keys, times: of the requests, in the order they came.
    """

    def __init__(self, *script: Behaviour) -> None:
        self.script = list(script)
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                body = json.loads(raw) | {"path": self.path}
                with server._lock:
                    k = len(server.bodies)
                    server.bodies.append(body)
                    server.keys.append(self.headers.get("Authorization"))
                    server.times.append(time.monotonic())
                    server.in_flight += 1
                    server.most_in_flight = max(server.most_in_flight, server.in_flight)
                try:
                    server.script[min(k, len(server.script) - 1)](self, body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    with server._lock:
                        server.in_flight -= 1

            def log_message(self, *args: object) -> None:
                pass

        return Handler


@contextmanager
def serving(*script: Behaviour) -> Iterator[ChatServer]:
    server = ChatServer(*script)
    try:
        yield server
    finally:
        server.close()


def send(
    handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]
) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def raw(body: bytes, status: int = 200, **headers: str) -> Behaviour:
    """Any body; header names with _ for -."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, request: send(handler, status, body, fields)


def says(text: str | None, finish_reason: str | None = "stop", **message: Any) -> Behaviour:
    """A chat completion."""
    choice = {"message": {"content": text, **message}, "finish_reason": finish_reason}
    return raw(json.dumps({"choices": [choice]}).encode())


def echo(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
    """A chat completion that repeats the last message and names the seed."""
    says(f"{request['messages'][-1]['content']} / {request['seed']}")(handler, request)


def error(status: int, message: str, **headers: str) -> Behaviour:
    return raw(json.dumps({"error": {"message": message}}).encode(), status, **headers)


def slow(seconds: float, then: Behaviour) -> Behaviour:
    def behave(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        time.sleep(seconds)
        then(handler, request)

    return behave


def dripping(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
    """Never silent for long, and never done."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    for _ in range(300):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)
    handler.close_connection = True


def dripping_headers(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
    """As `dripping`, within the headers."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    for _ in range(300):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.02)
    handler.close_connection = True


def reset(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
    """Break the connection (RST) instead of answering."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def half(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
    """Announce more bytes than are sent."""
    send(handler, 200, b'{"choices": [', {"Content-Length": "1000"})
    handler.close_connection = True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
