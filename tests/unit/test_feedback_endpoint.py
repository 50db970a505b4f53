"""The endpoint client against a real local server that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import gzip
import logging
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from chat_server import (
    Behaviour,
    dripping,
    dripping_headers,
    echo,
    error,
    free_port,
    half,
    raw,
    reset,
    says,
    serving,
    slow,
)

from alignment.activity import Activity
from alignment.feedback import endpoint
from alignment.feedback.cache import ReplyCache
from alignment.feedback.chat_model import Failure, Reply, check_failures
from alignment.feedback.completions import read_answer
from alignment.feedback.endpoint import EndpointChatModel
from alignment.types import AlignmentError, UserInputError

FAST: dict[str, Any] = {"backoff_seconds": 0.001, "timeout_seconds": 5.0}
HELLO = [{"role": "user", "content": "hello"}]


def ask(
    url: str, *texts: str, seed: int = 7, limit: int = 20, temperature: float = 0.5, **options: Any
) -> list[Reply]:
    model = EndpointChatModel(url, "m", **(FAST | options))
    try:
        return model.reply(
            [[{"role": "user", "content": text}] for text in texts or ("hello",)],
            max_new_tokens=limit,
            temperature=temperature,
            seed=seed,
        )
    finally:
        model.close()


# --- what is sent and what comes back ------------------------------------------------------------


def test_replies_come_in_order_and_requests_say_everything() -> None:
    delays = [slow(0.08, echo), slow(0.04, echo), echo]
    with serving(*delays) as server:
        replies = ask(server.url, "a", "b", "c", max_in_flight=3)
    assert replies == [Reply("a / 7"), Reply("b / 7"), Reply("c / 7")]
    sent = min(server.bodies, key=lambda body: body["messages"][0]["content"])
    assert sent == {
        "path": "/v1/chat/completions",
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 20,
        "temperature": 0.5,
        "seed": 7,
        "stream": False,
    }


def test_no_more_requests_than_allowed_are_in_flight() -> None:
    with serving(slow(0.03, echo)) as server:
        assert len(ask(server.url, *"abcdef", max_in_flight=2)) == 6
    assert server.most_in_flight == 2


def test_a_repeated_conversation_is_drawn_with_another_seed() -> None:
    with serving(echo) as server:
        first, other, again = (reply.text for reply in ask(server.url, "a", "b", "a"))
        assert (first, other) == ("a / 7", "b / 7")
        assert again != first
        assert [reply.text for reply in ask(server.url, "a", "a")] == [first, again]


def test_nothing_asked_nothing_sent() -> None:
    model = EndpointChatModel(f"http://127.0.0.1:{free_port()}", "m")
    assert model.reply([], max_new_tokens=1, temperature=0.0, seed=0) == []


# --- each class of failure, and whether it is tried again -----------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "failure", "said"),
    [
        (error(408, "slow client"), Failure.TIMEOUT, "HTTP 408: slow client"),
        (error(409, "busy"), Failure.UNAVAILABLE, "HTTP 409: busy"),
        (error(429, "too many"), Failure.UNAVAILABLE, "HTTP 429: too many"),
        (error(500, "oops"), Failure.UNAVAILABLE, "HTTP 500: oops"),
        (raw(b"<html>Bad gateway", 502), Failure.UNAVAILABLE, "HTTP 502: '<html>Bad gateway'"),
        (reset, Failure.UNREACHABLE, "Error"),
        (half, Failure.UNREACHABLE, "Error"),
        (says("half a", "error"), Failure.UNAVAILABLE, "broke its answer off: finish_reason 'er"),
        (says("half a", "abort"), Failure.UNAVAILABLE, "finish_reason 'abort'"),
        (says(None, "insufficient_system_resource"), Failure.UNAVAILABLE, "'insufficient_sys"),
    ],
)
def test_what_may_pass_is_tried_again_and_then_named(
    behaviour: Behaviour, failure: Failure, said: str
) -> None:
    with serving(behaviour) as server:
        (reply,) = ask(server.url, retries=2)
    assert len(server.bodies) == 3
    assert (reply.text, reply.failure) == (None, failure)
    assert said in reply.detail
    assert reply.detail.startswith(f"m at {server.url}: ")
    assert reply.detail.endswith("(attempts: 3)")


@pytest.mark.parametrize("behaviour", [error(500, "x"), error(429, "x"), reset, half])
def test_a_second_attempt_succeeds(behaviour: Behaviour) -> None:
    with serving(behaviour, says("fine")) as server:
        assert ask(server.url) == [Reply("fine")]
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    ("behaviour", "failure", "said"),
    [
        (error(400, "no such model"), Failure.REFUSED, "HTTP 400: no such model"),
        (error(401, "who are you"), Failure.REFUSED, "HTTP 401: who are you"),
        (raw(b'{"detail": "Not Found"}', 404), Failure.REFUSED, "HTTP 404: Not Found"),
        (raw(b"", 307, Location="http://x"), Failure.REFUSED, "HTTP 307"),
        (says(None, "content_filter"), Failure.REFUSED, "withheld its answer: content_filter"),
        (says(None, refusal="I won't"), Failure.REFUSED, "withheld its answer: I won't"),
        (raw(b"<html>hello"), Failure.GARBAGE, "not a chat completion: '<html>hello'"),
        (raw(b"[1]"), Failure.GARBAGE, "not a chat completion: '[1]'"),
        (raw(b'{"choices": []}'), Failure.GARBAGE, "not a chat completion"),
        (raw(b"[" * 100_000), Failure.GARBAGE, "not a chat completion"),
        (says(None), Failure.GARBAGE, "without a text"),
        (says(None, "tool_calls"), Failure.GARBAGE, "without a text"),
        (says("I look it up", "tool_calls"), Failure.GARBAGE, "without a text"),
        (raw(b'{"choices":[{"message":{"content":"\\ud800"}}]}'), Failure.GARBAGE, "without"),
        (raw(b"not gzip", Content_Encoding="gzip"), Failure.GARBAGE, "decompressed"),
        (raw(gzip.compress(bytes(20_000_000)), Content_Encoding="gzip"), Failure.GARBAGE, "over"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(
    behaviour: Behaviour, failure: Failure, said: str
) -> None:
    with serving(behaviour) as server:
        (reply,) = ask(server.url, retries=2)
    assert len(server.bodies) == 1
    assert (reply.text, reply.failure) == (None, failure)
    assert said in reply.detail


def test_an_answer_that_was_cut_off_keeps_its_text() -> None:
    with serving(says("half a", "length")) as server:
        (reply,) = ask(server.url)
    assert (reply.text, reply.failure) == ("half a", Failure.CUT_OFF)
    assert len(server.bodies) == 1


@pytest.mark.parametrize("text", [None, ""])
def test_a_model_that_only_thought_until_the_limit_was_cut_off(text: str | None) -> None:
    with serving(says(text, "length", reasoning_content="Let me see")) as server:
        (reply,) = ask(server.url, retries=2)
    assert reply.text == ""
    assert reply.failure is Failure.CUT_OFF
    assert len(server.bodies) == 1
    with pytest.raises(AlignmentError, match="allow more new tokens"):
        check_failures([reply])


@pytest.mark.parametrize("reason", ["stop", None, "eos", "eos_token", "stop_sequence", "end_turn"])
def test_the_ends_of_a_whole_answer_by_any_name(reason: str | None) -> None:
    with serving(says("fine", reason)) as server:
        assert ask(server.url, retries=0) == [Reply("fine")]


@pytest.mark.parametrize("behaviour", [slow(6.0, says("late")), dripping, dripping_headers])
def test_a_server_that_takes_too_long_is_a_timeout(behaviour: Behaviour) -> None:
    with serving(behaviour) as server:
        start = time.monotonic()
        (reply,) = ask(server.url, timeout_seconds=0.15, retries=1)
        assert time.monotonic() - start < 2.0
    assert reply.failure is Failure.TIMEOUT
    assert "no answer within 0.15 seconds" in reply.detail
    assert len(server.bodies) == 2


def test_a_slow_first_answer_is_made_up_for_by_a_second() -> None:
    with serving(slow(6.0, says("late")), says("in time")) as server:
        assert ask(server.url, timeout_seconds=0.15) == [Reply("in time")]


def test_a_connection_that_was_given_up_is_used_for_nothing_else() -> None:
    with serving(says("one"), dripping_headers, says("two"), says("three")) as server:
        found = ask(server.url, "a", "b", "c", timeout_seconds=0.3, max_in_flight=1)
    assert found == [Reply("one"), Reply("two"), Reply("three")]


def test_one_failure_leaves_the_others_alone() -> None:
    def by_content(handler: Any, request: dict[str, Any]) -> None:
        bad = request["messages"][0]["content"] == "bad"
        (error(400, "no") if bad else echo)(handler, request)

    with serving(by_content) as server:
        replies = ask(server.url, "a", "bad", "c")
    assert [reply.text for reply in replies] == ["a / 7", None, "c / 7"]


def test_messages_that_are_no_json_are_refused_without_a_request() -> None:
    with serving(echo) as server:
        model = EndpointChatModel(server.url, "m")
        odd = [{"role": "user", "content": {1, 2}}]
        replies = model.reply([odd, HELLO], max_new_tokens=1, temperature=0.0, seed=0)
    assert [reply.failure for reply in replies] == [Failure.REFUSED, Failure.NONE]
    assert len(server.bodies) == 1


def test_nobody_there_is_found_out_once_and_not_for_every_conversation() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    replies = ask(url, *map(str, range(40)), retries=1, max_in_flight=2)
    assert {reply.failure for reply in replies} == {Failure.UNREACHABLE}
    tried = [reply for reply in replies if "attempts: 2" in reply.detail]
    assert 8 <= len(tried) <= 9
    assert replies[-1].detail == f"not tried: nobody answers at m at {url}"
    assert "ConnectError: [Errno 111] " in tried[0].detail


def test_each_attempt_is_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[float] = []
    monkeypatch.setattr(Activity, "move", lambda note: moves.append(time.monotonic()))
    with serving(error(500, "x")) as server:
        ask(server.url, retries=2)
    assert len(moves) == 3 + 1  # attempts, and the conversation


# --- interrupted ---------------------------------------------------------------------------------

ASKER = """
import sys
from alignment.feedback.endpoint import EndpointChatModel
model = EndpointChatModel(sys.argv[1], "m", max_in_flight=2)
asked = [[{"role": "user", "content": str(i)}] for i in range(4)]
model.reply(asked, max_new_tokens=1, temperature=0.0, seed=0)
"""


def hear_interrupts() -> None:
    """Whoever started the tests may have them ignored, as a shell does in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_interrupted_process_ends_without_its_replies() -> None:
    with serving(slow(30.0, echo)) as server:
        asker = subprocess.Popen(
            [sys.executable, "-c", ASKER, server.url],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=hear_interrupts,
        )
        while server.in_flight < 2:
            time.sleep(0.02)
        asker.send_signal(signal.SIGINT)
        try:
            _, said = asker.communicate(timeout=10.0)
        finally:
            asker.kill()
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert asker.returncode == -signal.SIGINT
    assert len(server.bodies) == 2


