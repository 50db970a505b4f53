"""Direct preference optimization and its relatives, alone and in weighted sums."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from alignment.losses.divergences import divergence_score
from alignment.losses.inputs import check_shapes, choose, upcast
from alignment.losses.preference_kinds import (
    DIVERGENCE_KINDS,
    KINDS,
    REFERENCE_FREE_KINDS,
    SMOOTHED_KINDS,
    Options,
    Pairs,
    Side,
)
from alignment.losses.types import Mean, Metric, SequenceLoss
from alignment.types import UserInputError

NLL = "nll"
"""The name in a weighted sum of the chosen completion's negative log-likelihood."""


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    *,
    kind: str | Mapping[str, float],
    beta: float,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    nll_coef: float | None = None,
    simpo_gamma: float = 0.5,
    bco_shift: float = 0.0,
    discopop_tau: float = 0.05,
) -> SequenceLoss:
    """Loss per preference pair, `[B]`, from log-probabilities **summed** over completion tokens.

    `PREFERENCE_KINDS` lists the kinds; each function of `preference_kinds.py` states its formula
    and paper. In them c = chosen_logps - ref_chosen_logps, r = rejected_logps - ref_rejected_logps
    (log-ratios of policy to reference), D = c - r, s = sigmoid, e = label_smoothing. References
    are constants.

    Args:
        chosen_logps: `[B]`, log p(chosen completion | prompt) under the policy, in nats.
        rejected_logps: `[B]`.
        ref_chosen_logps: `[B]` under the reference; may be None for simpo, cpo, orpo.
        ref_rejected_logps: `[B]`, likewise.
        kind: a name in `PREFERENCE_KINDS`; or several with their weights w, all above 0, for
            sum_k w_k loss_k. Mixed preference optimization (Wang et al. 2024, MPO) is {sigmoid:
            0.8, bco: 0.2, nll: 1}, nll being the term of `nll_coef`. The other arguments are of all
            kinds of a sum.
        beta: strength of the pull to the reference (for orpo: weight of the odds-ratio term; for
            simpo and cpo: inverse temperature).
        label_smoothing: e, the probability that a label is wrong, in [0, 0.5). Used by sigmoid,
            sigmoid_norm, robust, exo, aot, aot_unpaired, simpo and cpo; refused where no kind is
            one of them.
        divergence: what keeps the policy near the reference, a name in `DIVERGENCES`. Another one
            than the reverse KL puts its `divergence_score` in the place of c and r (f-DPO, Wang
            et al. 2023). Used by the kinds made of D alone, `DIVERGENCE_KINDS`: sigmoid,
            sigmoid_norm, robust, ipo, ipo_norm, hinge, exo, discopop; refused where any kind is
            another.
        alpha: of the alpha-divergence, between 0 and 1.
        chosen_lengths: `[B]` completion tokens behind each sum. Needed by sigmoid_norm, ipo_norm,
            simpo, orpo, and wherever there is an NLL term.
        rejected_lengths: `[B]`, likewise.
        nll_coef: adds nll_coef * (-chosen_logps / chosen_lengths), the chosen completion's mean
            negative log-likelihood (RPO, Pang et al. 2024). None means 1 for cpo and orpo, whose
            papers have it (CPO sums it over tokens; here it is a mean), times their weight in a
            sum, and 0 otherwise. trl's loss type `sft` is the mean over all chosen tokens of a
            batch instead: the same where all completions are equally long.
        simpo_gamma: target margin of simpo.
        bco_shift: the moving average of both rewards that bco takes off (its delta).
        discopop_tau: temperature of discopop's blend.

    Metrics over pairs: `reward/chosen`, `reward/rejected` (beta c and beta r, whatever the
    divergence; for the reference-free kinds beta times the sum, or for simpo and orpo the
    per-token mean, of the log-probabilities; in a weighted sum those of the first kind that
    compares with a reference, or of the first one if none does), `reward/margin`,
    `reward/accuracy` (strict), `logps/chosen`, `logps/rejected`; `nll` where it is part of the
    loss; of a weighted sum `loss/<kind>`, each kind's loss before its weight and without an NLL.

    Raises:
        UserInputError: unknown kind, or a weight, value or tensor the kind does not allow or lacks.
        AlignmentError: tensors that are not all `[B]`.
    """
    weights, nll_weight = _weights(kind, nll_coef)
    options = Options(
        beta=beta,
        label_smoothing=label_smoothing,
        divergence=divergence,
        alpha=alpha,
        simpo_gamma=simpo_gamma,
        bco_shift=bco_shift,
        discopop_tau=discopop_tau,
    )
    chosen = _Given(chosen_logps, ref_chosen_logps, chosen_lengths)
    rejected = _Given(rejected_logps, ref_rejected_logps, rejected_lengths)
    _check_options(weights, options)
    _check_tensors(weights, chosen, rejected, nll_weight)
    pairs = Pairs(_side(chosen, options), _side(rejected, options), options)
    parts = {name: KINDS[name].loss(pairs) for name in weights}
    loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum(dim=0)
    metrics = _metrics(pairs, weights)
    if nll_weight:
        nll = -pairs.chosen.mean_logps
        loss = loss + nll_weight * nll
        metrics["nll"] = Mean.of(nll)
    if not isinstance(kind, str):
        metrics |= {f"loss/{name}": Mean.of(part) for name, part in parts.items()}
    return SequenceLoss(loss, metrics)


