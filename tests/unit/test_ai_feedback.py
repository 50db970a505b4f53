"""The maker of AI preferences: which pairs it asks about, what it keeps, and its statistics."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_server import serving
from feedback_runs import (
    answering,
    context_of,
    endpoint,
    recipe_of,
    rows_of,
    run,
    steps_on_ranks,
    total,
)
from safetensors.torch import load_file
from tiny_runs import events_of, metrics_of, rollouts_of, steps_of
from transformers import AutoModelForSequenceClassification

from alignment.config.load import load_recipe
from alignment.config.schema import Recipe
from alignment.data.pairs import build_pairs
from alignment.feedback.chat_model import Failure
from alignment.modeling.tiny import byte_tokenizer
from alignment.runs.checkpoint import list_checkpoints
from alignment.runs.directory import RunDirectory
from alignment.trainers.ai_feedback import pairs_of, statistics, why_unfit
from alignment.trainers.loop import Loop
from alignment.trainers.run import train
from alignment.types import (
    AlignmentError,
    Completion,
    Outcome,
    Prompt,
    RewardedCompletion,
    Rollout,
    StopReason,
    UserInputError,
)

TEXT = ("algorithm.verdict=text", "algorithm.require_consistent=true")
EVEN = "rewards=[{type: 'tiny_runs:even_tokens'}]"
SHOWN = re.compile(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\nBy the principle", re.DOTALL)


def of_question(question: str, a: str, b: str) -> str | None:
    """The judge's reply: by the second factor of "What is x * y?", the longer answer (0), always
    the first shown (1), a tie (2), or no verdict in one order of the two (3)."""
    rule = question.removesuffix("?")[-1]
    longer = "A" if (len(a), a) > (len(b), b) else "B"
    return {"0": longer, "1": "A", "2": "tie", "3": "A" if a > b else "well ..."}[rule]


def scripted(messages: list[dict[str, Any]]) -> str | None:
    (message,) = messages
    question = re.search(r"What is \d \* \d\?", message["content"])
    shown = SHOWN.search(message["content"])
    assert question is not None and shown is not None
    return of_question(question[0], shown[1], shown[2])


def expected(first: str, second: str, question: str) -> str:
    """Why a pair gives no row by the rules of `scripted`, or which answer is chosen."""
    a, b = first.strip(), second.strip()
    if not a or not b:
        return "blank"
    if a == b:
        return "same"
    replies = of_question(question, a, b), of_question(question, b, a)
    if "well ..." in replies:
        return "failed"
    if replies == ("tie", "tie"):
        return "tie"
    if replies == ("A", "A"):
        return "inconsistent"
    return first if replies == ("A", "B") else second


def sampled_pairs(run: RunDirectory) -> list[tuple[dict[str, Any], dict[str, Any], str]]:
    """(first answer, second answer, question) of everything sampled, in order."""
    samples = [sample for step in rollouts_of(run) for sample in step]
    questions = [json.loads(sample["prompt_row"])["question"] for sample in samples[::2]]
    return list(zip(samples[::2], samples[1::2], questions, strict=True))


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """64 pairs in three steps, judged by `scripted`, with the share of even tokens as gold."""
    with serving(answering(scripted)) as server:
        return run(
            "ai_feedback",
            tmp_path_factory.mktemp("judged"),
            *TEXT,
            EVEN,
            endpoint(server.url),
            "algorithm.pairs_per_prompt=4",
            "algorithm.steps=null",
            "algorithm.prompts_per_step=6",
            "limits.unscorable=1.0",
        )


def test_rows_are_what_the_judge_prefers_in_both_orders(judged: RunDirectory) -> None:
    rows, n_rows, reasons = rows_of(judged), 0, Counter[str]()
    for first, second, question in sampled_pairs(judged):
        verdict = expected(first["completion"], second["completion"], question)
        if verdict in ("blank", "same", "failed", "tie", "inconsistent"):
            reasons[verdict] += 1
            continue
        row = rows[n_rows]
        n_rows += 1
        chosen, rejected = (first, second) if verdict == first["completion"] else (second, first)
        assert (row["prompt"], row["chosen"], row["rejected"]) == (
            question,
            chosen["completion"],
            rejected["completion"],
        )
        assert (row["reward_chosen"], row["reward_rejected"]) == (
            chosen["reward"],
            rejected["reward"],
        )
        assert row["principle"] in ("right", "brief", "clear")
        assert "judge_margin" not in row
    assert n_rows == len(rows) == total(judged, "made/rows") > 10
    for reason in ("blank", "cut_off", "same", "failed", "inconsistent", "tie"):
        assert total(judged, f"made/left_out/{reason}") == reasons[reason]
    assert min(reasons["failed"], reasons["inconsistent"], reasons["tie"]) > 10
    assert total(judged, "judge/comparisons") == 64 - reasons["blank"] - reasons["same"]


def test_the_rows_serve_preference_methods(judged: RunDirectory) -> None:
    rows, tokenizer = rows_of(judged), byte_tokenizer()
    pairs, report = build_pairs(rows, tokenizer)
    assert len(pairs) == len(rows) - report.n_dropped > 10
    assert pairs.margins == ()


def test_a_reward_model_of_the_rows_is_reward_and_critic_of_ppo(
    judged: RunDirectory, tmp_path: Path
) -> None:
    def recipe(name: str, *overrides: str) -> Recipe:
        common = ("algorithm.steps=2", "expect=[]", f"run.dir={tmp_path}")
        found = load_recipe(name, [*common, *overrides])
        assert isinstance(found, Recipe)
        return found

    labels = f"data={{type: file, path: '{judged.data}', held_out: 4}}"
    learned = train(recipe("tiny/reward_model", labels))
    ppo = recipe(
        "tiny/ppo",
        f"algorithm.critic.path='{learned.model_dir}'",
        f"rewards=[{{type: reward_model, path: '{learned.model_dir}', dtype: float32}}]",
        "algorithm.prompts_per_step=8",
    )
    saved = load_file(learned.model_dir / "model.safetensors")
    critic: Any = context_of(ppo, tmp_path / "start").critic
    head = {"score.weight": critic.model.head.weight}
    start = {f"model.{n}": p for n, p in critic.model.decoder.named_parameters()} | head
    assert start.keys() == saved.keys()
    assert all(torch.equal(start[name], saved[name]) for name in saved)
    finished = train(ppo)
    for one in (learned, finished):
        assert (one.path / "finished.json").is_file()
        assert len(metrics_of(one)) == 2
        assert all(math.isfinite(value) for record in metrics_of(one) for value in record.values())
    scores = scores_of(learned, rollouts_of(finished)[0])
    assert len({round(score, 3) for score in scores}) > 4
    assert [row["reward"] for row in rollouts_of(finished)[0]] == pytest.approx(scores, abs=1e-4)
    assert metrics_of(finished)[0]["reward/mean"] == pytest.approx(sum(scores) / 8, abs=1e-4)


def scores_of(learned: RunDirectory, rows: list[dict[str, Any]]) -> list[float]:
    """What transformers makes of a reward model, row by row, normalized by hand."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(learned.model_dir)
    ids = [torch.tensor([[*row["prompt_ids"], *row["completion_ids"]]]) for row in rows]
    with torch.no_grad():
        raw = [float(model(input_ids=one).logits) for one in ids]
    stated = json.loads((learned.model_dir / "score_normalization.json").read_text("utf-8"))
    return [(score - stated["mean"]) / stated["std"] for score in raw]


