"""The maker of critiques and revisions: what it asks, keeps, leaves out and counts."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_server import error, says, serving
from feedback_runs import (
    DATA,
    answering,
    context_of,
    endpoint,
    recipe_of,
    rows_of,
    run,
    steps_on_ranks,
    total,
)
from tiny_runs import events_of, rollouts_of, steps_of

from alignment.config.load import load_recipe
from alignment.data.formats import demonstration_of, detect, preference_of
from alignment.data.pairs import build_pairs
from alignment.data.samples import build_samples
from alignment.feedback.chat_model import Failure
from alignment.feedback.revision import Revision, RevisionStep
from alignment.modeling.tiny import build_tiny, byte_tokenizer
from alignment.runs.checkpoint import list_checkpoints
from alignment.runs.directory import RunDirectory
from alignment.trainers.constitutional import (
    ConstitutionalMaker,
    row_of,
    why_left_out,
    why_unfit,
)
from alignment.trainers.feedback import CACHE_FILE
from alignment.trainers.loop import Loop
from alignment.types import (
    AlignmentError,
    Completion,
    Outcome,
    Prompt,
    RewardedCompletion,
    StopReason,
    UserInputError,
)

ANY_FAILURE = "limits.unscorable=1.0"
SHORT = "algorithm.judge.max_new_tokens=64"  # a third of the replies end by then


def by_first_factor(messages: list[dict[str, Any]]) -> str | None:
    """Critiques are "hm"; the revision of "What is a * b?" is the answer itself for a = 0, blank
    for 1, refused for 2, and "b it is" for 3."""
    question, answer, last = messages[0]["content"], messages[1]["content"], messages[-1]["content"]
    if last in ("Wrong?", "Too long?", "Unclear?"):
        assert len(messages) == 3
        return "hm"
    assert last in ("Correct it.", "Shorten it.", "Say it clearly.")
    assert messages[3]["content"] == "hm"
    a, b = question.removeprefix("What is ").removesuffix("?").split(" * ")
    return {"0": f" {answer}\n", "1": " \n", "2": None, "3": f" {b} it is\n"}[a]


def expected_reason(sample: dict[str, Any]) -> str:
    question = sample["prompt"].split("What is ")[1]
    if not sample["completion"].strip():
        return "blank"
    return {"0": "unchanged", "1": "failed", "2": "failed", "3": ""}[question[0]]


def test_rows_are_the_revisions_and_the_rest_is_counted_by_reason(tmp_path: Path) -> None:
    with serving(answering(by_first_factor)) as server:
        made = run(
            "constitutional",
            tmp_path,
            "algorithm.prompts_per_step=5",
            "algorithm.steps=null",
            endpoint(server.url),
            ANY_FAILURE,
        )
    samples = [sample for step in rollouts_of(made) for sample in step]
    assert [len(step) for step in rollouts_of(made)] == [5, 5, 5, 1]
    assert len({sample["prompt"] for sample in samples}) == 16
    reasons = Counter(map(expected_reason, samples))
    kept = [sample for sample in samples if not expected_reason(sample)]
    rows = rows_of(made)
    assert len(rows) == len(kept) == total(made, "made/rows") == reasons[""] >= 3
    for row, sample in zip(rows, kept, strict=True):
        question = sample["prompt"].split("user\n")[1].split("<|im_end|>")[0]
        assert row["prompt"] == question
        assert row["completion"] == row["chosen"] == f"{question[-2]} it is"
        assert row["initial"] == sample["completion"]
        assert row["rejected"] == sample["completion"].strip()
        assert row["critiques"] == ["hm"]
        assert row["principles"][0] in ("right", "brief", "clear")
    for reason in ("blank", "cut_off", "failed", "unchanged"):
        assert total(made, f"made/left_out/{reason}") == reasons[reason]
    assert reasons["unchanged"] >= 3 and reasons["failed"] >= 6
    told = " ".join(event["message"] for event in events_of(made, "left_out"))
    assert "unchanged: " in told and "failed: " in told and "m at http://" in told


def test_failures_are_counted_by_class(tmp_path: Path) -> None:
    with serving(answering(by_first_factor)) as server:
        made = run(
            "constitutional",
            tmp_path,
            "algorithm.prompts_per_step=16",
            "algorithm.steps=1",
            endpoint(server.url),
            ANY_FAILURE,
        )
    (record,) = steps_of(made)
    assert record["judge/failed/refused"] == 4 / 16
    assert record["judge/failed/unparseable"] == 4 / 16
    assert record["judge/failed/timeout"] == record["judge/failed/cut_off"] == 0.0
    assert record["made/usable"] == record["made/rows"] / 16


def test_answers_that_can_give_no_row_are_not_asked_about(tmp_path: Path) -> None:
    with serving(answering(by_first_factor)) as server:
        made = run(
            "constitutional",
            tmp_path,
            "algorithm.prompts_per_step=16",
            "algorithm.steps=1",
            "algorithm.keep_cut_off=false",
            endpoint(server.url),
            ANY_FAILURE,
        )
        shown = {body["messages"][1]["content"] for body in server.bodies}
    (answers,) = rollouts_of(made)
    whole = [one for one in answers if one["stop_reason"] == "stop" and one["completion"].strip()]
    assert 0 < len(whole) < 16
    assert shown == {one["completion"] for one in whole}
    (record,) = steps_of(made)
    refused = sum(one["prompt"].split("What is ")[1][0] == "2" for one in whole)
    assert record["judge/failed/refused"] == pytest.approx(refused / len(whole))
    assert record["made/usable"] == record["made/rows"] / 16


def test_the_rows_serve_sft_and_preference_methods(tmp_path: Path) -> None:
    with serving(answering(by_first_factor)) as server:
        made = run("constitutional", tmp_path, endpoint(server.url), ANY_FAILURE)
    rows, tokenizer = rows_of(made), byte_tokenizer()
    row = rows[0]
    assert detect(row) == "preference"
    assert demonstration_of(row, chat=False) == (row["prompt"], row["chosen"])
    assert preference_of(row, chat=False) == (row["prompt"], row["chosen"], row["rejected"])
    samples, _ = build_samples(rows, tokenizer)
    pairs, _ = build_pairs(rows, tokenizer)
    assert len(samples) == len(pairs) == len(rows)
    for sample, chosen, rejected, row in zip(
        samples, pairs.chosen, pairs.rejected, rows, strict=True
    ):
        assert sample == chosen
        assert tokenizer.decode(chosen.completion_ids) == row["chosen"] + "<|im_end|>"
        assert tokenizer.decode(rejected.completion_ids) == row["initial"] + "<|im_end|>"


def item(text: str, stop: StopReason = StopReason.STOP) -> RewardedCompletion:
    completion = Completion(0, 0, (1,), (0.0,), stop, 0, text)
    return RewardedCompletion(Prompt((1,), "p", 0), completion, None, Outcome.SCORED, {})


@pytest.mark.parametrize(
    ("answer", "revised", "keep_cut_off", "reason"),
    [
        (item("a"), "b", False, ""),
        (item("a"), " a\n", False, "unchanged"),
        (item(" "), "b", True, "blank"),
        (item("a", StopReason.LENGTH), "b", False, "cut_off"),
        (item("a", StopReason.LENGTH), "b", True, ""),
        (item("a"), None, True, "failed"),
    ],
)
def test_why_an_answer_gives_no_row(
    answer: RewardedCompletion, revised: str | None, keep_cut_off: bool, reason: str
) -> None:
    text = answer.completion.text
    revision = (
        Revision(text, (), Failure.TIMEOUT)
        if revised is None
        else Revision(text, (RevisionStep("p", "c", "x"), RevisionStep("p", "c", revised)))
    )
    unfit = why_unfit(answer, keep_cut_off=keep_cut_off)
    assert (unfit or why_left_out(revision)) == reason
    assert bool(unfit) == (reason in ("blank", "cut_off"))


def test_white_space_does_not_tell_the_sides_apart() -> None:
    revision = Revision("\n a \n", (RevisionStep("p", "c", "b"),))
    answer = replace(item("\n a \n"), prompt=Prompt((1,), "p", 0, {"question": "q"}))
    row = row_of(answer, revision)
    assert (row["chosen"], row["rejected"], row["initial"]) == ("b", "a", "\n a \n")


def test_an_endpoint_that_is_down_stops_the_run_naming_the_class(tmp_path: Path) -> None:
    with (
        serving(error(503, "overloaded")) as server,
        pytest.raises(AlignmentError) as stopped,
    ):
        run("constitutional", tmp_path, endpoint(server.url), "limits.unscorable=0.5")
    message = str(stopped.value)
    assert "revisions by m at http://" in message
    assert "12 of 12 failed, over the limit of 50% (unavailable: 12)" in message
    assert "overloaded" in message


def test_a_key_comes_from_the_environment_and_stays_out_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", "very-secret")
    with serving(says("fine")) as server:
        made = run("constitutional", tmp_path, endpoint(server.url, api_key_variable="TEST_KEY"))
        assert set(server.keys) == {"Bearer very-secret"}
    files = [path for path in made.path.rglob("*") if path.is_file()]
    assert (made.cache_dir / CACHE_FILE) in files
    assert not [path for path in files if b"very-secret" in path.read_bytes()]


def test_a_local_model_with_the_policys_weights_says_what_the_policy_says(tmp_path: Path) -> None:
    settings = ("algorithm.steps=1", ANY_FAILURE)
    policy = run("constitutional", tmp_path / "policy", *settings, SHORT)
    judge = "algorithm.judge={kind: local, path: tiny-random, max_new_tokens: 64}"
    local = run("constitutional", tmp_path / "local", *settings, judge)
    assert rows_of(policy) == rows_of(local) != []


def test_a_local_judge_without_a_chat_template_is_told_what_it_lacks(tmp_path: Path) -> None:
    build_tiny(tmp_path / "judge")
    for file in (tmp_path / "judge").glob("*.jinja"):
        file.unlink()
    judge = f"algorithm.judge={{kind: local, path: '{tmp_path / 'judge'}'}}"
    with pytest.raises(UserInputError) as refused:
        run("constitutional", tmp_path, judge)
    said = str(refused.value)
    assert "its tokenizer has no chat template" in said
    assert "judge.path" in said
    assert "model.chat_template" not in said


def test_replies_are_sampled_as_the_recipe_says(tmp_path: Path) -> None:
    settings = ("algorithm.steps=1", "rollout.temperature=0.7", "algorithm.rounds=2")
    with serving(says("fine")) as server:
        run("constitutional", tmp_path / "a", endpoint(server.url), *settings)
        run(
            "constitutional",
            tmp_path / "b",
            endpoint(server.url, max_new_tokens=9, temperature=0.0),
            *settings,
        )
        sampling = Counter((body["max_tokens"], body["temperature"]) for body in server.bodies)
        seeds = {body["seed"] for body in server.bodies}
    assert sampling == {(16, 0.7): 48, (9, 0.0): 48}  # 12 answers, 2 rounds of 2 requests
    assert len(seeds) == 4


def test_a_system_message_is_shown_to_policy_and_judge(tmp_path: Path) -> None:
    with serving(says("fine")) as server:
        made = run("constitutional", tmp_path, endpoint(server.url), "data.system=Be brief.")
        assert {body["messages"][0]["content"] for body in server.bodies} == {"Be brief."}
    assert "system\nBe brief." in rollouts_of(made)[0][0]["prompt"]
    assert rows_of(made)[0]["prompt"].startswith("What is ")


@pytest.mark.parametrize("samples", [1, 2])
def test_the_rows_do_not_depend_on_the_number_of_ranks(tmp_path: Path, samples: int) -> None:
    recipe = recipe_of(
        "constitutional",
        tmp_path,
        f"algorithm.samples_per_prompt={samples}",
        f"algorithm.steps={3 - samples}",
        SHORT,
        ANY_FAILURE,
    )
    alone = steps_on_ranks("constitutional", recipe, tmp_path / "one", 1)
    assert len(alone) >= 4
    assert steps_on_ranks("constitutional", recipe, tmp_path / "three", 3) == alone


# -- resuming -------------------------------------------------------------------------------------


def assert_same_run(resumed: RunDirectory, whole: RunDirectory) -> None:
    assert resumed.data.read_bytes() == whole.data.read_bytes() != b""
    assert steps_of(resumed) == steps_of(whole)
    assert rollouts_of(resumed) == rollouts_of(whole)
    (_, mine), (_, yours) = (list_checkpoints(r.checkpoints_dir)[-1] for r in (resumed, whole))
    for file in yours.iterdir():
        assert (mine / file.name).read_bytes() == file.read_bytes()


class Interrupted(Exception):
    """Not one of the toolkit's: as a crash or a kill would be."""


