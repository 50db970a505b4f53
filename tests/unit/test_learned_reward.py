"""Learned reward models as rewards: which tokens they see, and what becomes of their scores."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_tokenizers import merging

from alignment.config.load import load_recipe
from alignment.config.schema import Recipe
from alignment.data.chat import encode_conversation, encode_plain, encode_prompt
from alignment.data.steps import build_steps
from alignment.data.text_form import TEXT_FORM
from alignment.modeling.heads import ScalarModel
from alignment.modeling.load import load_tokenizer
from alignment.modeling.scalar import load_scalar_model, save_scalar_model
from alignment.modeling.tiny import build_tiny
from alignment.rewards.compose import CompositeReward, NamedReward, RewardSpec, build_rewards
from alignment.rewards.protocol import run_reward
from alignment.trainers.setup import load_parts
from alignment.types import (
    AlignmentError,
    Completion,
    Outcome,
    Prompt,
    Sample,
    Score,
    StopReason,
    UserInputError,
)
from reward_models.learned import ProcessRewardModelReward, RewardModelReward
from reward_models.scalar_scoring import step_ends

END = 258  # <|im_end|>
OTHER_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ': ' "
    "+ message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"
)
Items = Sequence[tuple[Prompt, Completion]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What policy and reward model start from; 128 tokens of context."""
    return build_tiny(tmp_path_factory.mktemp("base"), seed=3, context=128)


@pytest.fixture(scope="module")
def model(base: Path) -> ScalarModel:
    return load_scalar_model(base, seed=1)


