"""The kinds of preference loss: one small function each, all in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One completion of each pair, all `[B]`.

    logps:     sums of log-probabilities under the policy.
    ref_logps: under the reference; 0 where none was given.
    score:     f'(t) of the ratio of the two; the log-ratio itself for the reverse KL.
    lengths:   token counts behind the sums; 1 where none were given.
    """

    logps: Tensor
    ref_logps: Tensor
    score: Tensor
    lengths: Tensor

    @property
    def ratio(self) -> Tensor:
        """log(policy / reference)."""
        return self.logps - self.ref_logps

    @property
    def mean_score(self) -> Tensor:
        return self.score / self.lengths

    @property
    def mean_logps(self) -> Tensor:
        return self.logps / self.lengths


@dataclass(frozen=True, slots=True)
class Options:
    """The numbers of `preference_loss`; see there."""

    beta: float
    label_smoothing: float
    divergence: str
    alpha: float
    simpo_gamma: float
    bco_shift: float
    discopop_tau: float


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """What every kind may look at."""

    chosen: Side
    rejected: Side
    options: Options

    @property
    def beta(self) -> float:
        return self.options.beta

    @property
    def logits(self) -> Tensor:
        """beta D."""
        return self.beta * (self.chosen.score - self.rejected.score)

    def smoothed(self, logits: Tensor) -> Tensor:
        """-(1 - e) log s(x) - e log s(-x)."""
        e = self.options.label_smoothing
        if not e:
            return -logsigmoid(logits)
        return -(1 - e) * logsigmoid(logits) - e * logsigmoid(-logits)


# ---------------------------------------------------------------- on D alone: any f-divergence


def _sigmoid(pairs: Pairs) -> Tensor:
    """DPO: -(1 - e) log s(beta D) - e log s(-beta D). Rafailov et al. 2023, eq. 7; with e > 0 the
    conservative form of Mitchell 2023, which trl no longer has."""
    return pairs.smoothed(pairs.logits)


def _sigmoid_norm(pairs: Pairs) -> Tensor:
    """DPO on log-ratios averaged over tokens: -log s(beta (c/|y_c| - r/|y_r|)), smoothed as
    `sigmoid`. Length-normalized DPO of Tulu 3, Lambert et al. 2024."""
    return pairs.smoothed(pairs.beta * (pairs.chosen.mean_score - pairs.rejected.mean_score))


def _robust(pairs: Pairs) -> Tensor:
    """(-(1 - e) log s(beta D) + e log s(-beta D)) / (1 - 2 e): unbiased under labels flipped with
    probability e. Chowdhury et al. 2024."""
    e = pairs.options.label_smoothing
    signed = (1 - e) * logsigmoid(pairs.logits) - e * logsigmoid(-pairs.logits)
    return -signed / (1 - 2 * e)


def _ipo(pairs: Pairs) -> Tensor:
    """(D - 1 / (2 beta))^2. IPO, Azar et al. 2023, eq. 17, beta being its tau. Not trl's `ipo`,
    which is `ipo_norm`."""
    return (pairs.chosen.score - pairs.rejected.score - 0.5 / pairs.beta).square()


def _ipo_norm(pairs: Pairs) -> Tensor:
    """IPO on log-ratios averaged over tokens: (c/|y_c| - r/|y_r| - 1 / (2 beta))^2. The sum grows
    with length where the target 1 / (2 beta) does not; trl's `ipo` is this one."""
    return (pairs.chosen.mean_score - pairs.rejected.mean_score - 0.5 / pairs.beta).square()


def _hinge(pairs: Pairs) -> Tensor:
    """max(0, 1 - beta D). SLiC-HF, Zhao et al. 2023, with the reward of DPO."""
    return torch.relu(1 - pairs.logits)


def _exo(pairs: Pairs) -> Tensor:
    """KL of (s(beta D), s(-beta D)) from the label distribution (1 - e, e); needs e > 0. EXO,
    Ji et al. 2024, eq. 16 (the pair form; trl's `exo_pair`)."""
    logits = pairs.logits
    e = torch.tensor(pairs.options.label_smoothing, dtype=logits.dtype, device=logits.device)
    log_win, log_lose = logsigmoid(logits), logsigmoid(-logits)
    return log_win.exp() * (log_win - torch.log1p(-e)) + log_lose.exp() * (log_lose - e.log())


