"""From a model's logits to the distribution tokens are drawn from.

One function, used by the rollout engines when they draw and by the scorer when it recomputes
log-probabilities, so that both speak about the same distribution.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alignment.types import SamplingParams, UserInputError

# Nearly every nucleus fits in this many tokens, and selecting them costs far less than sorting
# the vocabulary. Rows where it does not fit are sorted in full: the result is the same.
_NUCLEUS_GUESS = 1024


def check_sampling_params(params: SamplingParams) -> None:
    """Refuse parameters that define no distribution.

    Raises:
        UserInputError: a value outside its range, named.
    """
    ranges = (
        ("temperature", params.temperature >= 0, "0 (greedy) or more"),
        ("top_k", params.top_k >= 0, "0 (off) or more"),
        ("top_p", 0 < params.top_p <= 1, "above 0 and at most 1 (off)"),
        ("min_p", 0 <= params.min_p <= 1, "between 0 (off) and 1"),
        ("n", params.n >= 1, "1 or more"),
        ("max_new_tokens", params.max_new_tokens >= 1, "1 or more"),
        ("stop", all(params.stop), "non-empty strings"),
    )
    for name, valid, allowed in ranges:
        if not valid:
            raise UserInputError(
                f"sampling parameter {name} is {getattr(params, name)!r}; it must be {allowed}"
            )


def transform_logits(
    logits: Tensor, params: SamplingParams, *, keep: Tensor | None = None
) -> Tensor:
    """Logits `[N, V]` of the distribution that `params` samples from, -inf outside its support.

    In this order, each step acting on what the one before left:

    * temperature T: `logits / T`. T = 0 is greedy: the support is the argmax alone (the lowest id
      among equals), whose log-probability is therefore 0;
    * top-k: the k most probable tokens;
    * top-p: the smallest set of most probable tokens whose mass reaches p
      (Holtzman et al. 2020, arXiv:1904.09751, eq. 2);
    * min-p: tokens with p(token) >= min_p * max p (Nguyen et al. 2024, arXiv:2407.01082, eq. 1).

    Ties: a cut is a threshold on the logit, and every token at the threshold stays. The result
    thus depends neither on the order of the vocabulary nor on a sorting algorithm.

    Args:
        logits: fp32 `[N, V]`. Not modified; returned as is where nothing changes it. A row with a
            NaN or a positive infinity has no distribution, and comes out with NaN in it.
        params: only temperature, top_k, top_p and min_p are read.
        keep: `[N]` token ids that stay in the support whatever the cuts. A scorer passes the
            sampled tokens: its logits differ from the engine's in the last digits, and a token
            that was drawn at the edge of the support must not come out as impossible.
    """
    if params.temperature == 0:
        greedy = logits.argmax(-1, keepdim=True)
        support = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, greedy, True)
        return _restrict(logits, support, keep, logits.new_tensor(-math.inf))
    if params.temperature != 1:
        logits = logits / params.temperature
    if params.top_k == 0 and params.top_p == 1 and params.min_p == 0:
        return logits
    with torch.no_grad():
        best = logits.amax(-1, keepdim=True)
        support = logits >= _threshold(logits, best, params)
        # A NaN is no part of any support, and would be cut off without a trace.
        outside = torch.where(best.isfinite(), -math.inf, math.nan)
    return _restrict(logits, support, keep, outside)


def _restrict(logits: Tensor, support: Tensor, keep: Tensor | None, outside: Tensor) -> Tensor:
    """Logits inside the support and at `keep`, and elsewhere what `outside` says."""
    if keep is not None:
        support = support.scatter(-1, keep[:, None], True)
    return torch.where(support, logits, outside)


def _threshold(logits: Tensor, best: Tensor, params: SamplingParams) -> Tensor:
    """`[N, 1]`: the smallest logit that stays, given the largest one."""
    threshold = torch.full_like(best, -math.inf)
    vocabulary = logits.shape[-1]
    if 0 < params.top_k < vocabulary:
        threshold = logits.topk(params.top_k, dim=-1).values[:, -1:]
    if params.top_p < 1:
        threshold = torch.maximum(threshold, _nucleus(logits, threshold, params.top_p))
    if params.min_p > 0:
        threshold = torch.maximum(threshold, best + math.log(params.min_p))
    return threshold


def _nucleus(logits: Tensor, threshold: Tensor, top_p: float) -> Tensor:
    """`[N, 1]`: smallest logit of the nucleus of the tokens that reach `threshold`."""
    kept = logits.masked_fill(logits < threshold, -math.inf)
    log_total = kept.logsumexp(-1, keepdim=True)
    size = min(_NUCLEUS_GUESS, logits.shape[-1])
    while True:
        largest = kept.topk(size, dim=-1).values
        mass = (largest - log_total).double().exp().cumsum(-1)
        reached = mass >= top_p
        if size == logits.shape[-1] or bool(reached[:, -1].all()):
            break
        size = logits.shape[-1]
    # The mass of everything can fall short of p by rounding: then everything stays.
    last = torch.where(reached.any(-1), reached.int().argmax(-1), size - 1)
    return largest.gather(-1, last[:, None])
