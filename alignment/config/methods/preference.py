"""The preference losses as a recipe names them, and which options each of them takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails

from alignment.config.fields import (
    Fraction,
    NonNegative,
    Number,
    Positive,
    Section,
    problem,
    raise_problems,
)
from alignment.registry import unknown_name

NLL = "nll"
"""The name of the chosen completion's negative log-likelihood in a weighted sum."""


@dataclass(frozen=True, slots=True)
class PreferenceKind:
    """What a kind of preference loss takes; `alignment.losses` has its formula.

    smooths:         label_smoothing.
    diverges:        another divergence than the reverse KL.
    couples:         a pair's loss depends on the other pairs of the step.
    needs_reference: it compares with a reference.
    nll_coef:        weight of the negative log-likelihood that its paper has.
    """

    smooths: bool = False
    diverges: bool = False
    couples: bool = False
    needs_reference: bool = True
    nll_coef: float = 0.0


KINDS: Mapping[str, PreferenceKind] = {
    "sigmoid": PreferenceKind(smooths=True, diverges=True),
    "sigmoid_norm": PreferenceKind(smooths=True, diverges=True),
    "robust": PreferenceKind(smooths=True, diverges=True),
    "ipo": PreferenceKind(diverges=True),
    "ipo_norm": PreferenceKind(diverges=True),
    "hinge": PreferenceKind(diverges=True),
    "exo": PreferenceKind(smooths=True, diverges=True),
    "nca": PreferenceKind(),
    "sppo": PreferenceKind(),
    "aot": PreferenceKind(smooths=True, couples=True),
    "aot_unpaired": PreferenceKind(smooths=True, couples=True),
    "apo_zero": PreferenceKind(),
    "apo_down": PreferenceKind(),
    "discopop": PreferenceKind(diverges=True),
    "bco": PreferenceKind(),
    "simpo": PreferenceKind(smooths=True, needs_reference=False),
    "cpo": PreferenceKind(smooths=True, needs_reference=False, nll_coef=1.0),
    "orpo": PreferenceKind(needs_reference=False, nll_coef=1.0),
}
"""The kinds of `alignment.losses.preference_loss`. Stated here a second time because that module
imports torch and recipes do not; a test holds the two together."""

# Options of one kind each, and what it takes where the recipe says nothing.
_OWN_OPTIONS: Mapping[str, tuple[str, float]] = {
    "simpo_gamma": ("simpo", 0.5),
    "discopop_tau": ("discopop", 0.05),
    "bco_decay": ("bco", 0.9),
}


def _names(kind: Any) -> list[str]:
    """The kinds of a loss section, without the likelihood term; none where `kind` is not valid."""
    found = kind if isinstance(kind, Mapping) else [kind]
    return [name for name in found if name in KINDS]


def _own(option: str) -> Any:
    kind, default = _OWN_OPTIONS[option]
    return Field(
        default_factory=lambda data: default if kind in _names(data.get("kind", "")) else None
    )


