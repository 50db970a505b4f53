"""Evaluation: tasks, statistics, comparison of models and the HTML report of a run."""

from evals.compare import Change, Comparison, ModelScore, compare, render_text
from evals.report import comparison_html, html_report
from evals.results import EvalRecord, EvalResult
from evals.statistics import (
    Estimate,
    PairedDifference,
    bootstrap_interval,
    holm,
    mcnemar_test,
    mean_estimate,
    paired_difference,
    pass_at_k,
    proportion_estimate,
    ratio_estimate,
    sign_flip_test,
    wilson_interval,
)
from evals.summary import summarize_graded
from evals.tasks import Task, TaskContext, TokenScores, held_out_loss, verifiable

__all__ = [
    "Change",
    "Comparison",
    "Estimate",
    "EvalRecord",
    "EvalResult",
    "ModelScore",
    "PairedDifference",
    "Task",
    "TaskContext",
    "TokenScores",
    "bootstrap_interval",
    "compare",
    "comparison_html",
    "held_out_loss",
    "holm",
    "html_report",
    "mcnemar_test",
    "mean_estimate",
    "paired_difference",
    "pass_at_k",
    "proportion_estimate",
    "ratio_estimate",
    "render_text",
    "sign_flip_test",
    "summarize_graded",
    "verifiable",
    "wilson_interval",
]