@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """One side of the pairs as the caller gave it."""

    logps: Tensor
    ref_logps: Tensor | None
    lengths: Tensor | None


def _side(given: _Given, options: Options) -> Side:
    logps = upcast(given.logps)
    absent, ones = torch.zeros_like(logps), torch.ones_like(logps)
    ref_logps = absent if given.ref_logps is None else upcast(given.ref_logps.detach())
    return Side(
        logps=logps,
        ref_logps=ref_logps,
        score=divergence_score(
            logps - ref_logps, divergence=options.divergence, alpha=options.alpha
        ),
        lengths=ones if given.lengths is None else upcast(given.lengths).clamp(min=1),
    )


def _metrics(pairs: Pairs, kinds: Iterable[str]) -> dict[str, Metric]:
    """The reward is that of the first kind with a reference, else that of the first kind."""
    entry = min((KINDS[kind] for kind in kinds), key=lambda entry: not entry.needs_reference)
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


# ---------------------------------------------------------------- checks


def _weights(
    kind: str | Mapping[str, float], nll_coef: float | None
) -> tuple[Mapping[str, float], float]:
    """The weight of each kind, and that of the NLL term."""
    if isinstance(kind, str):
        own = choose(KINDS, "preference loss", kind).nll_coef
        return {kind: 1.0}, own if nll_coef is None else nll_coef
    if nll_coef is not None:
        raise UserInputError(
            f"nll_coef is {nll_coef!r} beside a weighted sum; name {NLL!r} with its weight among "
            "the kinds in its place"
        )
    for name, weight in kind.items():
        choose({**KINDS, NLL: None}, "preference loss", name)
        if not 0 < weight < math.inf:
            raise UserInputError(
                f"the weight of preference loss {name!r} is {weight!r}; give a number above 0, or "
                "leave the loss out"
            )
    weights = {name: weight for name, weight in kind.items() if name != NLL}
    if not weights:
        raise UserInputError(
            f"the weights {dict(kind)} name no preference loss; give one or more of "
            f"{', '.join(KINDS)}"
        )
    of_kinds = sum(weight * KINDS[name].nll_coef for name, weight in weights.items())
    return weights, kind.get(NLL, 0.0) + of_kinds


def _check_options(kinds: Iterable[str], options: Options) -> None:
    named = frozenset(kinds)
    if not options.beta > 0:
        raise UserInputError(f"preference loss beta is {options.beta!r}; give a number above 0")
    if not 0 <= options.label_smoothing < 0.5:
        raise UserInputError(
            f"label_smoothing is {options.label_smoothing!r}; it is the probability that a label "
            "is wrong, so give a number in [0, 0.5)"
        )
    if options.label_smoothing and not named & SMOOTHED_KINDS:
        _refuse("label_smoothing", named, SMOOTHED_KINDS)
    if options.divergence != "reverse_kl" and not named <= DIVERGENCE_KINDS:
        _refuse(f"divergence {options.divergence!r}", named - DIVERGENCE_KINDS, DIVERGENCE_KINDS)
    if "exo" in named and not options.label_smoothing:
        raise UserInputError(
            "preference loss 'exo' needs label_smoothing above 0 (its paper uses 1e-3): without "
            "it the loss is infinite"
        )
    if "discopop" in named and not options.discopop_tau > 0:
        raise UserInputError(f"discopop_tau is {options.discopop_tau!r}; give a number above 0")


def _refuse(option: str, kinds: frozenset[str], able: frozenset[str]) -> NoReturn:
    raise UserInputError(
        f"{option} has no meaning in preference loss {_listed(kinds)}; drop it, or use "
        f"{_listed(able)}"
    )


def _check_tensors(
    kinds: Iterable[str], chosen: _Given, rejected: _Given, nll_weight: float
) -> None:
    tensors = {
        "chosen_logps": chosen.logps,
        "rejected_logps": rejected.logps,
        "ref_chosen_logps": chosen.ref_logps,
        "ref_rejected_logps": rejected.ref_logps,
        "chosen_lengths": chosen.lengths,
        "rejected_lengths": rejected.lengths,
    }
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    check_shapes(chosen.logps.shape[:1], **given)
    comparing = frozenset(kinds) - REFERENCE_FREE_KINDS
    if comparing and not {"ref_chosen_logps", "ref_rejected_logps"} <= given.keys():
        raise UserInputError(
            f"preference loss {_listed(comparing)} compares with a reference and none was scored; "
            f"give the run a reference, or use one of {_listed(REFERENCE_FREE_KINDS)}"
        )
    averaging = frozenset(kind for kind in kinds if KINDS[kind].needs_lengths)
    averages = [f"preference loss {_listed(averaging)}"] if averaging else []
    averages += [f"the NLL term (weight {nll_weight:g})"] if nll_weight else []
    if averages and not {"chosen_lengths", "rejected_lengths"} <= given.keys():
        raise UserInputError(
            f"a mean over tokens is part of {' and of '.join(averages)}; give chosen_lengths and "
            "rejected_lengths"
        )


def _listed(kinds: Iterable[str]) -> str:
    return ", ".join(repr(kind) for kind in KINDS if kind in frozenset(kinds))