@pytest.fixture(scope="module")
def path(base: Path, model: ScalarModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reward")
    save_scalar_model(model, load_tokenizer(base), folder)
    return str(folder)


def copy_with(path: str, folder: Path, tokenizer: Any) -> str:
    """The same model with another tokenizer."""
    save_scalar_model(load_scalar_model(path), tokenizer, folder)
    return str(folder)


def item(
    tokenizer: Any,
    question: str,
    answer: str,
    *,
    number: int = 0,
    ids: Sequence[int] | None = None,
    cut_off: bool = False,
    row: dict[str, Any] | None = None,
) -> tuple[Prompt, Completion]:
    prompt_ids, text = encode_prompt(tokenizer, [{"role": "user", "content": question}])
    if ids is None:
        ids = [*tokenizer.encode(answer, add_special_tokens=False), *([] if cut_off else [END])]
    return (
        Prompt(prompt_ids, text, number, {"prompt": question} if row is None else row),
        Completion(
            prompt_index=number,
            sample_index=0,
            token_ids=tuple(ids),
            sampling_logprobs=(0.0,) * len(ids),
            stop_reason=StopReason.LENGTH if cut_off else StopReason.STOP,
            policy_version=0,
            text=answer,
        ),
    )


@pytest.fixture
def items(base: Path) -> list[tuple[Prompt, Completion]]:
    tokenizer = load_tokenizer(base)
    return [
        item(tokenizer, "one?", "yes"),
        item(tokenizer, "one?", "no, never"),
        item(tokenizer, "two", "cut o", number=1, cut_off=True),
        # Ids that no text gives: tokenized again, they would be others.
        item(tokenizer, "two", "ab<|im_start|>", number=1, ids=[97, 98, 257, 300 % 256, END]),
    ]


def shown(items: Items) -> list[Sample]:
    """What is scored where the tokens are the model's own."""
    return [Sample(p.token_ids, c.token_ids, (True,) * len(c.token_ids)) for p, c in items]


def without_end(sample: Sample) -> Sample:
    """As one that was cut off before its last token."""
    ids = sample.completion_ids[:-1]
    return Sample(sample.prompt_ids, ids, (True,) * len(ids))


def values(scores: Sequence[Score]) -> list[float]:
    assert all(score.outcome is Outcome.SCORED for score in scores)
    return [score.value for score in scores if score.value is not None]


def bound(tokenizer: Any, path: str, **options: Any) -> RewardModelReward:
    reward = RewardModelReward(path=path, dtype="float32", **options)
    reward.bind(tokenizer)
    return reward


# -- tokens that both share -------------------------------------------------------------------


def test_i34_sampled_tokens_are_scored_as_they_are(
    base: Path, path: str, model: ScalarModel, items: Items
) -> None:
    expected = model.scores(shown(items), 4096)
    for budget in (4096, 1):
        reward = bound(load_tokenizer(base), path, micro_batch_tokens=budget)
        assert values(reward(items)) == pytest.approx(expected, abs=1e-5)
        assert values(reward(items[::-1])) == pytest.approx(expected[::-1], abs=1e-5)
        assert reward([]) == []


def test_completions_of_one_prompt_share_its_computation(
    base: Path, path: str, items: Items, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = ScalarModel.forward

    def counted(self: ScalarModel, samples: Sequence[Sample], **options: Any) -> Any:
        found = forward(self, samples, **options)
        rows.append(found.n_tokens)
        return found

    reward = bound(load_tokenizer(base), path)
    monkeypatch.setattr(ScalarModel, "forward", counted)
    reward(items[:2])
    (n_tokens,) = rows
    lengths = [len(completion.token_ids) for _, completion in items[:2]]
    assert n_tokens == len(items[0][0].token_ids) + sum(lengths)


def test_the_reward_is_a_plug_in_of_a_recipe(base: Path, path: str, items: Items) -> None:
    options = {"path": path, "dtype": "float32"}
    rewards = build_rewards([RewardSpec("reward_model", 2.0, None, options)])
    rewards.bind(load_tokenizer(base))
    alone = values(bound(load_tokenizer(base), path)(items))
    assert [one.reward for one in rewards.grade(items)] == pytest.approx([2 * v for v in alone])
    rewards.close()
    with pytest.raises(AlignmentError, match=r"call bind\(tokenizer\)"):
        rewards.grade(items)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_mismatch": "guess"}, "on_mismatch"),
        ({"path": "somewhere", "seperator": ","}, "seperator"),
        ({"path": "somewhere", "micro_batch_tokens": 0}, "micro_batch_tokens is 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        build_rewards([RewardSpec("reward_model", 1.0, None, options)])


def test_checking_a_recipe_loads_neither_model_nor_torch() -> None:
    code = (
        "import sys; from reward_models.learned import RewardModelReward as R; "
        "R(path='nowhere'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- another tokenizer or template ------------------------------------------------------------


def test_another_vocabulary_is_refused(base: Path, path: str) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["new"])
    with pytest.raises(UserInputError) as caught:
        bound(tokenizer, path)
    message = str(caught.value)
    assert "another tokenizer (260 tokens, the policy's has 261)" in message
    assert "chat template than" not in message
    assert "on_mismatch: retokenize" in message


def test_another_chat_template_is_refused(base: Path, path: str) -> None:
    tokenizer = load_tokenizer(base, chat_template=OTHER_TEMPLATE)
    with pytest.raises(UserInputError, match="has another chat template than the policy"):
        bound(tokenizer, path)


def test_another_padding_token_is_no_mismatch(base: Path, path: str, items: Items) -> None:
    """What pads is never read; the saved model pads with another token than EOS."""
    tokenizer = load_tokenizer(base)
    tokenizer.pad_token = tokenizer.eos_token
    assert len(bound(tokenizer, path)(items)) == 4


def test_text_is_rendered_with_the_models_own_template(
    base: Path, path: str, model: ScalarModel, items: Items
) -> None:
    """The row's prompt and the completion's text; without the end where it was cut off."""
    own = load_tokenizer(base)
    policy = load_tokenizer(base, chat_template=OTHER_TEMPLATE)
    spoken = [
        item(policy, "one?", "yes"),
        item(policy, "two", "cut o", cut_off=True),
        item(policy, "x", "hm", row={"messages": [{"role": "user", "content": "in the row"}]}),
    ]
    turns = [("one?", "yes"), ("two", "cut o"), ("in the row", "hm")]
    expected = []
    for (question, answer), (_, completion) in zip(turns, spoken, strict=True):
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        sample = encode_conversation(own, messages)
        assert sample.completion_ids[-1] == END
        if completion.stop_reason is StopReason.LENGTH:
            sample = without_end(sample)
        expected.append(sample)
    assert bytes(expected[1].completion_ids) == b"cut o"
    reward = bound(policy, path, on_mismatch="retokenize")
    scores = values(reward(spoken))
    assert scores == pytest.approx(model.scores(expected, 4096), abs=1e-5)
    as_sampled = model.scores(shown(spoken), 4096)
    assert max(abs(a - b) for a, b in zip(scores, as_sampled, strict=True)) > 1e-3


def test_text_of_another_vocabulary_is_tokenized_again(
    base: Path, path: str, model: ScalarModel
) -> None:
    """Another tokenizer gives the same text other ids."""
    own, policy = load_tokenizer(base), merging()
    turns = [("one?", "hello world"), ("what is the answer", "12 * 34 = 408"), ("two", "cut o")]
    spoken, expected = [], []
    for question, answer in turns:
        ids = policy.encode(answer, add_special_tokens=False)
        cut_off = answer == "cut o"
        ids += [] if cut_off else [policy.eos_token_id]
        spoken.append(item(policy, question, answer, ids=ids, cut_off=cut_off))
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        sample = encode_conversation(own, messages)
        if cut_off:
            sample = without_end(sample)
        assert sample.completion_ids != tuple(ids)
        expected.append(sample)
    scores = values(bound(policy, path, on_mismatch="retokenize")(spoken))
    assert scores == pytest.approx(model.scores(expected, 4096), abs=1e-5)


def test_retokenized_prompts_begin_with_the_system_message(
    base: Path, path: str, model: ScalarModel
) -> None:
    policy = load_tokenizer(base, chat_template=OTHER_TEMPLATE)
    reward = bound(policy, path, on_mismatch="retokenize", system="be kind")
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "yes"},
    ]
    expected = model.scores([encode_conversation(load_tokenizer(base), messages)], 4096)
    assert values(reward([item(policy, "one?", "yes")])) == pytest.approx(expected, abs=1e-5)


def test_a_model_without_a_template_gets_plain_text(
    base: Path, path: str, model: ScalarModel, tmp_path: Path
) -> None:
    own = load_tokenizer(base)
    own.chat_template = None
    plain = copy_with(path, tmp_path, own)
    policy = load_tokenizer(base)
    reward = bound(policy, plain, on_mismatch="retokenize")
    expected = model.scores([encode_plain(own, "one?", "yes")], 4096)
    assert values(reward([item(policy, "one?", "yes")])) == pytest.approx(expected, abs=1e-5)


def test_a_row_without_a_prompt_cannot_be_retokenized(base: Path, path: str) -> None:
    policy = load_tokenizer(base, chat_template=OTHER_TEMPLATE)
    reward = bound(policy, path, on_mismatch="retokenize")
    (score,) = reward([item(policy, "one?", "yes", row={"answer": "1"})])
    assert score.outcome is Outcome.CRASH and "'prompt', 'question' or 'messages'" in score.detail


# -- what is noted beside the model -----------------------------------------------------------


@pytest.fixture
def noted(base: Path, path: str, tmp_path: Path) -> Callable[..., str]:
    """The model with a note of the form of its texts."""

    def note(**form: Any) -> str:
        folder = copy_with(path, tmp_path / "noted", load_tokenizer(base))
        (Path(folder) / TEXT_FORM).write_text(json.dumps(form))
        return folder

    return note


def test_a_model_of_plain_text_is_shown_plain_text(
    base: Path, path: str, model: ScalarModel, noted: Callable[..., str]
) -> None:
    """Though its tokenizer has a chat template; by its note, or because the recipe says so."""
    own, policy = load_tokenizer(base), load_tokenizer(base, chat_template=OTHER_TEMPLATE)
    spoken = [item(policy, "one?", " yes"), item(policy, "two", " cut o", cut_off=True)]
    plain = [encode_plain(own, "one?", " yes"), without_end(encode_plain(own, "two", " cut o"))]
    expected = pytest.approx(model.scores(plain, 4096), abs=1e-5)
    folder = noted(style="plain")
    assert values(bound(policy, folder, on_mismatch="retokenize")(spoken)) == expected
    said = bound(policy, path, on_mismatch="retokenize", style="plain")
    assert values(said(spoken)) == expected
    # What a recipe says goes before the note.
    chat = bound(policy, folder, on_mismatch="retokenize", style="chat")
    unnoted = bound(policy, path, on_mismatch="retokenize")
    assert values(chat(spoken)) == pytest.approx(values(unnoted(spoken)), abs=1e-5)
    assert values(chat(spoken)) != expected


def test_another_style_is_a_mismatch_under_one_tokenizer_too(
    base: Path, path: str, model: ScalarModel, noted: Callable[..., str], items: Items
) -> None:
    tokenizer, folder = load_tokenizer(base), noted(style="plain")
    reward = RewardModelReward(path=folder, dtype="float32")
    refused = r"another data\.style \(plain, the policy's is chat\).*on_mismatch: retokenize"
    with pytest.raises(UserInputError, match=refused):
        reward.bind(tokenizer, policy_style="chat")
    reward.bind(tokenizer, policy_style="plain")
    assert values(reward(items)) == pytest.approx(model.scores(shown(items), 4096), abs=1e-5)
    reward = RewardModelReward(path=folder, dtype="float32", on_mismatch="retokenize")
    reward.bind(tokenizer, policy_style="chat")
    plain = model.scores([encode_plain(tokenizer, "one?", "yes")], 4096)
    assert values(reward(items[:1])) == pytest.approx(plain, abs=1e-5)
    for style in ("chat", "plain"):  # of this one, nothing is known
        reward = RewardModelReward(path=path, dtype="float32")
        reward.bind(tokenizer, policy_style=style)
        assert values(reward(items)) == pytest.approx(model.scores(shown(items), 4096), abs=1e-5)


def test_a_runs_data_style_is_compared(base: Path, noted: Callable[..., str]) -> None:
    rewards = [{"type": "reward_model", "path": noted(style="chat")}]
    settings = [f"model.path={base}", f"rewards={json.dumps(rewards)}", "data.style=plain"]
    recipe = load_recipe("tiny/grpo", settings)
    assert isinstance(recipe, Recipe)
    with pytest.raises(UserInputError, match=r"data\.style \(chat, the policy's is plain\)"):
        load_parts(recipe)


def test_rewards_that_ask_for_no_style_are_told_none(base: Path) -> None:
    told: list[Any] = []

    class Own:
        def __call__(self, items: Items) -> list[Score]:
            return []

        def bind(self, tokenizer: Any) -> None:
            told.append(tokenizer)

    tokenizer = load_tokenizer(base)
    CompositeReward([NamedReward("own", 1.0, Own())]).bind(tokenizer, policy_style="chat")
    assert told == [tokenizer]


def test_the_noted_system_message_is_the_default(
    base: Path, model: ScalarModel, noted: Callable[..., str]
) -> None:
    own, policy = load_tokenizer(base), load_tokenizer(base, chat_template=OTHER_TEMPLATE)
    folder = noted(style="chat", system="be kind")
    for system in (None, "be brief"):
        messages = [
            {"role": "system", "content": system or "be kind"},
            {"role": "user", "content": "one?"},
            {"role": "assistant", "content": "yes"},
        ]
        expected = model.scores([encode_conversation(own, messages)], 4096)
        reward = bound(policy, folder, on_mismatch="retokenize", system=system)
        assert values(reward([item(policy, "one?", "yes")])) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "form", [{"style": "auto"}, {"style": "chat", "separator": ""}, {"styles": "chat"}, {}]
)
def test_a_damaged_note_is_refused(
    base: Path, noted: Callable[..., str], form: dict[str, str]
) -> None:
    with pytest.raises(UserInputError, match=r"text_form\.json is damaged.*delete it"):
        bound(load_tokenizer(base), noted(**form))


