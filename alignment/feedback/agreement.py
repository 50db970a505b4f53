"""How far a judge can be trusted: does it agree with itself, and with labels known to be right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alignment.feedback.chat_model import Failure
from alignment.feedback.judging import Judgement, Preference
from alignment.types import UserInputError


@dataclass(frozen=True, slots=True)
class AgreementStats:
    """Statistics of judgements. Shares are None where there is nothing to take a share of.

    n:                  comparisons.
    failures:           how many failed, by class; `n_judged` is the number of the others, which
                        have a verdict in both orders, and which the next four refer to.
    swap_consistency:   share with the same verdict in both orders.
    first_bias:         share where the answer shown first won both times.
    second_bias:        share where the answer shown second won both times.
    tie_share:          share of the verdicts (two a comparison) that are ties.
    kappa:              Cohen's kappa between the verdicts of the two orders,
                        (p_o - p_e) / (1 - p_e), with p_o the share that agrees and p_e what
                        independent verdicts of the same frequencies would give; 1: consistent, 0:
                        no better than chance. None where every verdict is the same (p_e = 1).
    n_usable:           comparisons with a preference that both orders share.
    gold_agreement:     share of the usable ones with a gold label that prefer the same answer;
                        `n_gold` is their number. (Of all with a preference, under
                        `consistent_only=False`.)
    """

    n: int
    failures: Mapping[Failure, int]
    n_judged: int
    swap_consistency: float | None
    first_bias: float | None
    second_bias: float | None
    tie_share: float | None
    kappa: float | None
    n_usable: int
    gold_agreement: float | None
    n_gold: int


def agreement(
    judgements: Sequence[Judgement],
    gold: Sequence[Preference | None] | None = None,
    *,
    consistent_only: bool = True,
) -> AgreementStats:
    """Statistics of a judge.

    Args:
        gold: the answer known to be better; None for a comparison where it is not known.
        consistent_only: False compares every preference with its gold label, those by an average
            margin whose two orders disagree included.

    Raises:
        UserInputError: another number of gold labels than of judgements.
    """
    labels = [None] * len(judgements) if gold is None else list(gold)
    if len(labels) != len(judgements):
        raise UserInputError(
            f"{len(labels)} gold labels for {len(judgements)} judgements; give one for each, None "
            "where it is not known"
        )
    verdicts = [j.verdicts for j in judgements if not j.failure]
    counts = Counter(verdicts)
    checked = [
        judgement.preferred == label
        for judgement, label in zip(judgements, labels, strict=True)
        if label is not None and _counts(judgement, consistent_only)
    ]
    return AgreementStats(
        n=len(judgements),
        failures=dict(Counter(j.failure for j in judgements if j.failure)),
        n_judged=len(verdicts),
        swap_consistency=_share(sum(one == two for one, two in verdicts), len(verdicts)),
        first_bias=_share(counts["first", "second"], len(verdicts)),
        second_bias=_share(counts["second", "first"], len(verdicts)),
        tie_share=_share(sum(pair.count("tie") for pair in verdicts), 2 * len(verdicts)),
        kappa=_kappa(verdicts),
        n_usable=sum(judgement.usable for judgement in judgements),
        gold_agreement=_share(sum(checked), len(checked)),
        n_gold=len(checked),
    )


def _counts(judgement: Judgement, consistent_only: bool) -> bool:
    return judgement.usable if consistent_only else judgement.preferred is not None


def _kappa(pairs: Sequence[tuple[str | None, str | None]]) -> float | None:
    """Cohen 1960, "A coefficient of agreement for nominal scales"; None where undefined."""
    if not pairs:
        return None
    n = len(pairs)
    observed = sum(one == two for one, two in pairs) / n
    ones, twos = Counter(one for one, _ in pairs), Counter(two for _, two in pairs)
    expected_count = sum(ones[value] * twos[value] for value in ones)
    if expected_count == n * n:
        return None
    expected = expected_count / n**2
    return (observed - expected) / (1.0 - expected)


def _share(count: int, of: int) -> float | None:
    return count / of if of else None