def test_statistics_are_those_of_all_verdicts(judged: RunDirectory) -> None:
    """By hand: the verdicts of `scripted` in both orders, over all steps."""
    failed = agree = first_won = ties = n = gold = gold_agrees = 0
    for first, second, question in sampled_pairs(judged):
        verdict = expected(first["completion"], second["completion"], question)
        if verdict in ("blank", "same"):
            continue
        n += 1
        failed += verdict == "failed"
        first_won += verdict == "inconsistent"
        ties += verdict == "tie"
        if verdict in ("failed", "inconsistent"):
            continue
        agree += 1
        if verdict != "tie" and first["reward"] != second["reward"]:
            better = first if first["reward"] > second["reward"] else second
            gold += 1
            gold_agrees += verdict == better["completion"]
    last = metrics_of(judged)[-1]
    n_judged = n - failed
    assert last["judge/total/comparisons"] == n
    assert last["judge/total/swap_consistency"] == pytest.approx(agree / n_judged)
    assert last["judge/total/first_bias"] == pytest.approx(first_won / n_judged)
    assert last["judge/total/second_bias"] == 0.0
    assert last["judge/total/tie_share"] == pytest.approx(2 * ties / (2 * n_judged))
    assert last["judge/total/usable"] == pytest.approx((agree - ties) / n)
    assert last["judge/total/gold_agreement"] == pytest.approx(gold_agrees / gold)
    assert 0.0 < last["judge/total/kappa"] < 1.0
    failures = sum(
        record["judge/failed/unparseable"] * record["judge/comparisons"]
        for record in metrics_of(judged)
    )
    assert failures == pytest.approx(failed)
    (event,) = events_of(judged, "agreement")
    assert event["message"].startswith(f"the judge in all: {n} comparisons, swap consistency 0.")


