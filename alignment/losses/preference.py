"""Direct preference optimization and its relatives: one small function per kind, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignment.losses.inputs import check_shapes, choose, upcast
from alignment.losses.types import Mean, Metric, SequenceLoss
from alignment.types import UserInputError


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    *,
    kind: str,
    beta: float,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    nll_coef: float | None = None,
    simpo_gamma: float = 0.5,
    bco_shift: float = 0.0,
    discopop_tau: float = 0.05,
) -> SequenceLoss:
    """Loss per preference pair, `[B]`, from log-probabilities **summed** over completion tokens.

    `PREFERENCE_KINDS` lists the kinds; each function below states its formula and paper. In them
    c = chosen_logps - ref_chosen_logps, r = rejected_logps - ref_rejected_logps (log-ratios of
    policy to reference), D = c - r, s = sigmoid, e = label_smoothing. References are constants.

    Args:
        chosen_logps: `[B]`, log p(chosen completion | prompt) under the policy, in nats.
        rejected_logps: `[B]`.
        ref_chosen_logps: `[B]` under the reference; may be None for simpo, cpo, orpo.
        ref_rejected_logps: `[B]`, likewise.
        kind: a name in `PREFERENCE_KINDS`.
        beta: strength of the pull to the reference (for orpo: weight of the odds-ratio term; for
            simpo and cpo: inverse temperature).
        label_smoothing: e, the probability that a label is wrong, in [0, 0.5). Used by sigmoid,
            sigmoid_norm, robust, exo, aot, aot_unpaired, simpo and cpo; refused elsewhere.
        chosen_lengths: `[B]` completion tokens behind each sum. Needed by sigmoid_norm, ipo_norm,
            simpo, orpo, and wherever `nll_coef` is not 0.
        rejected_lengths: `[B]`, likewise.
        nll_coef: adds nll_coef * (-chosen_logps / chosen_lengths), the chosen completion's mean
            negative log-likelihood. None means 1 for cpo and orpo, whose papers have it (CPO
            sums it over tokens; here it is a mean), and 0 otherwise.
        simpo_gamma: target margin of simpo.
        bco_shift: the moving average of both rewards that bco takes off (its delta).
        discopop_tau: temperature of discopop's blend.

    Metrics over pairs: `reward/chosen`, `reward/rejected` (beta c and beta r; for the
    reference-free kinds beta times the sum, or for simpo and orpo the per-token mean, of the
    log-probabilities), `reward/margin`, `reward/accuracy` (strict), `logps/chosen`,
    `logps/rejected`; `nll` where it is part of the loss.

    Raises:
        UserInputError: unknown kind, or a value or tensor the kind does not allow or lacks.
        AlignmentError: tensors that are not all `[B]`.
    """
    entry = choose(_KINDS, "preference loss", kind)
    nll_coef = entry.nll_coef if nll_coef is None else nll_coef
    _check_options(kind, entry, beta, label_smoothing, discopop_tau)
    tensors = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
    }
    _check_tensors(kind, entry, tensors, nll_coef)
    pairs = _Pairs(
        chosen=_side(chosen_logps, ref_chosen_logps, chosen_lengths, entry),
        rejected=_side(rejected_logps, ref_rejected_logps, rejected_lengths, entry),
        beta=beta,
        label_smoothing=label_smoothing,
        simpo_gamma=simpo_gamma,
        bco_shift=bco_shift,
        discopop_tau=discopop_tau,
    )
    loss = entry.loss(pairs)
    metrics = _metrics(pairs, entry)
    if nll_coef:
        nll = -pairs.chosen.mean_logps
        loss = loss + nll_coef * nll
        metrics["nll"] = Mean.of(nll)
    return SequenceLoss(loss, metrics)


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """One completion of each pair, all `[B]`: sums of log-probabilities and token counts.

    `ref_logps` is 0 for a reference-free kind, `lengths` is 1 for a kind that needs none.
    """

    logps: Tensor
    ref_logps: Tensor
    lengths: Tensor

    @property
    def ratio(self) -> Tensor:
        return self.logps - self.ref_logps

    @property
    def mean_ratio(self) -> Tensor:
        return self.ratio / self.lengths

    @property
    def mean_logps(self) -> Tensor:
        return self.logps / self.lengths


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """What every kind may look at."""

    chosen: _Side
    rejected: _Side
    beta: float
    label_smoothing: float
    simpo_gamma: float
    bco_shift: float
    discopop_tau: float

    @property
    def logits(self) -> Tensor:
        """beta D."""
        return self.beta * (self.chosen.ratio - self.rejected.ratio)


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log s(x) - e log s(-x)."""
    if not label_smoothing:
        return -logsigmoid(logits)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def _sigmoid(pairs: _Pairs) -> Tensor:
    """DPO: -(1 - e) log s(beta D) - e log s(-beta D). Rafailov et al. 2023, eq. 7; with e > 0 the
    conservative form of Mitchell 2023."""
    return _smoothed(pairs.logits, pairs.label_smoothing)


