"""Invariants of tokenizing and masking: the rows 7, 8, 9, 34, 35, 36, 37 and 46, and of loading:
21 and 22."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chat_tokenizers import TEMPLATES, THINKING, TOKENIZERS, bytes_only, merging
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.data.chat import ChatEncoder, encode_conversation, encode_prompt
from alignment.data.control import ControlTokens
from alignment.data.labelled import build_labelled
from alignment.data.order import DataOrder
from alignment.data.pairs import build_pairs
from alignment.data.prompts import build_prompts, draw_prompts
from alignment.data.report import NOTHING_TO_TRAIN_ON, PROMPT_TOO_LONG
from alignment.data.samples import build_samples
from alignment.data.steps import build_steps
from alignment.modeling.catalog import cached, fetch
from alignment.modeling.load import LoraOptions, add_lora, load_causal_lm, load_tokenizer
from alignment.modeling.tiny import build_tiny
from alignment.types import UserInputError

TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "what is 1 + 2?"},
    {"role": "assistant", "content": "the answer is 3."},
]
EVERY = [(kind, name) for kind in TOKENIZERS for name in TEMPLATES]
_made: dict[tuple[str, str], Any] = {}


def tokenizer_of(kind: str, template: str) -> Any:
    """Trained once, shared by tests; a byte tokenizer has no BOS for the templates that ask."""
    if (kind, template) not in _made:
        text = TEMPLATES[template]
        if kind == "bytes":
            text = text.replace("{{ bos_token }}", "")
        _made[kind, template] = TOKENIZERS[kind](text)
    return _made[kind, template]


def template_ids(tokenizer: Any, messages: list[dict[str, str]], **kwargs: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, **kwargs)["input_ids"])


def scored_texts(tokenizer: Any, sample: Any) -> list[str]:
    """The decoded runs of scored tokens."""
    runs: list[list[int]] = []
    previous = False
    for token_id, counts in zip(sample.completion_ids, sample.loss_mask, strict=True):
        if counts and not previous:
            runs.append([])
        if counts:
            runs[-1].append(token_id)
        previous = counts
    return [tokenizer.decode(run) for run in runs]


def test_i07_last_supervised_token_is_eos_although_pad_is_eos() -> None:
    pad_is_eos, pad_is_other = merging(), merging()
    pad_is_other.pad_token = "<|endoftext|>"
    assert pad_is_eos.pad_token_id == pad_is_eos.eos_token_id
    one, other = encode_conversation(pad_is_eos, TALK), encode_conversation(pad_is_other, TALK)
    assert one == other
    assert one.completion_ids[-1] == pad_is_eos.eos_token_id
    assert one.loss_mask[-1]
    plain = ChatEncoder(pad_is_eos).plain("hello", " world")
    assert plain.completion_ids[-1] == pad_is_eos.eos_token_id
    assert all(plain.loss_mask)


def test_i08_rows_with_nothing_to_learn_are_dropped_and_counted() -> None:
    rows: list[dict[str, Any]] = [
        {"messages": TALK},
        {"messages": TALK[:1]},
        {"prompt": "hello", "completion": " "},
    ]
    samples, report = build_samples(rows, bytes_only())
    assert len(samples) == 1
    assert report.kept == (0,)
    assert report.dropped == {NOTHING_TO_TRAIN_ON: (1, 2)}
    with pytest.raises(UserInputError, match="no row can be used"):
        build_samples(rows[1:], bytes_only())


@pytest.mark.parametrize(("kind", "template"), EVERY)
def test_i09_ids_are_those_of_the_rendered_text(kind: str, template: str) -> None:
    tokenizer = tokenizer_of(kind, template)
    for messages in (TALK, TALK[:2], [{"role": "system", "content": "yes no"}, *TALK[:2]]):
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        whole = template_ids(tokenizer, messages)
        assert whole == tokenizer.encode(text, add_special_tokens=False)
        sample = encode_conversation(tokenizer, messages)
        ids = [*sample.prompt_ids, *sample.completion_ids]
        n_before = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        prompt = template_ids(tokenizer, messages[:n_before], add_generation_prompt=True)
        if whole[: len(prompt)] == prompt:
            assert whole[: len(ids)] == ids
            assert tokenizer.decode(whole[len(ids) :]).strip() == ""
        else:  # a token straddles the border: rule 35 goes first, and the text stays the same
            assert (kind, template) == ("merging", "trim")
            assert text.startswith(tokenizer.decode(ids))
        if "bos_token" in TEMPLATES[template] and kind != "bytes":
            assert ids.count(tokenizer.bos_token_id) == 1
            assert ids[0] == tokenizer.bos_token_id


def test_i09_doubled_bos_is_refused() -> None:
    with pytest.raises(UserInputError, match="two BOS"):
        encode_prompt(merging("{{ bos_token }}{{ bos_token }}hello"), TALK[:1])


def test_i34_no_text_is_tokenized_again_after_building() -> None:
    tokenizer = merging()
    rows = [{"question": f"what is {i}?"} for i in range(3)]
    prompts, _ = build_prompts(rows, tokenizer)
    tokenizer.encode = None  # any further tokenizing would fail
    drawn = draw_prompts(prompts, DataOrder(3, seed=0), 5)
    assert [p.index for p in drawn] == [0, 1, 2, 3, 4]
    by_text = {p.text: p.token_ids for p in prompts}
    assert all(p.token_ids is by_text[p.text] for p in drawn)


@pytest.mark.parametrize(("kind", "template"), EVERY)
def test_i35_prompt_ids_are_a_prefix_at_token_level(kind: str, template: str) -> None:
    tokenizer = tokenizer_of(kind, template)
    for content in ("yes", "\nyes", "\n\nno", " the answer", "é\u3000", ".", "12"):
        messages = [TALK[0], {"role": "assistant", "content": content}]
        sample = encode_conversation(tokenizer, messages)
        expected = template_ids(tokenizer, messages[:1], add_generation_prompt=True)
        assert list(sample.prompt_ids) == expected
        assert sample.prompt_ids == encode_prompt(tokenizer, messages[:1])[0]
        spoken = content.strip() if template == "trim" else content
        decoded = tokenizer.decode(sample.completion_ids)
        if kind in ("bytes", "merging"):  # the others normalize white space away
            assert decoded.removeprefix(" " if template == "inst" else "") == spoken + "<|im_end|>"


def test_i35_border_that_a_merge_would_straddle_is_cut() -> None:
    tokenizer = merging()
    messages = [TALK[0], {"role": "assistant", "content": "\n\nyes"}]
    joined = template_ids(tokenizer, messages)
    prompt = template_ids(tokenizer, messages[:1], add_generation_prompt=True)
    assert joined[: len(prompt)] != prompt  # the whole joins two of the line breaks
    sample = encode_conversation(tokenizer, messages)
    assert list(sample.prompt_ids) == prompt
    assert list(sample.completion_ids) == tokenizer.encode("\n\nyes<|im_end|>")


def test_i35_template_that_rewrites_earlier_turns_is_an_error_with_a_remedy() -> None:
    tokenizer = merging(THINKING)
    with pytest.raises(UserInputError, match="loss_on: last_assistant"):
        encode_conversation(tokenizer, TALK)
    sample = encode_conversation(tokenizer, TALK, loss_on="last_assistant")
    assert scored_texts(tokenizer, sample) == ["<think>\n\n</think>\n\nthe answer is 3.<|im_end|>"]
    assert list(sample.prompt_ids) == template_ids(tokenizer, TALK[:3], add_generation_prompt=True)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_i36_prompt_and_completion_make_the_whole_with_one_system_turn(kind: str) -> None:
    tokenizer = tokenizer_of(kind, "system")
    rows = [{"prompt": "hello", "completion": "yes"}]
    sample = build_samples(rows, tokenizer)[0][0]
    whole = template_ids(tokenizer, TALK[:2])
    ids = [*sample.prompt_ids, *sample.completion_ids]
    assert ids == whole[: len(ids)]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3  # one system turn
    pairs, _ = build_pairs([{"prompt": "hello", "chosen": "yes", "rejected": "no"}], tokenizer)
    assert pairs.chosen[0] == sample
    assert pairs.rejected[0].prompt_ids == sample.prompt_ids


@pytest.mark.parametrize(("kind", "template"), EVERY)
def test_i35_i36_both_sides_of_a_pair_are_wholes_with_one_prompt(kind: str, template: str) -> None:
    tokenizer = tokenizer_of(kind, template)
    context = [{"role": "system", "content": "yes no"}, *TALK[:3]]
    answers = [{"role": "assistant", "content": text} for text in ("the answer is 3.", "no 12")]
    rows: list[dict[str, Any]] = [
        {"prompt": context, "chosen": [answers[0]], "rejected": [answers[1]]},
        {"chosen": [*context, answers[0]], "rejected": [*context, answers[1]]},
        {"prompt": context, "chosen": [*context, answers[0]], "rejected": "no 12"},
    ]
    pairs, _ = build_pairs(rows, tokenizer)
    prompt = template_ids(tokenizer, context, add_generation_prompt=True)
    sides = {0: pairs.chosen, 1: pairs.rejected}
    for number, samples in sides.items():
        whole = template_ids(tokenizer, [*context, answers[number]])
        for sample in samples:
            assert list(sample.prompt_ids) == prompt
            ids = [*sample.prompt_ids, *sample.completion_ids]
            if whole[: len(prompt)] == prompt:
                assert ids == whole[: len(ids)]
                assert tokenizer.decode(whole[len(ids) :]).strip() == ""
            else:  # a token straddles the border: rule 35 goes first, and the text stays the same
                assert (kind, template) == ("merging", "trim")
                assert tokenizer.decode(whole).startswith(tokenizer.decode(ids))
    labelled, _ = build_labelled(rows[:1], tokenizer)
    assert [one.sample for one in labelled] == [pairs.chosen[0], pairs.rejected[0]]


@pytest.mark.parametrize(("kind", "template"), EVERY)
def test_i34_i36_steps_are_tokenized_as_one_answer(kind: str, template: str) -> None:
    tokenizer = tokenizer_of(kind, template)
    steps = ["the answer is", " yes.", "1 + 2\n", "hello"]
    rows = [{"prompt": "what?", "completions": steps, "labels": [1, 0, 1, 0]}]
    (stepped,), _ = build_steps(rows, tokenizer)
    whole = build_samples([{"prompt": "what?", "completion": "\n".join(steps)}], tokenizer)[0][0]
    assert stepped.sample.prompt_ids == whole.prompt_ids
    assert stepped.sample.completion_ids == whole.completion_ids
    ends = [i for i, marked in enumerate(stepped.sample.loss_mask) if marked]
    spoken = [tokenizer.decode(whole.completion_ids[: end + 1]).strip() for end in ends]
    before = [tokenizer.decode(whole.completion_ids[:end]).strip() for end in ends]
    assert len(ends) == 4
    for text, shorter, last in zip(spoken, before, ("is", "yes.", "2", "hello"), strict=True):
        assert text.endswith(last)
        assert not shorter.endswith(last)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.text("ab .\né\u3000\U0001f642", min_size=1).filter(
            lambda s: s.strip() and "\n" not in s.strip()  # what parts steps is in none
        ),
        min_size=1,
    )
)
def test_i34_step_ends_cover_their_steps_whatever_the_text(steps: list[str]) -> None:
    tokenizer = tokenizer_of("merging", "chatml")
    rows = [
        {"prompt": "what?", "completions": steps, "labels": [1] * len(steps)},
        {"prompt": "what?", "completions": ["yes"], "labels": [1]},
    ]
    stepped, report = build_steps(rows, tokenizer)
    assert report.n_dropped == 0
    sample = stepped[0].sample
    ends = [i for i, marked in enumerate(sample.loss_mask) if marked]
    for number, end in enumerate(ends, start=1):
        reached = "\n".join(steps[:number]).rstrip()
        assert tokenizer.decode(sample.completion_ids[: end + 1]).startswith(reached)
        assert not tokenizer.decode(sample.completion_ids[:end]).startswith(reached)


def test_i37_truncation_keeps_a_scored_token_or_drops_the_row() -> None:
    tokenizer = bytes_only()
    rows = [{"prompt": "hello", "completion": "world"}]
    full = build_samples(rows, tokenizer)[0][0]
    n_prompt = len(full.prompt_ids)
    cut, report = build_samples(rows, tokenizer, max_tokens=n_prompt + 1)
    assert cut[0].completion_ids == full.completion_ids[:1]
    assert cut[0].n_loss_tokens == 1
    assert report.truncated == (0,)
    exact, report = build_samples(rows, tokenizer, max_tokens=n_prompt + len("world") + 1)
    assert exact[0] == full
    assert report.truncated == ()
    short_and_long = [{"prompt": "h", "completion": "w"}, *rows]
    kept, report = build_samples(short_and_long, tokenizer, max_tokens=n_prompt)
    assert len(kept) == 1
    assert report.dropped == {PROMPT_TOO_LONG: (1,)}
    with pytest.raises(UserInputError, match=r"row 1 .*limit of"):
        build_samples(short_and_long, tokenizer, max_tokens=n_prompt, too_long="error")


@pytest.mark.parametrize(("kind", "template"), EVERY)
@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_i46_control_tokens_in_content_stay_text(kind: str, template: str, role: str) -> None:
    tokenizer = tokenizer_of(kind, template)
    control = ControlTokens(tokenizer).ids
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= set(control)
    harmless = _conversation(role, "hello")
    expected = encode_conversation(tokenizer, harmless)
    for marker in control:
        if role == "assistant" and marker in ("<think>", "</think>"):
            continue  # a model's own words
        sample = encode_conversation(tokenizer, _conversation(role, f"hello {marker}yes"))
        for token_id in control.values():
            if token_id == tokenizer.unk_token_id:
                continue  # what a small vocabulary cannot spell
            assert _count(sample, token_id) == _count(expected, token_id), marker


@pytest.mark.parametrize("kind", ["bytes", "merging"])
@pytest.mark.parametrize(
    "marker", ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_<|im_end|>"]
)
def test_i46_content_is_tokenized_with_special_tokens_split(kind: str, marker: str) -> None:
    tokenizer = tokenizer_of(kind, "chatml")
    content = f"say{marker}now zq0t1zq <@0:2@>"
    ids, text = encode_prompt(tokenizer, [{"role": "user", "content": content}])
    inside = tokenizer.encode(f"user\n{content}", split_special_tokens=True)
    start, end = tokenizer.encode("<|im_start|>"), tokenizer.encode("<|im_end|>")
    tail = tokenizer.encode("\n<|im_start|>assistant\n")
    assert list(ids) == [*start, *inside, *end, *tail]
    assert text == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    plain, _ = encode_prompt(tokenizer, content)
    assert list(plain) == tokenizer.encode(content, split_special_tokens=True)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=30))
def test_i46_private_copy_tokenizes_as_the_original(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind, "chatml")
    control = ControlTokens(tokenizer)
    rendered = f"<|im_start|>user\n{text}<|im_end|>\n <|im_start|>assistant\n"
    assert control.encode(rendered, "7") == [tokenizer.encode(rendered, add_special_tokens=False)]


def test_i46_a_thought_of_the_assistant_keeps_its_own_tokens() -> None:
    tokenizer = merging()
    think = tokenizer.convert_tokens_to_ids("<think>")
    said = encode_conversation(tokenizer, _conversation("assistant", "<think>no</think>yes"))
    asked = encode_conversation(tokenizer, _conversation("user", "<think>no</think>yes"))
    assert said.completion_ids.count(think) == 1
    assert _count(asked, think) == 0


def _conversation(role: str, content: str) -> list[dict[str, str]]:
    messages = {"system": "yes", "user": "no", "assistant": "hello"} | {role: content}
    return [{"role": r, "content": c} for r, c in messages.items()]


def _count(sample: Any, token_id: int) -> int:
    return int(sample.prompt_ids.count(token_id) + sample.completion_ids.count(token_id))


def test_i21_an_adapter_trains_something_or_is_an_error(tmp_path: Path) -> None:
    model = load_causal_lm(build_tiny(tmp_path), lora=LoraOptions(rank=2, targets=("q_proj",)))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4  # two layers, A and B
    with pytest.raises(UserInputError, match=r"nosuch.*q_proj"):
        load_causal_lm(tmp_path, lora=LoraOptions(targets=("nosuch",)))


def test_i22_tied_embeddings_survive_saving_merging_and_reloading(tmp_path: Path) -> None:
    base = build_tiny(tmp_path / "base")
    model: Any = load_causal_lm(base, lora=LoraOptions(rank=4))
    base_model = model.get_base_model()
    assert base_model.get_input_embeddings().weight is base_model.get_output_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.1)
    ids = torch.randint(0, 256, (2, 9))
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    again = load_causal_lm(tmp_path / "adapter")
    assert torch.equal(again(input_ids=ids).logits, expected)
    assert any(p.requires_grad for p in again.parameters())
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = load_causal_lm(tmp_path / "merged")
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    tied: Any = load_causal_lm(base)
    with pytest.raises(UserInputError, match="lm_head"):
        add_lora(tied, LoraOptions(targets=("q_proj", "lm_head")), seed=0)


@pytest.mark.real_model
def test_i09_i35_i46_default_model_keeps_the_rules() -> None:
    if cached("smollm2-135m-instruct") is None:
        pytest.skip("the default model has not been fetched")
    tokenizer = load_tokenizer(fetch("smollm2-135m-instruct"))
    sample = encode_conversation(tokenizer, TALK)
    ids = [*sample.prompt_ids, *sample.completion_ids]
    assert [*ids, *tokenizer.encode("\n")] == template_ids(tokenizer, TALK)
    assert scored_texts(tokenizer, sample) == ["yes<|im_end|>", "the answer is 3.<|im_end|>"]
    evil = encode_conversation(
        tokenizer, _conversation("user", "<|im_start|> <|im_end|> <file_sep>")
    )
    assert _count(evil, tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    assert _count(evil, tokenizer.convert_tokens_to_ids("<file_sep>")) == 0
