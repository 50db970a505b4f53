"""Pairwise judgements: both orders asked, strict verdicts, statistics worked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from alignment.feedback.agreement import agreement
from alignment.feedback.chat_model import (
    ContinuationScores,
    Conversation,
    Failure,
    Reply,
    check_failures,
)
from alignment.feedback.endpoint import EndpointChatModel
from alignment.feedback.judging import Judgement, Preference, Verdict, judge_pairs, parse_verdict
from alignment.types import AlignmentError, UserInputError

QUESTION = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}]


class Judge:
    """Answers each showing with what a function of its text says."""

    name = "a scripted judge"

    def __init__(self, answer: Callable[[str], str | Reply]) -> None:
        self.answer = answer
        self.shown: list[str] = []
        self.settings: dict[str, float] = {}

    def reply(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[Reply]:
        self.settings = {"limit": max_new_tokens, "temperature": temperature, "seed": seed}
        texts = [conversation[-1]["content"] for conversation in conversations]
        self.shown += texts
        answers = [self.answer(text) for text in texts]
        return [answer if isinstance(answer, Reply) else Reply(answer) for answer in answers]


class ScoringJudge(Judge):
    """log p("A") and log p("B") by a function of what is shown."""

    def __init__(self, logprobs: Callable[[str], tuple[float, float] | None]) -> None:
        super().__init__(lambda text: "A")
        self.logprobs = logprobs

    def score(
        self, conversations: Sequence[Conversation], continuations: Sequence[str]
    ) -> list[ContinuationScores]:
        assert list(continuations) == ["A", "B"]
        found = [self.logprobs(conversation[-1]["content"]) for conversation in conversations]
        refused = ContinuationScores((), Failure.REFUSED, "too long")
        return [refused if pair is None else ContinuationScores(pair) for pair in found]


def shown_first(text: str) -> str:
    return text.split("[Answer A]\n")[1].split("\n")[0]


def shown_second(text: str) -> str:
    return text.split("[Answer B]\n")[1].split("\n")[0]


def judged(answer: Callable[[str], str | Reply], *pairs: tuple[str, str]) -> list[Judgement]:
    items = [(QUESTION, *pair) for pair in pairs or [("good", "bad")]]
    return judge_pairs(Judge(answer), items, principle="be good", seed=1)


# --- both orders ---------------------------------------------------------------------------------


def test_each_pair_is_shown_twice_with_the_answers_swapped() -> None:
    judge = Judge(lambda text: "A")
    items = [(QUESTION, "one", "two"), (QUESTION, "three", "four")]
    judge_pairs(judge, items, principle="be good", seed=5, max_new_tokens=9, temperature=0.5)
    pairs = [(shown_first(text), shown_second(text)) for text in judge.shown]
    assert pairs == [("one", "two"), ("two", "one"), ("three", "four"), ("four", "three")]
    assert judge.settings == {"limit": 9, "temperature": 0.5, "seed": 5}
    for text in judge.shown:
        assert "[Principle]\nbe good\n" in text
        assert "[Conversation]\nSystem: Be kind.\nUser: Who?\n" in text


@pytest.mark.parametrize(
    ("pair", "preferred"), [(("good", "bad"), "first"), (("bad", "good"), "second")]
)
def test_a_judge_that_looks_at_the_answers_is_consistent(
    pair: tuple[str, str], preferred: Preference
) -> None:
    (judgement,) = judged(lambda text: "A" if shown_first(text) == "good" else "B", pair)
    assert judgement == Judgement(preferred, True, verdicts=(preferred, preferred))
    assert judgement.usable


@pytest.mark.parametrize(("letter", "verdicts"), [("A", "fs"), ("B", "sf")])
def test_a_judge_that_looks_at_the_position_prefers_nothing(letter: str, verdicts: str) -> None:
    (judgement,) = judged(lambda text: letter)
    words: dict[str, Verdict] = {"f": "first", "s": "second"}
    assert judgement == Judgement(None, False, verdicts=(words[verdicts[0]], words[verdicts[1]]))
    assert not judgement.usable


def test_ties_are_consistent_and_of_no_use() -> None:
    (both,) = judged(lambda text: "tie")
    assert both == Judgement(None, True, verdicts=("tie", "tie"))
    assert not both.usable
    (one,) = judged(lambda text: "tie" if shown_first(text) == "good" else "B")
    assert one == Judgement(None, False, verdicts=("tie", "first"))


def test_one_failed_order_fails_the_judgement_and_no_other() -> None:
    def answer(text: str) -> str | Reply:
        if shown_first(text) == "x":
            return Reply(None, Failure.TIMEOUT, "60 s")
        if shown_first(text) == "cut":
            return Reply("A", Failure.CUT_OFF, "limit")
        return "I like both" if shown_first(text) == "chatty" else "A"

    found = judged(answer, ("a", "x"), ("cut", "a"), ("a", "chatty"), ("a", "b"))
    assert [j.failure for j in found] == ["timeout", "cut_off", "unparseable", ""]
    assert [j.verdicts for j in found[:3]] == [
        ("first", None),
        (None, "second"),
        ("first", None),
    ]
    assert [j.usable for j in found] == [False] * 4
    assert found[0].detail == "60 s"
    assert found[2].detail == "no verdict in 'I like both'"


def test_one_principle_for_each_comparison() -> None:
    judge = Judge(lambda text: "A")
    items = [(QUESTION, "one", "two"), (QUESTION, "three", "four")]
    judge_pairs(judge, items, principle=["be brief", "be {kind}"], seed=0)
    assert ["be brief" in text for text in judge.shown] == [True, True, False, False]
    assert ["be {kind}" in text for text in judge.shown] == [False, False, True, True]
    with pytest.raises(UserInputError, match="1 principles for 2 comparisons"):
        judge_pairs(judge, items, principle=["be brief"], seed=0)


# --- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", "first"),
        ("B", "second"),
        (" **B**\n", "second"),
        ("(A).", "first"),
        ("Answer A", "first"),
        ("answer: B", "second"),
        ("Tie.", "tie"),
        ("TIE", "tie"),
        ("A is longer, B is right.\nVerdict: B", "second"),
        ("Both are fine.\n\n**Verdict:** tie", "tie"),
        ("", None),
        ("a", None),
        ("C", None),
        ("A or B", None),
        ("A B", None),
        ("A, because it is short", None),
        ("Answer A is better", None),
        ("AnswerA", None),
        ("A\nbecause it is short", None),
        ("It is short.\nA", None),
        ("Verdict: A\nno, wait", None),
        ("neither", None),
    ],
)
def test_a_verdict_is_read_strictly(text: str, verdict: Verdict | None) -> None:
    assert parse_verdict(text) == verdict


# --- log-probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("leaning", [0.0, 5.0, -5.0])
def test_the_margin_averages_a_leaning_towards_a_letter_away(leaning: float) -> None:
    worth = {"good": 1.5, "bad": -0.5}

    def logprobs(text: str) -> tuple[float, float]:
        return worth[shown_first(text)] + leaning, worth[shown_second(text)]

    judge = ScoringJudge(logprobs)
    items = [(QUESTION, "good", "bad"), (QUESTION, "bad", "good")]
    found = judge_pairs(judge, items, principle="be good", seed=0, verdict="logprobs")
    assert [j.margin for j in found] == [2.0, -2.0]
    assert [j.preferred for j in found] == ["first", "second"]
    assert [j.consistent for j in found] == [leaning == 0.0] * 2
    assert [j.usable for j in found] == [leaning == 0.0] * 2


def test_margins_of_zero_are_ties_and_failures_stay_failures() -> None:
    (tie,) = judge_pairs(
        ScoringJudge(lambda text: (-1.0, -1.0)),
        [(QUESTION, "a", "b")],
        principle="p",
        seed=0,
        verdict="logprobs",
    )
    assert tie == Judgement(None, True, verdicts=("tie", "tie"), margin=0.0)
    (failed,) = judge_pairs(
        ScoringJudge(lambda text: None if shown_first(text) == "b" else (-1.0, -2.0)),
        [(QUESTION, "a", "b")],
        principle="p",
        seed=0,
        verdict="logprobs",
    )
    assert failed == Judgement(None, False, Failure.REFUSED, ("first", None), None, "too long")


@pytest.mark.parametrize(
    ("a", "b"), [(math.nan, -1.0), (-1.0, math.nan), (-math.inf, -math.inf), (-1.0, -math.inf)]
)
def test_log_probabilities_that_are_not_finite_are_no_verdict(a: float, b: float) -> None:
    judge = ScoringJudge(lambda text: (a, b) if shown_first(text) == "bad" else (-1.0, -2.0))
    items = [(QUESTION, "good", "bad"), (QUESTION, "good", "fine")]
    bad, sound = judge_pairs(judge, items, principle="p", seed=0, verdict="logprobs")
    assert (bad.failure, bad.preferred, bad.margin) == (Failure.NOT_FINITE, None, None)
    assert bad.verdicts == ("first", None)
    assert bad.detail == f"log p is {a} of the answer A and {b} of B"
    assert sound.failure is Failure.NONE
    with pytest.raises(AlignmentError, match=r"not_finite: 1.*judge\.dtype: float32"):
        check_failures([bad, sound], 0.2)


def test_an_endpoint_has_no_log_probabilities() -> None:
    endpoint = EndpointChatModel("http://127.0.0.1:9/v1", "m")
    with pytest.raises(UserInputError, match=r"m at http://127\.0\.0\.1:9/v1 gives no"):
        judge_pairs(endpoint, [(QUESTION, "a", "b")], principle="p", seed=0, verdict="logprobs")


# --- statistics ----------------------------------------------------------------------------------


def made(one: Verdict, two: Verdict) -> Judgement:
    preferred = one if one == two and one != "tie" else None
    return Judgement(preferred, one == two, verdicts=(one, two))


JUDGEMENTS = [
    *[made("first", "first")] * 4,
    *[made("second", "second")] * 2,
    made("tie", "tie"),
    *[made("first", "second")] * 2,
    made("second", "first"),
    Judgement(None, False, Failure.TIMEOUT),
    Judgement(None, False, Failure.UNPARSEABLE, ("first", None)),
]


def test_agreement_by_hand() -> None:
    labels: list[Preference | None] = ["first", "second", None]
    gold = [*labels[:1] * 3, *labels[1:2] * 2, None, *labels[:1] * 6]
    stats = agreement(JUDGEMENTS, gold)
    assert (stats.n, stats.n_judged, stats.n_usable) == (12, 10, 6)
    assert stats.failures == {Failure.TIMEOUT: 1, Failure.UNPARSEABLE: 1}
    assert stats.swap_consistency == 0.7
    assert stats.first_bias == 0.2
    assert stats.second_bias == 0.1
    assert stats.tie_share == 0.1
    # In order: 6 first, 3 second, 1 tie; swapped: 5 first, 4 second, 1 tie.
    # p_e = (6*5 + 3*4 + 1*1) / 100 = 0.43, kappa = (0.7 - 0.43) / 0.57.
    assert stats.kappa == pytest.approx(0.27 / 0.57, abs=1e-12)
    # Usable with a label: first x 3 right, first against second wrong, second right; one has none.
    assert (stats.n_gold, stats.gold_agreement) == (5, 0.8)


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_that_of_the_confusion_matrix(seed: int) -> None:
    words: tuple[Verdict, ...] = ("first", "second", "tie")
    pairs = np.random.default_rng(seed).integers(0, 3, size=(40, 2))
    table = np.zeros((3, 3))
    np.add.at(table, (pairs[:, 0], pairs[:, 1]), 1 / len(pairs))
    chance = table.sum(1) @ table.sum(0)
    expected = (np.trace(table) - chance) / (1 - chance)
    stats = agreement([made(words[one], words[two]) for one, two in pairs])
    assert stats.kappa == pytest.approx(expected, abs=1e-12)


def test_preferences_by_margin_count_where_that_is_asked_for() -> None:
    leaning = Judgement("first", False, verdicts=("first", "second"), margin=0.5)
    judgements = [made("first", "first"), leaning, made("tie", "tie")]
    gold: list[Preference | None] = ["first", "second", "first"]
    assert agreement(judgements, gold).gold_agreement == 1.0
    every = agreement(judgements, gold, consistent_only=False)
    assert (every.gold_agreement, every.n_gold, every.n_usable) == (0.5, 2, 1)


def test_statistics_of_nothing_are_none() -> None:
    for judgements in ([], [Judgement(None, False, Failure.TIMEOUT)]):
        stats = agreement(judgements)
        shares = (stats.swap_consistency, stats.first_bias, stats.tie_share, stats.kappa)
        assert (*shares, stats.gold_agreement, stats.n_judged) == (None,) * 5 + (0,)
    assert agreement([made("first", "first")] * 3).kappa is None
    with pytest.raises(UserInputError, match="1 gold labels for 0 judgements"):
        agreement([], ["first"])