def interrupt(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Raise at the `call`-th call of `owner.name`."""
    original, calls = getattr(owner, name), 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Interrupted
        return original(*arguments)

    patch.setattr(owner, name, failing)


FOUR_STEPS = ("algorithm.steps=4", "algorithm.prompts_per_step=6", "checkpoint.every=1")
BY_THE_POLICY = (*FOUR_STEPS, SHORT, ANY_FAILURE)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return run("constitutional", tmp_path_factory.mktemp("whole"), *BY_THE_POLICY)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(ConstitutionalMaker, "revise"), (Loop, "_keep_rows"), (Loop, "_save")],
    ids=["in the step", "before its rows", "before its checkpoint"],
)
def test_i45_resumed_is_uninterrupted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: RunDirectory,
    owner: Any,
    name: str,
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, 3)
        with pytest.raises(Interrupted):
            run("constitutional", tmp_path, *BY_THE_POLICY)
    resumed = run("constitutional", tmp_path, *BY_THE_POLICY)
    assert [event["step"] for event in events_of(resumed, "resume")] == [2]
    assert_same_run(resumed, uninterrupted)


def test_replies_that_were_paid_for_are_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(says("fine")) as server:
        settings = (*FOUR_STEPS, endpoint(server.url))
        with monkeypatch.context() as patch:
            interrupt(patch, Loop, "_save", 3)
            with pytest.raises(Interrupted):
                run("constitutional", tmp_path, *settings)
        assert len(server.bodies) == 3 * 6 * 2
        made = run("constitutional", tmp_path, *settings)
        assert len(server.bodies) == 4 * 6 * 2
    assert len(rows_of(made)) == total(made, "made/rows") > 20


def test_another_constitution_is_no_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.yaml"
    principle = "{name: n, critique: c, revision: r, preference: p}"
    file.write_text(f"principles: [{principle}]", encoding="utf-8")
    settings = (*FOUR_STEPS, f"algorithm.constitution={file}", ANY_FAILURE)
    with monkeypatch.context() as patch:
        interrupt(patch, Loop, "_save", 3)
        with pytest.raises(Interrupted):
            run("constitutional", tmp_path, *settings)
    file.write_text(f"principles: [{principle.replace('r,', 'x,')}]", encoding="utf-8")
    with pytest.raises(UserInputError, match="has changed since this run began"):
        run("constitutional", tmp_path, *settings)


# -- the recipe -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ("{kind: local}", "judge.path: required by kind: local, but missing"),
        ("{kind: endpoint, model: m}", "judge.base_url: required by kind: endpoint, but missing"),
        ("{kind: endpoint, base_url: 'http://x/v1'}", "judge.model: required by kind: endpoint"),
        ("{path: x}", "judge.path: applies to kind: local only; remove it"),
        ("{kind: local, path: x, retries: 1}", "judge.retries: applies to kind: endpoint only"),
        ("{timeout_seconds: 5.0}", "judge.timeout_seconds: applies to kind: endpoint only"),
        ("{cache: x}", "judge.cache: applies to kind: endpoint only"),
        ("{kind: endpoint, base_url: 'http://x', model: m, path: x}", "judge.path: applies to"),
        ("{kind: endpoint, base_url: 'localhost:80', model: m}", "judge.base_url: "),
        ("{api_key: x}", "judge.api_key: unknown key; did you mean 'api_key_variable'?"),
    ],
)
def test_options_that_do_not_apply_are_refused(judge: str, said: str) -> None:
    with pytest.raises(UserInputError) as refused:
        load_recipe("tiny/constitutional", [f"algorithm.judge={judge}"])
    assert said in str(refused.value)


@pytest.mark.parametrize("key", ["sk-proj-1234", "$MY_KEY", "MY KEY", "1KEY", "", "KEY\\n"])
def test_a_key_in_place_of_its_variable_is_refused_without_showing_it(
    key: str, tmp_path: Path
) -> None:
    judge = f'{{kind: endpoint, base_url: "http://x", model: m, api_key_variable: "{key}"}}'
    (tmp_path / "r.yaml").write_text(
        f"run: {{name: r}}\nmodel: {{path: tiny-random}}\n{DATA.replace('=', ': ')}\n"
        f"algorithm:\n  type: constitutional\n  prompts_per_step: 1\n  judge: {judge}\n"
        "rollout: {max_new_tokens: 4}\n"
    )
    with pytest.raises(UserInputError) as refused:
        load_recipe(str(tmp_path / "r.yaml"))
    said = str(refused.value)
    assert "algorithm.judge.api_key_variable: give the name of an environment variable" in said
    shown = "".join(traceback.format_exception(refused.value))
    assert "sk-proj" not in shown
    assert "$MY_KEY" not in shown


def test_rewards_are_refused() -> None:
    rewards = "rewards=[{type: regex, pattern: x}]"
    with pytest.raises(UserInputError, match="constitutional does not learn from rewards"):
        load_recipe("tiny/constitutional", [rewards])


def test_a_recipe_is_checked_without_torch() -> None:
    code = (
        "import sys; from alignment.config.load import load_recipe; "
        "load_recipe('tiny/constitutional'); load_recipe('tiny/ai_feedback', ['rewards=[]']); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ, timeout=60)


def test_a_constitution_that_is_not_there_is_named_and_leaves_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="unknown constitution 'tyni'; did you mean 'tiny'"):
        run("constitutional", tmp_path, "algorithm.constitution=tyni")
    assert not (tmp_path / "run").exists()


def test_what_the_constitution_said_is_in_the_events(tmp_path: Path) -> None:
    recipe = recipe_of("constitutional", tmp_path)
    context: Any = context_of(recipe, tmp_path / "context")
    ConstitutionalMaker(context)
    (event,) = events_of(RunDirectory(tmp_path / "context"), "constitution")
    assert event["message"] == "tiny: right, brief, clear; feedback from the policy"
    assert event["constitution"]["principles"][0]["critique"] == "Wrong?"