def test_an_interrupted_call_sends_nothing_more() -> None:
    main = threading.get_ident()
    hear_interrupts()
    with serving(slow(1.0, error(500, "x"))) as server:

        def interrupt() -> None:
            while server.in_flight < 2:
                time.sleep(0.01)
            signal.pthread_kill(main, signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            ask(server.url, "a", "b", "c", max_in_flight=2)
        assert server.in_flight == 2  # nobody waited for them
        time.sleep(1.2)
        assert len(server.bodies) == 2


def test_a_caller_with_an_event_loop_gets_its_replies() -> None:
    async def cell() -> list[Reply]:
        return ask(server.url)

    with serving(says("fine")) as server:
        assert asyncio.run(cell()) == [Reply("fine")]


# --- waiting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(form: str) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    asked = "0.4" if form == "seconds" else date
    with serving(error(429, "x", Retry_After=asked), says("fine")) as server:
        assert ask(server.url) == [Reply("fine")]
    waited = server.times[1] - server.times[0]
    # A date has whole seconds: of the two, between one and two are left.
    assert waited >= (0.4 if form == "seconds" else 0.9)


def test_a_wait_longer_than_allowed_is_not_waited_for() -> None:
    with serving(error(503, "maintenance", Retry_After="3600")) as server:
        start = time.monotonic()
        (reply,) = ask(server.url, max_wait_seconds=10.0)
        assert time.monotonic() - start < 5.0
    assert (reply.failure, len(server.bodies)) == (Failure.UNAVAILABLE, 1)


def test_waits_double_within_their_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def pause(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(endpoint, "_pause", pause)
    with serving(error(500, "x")) as server:
        ask(server.url, backoff_seconds=0.5, retries=8, max_wait_seconds=20.0)
        ask(server.url, backoff_seconds=0.5, retries=8, max_wait_seconds=20.0)
        ask(server.url, "another", backoff_seconds=0.5, retries=8, max_wait_seconds=20.0)
    assert len(server.bodies) == 27
    ends = [min(0.5 * 2**k, 20.0) for k in range(8)]
    for k, end in enumerate(ends):
        assert end / 2 <= waits[k] <= end
    assert waits[:8] == waits[8:16]  # the jitter is seeded by the request,
    assert waits[:8] != waits[16:]  # so that requests do not come back all at once


@pytest.mark.parametrize("value", ["soon", "-5", "nan", "inf", ""])
def test_a_retry_after_that_means_nothing_is_no_wait(value: str) -> None:
    assert read_answer(503, {"retry-after": value}, b"").retry_after == 0.0


# --- the cache -----------------------------------------------------------------------------------


def test_a_cached_reply_is_the_same_bytes_and_makes_no_request(tmp_path: Path) -> None:
    text = "Grüße 😀\r\n\u2028 end \x00"
    cache = tmp_path / "new folder" / "replies.db"
    with serving(says(text), says("another")) as server:
        assert ask(server.url, cache=cache) == [Reply(text)]
        assert ask(server.url, cache=cache) == [Reply(text)]
        assert len(server.bodies) == 1


@pytest.mark.parametrize("change", [{"seed": 8}, {"limit": 21}, {"temperature": 0.6}])
def test_other_parameters_are_another_entry(tmp_path: Path, change: dict[str, Any]) -> None:
    with serving(says("one"), says("two")) as server:
        ask(server.url, cache=tmp_path / "c")
        assert ask(server.url, cache=tmp_path / "c", **change) == [Reply("two")]


def test_another_model_address_or_message_is_another_entry(tmp_path: Path) -> None:
    with serving(echo) as one, serving(says("elsewhere")) as two:
        ask(one.url, "a", cache=tmp_path / "c")
        assert ask(two.url, "a", cache=tmp_path / "c") == [Reply("elsewhere")]
        assert ask(one.url, "b", cache=tmp_path / "c") == [Reply("b / 7")]
        model = EndpointChatModel(one.url, "other", cache=tmp_path / "c")
        model.reply([HELLO], max_new_tokens=20, temperature=0.5, seed=7)
    assert [body["model"] for body in one.bodies] == ["m", "m", "other"]


def test_only_usable_replies_are_cached(tmp_path: Path) -> None:
    script = [says("half", "length"), error(400, "no"), says("half", "error"), says("whole")]
    with serving(*script) as server:
        answers = [ask(server.url, cache=tmp_path / "c", retries=0)[0] for _ in range(5)]
    assert [reply.failure for reply in answers] == ["cut_off", "refused", "unavailable", "", ""]
    assert len(server.bodies) == 4


def test_many_threads_share_a_model_and_its_cache(tmp_path: Path) -> None:
    with serving(echo) as server:
        model = EndpointChatModel(server.url, "m", cache=tmp_path / "c", **FAST)

        def part(k: int) -> list[Reply]:
            asked = [[{"role": "user", "content": f"{k} {i}"}] for i in range(25)]
            return model.reply(asked, max_new_tokens=1, temperature=0.0, seed=7)

        with ThreadPoolExecutor(4) as threads:
            first = list(threads.map(part, range(4)))
            assert list(threads.map(part, range(4))) == first
        assert len(server.bodies) == 100
    assert first == [[Reply(f"{k} {i} / 7") for i in range(25)] for k in range(4)]


WRITER = """
import sys
from alignment.feedback.cache import ReplyCache
cache = ReplyCache(sys.argv[1])
for i in range(10**9):
    cache.put(f"key {i}", f"text {i} " * 500)
    print(i, flush=True)
"""


def test_a_killed_writer_leaves_whole_replies(tmp_path: Path) -> None:
    path = tmp_path / "c"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    done = -1
    while done < 20:
        done = int(writer.stdout.readline())
    writer.kill()
    done = max([done, *map(int, writer.stdout.read().split("\n")[:-1])])
    writer.wait()
    cache = ReplyCache(path)
    assert [cache.get(f"key {i}") for i in range(done + 1)] == [
        f"text {i} " * 500 for i in range(done + 1)
    ]
    assert cache.get(f"key {done + 2}") is None
    assert cache.put("new", "text") == "text"


def test_the_first_text_of_a_key_stays(tmp_path: Path) -> None:
    one, two = ReplyCache(tmp_path / "c"), ReplyCache(tmp_path / "c")
    assert one.put("k", "first") == "first"
    assert two.put("k", "second") == "first"
    assert one.get("k") == two.get("k") == "first"


def test_a_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"something else entirely, and long enough to notice" * 50)
    with pytest.raises(UserInputError, match=r"reply cache .*c cannot be used: .*delete the file"):
        ReplyCache(tmp_path / "c")
    with pytest.raises(UserInputError, match="cannot be used"):
        ReplyCache(tmp_path)


def test_a_cache_that_cannot_be_read_ends_the_call(tmp_path: Path) -> None:
    with serving(slow(0.2, echo)) as server:
        model = EndpointChatModel(server.url, "m", cache=tmp_path / "c")
        other = sqlite3.connect(tmp_path / "c")
        other.execute("DROP TABLE replies")
        other.close()
        with pytest.raises(UserInputError, match="cannot be used"):
            model.reply([HELLO, HELLO], max_new_tokens=1, temperature=0.0, seed=0)
    assert server.bodies == []


def test_a_cache_that_cannot_be_written_keeps_the_reply_and_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ReplyCache(tmp_path / "c")
    other = sqlite3.connect(tmp_path / "c")
    other.execute("DROP TABLE replies")
    other.close()
    with caplog.at_level(logging.WARNING):
        assert (cache.put("a", "1"), cache.put("b", "2")) == ("1", "2")
    assert caplog.text.count("no longer cached") == 1


# --- the key -------------------------------------------------------------------------------------


def test_the_key_is_sent_and_is_in_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", " sekret-1234\n")
    with serving(error(401, "bad key sekret-1234"), says("fine")) as server, caplog.at_level(0):
        options: dict[str, Any] = {"api_key_variable": "MY_KEY", "cache": tmp_path / "c"}
        (refused,) = ask(server.url, **options)
        assert ask(server.url, **options) == [Reply("fine")]
    assert server.keys == ["Bearer sekret-1234"] * 2
    assert refused.detail.endswith("HTTP 401: bad key ***")
    assert "sekret" not in caplog.text
    assert b"sekret" not in (tmp_path / "c").read_bytes()


def test_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(says("fine")) as server:
        ask(server.url)
    assert server.keys == [None]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_says_that_no_key_was_sent(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with serving(error(status, "who are you")) as server:
        (without,) = ask(server.url, api_key_variable="MY_KEY")
        monkeypatch.setenv("MY_KEY", "sekret")
        (with_key,) = ask(server.url, api_key_variable="MY_KEY")
    said = f"HTTP {status}: who are you"
    no_key = "no key was sent: the environment variable MY_KEY is not set"
    assert without.detail.endswith(f"{said}; {no_key}")
    assert with_key.detail.endswith(said)


def test_a_key_with_a_line_break_is_refused_without_showing_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sek\nret")
    with pytest.raises(UserInputError, match="OPENAI_API_KEY") as caught:
        EndpointChatModel("http://x", "m")
    assert "sek" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://user:pass@host/v1", "password"),
        ("http://host/v1?key=pass", "query"),
        ("host:8000/v1", "not an http address"),
        ("ftp://host", "not an http address"),
        ("http://", "not an http address"),
        ("http://a b:x", "not an address"),
    ],
)
def test_an_address_that_cannot_be_right_is_refused(url: str, said: str) -> None:
    with pytest.raises(UserInputError, match=said) as caught:
        EndpointChatModel(url, "m")
    assert "pass@" not in str(caught.value)
    assert "key=pass" not in str(caught.value)


