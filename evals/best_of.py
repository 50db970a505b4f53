"""Best-of-n from samples that were drawn anyway. Pure functions of numpy arrays.

Best-of-n draws n completions and keeps the one that a proxy scores highest. From N >= n samples of
a prompt, its expected outcome is estimated over *all* subsets of n at once, without drawing any.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import special

from evals.statistics import FloatArray


def best_of_weights(proxy: npt.ArrayLike, n: int) -> FloatArray:
    """Chance of each of N samples to be the proxy's best in a random subset of n, `[N]`, sum 1.

    With the samples sorted by the proxy, the i-th smallest is the best of C(i - 1, n - 1) of the
    C(N, n) subsets. Samples that the proxy scores alike share their chances evenly, which is a
    fair draw among the best and does not depend on the order of the samples.

    Raises:
        ValueError: n is not in 1 .. N.
    """
    scores = np.asarray(proxy, dtype=np.float64)
    total = len(scores)
    if not 1 <= n <= total:
        raise ValueError(f"best of {n} needs 1 <= n <= the {total} samples")
    ranks = np.arange(total)
    by_rank = special.comb(ranks, n - 1) / special.comb(total, n)
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.concatenate([[0.0], np.cumsum(by_rank)])[np.concatenate([[0], np.cumsum(sizes)])]
    shared: FloatArray = np.diff(ends) / sizes
    return shared[group]


def best_of_mean(proxy: npt.ArrayLike, values: npt.ArrayLike, n: int) -> float:
    """Unbiased estimate of the expected value of what best-of-n by `proxy` keeps.

    Args:
        proxy: `[N]`, what the selection looks at.
        values: `[N]`, what is wanted of the selected one; `proxy` itself or any other number.
        n: how many are drawn to choose from.
    """
    return float(best_of_weights(proxy, n) @ np.asarray(values, dtype=np.float64))


def best_of_kl_bound(n: int) -> float:
    """log n - (n - 1) / n nats: at most so far is best-of-n from the policy it samples.

    The formula of Stiennon et al. (2020, appendix G.3) is exact where no two completions tie and
    none has a chance worth mentioning; in general it is an upper bound of KL(best-of-n || policy)
    (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n