# -- failures ---------------------------------------------------------------------------------


def test_i47_what_the_model_cannot_read_is_a_crash_and_the_others_keep_their_scores(
    base: Path, path: str, items: Items
) -> None:
    tokenizer = load_tokenizer(base)
    unreadable = [
        item(tokenizer, "one?", "", ids=()),
        item(tokenizer, "one?", "x" * 128),
    ]
    scores = bound(tokenizer, path)([items[0], *unreadable, items[1]])
    assert [score.outcome for score in scores[1:3]] == [Outcome.CRASH] * 2
    assert "empty" in scores[1].detail and "context of 128" in scores[2].detail
    assert values([scores[0], scores[3]]) == pytest.approx(
        values(bound(tokenizer, path)(items[:2])), abs=1e-5
    )


def test_i47_a_model_of_nan_is_a_crash_and_never_a_score(
    base: Path, model: ScalarModel, items: Items, tmp_path: Path
) -> None:
    broken = load_scalar_model(base)
    with torch.no_grad():
        broken.head.weight.fill_(math.nan)
    save_scalar_model(broken, load_tokenizer(base), tmp_path)
    reward = bound(load_tokenizer(base), str(tmp_path))
    scores = run_reward("reward_model", reward, items)
    assert [score.outcome for score in scores if score is not None] == [Outcome.CRASH] * 4
    assert all(score is not None and score.value is None for score in scores)