def _sigmoid_norm(pairs: _Pairs) -> Tensor:
    """DPO on log-ratios averaged over tokens: -log s(beta (c/|y_c| - r/|y_r|)), smoothed as
    `sigmoid`. Length-normalized DPO of Tulu 3, Lambert et al. 2024."""
    delta = pairs.chosen.mean_ratio - pairs.rejected.mean_ratio
    return _smoothed(pairs.beta * delta, pairs.label_smoothing)


def _robust(pairs: _Pairs) -> Tensor:
    """(-(1 - e) log s(beta D) + e log s(-beta D)) / (1 - 2 e): unbiased under labels flipped with
    probability e. Chowdhury et al. 2024."""
    e = pairs.label_smoothing
    signed = (1 - e) * logsigmoid(pairs.logits) - e * logsigmoid(-pairs.logits)
    return -signed / (1 - 2 * e)


def _ipo(pairs: _Pairs) -> Tensor:
    """(D - 1 / (2 beta))^2. IPO, Azar et al. 2023, eq. 17, beta being its tau."""
    return (pairs.chosen.ratio - pairs.rejected.ratio - 0.5 / pairs.beta).square()


def _ipo_norm(pairs: _Pairs) -> Tensor:
    """IPO on log-ratios averaged over tokens: (c/|y_c| - r/|y_r| - 1 / (2 beta))^2. The sum grows
    with length where the target 1 / (2 beta) does not; trl's `ipo` is this one."""
    return (pairs.chosen.mean_ratio - pairs.rejected.mean_ratio - 0.5 / pairs.beta).square()


def _hinge(pairs: _Pairs) -> Tensor:
    """max(0, 1 - beta D). SLiC-HF, Zhao et al. 2023, with the reward of DPO."""
    return torch.relu(1 - pairs.logits)


def _exo(pairs: _Pairs) -> Tensor:
    """KL of (s(beta D), s(-beta D)) from the label distribution (1 - e, e); needs e > 0. EXO,
    Ji et al. 2024, eq. 16 (the pair form)."""
    e = torch.tensor(pairs.label_smoothing, dtype=pairs.logits.dtype, device=pairs.logits.device)
    log_win, log_lose = logsigmoid(pairs.logits), logsigmoid(-pairs.logits)
    return log_win.exp() * (log_win - torch.log1p(-e)) + log_lose.exp() * (log_lose - e.log())


