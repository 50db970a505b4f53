"""Which metrics share a chart in a run's report, in which order, and in which unit: two tables."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

Bounds = tuple[float | None, float | None]

ANY: Bounds = (None, None)
SHARE: Bounds = (0.0, 1.0)
NON_NEGATIVE: Bounds = (0.0, None)


@dataclass(frozen=True, slots=True)
class Curves:
    """One chart of training metrics: (metric name, legend) lines that share a unit.

    A trainer may put a prefix of one word before a metric's name, as in `policy/entropy`, unless
    the whole is in this table too.

    spread: a metric to add to and subtract from the first line for a band, if any.
    rest:   also draw every metric of this prefix that no chart names; on several charts where
        they differ so much in size that one would be a flat line next to another.
    """

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    bounds: Bounds = ANY
    spread: str = ""
    rest: str = ""


@dataclass(frozen=True, slots=True)
class EvalCurves:
    """One chart of evaluation metrics over training steps, with 95% intervals.

    metrics: names, or patterns with a `*`; on several charts where they differ much in size.
    """

    title: str
    unit: str
    metrics: tuple[str, ...]
    bounds: Bounds = ANY

    def has(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.metrics)


# In order of appearance. A chart is drawn from those of its lines that the run has.
CURVES: tuple[Curves, ...] = (
    Curves("Reward", "reward", (("reward/mean", "mean"),), spread="reward/std_in_group"),
    Curves(
        "Implicit rewards",
        "reward",
        (
            ("reward/chosen", "chosen"),
            ("reward/rejected", "rejected"),
            ("reward/desirable", "desirable"),
            ("reward/undesirable", "undesirable"),
        ),
    ),
    Curves(
        "Pairs or steps judged right",
        "share of pairs or steps",
        (
            ("reward/accuracy", "accuracy"),
            ("accuracy", "accuracy"),
            ("accuracy/good", "good steps"),
            ("accuracy/bad", "bad steps"),
        ),
        SHARE,
    ),
    # The margin hides that both sides may fall, so each has a chart of its own.
    Curves("Log-probability of chosen", "nats per completion", (("logps/chosen", "chosen"),)),
    Curves("Log-probability of rejected", "nats per completion", (("logps/rejected", "rejected"),)),
    Curves("Log-probability of desirable", "nats per completion", (("logps/desirable", "mean"),)),
    Curves(
        "Log-probability of undesirable", "nats per completion", (("logps/undesirable", "mean"),)
    ),
    Curves(
        "Preference margin",
        "chosen minus rejected",
        (("reward/margin", "margin"), ("margin", "margin")),
    ),
    Curves(
        "Scores of preference pairs",
        "score",
        (("score/chosen", "chosen"), ("score/rejected", "rejected")),
    ),
    Curves("Reward parts", "mean of each part", (), rest="reward/"),
    Curves(
        "Outcomes in training",
        "share of samples",
        (
            ("outcome/correct", "correct"),
            ("outcome/wrong", "wrong"),
            ("outcome/unparseable", "unparseable"),
            ("outcome/timeout", "timeout"),
            ("outcome/crash", "crash"),
        ),
        SHARE,
    ),
    Curves("KL to the reference", "nats per token", (("kl/mean", "mean KL"),)),
    Curves("KL of whole completions", "nats per completion", (("kl/sequence", "mean KL"),)),
    Curves("KL coefficient", "coefficient", (("kl/coef", "coefficient"),), NON_NEGATIVE),
    Curves("Loss", "loss", (("loss", "loss"),)),
    Curves(
        "Value loss",
        "squared error",
        (("critic/loss", "loss"), ("value/squared_error", "squared error, unclipped")),
        NON_NEGATIVE,
    ),
    Curves(
        "Explained variance of the critic",
        "share of variance",
        (("explained_variance", "explained"),),
        (None, 1.0),
    ),
    Curves(
        "Values and returns",
        "reward",
        (("value/mean", "value"), ("return/mean", "return")),
    ),
    Curves("Negative log-likelihood", "nats per token", (("nll", "NLL"),), NON_NEGATIVE),
    Curves(
        "Token accuracy in training",
        "share of tokens",
        (("token_accuracy", "token accuracy"),),
        SHARE,
    ),
    Curves("Completion length", "tokens", (("completion/length", "mean"),), NON_NEGATIVE),
    Curves(
        "Completions cut off at the limit",
        "share of samples",
        (("completion/cut_off", "cut off"),),
        SHARE,
    ),
    Curves("Entropy of the policy", "nats per token", (("entropy", "entropy"),), NON_NEGATIVE),
    Curves(
        "Gradient norm",
        "norm before clipping",
        (("grad_norm", "gradient norm"), ("critic/optim/grad_norm", "critic")),
        NON_NEGATIVE,
    ),
    Curves(
        "Learning rate",
        "learning rate",
        (("lr", "rate"), ("critic/optim/lr", "critic")),
        NON_NEGATIVE,
    ),
    Curves(
        "Clipped tokens",
        "share of tokens",
        (
            ("clip_fraction/low", "ratio, below"),
            ("clip_fraction/high", "ratio, above"),
            ("value/clip_fraction", "value"),
        ),
        SHARE,
    ),
    Curves(
        "Groups with differing rewards",
        "share of groups",
        (("groups/with_spread", "with spread"),),
        SHARE,
    ),
    Curves(
        "Engine against trainer log-probabilities",
        "nats per token",
        (("engine/logprob_gap", "mean absolute gap"),),
        NON_NEGATIVE,
    ),
)
NAMED = {name for one in CURVES for name, _ in one.lines} | {one.spread for one in CURVES}

EVAL_CURVES: tuple[EvalCurves, ...] = (
    EvalCurves("accuracy", "share of samples", ("accuracy", "pass@*"), SHARE),
    EvalCurves("reward", "reward", ("reward", "reward/*")),
    EvalCurves("KL to the reference", "nats per completion", ("kl", "kl_k3")),
    EvalCurves("margin", "chosen minus rejected", ("margin",)),
    EvalCurves("calibration error", "ECE, Brier score", ("ece", "brier"), NON_NEGATIVE),
    EvalCurves(
        "length bias", "correlation", ("length_correlation", "length_rank_correlation"), (-1.0, 1.0)
    ),
    EvalCurves("steps judged right", "share of steps", ("step_accuracy", "step_auc"), SHARE),
    EvalCurves(
        "first errors found",
        "share of solutions",
        ("first_error_accuracy", "first_error_erroneous", "first_error_correct"),
        SHARE,
    ),
    EvalCurves("loss", "nats per token", ("loss",)),
    EvalCurves("token accuracy", "share of tokens", ("token_accuracy",), SHARE),
    EvalCurves("diversity", "share of bigrams", ("distinct_2",), SHARE),
    EvalCurves("completion length", "tokens", ("length",), NON_NEGATIVE),
)