def test_a_model_that_is_not_there_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="no such directory"):
        bound(load_tokenizer(base), str(tmp_path / "nothing"))


# -- normalization ----------------------------------------------------------------------------


@pytest.fixture
def measured(base: Path, path: str, tmp_path: Path) -> str:
    """With a normalization beside it."""
    folder = copy_with(path, tmp_path / "measured", load_tokenizer(base))
    stated = {"mean": 3.0, "std": 0.5, "count": 8}
    (Path(folder) / "score_normalization.json").write_text(json.dumps(stated))
    return folder


def test_scores_are_normalized_by_what_lies_beside_the_model(
    base: Path, path: str, measured: str, items: Items
) -> None:
    tokenizer = load_tokenizer(base)
    raw = values(bound(tokenizer, path)(items))
    for normalize in ("auto", True):
        scores = values(bound(tokenizer, measured, normalize=normalize)(items))
        assert scores == pytest.approx([(value - 3.0) / 0.5 for value in raw], abs=1e-4)
    assert values(bound(tokenizer, measured, normalize=False)(items)) == pytest.approx(raw)
    with pytest.raises(UserInputError, match=r"has no score_normalization\.json"):
        bound(tokenizer, path, normalize=True)


@pytest.mark.parametrize("text", ["{", '{"mean": 0}', '{"mean": 0, "std": 0}', "[]"])
def test_a_damaged_normalization_is_refused(base: Path, measured: str, text: str) -> None:
    (Path(measured) / "score_normalization.json").write_text(text)
    with pytest.raises(UserInputError, match=r"score_normalization\.json.*set normalize: false"):
        bound(load_tokenizer(base), measured)