def test_labels_are_compared_with_the_rewards(judged: RunDirectory) -> None:
    rows = [row for row in rows_of(judged) if row["reward_chosen"] != row["reward_rejected"]]
    share = sum(row["reward_chosen"] > row["reward_rejected"] for row in rows) / len(rows)
    assert metrics_of(judged)[-1]["judge/total/gold_agreement"] == pytest.approx(share)


def test_a_judge_that_gives_no_verdict_stops_the_run_naming_the_class(tmp_path: Path) -> None:
    with serving(answering(lambda _: "I like both")) as server, pytest.raises(AlignmentError) as e:
        run("ai_feedback", tmp_path, *TEXT, "rewards=[]", endpoint(server.url))
    message = str(e.value)
    assert "verdicts of m at http://" in message
    assert "over the limit of 20% (unparseable: " in message and "'I like both'" in message


def test_verdicts_are_asked_for_shortly_and_greedily(tmp_path: Path) -> None:
    with serving(answering(lambda _: "tie")) as server:
        run("ai_feedback", tmp_path, *TEXT, "rewards=[]", endpoint(server.url))
        assert {(body["max_tokens"], body["temperature"]) for body in server.bodies} == {(16, 0.0)}
        shown = Counter(body["messages"][0]["content"] for body in server.bodies)
    assert max(shown.values()) == 1  # no order is shown twice


# -- verdicts by log-probabilities ----------------------------------------------------------------


def test_margins_decide_and_small_ones_are_left_out(tmp_path: Path) -> None:
    every = run("ai_feedback", tmp_path / "every")
    margins = [row["judge_margin"] for row in rows_of(every)]
    assert len(margins) > 30 and min(margins) > 0.0
    for number, record in enumerate(metrics_of(every), start=1):
        made = (every.made_dir / f"step-{number:06d}.jsonl").read_text(encoding="utf-8")
        rewards = [
            (row["reward_chosen"], row["reward_rejected"])
            for row in map(json.loads, made.splitlines())
        ]
        hits = [chosen > rejected for chosen, rejected in rewards if chosen != rejected]
        assert record["made/gold_agreement"] == pytest.approx(sum(hits) / len(hits))
    middle = sorted(margins)[len(margins) // 2]
    some = run("ai_feedback", tmp_path / "some", f"algorithm.min_margin={middle}")
    assert rows_of(some) == [row for row in rows_of(every) if row["judge_margin"] > middle]
    assert total(some, "made/left_out/tie") == len(margins) - len(rows_of(some))
    strict = run("ai_feedback", tmp_path / "strict", "algorithm.require_consistent=true")
    assert rows_of(strict) == []  # the tiny model goes by the letter
    assert total(strict, "made/left_out/inconsistent") == len(margins)


def test_the_rows_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    recipe = recipe_of("ai_feedback", tmp_path, "rewards=[]")
    alone = steps_on_ranks("ai_feedback", recipe, tmp_path / "one", 1)
    assert len(alone) > 30
    assert steps_on_ranks("ai_feedback", recipe, tmp_path / "three", 3) == alone


# -- parts ----------------------------------------------------------------------------------------


def item(prompt: int, sample: int, text: str, reward: float | None = None) -> RewardedCompletion:
    stop = StopReason.LENGTH if text.endswith("-") else StopReason.STOP
    completion = Completion(prompt, sample, (1,), (0.0,), stop, 0, text)
    return RewardedCompletion(Prompt((1,), "p", prompt), completion, reward, Outcome.SCORED, {})


def test_pairs_are_neighbours_with_a_number_of_their_own() -> None:
    items = tuple(
        item(prompt, sample, f"{prompt}{sample}") for prompt in (7, 8) for sample in range(4)
    )
    pairs = list(pairs_of(Rollout(items, group_size=4, step=1)))
    texts = [(pair.first.completion.text, pair.second.completion.text) for pair in pairs]
    assert texts == [("70", "71"), ("72", "73"), ("80", "81"), ("82", "83")]
    assert [pair.number for pair in pairs] == [14, 15, 16, 17]


@pytest.mark.parametrize(
    ("first", "second", "gold"),
    [(1.0, 0.0, "first"), (0.0, 1.0, "second"), (1.0, 1.0, None), (None, 1.0, None)],
)
def test_the_gold_label_is_the_better_reward(
    first: float | None, second: float | None, gold: str | None
) -> None:
    rollout = Rollout((item(0, 0, "a", first), item(0, 1, "b", second)), 2, 1)
    (pair,) = pairs_of(rollout)
    assert pair.gold == gold


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ("a", "b", ""),
        ("a ", "a", "same"),
        (" ", "a", "blank"),
        ("a", "", "blank"),
        ("a-", "b", "cut_off"),
    ],
)
def test_which_pairs_are_not_asked_about(first: str, second: str, reason: str) -> None:
    (pair,) = pairs_of(Rollout((item(0, 0, first), item(0, 1, second)), 2, 1))
    assert why_unfit(pair, keep_cut_off=False) == reason
    assert why_unfit(pair, keep_cut_off=True) == ("" if reason == "cut_off" else reason)


