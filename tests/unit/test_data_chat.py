"""Prompts, samples and pairs on a byte-level tokenizer, where every id can be worked by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from chat_tokenizers import CHATML, bytes_only, merging, metaspace

from alignment.data.chat import (
    check_stop_token_trained,
    encode_conversation,
    encode_plain,
    encode_prompt,
    stop_token_ids,
)
from alignment.data.prompts import build_prompts
from alignment.data.samples import build_samples
from alignment.types import UserInputError

START, END, EOS = 257, 258, 258
USER = {"role": "user", "content": "hi"}


def raw(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


PROMPT = (START, *raw("user\nhi"), END, *raw("\n"), START, *raw("assistant\n"))


def test_multi_turn_masks_by_hand() -> None:
    tokenizer = bytes_only()
    messages = [
        USER,
        {"role": "assistant", "content": "ok"},
        USER,
        {"role": "assistant", "content": "é"},
        USER,
    ]
    sample = encode_conversation(tokenizer, messages)
    between = (*raw("\n"), *PROMPT)
    assert sample.prompt_ids == PROMPT
    assert sample.completion_ids == (*raw("ok"), END, *between, *raw("é"), END)
    assert sample.loss_mask == (True,) * 3 + (False,) * len(between) + (True,) * 3
    last = encode_conversation(tokenizer, messages, loss_on="last_assistant")
    assert last.completion_ids == (*raw("é"), END)
    assert last.prompt_ids == (*PROMPT, *raw("ok"), END, *between)


def test_context_turns_of_a_prompt_are_never_scored() -> None:
    prompt = [USER, {"role": "assistant", "content": "ok"}, USER]
    rows = [{"prompt": prompt, "completion": "no"}]
    sample = build_samples(rows, bytes_only())[0][0]
    assert sample.completion_ids == (*raw("no"), END)
    assert all(sample.loss_mask)


def test_plain_text_by_hand() -> None:
    sample = encode_plain(bytes_only(), "1 + 1 =", " 2")
    assert sample.prompt_ids == raw("1 + 1 =")
    assert sample.completion_ids == (*raw(" 2"), EOS)
    assert sample.loss_mask == (True,) * 3
    marked = encode_plain(bytes_only(), "a<|im_", "end|>b")
    assert marked.prompt_ids == raw("a<|im_")
    assert marked.completion_ids == (*raw("end|>b"), EOS)


def test_plain_text_gets_the_bos_its_tokenizer_puts() -> None:
    tokenizer = metaspace("")
    ids, _ = encode_prompt(tokenizer, "hello world")
    assert list(ids) == tokenizer.encode("hello world")
    assert ids[0] == tokenizer.bos_token_id
    assert encode_plain(tokenizer, "hello", " world").prompt_ids.count(ids[0]) == 1
    assert encode_prompt(merging(), "hello")[0] == tuple(merging().encode("hello"))


def test_prompts_with_system_message_and_limit() -> None:
    rows = [{"question": "hi", "answer": "1"}, {"question": "hi" * 50, "answer": "2"}]
    system = (START, *raw("system\nbe"), END, *raw("\n"))
    prompts, report = build_prompts(rows, bytes_only(), system="be", max_prompt_tokens=60)
    assert [p.token_ids for p in prompts] == [(*system, *PROMPT)]
    assert prompts[0].row is rows[0]
    assert prompts[0].text.startswith("<|im_start|>system\nbe<|im_end|>\n")
    assert report.summary() == (
        "1 of 2 rows kept; 1 dropped, the prompt leaves no room for a completion (row 1)"
    )
    with pytest.raises(UserInputError, match=r"row 1 .* limit of 60"):
        build_prompts(rows, bytes_only(), max_prompt_tokens=60, too_long="error")
    own = [{"role": "system", "content": "mine"}, USER]
    kept, _ = build_prompts([{"prompt": own}], bytes_only(), system="be")
    assert "be" not in kept[0].text
    with pytest.raises(UserInputError, match="a system message needs a chat template"):
        build_prompts(rows, bytes_only(), system="be", style="plain")


def test_stop_tokens_and_their_check() -> None:
    tokenizer = bytes_only()
    config = SimpleNamespace(eos_token_id=[256, 258])
    assert stop_token_ids(tokenizer, config) == (256, 258)
    assert stop_token_ids(tokenizer) == (258,)
    tokenizer.eos_token = "<|endoftext|>"
    assert stop_token_ids(tokenizer) == (256, 258)  # EOS, and the template's end of turn
    check_stop_token_trained(tokenizer, (256, 258))
    with pytest.raises(UserInputError, match="never learn to stop"):
        check_stop_token_trained(tokenizer, (256,))
    endless = bytes_only(CHATML.replace("<|im_end|>", ""))
    with pytest.raises(UserInputError, match="never learn to stop"):
        check_stop_token_trained(endless, stop_token_ids(endless))
    check_stop_token_trained(bytes_only(""), (258,))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER], "no assistant message"),
        ([{"role": "assistant", "content": "a"}], "begins with the assistant"),
    ],
)
def test_conversations_without_a_turn_to_learn(messages: list[Any], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        encode_conversation(bytes_only(), messages)


def test_errors_name_the_cause() -> None:
    with pytest.raises(UserInputError, match="no chat template"):
        encode_prompt(bytes_only(""), [USER])
    with pytest.raises(UserInputError, match="last message is the assistant's"):
        encode_prompt(bytes_only(), [USER, {"role": "assistant", "content": "a"}])
    with pytest.raises(UserInputError, match="rejects it: no systems here"):
        encode_prompt(bytes_only("{{ raise_exception('no systems here') }}"), [USER])
    with pytest.raises(UserInputError, match="is empty"):
        encode_prompt(bytes_only(), "")