# -- process reward models --------------------------------------------------------------------


def test_step_ends_are_the_tokens_of_the_last_characters(base: Path) -> None:
    tokenizer = load_tokenizer(base)

    def ends(text: str, separator: str = "\n") -> list[int]:
        return step_ends(tokenizer, [*tokenizer.encode(text), END], separator)

    assert ends("ab\ncd e\nf") == [1, 6, 8]
    assert ends("ab \n\n  \ncd\n") == [1, 9]
    assert ends("ab;cd", ";") == [1, 4]
    assert ends("é\nb") == [1, 3]  # two bytes, and so two tokens
    assert (ends(""), ends(" \n ")) == ([0], [3])  # nothing that is a step: the last token


@pytest.mark.parametrize("aggregate", ["min", "mean", "last", "product"])
def test_steps_are_scored_at_their_ends_and_aggregated(
    base: Path, path: str, model: ScalarModel, aggregate: Any
) -> None:
    tokenizer = load_tokenizer(base)
    steps = [item(tokenizer, "one?", "ab\ncd e\nf"), item(tokenizer, "two", "a", cut_off=True)]
    rows = model.values(shown(steps), 4096, reads="after")
    chances = [1 / (1 + math.exp(-float(rows[0][at]))) for at in (1, 6, 8)]
    assert min(chances) < 0.99 and len({round(chance, 3) for chance in chances}) == 3
    by_hand = {
        "min": min(chances),
        "mean": sum(chances) / 3,
        "last": chances[2],
        "product": chances[0] * chances[1] * chances[2],
    }
    reward = ProcessRewardModelReward(path=path, dtype="float32", aggregate=aggregate)
    reward.bind(tokenizer)
    alone = 1 / (1 + math.exp(-float(rows[1][0])))
    assert values(reward(steps)) == pytest.approx([by_hand[aggregate], alone], abs=1e-5)


