"""Constitution files, and critique and revision by them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from alignment.feedback.chat_model import Conversation, Failure, Reply, check_failures
from alignment.feedback.constitution import (
    Constitution,
    load_constitution,
    shipped_constitutions,
)
from alignment.feedback.revision import (
    Response,
    Revision,
    RevisionStep,
    critique_and_revise,
)
from alignment.types import AlignmentError, UserInputError

PRINCIPLE = "{name: kind, critique: 'is it kind?', revision: 'be kind', preference: kinder}"
SECOND = "{name: right, critique: 'is it true?', revision: 'be true', preference: truer}"
EXAMPLE = "{question: Q, response: R, principle: kind, critique: C, revision: V}"


def made(text: str, folder: Path) -> Constitution:
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    return load_constitution(folder / "c.yaml")


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(shipped_constitutions()))
def test_a_shipped_constitution_is_valid_and_says_what_it_is(name: str) -> None:
    constitution = load_constitution(name)
    assert len(constitution.principles) >= 3
    assert shipped_constitutions()[name].read_text(encoding="utf-8").startswith("# ")
    for principle in constitution.principles:
        assert max(len(principle.critique), len(principle.revision)) < 300


def test_there_is_a_shipped_constitution() -> None:
    assert "plain" in shipped_constitutions()


def test_a_file_is_read(tmp_path: Path) -> None:
    constitution = made(f"principles: [{PRINCIPLE}]\nexamples: [{EXAMPLE}]", tmp_path)
    assert constitution.principle("kind").critique == "is it kind?"
    assert constitution.examples[0].revision == "V"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("principles: []", "c.yaml:1: principles: expected at least 1 items"),
        ("{}", "principles: required, but missing"),
        (f"principles: [{PRINCIPLE}]\nexample: []", "c.yaml:2: example: unknown key; did you mean"),
        ("principles:\n- {name: x, critique: c, revision: r}", "preference: required, but missing"),
        (f"principles: [{PRINCIPLE.replace('kinder', '3')}]", "preference: expected text"),
        (f"principles: [{PRINCIPLE.replace('kinder', '')}]", "preference: expected text"),
        (f"principles: [{PRINCIPLE.replace('kinder', ' ' * 3)}]", "preference: expected text"),
        (f"principles: [{PRINCIPLE}, {PRINCIPLE}]", "'kind' is the name of two principles"),
        (
            f"principles: [{PRINCIPLE}]\nexamples: [{EXAMPLE.replace('kind', 'kin')}]",
            "examples.0.principle: unknown principle 'kin'; did you mean 'kind'?",
        ),
        ("- a list", "c.yaml:1:"),
        ("principles: [", "not valid YAML"),
        ("", "the file is empty"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserInputError) as caught:
        made(text, tmp_path)
    assert said in str(caught.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="unknown constitution 'plian'; did you mean 'plain'"):
        load_constitution("plian")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserInputError, match="not UTF-8"):
        load_constitution(tmp_path / "c.yaml")


def test_principles_are_drawn_by_counters_and_evenly(tmp_path: Path) -> None:
    constitution = made(f"principles: [{PRINCIPLE}, {SECOND}]", tmp_path)
    drawn = [constitution.draw(3, item, round_).name for item in range(500) for round_ in (0, 1)]
    assert drawn == [constitution.draw(3, i, r).name for i in range(500) for r in (0, 1)]
    assert drawn != [constitution.draw(4, i, r).name for i in range(500) for r in (0, 1)]
    assert drawn[::2] != drawn[1::2]
    assert abs(Counter(drawn)["kind"] - 500) < 5 * 1000**0.5 / 2


# --- critique and revision -----------------------------------------------------------------------


class Author:
    """Answers with what a function of the conversation says, and remembers the calls."""

    name = "a scripted author"

    def __init__(self, answer: Callable[[Conversation], str | Reply]) -> None:
        self.answer = answer
        self.calls: list[list[Conversation]] = []
        self.seeds: list[int] = []

    def reply(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[Reply]:
        self.calls.append(list(conversations))
        self.seeds.append(seed)
        answers = [self.answer(conversation) for conversation in conversations]
        return [answer if isinstance(answer, Reply) else Reply(answer) for answer in answers]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def counted(conversation: Conversation) -> str:
    """What is asked, and of which answer: the critique of "r" is "critique of r"."""
    if conversation[-1]["content"].startswith("is it"):
        return f"critique of {conversation[-2]['content']}"
    return f"({conversation[-4]['content']})'"


def test_a_round_is_a_critique_and_a_revision_of_what_it_was_given(tmp_path: Path) -> None:
    constitution = made(f"principles: [{PRINCIPLE}]\nexamples: [{EXAMPLE}]", tmp_path)
    author = Author(counted)
    system = {"role": "system", "content": "S"}
    response = Response(0, [system, user("q")], "r")
    (revision,) = critique_and_revise(
        author, constitution, [response], rounds=2, seed=0, max_new_tokens=9
    )
    assert revision == Revision(
        "r",
        (
            RevisionStep("kind", "critique of r", "(r)'"),
            RevisionStep("kind", "critique of (r)'", "((r)')'"),
        ),
    )
    assert revision.final == "((r)')'"
    shown = [user("Q"), said("R"), user("is it kind?"), said("C"), user("be kind"), said("V")]
    head = [system, *shown, user("q")]
    assert author.calls == [
        [[*head, said("r"), user("is it kind?")]],
        [[*head, said("r"), user("is it kind?"), said("critique of r"), user("be kind")]],
        [[*head, said("(r)'"), user("is it kind?")]],
        [[*head, said("(r)'"), user("is it kind?"), said("critique of (r)'"), user("be kind")]],
    ]
    assert len(set(author.seeds)) == 4


def test_an_item_that_fails_goes_no_further_and_the_others_do(tmp_path: Path) -> None:
    constitution = made(f"principles: [{PRINCIPLE}]", tmp_path)

    def answer(conversation: Conversation) -> str | Reply:
        question, critique = conversation[0]["content"], len(conversation) == 3
        if question == "no critique" and critique:
            return Reply(None, Failure.TIMEOUT, "60 s")
        if question == "long critique" and critique:
            return Reply("it is", Failure.CUT_OFF, "limit")
        if question == "only thoughts" and critique:
            return Reply("", Failure.CUT_OFF, "limit")
        if question == "blank critique" and critique:
            return " \n"
        if question == "long revision" and not critique:
            return Reply("half a", Failure.CUT_OFF, "limit")
        if question == "blank revision" and not critique:
            return ""
        # Fails in the second round: what is revised was revised before.
        if question == "second round" and critique and conversation[1]["content"] == "better":
            return Reply(None, Failure.REFUSED, "no")
        return "bad" if critique else " better\n"

    questions = [
        "no critique",
        "long critique",
        "only thoughts",
        "blank critique",
        "long revision",
        "blank revision",
        "second round",
        "fine",
    ]
    author = Author(answer)
    found = critique_and_revise(
        author,
        constitution,
        [Response(number, [user(question)], "r") for number, question in enumerate(questions)],
        rounds=2,
        seed=0,
        max_new_tokens=9,
    )
    by_question = dict(zip(questions, found, strict=True))
    failures = [revision.failure for revision in found]
    assert failures[:3] == ["timeout", "", "cut_off"]
    assert failures[3:] == ["unparseable", "cut_off", "unparseable", "refused", ""]
    assert [len(call) for call in author.calls] == [8, 5, 3, 2]
    assert by_question["no critique"].detail == "critique: 60 s"
    assert by_question["only thoughts"].detail == "critique: limit"
    assert by_question["long revision"].final is None
    assert by_question["long critique"].steps[0] == RevisionStep("kind", "it is", "better")
    assert by_question["second round"].steps == (RevisionStep("kind", "bad", "better"),)
    assert by_question["second round"].final is None
    assert by_question["fine"].final == "better"
    with pytest.raises(AlignmentError, match=r"6 of 8 failed.*unparseable: 2"):
        check_failures(found, 0.5, "revisions")


def test_items_made_in_two_calls_are_as_if_made_in_one(tmp_path: Path) -> None:
    constitution = made(f"principles: [{PRINCIPLE}, {SECOND}]", tmp_path)
    responses = [Response(i, [user(f"q{i}")], f"r{i}") for i in range(20)]

    def revise(start: int, end: int, every: int = 1) -> list[Revision]:
        return critique_and_revise(
            Author(counted),
            constitution,
            responses[start:end:every],
            rounds=2,
            seed=1,
            max_new_tokens=9,
        )

    whole = revise(0, 20)
    assert revise(0, 7) + revise(7, 20) == whole
    assert revise(0, 20, every=3) == whole[::3]  # whatever is left out
    assert {step.principle for revision in whole for step in revision.steps} == {"kind", "right"}


def test_no_rounds_change_nothing(tmp_path: Path) -> None:
    constitution = made(f"principles: [{PRINCIPLE}]", tmp_path)
    author = Author(counted)
    options = {"seed": 0, "max_new_tokens": 9}
    response = Response(0, [user("q")], "r")
    (same,) = critique_and_revise(author, constitution, [response], rounds=0, **options)
    assert (same.final, author.calls) == ("r", [])
    with pytest.raises(UserInputError, match="-1 rounds"):
        critique_and_revise(author, constitution, [], rounds=-1, **options)