def _nca(pairs: _Pairs) -> Tensor:
    """-log s(beta c) - 1/2 log s(-beta c) - 1/2 log s(-beta r). NCA, Chen et al. 2024 (pair
    form)."""
    chosen, rejected = pairs.beta * pairs.chosen.ratio, pairs.beta * pairs.rejected.ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _sppo(pairs: _Pairs) -> Tensor:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2. SPPO, Wu et al. 2024, eq. 4.7, with win
    probabilities 1 and 0 (the hard form)."""
    half = 0.5 / pairs.beta
    return (pairs.chosen.ratio - half).square() + (pairs.rejected.ratio + half).square()


def _aot(pairs: _Pairs) -> Tensor:
    """Alignment by optimal transport, paired: `sigmoid` with D replaced by the difference of the
    *sorted* policy margins and the sorted reference margins. Melnyk et al. 2024. Sorting is over
    the micro-batch, so this loss (alone with aot_unpaired) depends on how a batch is cut."""
    margins = (pairs.chosen.logps - pairs.rejected.logps).sort(dim=0).values
    ref_margins = (pairs.chosen.ref_logps - pairs.rejected.ref_logps).sort(dim=0).values
    return _smoothed(pairs.beta * (margins - ref_margins), pairs.label_smoothing)


def _aot_unpaired(pairs: _Pairs) -> Tensor:
    """Alignment by optimal transport, unpaired: as `aot`, with sorted c minus sorted r."""
    delta = pairs.chosen.ratio.sort(dim=0).values - pairs.rejected.ratio.sort(dim=0).values
    return _smoothed(pairs.beta * delta, pairs.label_smoothing)


def _apo_zero(pairs: _Pairs) -> Tensor:
    """1 - s(beta c) + s(beta r): chosen up, rejected down. APO, D'Oosterlinck et al. 2024,
    eq. 7."""
    chosen, rejected = pairs.beta * pairs.chosen.ratio, pairs.beta * pairs.rejected.ratio
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def _apo_down(pairs: _Pairs) -> Tensor:
    """s(beta c) + 1 - s(beta D): both down, rejected more. APO, D'Oosterlinck et al. 2024,
    eq. 8."""
    return torch.sigmoid(pairs.beta * pairs.chosen.ratio) + torch.sigmoid(-pairs.logits)


def _discopop(pairs: _Pairs) -> Tensor:
    """(1 - g) (-log s(x)) + g exp(-x), x = beta D, g = s(x / tau). DiscoPOP, Lu et al. 2024,
    eq. 5. Not convex: with small tau its slope at x = 0 is inverted, as the paper notes."""
    gate = torch.sigmoid(pairs.logits / pairs.discopop_tau)
    return (1 - gate) * -logsigmoid(pairs.logits) + gate * torch.exp(-pairs.logits)


def _bco(pairs: _Pairs) -> Tensor:
    """-log s(beta c - shift) - log s(-(beta r - shift)). BCO, Jung et al. 2024, on pairs."""
    chosen, rejected = pairs.beta * pairs.chosen.ratio, pairs.beta * pairs.rejected.ratio
    return -logsigmoid(chosen - pairs.bco_shift) - logsigmoid(pairs.bco_shift - rejected)


def _simpo(pairs: _Pairs) -> Tensor:
    """-log s(beta (mean logp chosen - mean logp rejected) - gamma), smoothed as `sigmoid`. SimPO,
    Meng et al. 2024, eq. 6."""
    delta = pairs.chosen.mean_logps - pairs.rejected.mean_logps
    return _smoothed(pairs.beta * delta - pairs.simpo_gamma, pairs.label_smoothing)


def _cpo(pairs: _Pairs) -> Tensor:
    """-log s(beta (logp chosen - logp rejected)), smoothed as `sigmoid`, beside the NLL. CPO, Xu et
    al. 2024, eq. 3 (the preference term)."""
    return _smoothed(pairs.logits, pairs.label_smoothing)


def _orpo(pairs: _Pairs) -> Tensor:
    """-beta log s(log odds(chosen) - log odds(rejected)) beside the NLL, odds(p) = p / (1 - p), p
    the exponential of the mean log-probability. ORPO, Hong et al. 2024, eqs. 4 and 7."""
    return -pairs.beta * logsigmoid(
        _log_odds(pairs.chosen.mean_logps) - _log_odds(pairs.rejected.mean_logps)
    )


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p < 0; p = 1 is taken as the largest number below 1."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


def _ratio_reward(side: _Side) -> Tensor:
    return side.ratio


def _mean_reward(side: _Side) -> Tensor:
    return side.mean_logps


@dataclass(frozen=True, slots=True)
class _Kind:
    loss: Callable[[_Pairs], Tensor]
    smooths: bool = False
    needs_reference: bool = True
    needs_lengths: bool = False
    nll_coef: float = 0.0
    reward: Callable[[_Side], Tensor] = _ratio_reward


_KINDS: Mapping[str, _Kind] = {
    "sigmoid": _Kind(_sigmoid, smooths=True),
    "sigmoid_norm": _Kind(_sigmoid_norm, smooths=True, needs_lengths=True),
    "robust": _Kind(_robust, smooths=True),
    "ipo": _Kind(_ipo),
    "ipo_norm": _Kind(_ipo_norm, needs_lengths=True),
    "hinge": _Kind(_hinge),
    "exo": _Kind(_exo, smooths=True),
    "nca": _Kind(_nca),
    "sppo": _Kind(_sppo),
    "aot": _Kind(_aot, smooths=True),
    "aot_unpaired": _Kind(_aot_unpaired, smooths=True),
    "apo_zero": _Kind(_apo_zero),
    "apo_down": _Kind(_apo_down),
    "discopop": _Kind(_discopop),
    "bco": _Kind(_bco),
    "simpo": _Kind(
        _simpo, smooths=True, needs_reference=False, needs_lengths=True, reward=_mean_reward
    ),
    "cpo": _Kind(_cpo, smooths=True, needs_reference=False, nll_coef=1.0),
    "orpo": _Kind(
        _orpo, needs_reference=False, needs_lengths=True, nll_coef=1.0, reward=_mean_reward
    ),
}

PREFERENCE_KINDS: tuple[str, ...] = tuple(_KINDS)
"""The kinds of `preference_loss`."""

REFERENCE_FREE_KINDS: frozenset[str] = frozenset(
    name for name, entry in _KINDS.items() if not entry.needs_reference
)
"""The kinds that look at no reference, so that none has to be scored."""


def _side(logps: Tensor, ref: Tensor | None, lengths: Tensor | None, entry: _Kind) -> _Side:
    logps = upcast(logps)
    if ref is None or not entry.needs_reference:
        ref = torch.zeros_like(logps)
    return _Side(
        logps=logps,
        ref_logps=upcast(ref.detach()),
        lengths=torch.ones_like(logps) if lengths is None else upcast(lengths).clamp(min=1),
    )


def _metrics(pairs: _Pairs, entry: _Kind) -> dict[str, Metric]:
    chosen = pairs.beta * entry.reward(pairs.chosen)
    rejected = pairs.beta * entry.reward(pairs.rejected)
    return {
        "reward/chosen": Mean.of(chosen),
        "reward/rejected": Mean.of(rejected),
        "reward/margin": Mean.of(chosen - rejected),
        "reward/accuracy": Mean.of(chosen > rejected),
        "logps/chosen": Mean.of(pairs.chosen.logps),
        "logps/rejected": Mean.of(pairs.rejected.logps),
    }


def _check_options(
    kind: str, entry: _Kind, beta: float, label_smoothing: float, discopop_tau: float
) -> None:
    if not beta > 0:
        raise UserInputError(f"preference loss beta is {beta!r}; give a number above 0")
    if not 0 <= label_smoothing < 0.5:
        raise UserInputError(
            f"label_smoothing is {label_smoothing!r}; it is the probability that a label is wrong, "
            "so give a number in [0, 0.5)"
        )
    if label_smoothing and not entry.smooths:
        able = ", ".join(name for name, other in _KINDS.items() if other.smooths)
        raise UserInputError(
            f"preference loss {kind!r} has no label smoothing; drop it, or use one of {able}"
        )
    if kind == "exo" and not label_smoothing:
        raise UserInputError(
            "preference loss 'exo' needs label_smoothing above 0 (its paper uses 1e-3): without "
            "it the loss is infinite"
        )
    if kind == "discopop" and not discopop_tau > 0:
        raise UserInputError(f"discopop_tau is {discopop_tau!r}; give a number above 0")


def _check_tensors(
    kind: str, entry: _Kind, tensors: Mapping[str, Tensor | None], nll_coef: float
) -> None:
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    check_shapes(given["chosen_logps"].shape[:1], **given)
    if entry.needs_reference and not {"ref_chosen_logps", "ref_rejected_logps"} <= given.keys():
        raise UserInputError(
            f"preference loss {kind!r} compares with a reference and none was scored; give the "
            f"run a reference, or use one of {', '.join(sorted(REFERENCE_FREE_KINDS))}"
        )
    averages = entry.needs_lengths or bool(nll_coef)
    if averages and not {"chosen_lengths", "rejected_lengths"} <= given.keys():
        raise UserInputError(
            f"preference loss {kind!r} with nll_coef={nll_coef} averages over tokens; give "
            "chosen_lengths and rejected_lengths"
        )