def test_statistics_of_counted_verdicts() -> None:
    stats = statistics(
        Counter(
            {
                ("", "first", "first", "first", True, "first"): 3,
                ("", "second", "second", "second", True, "first"): 1,
                ("", "first", "second", None, False, None): 4,
                ("timeout", None, None, None, False, None): 2,
            }
        )
    )
    assert (stats.n, stats.n_judged, stats.n_usable) == (10, 8, 4)
    assert stats.failures == {Failure.TIMEOUT: 2}
    assert (stats.swap_consistency, stats.first_bias, stats.second_bias) == (0.5, 0.5, 0.0)
    assert stats.gold_agreement == 0.75
    # p_o = 4/8; first: 7/8 then 3/8, second: 1/8 then 5/8; p_e = 21/64 + 5/64 = 26/64.
    assert stats.kappa == pytest.approx((32 - 26) / (64 - 26))


# -- resuming -------------------------------------------------------------------------------------


def test_i45_resumed_is_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("algorithm.steps=3", "algorithm.prompts_per_step=6", "checkpoint.every=1", EVEN)
    whole = run("ai_feedback", tmp_path / "whole", *settings)
    original = Loop._save

    def failing(self: Loop, step: int, *arguments: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt
        original(self, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_save", failing)
        with pytest.raises(KeyboardInterrupt):
            run("ai_feedback", tmp_path / "resumed", *settings)
    resumed = run("ai_feedback", tmp_path / "resumed", *settings)
    assert [event["step"] for event in events_of(resumed, "resume")] == [2]
    assert resumed.data.read_bytes() == whole.data.read_bytes() != b""
    assert steps_of(resumed) == steps_of(whole)
    assert steps_of(whole)[-1]["judge/total/comparisons"] == total(whole, "judge/comparisons")
    (_, mine), (_, yours) = (list_checkpoints(r.checkpoints_dir)[-1] for r in (resumed, whole))
    for file in yours.iterdir():
        assert (mine / file.name).read_bytes() == file.read_bytes()


# -- the recipe -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("algorithm.verdict=text",), "require_consistent: of two verdicts in text that differ"),
        ((*TEXT, "algorithm.min_margin=0.1"), "min_margin: applies to verdict: logprobs only"),
        (
            ("algorithm.judge={kind: endpoint, base_url: 'http://x/v1', model: m}",),
            "verdict: an endpoint gives no log-probabilities of given answers; use text",
        ),
        (("algorithm.judge.temperature=0.5",), "judge.temperature: with verdict: logprobs nothing"),
        (("algorithm.judge.max_new_tokens=5",), "judge.max_new_tokens: with verdict: logprobs"),
        (("algorithm.judge={kind: local}",), "judge.path: required by kind: local"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserInputError) as refused:
        load_recipe("tiny/ai_feedback", list(settings))
    assert said in str(refused.value)