def test_steps_are_parted_as_in_training(
    base: Path, model: ScalarModel, noted: Callable[..., str]
) -> None:
    tokenizer = load_tokenizer(base)
    one = item(tokenizer, "one?", "ab;c\nd")
    (row,) = model.values(shown([one]), 4096, reads="after")

    def scored(separator: str | None) -> float:
        reward = ProcessRewardModelReward(
            path=folder, dtype="float32", aggregate="product", separator=separator
        )
        reward.bind(tokenizer)
        (value,) = values(reward([one]))
        return value

    def product(*ends: int) -> Any:
        chances = [1 / (1 + math.exp(-float(row[end]))) for end in ends]
        return pytest.approx(math.prod(chances), abs=1e-5)

    folder = noted(style="chat", separator=";")
    assert scored(None) == product(1, 5)
    assert scored("\n") == product(3, 5)
    folder = noted(style="chat")  # a note of no separator
    assert scored(None) == product(3, 5)


@pytest.mark.parametrize("separator", ["\n", "\n\n", " ## ", "ab"])
def test_steps_are_read_where_they_were_labelled(base: Path, separator: str) -> None:
    """Training finds their tokens by offsets, the reward by decoding."""
    tokenizer = load_tokenizer(base)
    answers = [["a.", "bc"], ["é🙂 \n", " x"], ["a\nb", "c"], ["xa", "b"], ["1 #", "# 2"]]
    rows = [{"prompt": "hi", "completions": steps, "labels": [1] * len(steps)} for steps in answers]
    built, _ = build_steps(rows, tokenizer, separator=separator)
    assert 3 <= len(built) <= 5
    for stepped in built:
        labelled = [i for i, marked in enumerate(stepped.sample.loss_mask) if marked]
        assert step_ends(tokenizer, stepped.sample.completion_ids, separator) == labelled


def test_a_process_reward_is_a_plug_in_and_refuses_another_vocabulary(
    base: Path, path: str
) -> None:
    rewards = build_rewards([RewardSpec("process_reward_model", 1.0, None, {"path": path})])
    assert isinstance(rewards, CompositeReward)
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["new"])
    with pytest.raises(UserInputError, match="another tokenizer"):
        rewards.bind(tokenizer)
    with pytest.raises(UserInputError, match="separator is empty"):
        ProcessRewardModelReward(path=path, separator="")


def test_i47_a_step_of_nan_is_a_crash(base: Path, tmp_path: Path) -> None:
    broken = load_scalar_model(base)
    with torch.no_grad():
        broken.head.weight.fill_(math.nan)
    save_scalar_model(broken, load_tokenizer(base), tmp_path)
    tokenizer = load_tokenizer(base)
    for aggregate in ("min", "mean", "last", "product"):
        reward = ProcessRewardModelReward(path=str(tmp_path), aggregate=aggregate)
        reward.bind(tokenizer)
        (score,) = run_reward("process", reward, [item(tokenizer, "one?", "a\nb")])
        assert score is not None and score.outcome is Outcome.CRASH