@pytest.mark.parametrize(
    "option",
    [
        {"timeout_seconds": 0.0},
        {"retries": -1},
        {"backoff_seconds": -1.0},
        {"max_wait_seconds": -1.0},
        {"max_in_flight": 0},
    ],
)
def test_a_number_that_cannot_be_right_is_refused(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(UserInputError, match=f"{name} is"):
        EndpointChatModel("http://host/v1", "m", **option)


# --- the stop rule -------------------------------------------------------------------------------


def test_too_many_failures_stop_with_their_classes() -> None:
    good = [Reply("x")] * 6
    bad = [Reply(None, Failure.TIMEOUT, "30 s")] * 3 + [Reply(None, Failure.GARBAGE, "<html>")]
    check_failures(good + bad, 0.4)
    with pytest.raises(AlignmentError) as caught:
        check_failures(good + bad, 0.39, "the judge m at http://host/v1")
    assert str(caught.value).startswith(
        "the judge m at http://host/v1: 4 of 10 failed, over the limit of 39% "
        "(timeout: 3, garbage: 1). Example, timeout: 30 s. To go on, allow it more time"
    )


def test_the_stop_rule_by_default_allows_a_fifth() -> None:
    check_failures([])
    bad = Reply(None, Failure.REFUSED)
    check_failures([Reply("x")] * 4 + [bad])
    with pytest.raises(AlignmentError, match="2 of 5 failed"):
        check_failures([Reply("x")] * 3 + [bad] * 2)


def test_a_reply_has_a_text_exactly_where_there_was_one() -> None:
    with pytest.raises(AlignmentError, match="came with text None"):
        Reply(None)
    with pytest.raises(AlignmentError, match="came with text 'x'"):
        Reply("x", Failure.TIMEOUT)