class PreferenceLossConfig(Section):
    """How a preference between two completions becomes a loss.

    The kinds: `sigmoid` (DPO; conservative with label_smoothing), `sigmoid_norm` (on log-ratios
    averaged over tokens), `robust`, `ipo`, `ipo_norm`, `hinge` (SLiC), `exo`, `nca`, `sppo`, `aot`,
    `aot_unpaired`, `apo_zero`, `apo_down`, `discopop`, `bco`; and without a reference `simpo`,
    `cpo`, `orpo`.
    """

    kind: str | dict[str, Positive] = "sigmoid"
    """One kind; or several with their weights, such as {sigmoid: 0.8, bco: 0.2, nll: 1.0} (MPO),
    where nll is the chosen completion's mean negative log-likelihood."""
    beta: Positive = Field(
        default_factory=lambda data: 2.0 if _names(data.get("kind", "")) == ["simpo"] else 0.1
    )
    """Strength of the pull to the reference; weight of orpo's odds-ratio term; inverse temperature
    of simpo (whose default is 2) and cpo. The default of the others is 0.1; a sum of simpo and
    others has none, and needs it."""
    label_smoothing: Annotated[Number, Field(ge=0.0, lt=0.5)] = Field(
        default_factory=lambda data: 1e-3 if data.get("kind") == "exo" else 0.0
    )
    """Probability that a label is wrong; for sigmoid, sigmoid_norm, robust, exo (which needs it;
    default 0.001), aot, aot_unpaired, simpo and cpo."""
    nll_coef: NonNegative | None = Field(
        default_factory=lambda data: (
            KINDS[data["kind"]].nll_coef if isinstance(data.get("kind"), str) else None
        )
    )
    """Weight of the chosen completion's mean negative log-likelihood (RPO). The default is 1 for
    cpo and orpo, and 0 for the other kinds; a weighted sum names it among its kinds."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """What keeps the policy near the reference (f-DPO); other than reverse_kl for sigmoid,
    sigmoid_norm, robust, ipo, ipo_norm, hinge, exo and discopop."""
    alpha: Annotated[Number, Field(gt=0.0, lt=1.0)] | None = Field(
        default_factory=lambda data: 0.5 if data.get("divergence") == "alpha" else None
    )
    """Of divergence: alpha, from the reverse (0) to the forward KL (1); its default is 0.5."""
    desensitize: Fraction | None = None
    """Share that the longer completion's excess tokens count with (LD-DPO): 0 cuts both to the
    same length. Null is off. For the kinds with a reference, without a likelihood term."""
    simpo_gamma: NonNegative | None = _own("simpo_gamma")
    """Target margin of simpo; its default is 0.5."""
    discopop_tau: Positive | None = _own("discopop_tau")
    """Temperature of discopop's blend; its default is 0.05."""
    bco_decay: Annotated[Number, Field(ge=0.0, lt=1.0)] | None = _own("bco_decay")
    """Share that bco's moving average of rewards keeps in a step; its default is 0.9."""

    @field_validator("kind", mode="before")
    @classmethod
    def _kinds_exist(cls, value: Any) -> Any:
        known = [*KINDS, NLL] if isinstance(value, Mapping) else [*KINDS]
        found = value if isinstance(value, Mapping) else [value]
        unknown = [name for name in found if isinstance(name, str) and name not in known]
        if unknown:
            message = unknown_name("preference loss", unknown[0], known)
            raise ValidationError.from_exception_data("kind", [problem((), message, value)])
        if isinstance(value, str | Mapping) and not _names(value):
            message = f"names no preference loss; give one or more of {', '.join(KINDS)}"
            raise ValidationError.from_exception_data("kind", [problem((), message, value)])
        return value

    @model_validator(mode="after")
    def _options_apply(self) -> PreferenceLossConfig:
        raise_problems("loss", self._problems())
        return self

    @property
    def kinds(self) -> list[str]:
        """The kinds that take part, without the likelihood term."""
        return _names(self.kind)

    @property
    def uses_reference(self) -> bool:
        """Whether any kind compares with a reference."""
        return any(KINDS[kind].needs_reference for kind in self.kinds)

    @property
    def couples(self) -> bool:
        """Whether a pair's loss depends on the other pairs of the step."""
        return any(KINDS[kind].couples for kind in self.kinds)

    @property
    def lowers_chosen(self) -> bool:
        """Whether a kind takes the chosen completions' likelihood down on purpose."""
        return "apo_down" in self.kinds

    @property
    def has_nll(self) -> bool:
        """Whether the negative log-likelihood is part of the loss."""
        weighted = not isinstance(self.kind, str) and NLL in self.kind
        return weighted or bool(self.nll_coef) or any(KINDS[k].nll_coef for k in self._in_a_sum)

    @property
    def _in_a_sum(self) -> list[str]:
        return [] if isinstance(self.kind, str) else self.kinds

    def _problems(self) -> Iterator[InitErrorDetails]:
        kinds = [KINDS[kind] for kind in self.kinds]
        if "simpo" in self.kinds and len(kinds) > 1 and "beta" not in self.model_fields_set:
            yield problem(
                ("beta",),
                "missing: one beta is for all kinds of a sum, and simpo's default is 2, that of "
                "the others 0.1; give it",
            )
        if self.label_smoothing and not any(kind.smooths for kind in kinds):
            able = _where(kind.smooths for kind in KINDS.values())
            yield problem(("label_smoothing",), f"applies to {able} only; remove it")
        if "exo" in self.kinds and not self.label_smoothing:
            yield problem(
                ("label_smoothing",),
                "exo needs it above 0, such as 0.001: its loss is infinite at 0",
            )
        if self.divergence != "reverse_kl" and not all(kind.diverges for kind in kinds):
            able = _where(kind.diverges for kind in KINDS.values())
            yield problem(("divergence",), f"applies to {able} only; remove it")
        if self.alpha is not None and self.divergence != "alpha":
            yield problem(("alpha",), "applies to divergence: alpha only; remove it")
        if self.nll_coef is not None and self._in_a_sum:
            yield problem(("nll_coef",), "name nll with its weight among the kinds in its place")
        if self.desensitize is not None and (
            self.has_nll or not all(kind.needs_reference for kind in kinds)
        ):
            yield problem(
                ("desensitize",),
                "applies to kinds with a reference and without a likelihood term; remove it",
            )
        for option, (kind, _) in _OWN_OPTIONS.items():
            if getattr(self, option) is not None and kind not in self.kinds:
                yield problem((option,), f"applies to kind: {kind} only; remove it")


def _where(holds: Iterable[bool]) -> str:
    return ", ".join(name for name, able in zip(KINDS, holds, strict=True) if able)