def _discopop(pairs: Pairs) -> Tensor:
    """(1 - g) (-log s(x)) + g exp(-x), x = beta D, g = s(x / tau). DiscoPOP, Lu et al. 2024,
    eq. 5. Not convex: with small tau its slope at x = 0 is inverted, as the paper notes."""
    log_gate = logsigmoid(pairs.logits / pairs.options.discopop_tau)
    # g exp(-x) as one exponential: far below 0 the two would be 0 * inf.
    exponential = torch.exp(log_gate - pairs.logits)
    return (1 - log_gate.exp()) * -logsigmoid(pairs.logits) + exponential


# ---------------------------------------------------------------- on log-ratios


def _nca(pairs: Pairs) -> Tensor:
    """-log s(beta c) - 1/2 log s(-beta c) - 1/2 log s(-beta r). NCA, Chen et al. 2024 (pair
    form; trl's `nca_pair`)."""
    chosen, rejected = pairs.beta * pairs.chosen.ratio, pairs.beta * pairs.rejected.ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _sppo(pairs: Pairs) -> Tensor:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2. SPPO, Wu et al. 2024, eq. 4.7, with win
    probabilities 1 and 0 (the hard form; trl's `sppo_hard`)."""
    half = 0.5 / pairs.beta
    return (pairs.chosen.ratio - half).square() + (pairs.rejected.ratio + half).square()


def _aot(pairs: Pairs) -> Tensor:
    """Alignment by optimal transport, paired: `sigmoid` with D replaced by the difference of the
    *sorted* policy margins and the sorted reference margins. Melnyk et al. 2024. Sorting is over
    the given pairs, so this loss (as aot_unpaired) depends on how a batch is cut; see
    `sequence_weights`."""
    margins = (pairs.chosen.logps - pairs.rejected.logps).sort(dim=0).values
    ref_margins = (pairs.chosen.ref_logps - pairs.rejected.ref_logps).sort(dim=0).values
    return pairs.smoothed(pairs.beta * (margins - ref_margins))


def _aot_unpaired(pairs: Pairs) -> Tensor:
    """Alignment by optimal transport, unpaired: as `aot`, with sorted c minus sorted r. Both names
    are those of trl 1.16."""
    delta = pairs.chosen.ratio.sort(dim=0).values - pairs.rejected.ratio.sort(dim=0).values
    return pairs.smoothed(pairs.beta * delta)


def _apo_zero(pairs: Pairs) -> Tensor:
    """1 - s(beta c) + s(beta r): chosen up, rejected down. APO, D'Oosterlinck et al. 2024,
    eq. 7."""
    chosen, rejected = pairs.beta * pairs.chosen.ratio, pairs.beta * pairs.rejected.ratio
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def _apo_down(pairs: Pairs) -> Tensor:
    """s(beta c) + 1 - s(beta (c - r)): both down, rejected more. APO, D'Oosterlinck et al. 2024,
    eq. 8."""
    chosen, rejected = pairs.beta * pairs.chosen.ratio, pairs.beta * pairs.rejected.ratio
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def _bco(pairs: Pairs) -> Tensor:
    """-log s(beta c - shift) - log s(-(beta r - shift)). BCO, Jung et al. 2024, on pairs. trl's
    `bco_pair` has no shift; `bco_loss` is the form for unpaired data."""
    chosen, rejected = pairs.beta * pairs.chosen.ratio, pairs.beta * pairs.rejected.ratio
    shift = pairs.options.bco_shift
    return -logsigmoid(chosen - shift) - logsigmoid(shift - rejected)


# ---------------------------------------------------------------- without a reference


def _simpo(pairs: Pairs) -> Tensor:
    """-log s(beta (mean logp chosen - mean logp rejected) - gamma), smoothed as `sigmoid`. SimPO,
    Meng et al. 2024, eq. 6."""
    delta = pairs.chosen.mean_logps - pairs.rejected.mean_logps
    return pairs.smoothed(pairs.beta * delta - pairs.options.simpo_gamma)


def _cpo(pairs: Pairs) -> Tensor:
    """-log s(beta (logp chosen - logp rejected)), smoothed as `sigmoid`, beside the NLL. CPO, Xu et
    al. 2024, eq. 3 (the preference term)."""
    return pairs.smoothed(pairs.beta * (pairs.chosen.logps - pairs.rejected.logps))


def _orpo(pairs: Pairs) -> Tensor:
    """-beta log s(log odds(chosen) - log odds(rejected)) beside the NLL, odds(p) = p / (1 - p), p
    the exponential of the mean log-probability. ORPO, Hong et al. 2024, eqs. 4 and 7."""
    return -pairs.beta * logsigmoid(
        log_odds(pairs.chosen.mean_logps) - log_odds(pairs.rejected.mean_logps)
    )


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p < 0; p = 1 is taken as the largest number below 1."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


# ---------------------------------------------------------------- the table


def _ratio_reward(side: Side) -> Tensor:
    return side.ratio


def _sum_reward(side: Side) -> Tensor:
    return side.logps


def _mean_reward(side: Side) -> Tensor:
    return side.mean_logps


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind and what it takes.

    loss:            the loss of each pair, `[B]`.
    smooths:         uses label_smoothing.
    diverges:        is a function of D alone, which any f-divergence can give.
    couples:         a pair's loss depends on the other pairs of the batch.
    needs_reference: looks at the reference.
    needs_lengths:   averages over tokens.
    nll_coef:        weight of the NLL term its paper has.
    reward:          what times beta is logged as the reward of a completion.
    """

    loss: Callable[[Pairs], Tensor]
    smooths: bool = False
    diverges: bool = False
    couples: bool = False
    needs_reference: bool = True
    needs_lengths: bool = False
    nll_coef: float = 0.0
    reward: Callable[[Side], Tensor] = _ratio_reward


KINDS: Mapping[str, Kind] = {
    "sigmoid": Kind(_sigmoid, smooths=True, diverges=True),
    "sigmoid_norm": Kind(_sigmoid_norm, smooths=True, diverges=True, needs_lengths=True),
    "robust": Kind(_robust, smooths=True, diverges=True),
    "ipo": Kind(_ipo, diverges=True),
    "ipo_norm": Kind(_ipo_norm, diverges=True, needs_lengths=True),
    "hinge": Kind(_hinge, diverges=True),
    "exo": Kind(_exo, smooths=True, diverges=True),
    "nca": Kind(_nca),
    "sppo": Kind(_sppo),
    "aot": Kind(_aot, smooths=True, couples=True),
    "aot_unpaired": Kind(_aot_unpaired, smooths=True, couples=True),
    "apo_zero": Kind(_apo_zero),
    "apo_down": Kind(_apo_down),
    "discopop": Kind(_discopop, diverges=True),
    "bco": Kind(_bco),
    "simpo": Kind(
        _simpo, smooths=True, needs_reference=False, needs_lengths=True, reward=_mean_reward
    ),
    "cpo": Kind(_cpo, smooths=True, needs_reference=False, nll_coef=1.0, reward=_sum_reward),
    "orpo": Kind(
        _orpo, needs_reference=False, needs_lengths=True, nll_coef=1.0, reward=_mean_reward
    ),
}

PREFERENCE_KINDS: tuple[str, ...] = tuple(KINDS)
"""The kinds of `preference_loss`."""


def _kinds_where(holds: Callable[[Kind], bool]) -> frozenset[str]:
    return frozenset(name for name, entry in KINDS.items() if holds(entry))


REFERENCE_FREE_KINDS = _kinds_where(lambda entry: not entry.needs_reference)
"""The kinds that look at no reference, so that none has to be scored."""

SMOOTHED_KINDS = _kinds_where(lambda entry: entry.smooths)
"""The kinds that take label smoothing."""

DIVERGENCE_KINDS = _kinds_where(lambda entry: entry.diverges)
"""The kinds that take another divergence than the reverse KL."""

COUPLED_KINDS = _kinds_where(lambda entry: entry.couples)
"""The kinds in which a pair's loss depends on the other pairs; see `sequence_weights`."""
