"""Evaluation: tasks, statistics, comparison of models and the HTML report of a run."""

from evals.best_of import best_of_kl_bound, best_of_mean, best_of_weights
from evals.calibration import (
    LengthBias,
    ReliabilityBin,
    brier_terms,
    expected_calibration_error,
    length_bias,
    preference_probabilities,
    reliability_bins,
)
from evals.compare import Change, Comparison, ModelScore, compare, render_text
from evals.context import Task, TaskContext, TokenScores
from evals.frontier import Frontier, FrontierPoint, read_frontiers
from evals.frontier_charts import frontier_report, frontier_view
from evals.preference_task import preference
from evals.process_task import area_under_curve, process
from evals.report import comparison_html, html_report
from evals.results import EvalRecord, EvalResult
from evals.reward_kl_task import reward_kl
from evals.statistics import (
    Estimate,
    PairedDifference,
    bootstrap_interval,
    clustered_proportion,
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
from evals.tasks import held_out_loss, verifiable

__all__ = [
    "Change",
    "Comparison",
    "Estimate",
    "EvalRecord",
    "EvalResult",
    "Frontier",
    "FrontierPoint",
    "LengthBias",
    "ModelScore",
    "PairedDifference",
    "ReliabilityBin",
    "Task",
    "TaskContext",
    "TokenScores",
    "area_under_curve",
    "best_of_kl_bound",
    "best_of_mean",
    "best_of_weights",
    "bootstrap_interval",
    "brier_terms",
    "clustered_proportion",
    "compare",
    "comparison_html",
    "expected_calibration_error",
    "frontier_report",
    "frontier_view",
    "held_out_loss",
    "holm",
    "html_report",
    "length_bias",
    "mcnemar_test",
    "mean_estimate",
    "paired_difference",
    "pass_at_k",
    "preference",
    "preference_probabilities",
    "process",
    "proportion_estimate",
    "ratio_estimate",
    "read_frontiers",
    "reliability_bins",
    "render_text",
    "reward_kl",
    "sign_flip_test",
    "summarize_graded",
    "verifiable",
    "wilson_interval",
]
