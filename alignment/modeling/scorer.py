"""The one scorer: samples in, completion-aligned `[B, T]` tensors out.

Every method of the toolkit trains and scores through `score`. Hidden states are computed for all
packed tokens; logits exist only for completion positions, a chunk at a time, and are recomputed in
the backward pass, so no `[tokens, vocabulary]` tensor is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignment.losses.kl import kl_full
from alignment.modeling.attention import SeamsLost
from alignment.modeling.backbone import Backbone
from alignment.modeling.logits import transform_logits
from alignment.modeling.packing import Packed, Reads, pack, pad
from alignment.types import AlignmentError, Sample, SamplingParams

# Completion positions whose logits exist at the same time: 128 x 49,152 fp32 logits are 25 MB.
CHUNK = 128


@dataclass(frozen=True, slots=True)
class Scores:
    """What the scorer knows of `B` samples, aligned to completions (`T` = the longest).

    logprobs:  fp32 `[B, T]`, log p(completion token), 0 outside the completion.
    mask:      bool `[B, T]`, the samples' loss masks: True = counts.
    entropies: fp32 `[B, T]` in nats, or None where not asked for.
    greedy:    bool `[B, T]`, True where the token is the most likely one; None if not asked for.
    full_kl:   fp32 `[B, T]`, KL(policy || reference) over the vocabulary; None if not asked for.
    values:    fp32 `[B, T]`, a value head's estimate where each token is chosen; None without one.
    aux_loss:  the router's load-balancing loss of a mixture of experts (scalar), else None.
    n_tokens:  tokens computed, shared prompts once, padding included.
    """

    logprobs: Tensor
    mask: Tensor
    entropies: Tensor | None
    greedy: Tensor | None
    full_kl: Tensor | None
    values: Tensor | None
    aux_loss: Tensor | None
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Values:
    """What a scalar head says of `B` samples, aligned to completions (`T` = the longest).

    values:   fp32 `[B, T]`, 0 outside the completion.
    mask:     bool `[B, T]`, the samples' loss masks: True = counts.
    lengths:  `[B]`, completion tokens.
    aux_loss: the router's load-balancing loss of a mixture of experts (scalar), else None.
    n_tokens: tokens computed, shared prompts once, padding included.
    """

    values: Tensor
    mask: Tensor
    lengths: Tensor
    aux_loss: Tensor | None
    n_tokens: int

    @property
    def last(self) -> Tensor:
        """`[B]`: the number at each sample's last completion token."""
        return self.values.gather(1, self.lengths[:, None] - 1).squeeze(1)


@dataclass(frozen=True, slots=True)
class PredictingStates:
    """Hidden states `[M, D]` that predict completion tokens, with the backbone to read them."""

    backbone: Backbone
    hidden: Tensor


def score(
    backbone: Backbone,
    samples: Sequence[Sample],
    *,
    sampling: SamplingParams | None = None,
    entropy: bool = False,
    entropy_gradient: bool = False,
    greedy: bool = False,
    reference: PredictingStates | None = None,
    value_head: Callable[[Tensor], Tensor] | None = None,
    router_loss: bool = False,
) -> Scores:
    """Score samples in one forward pass (the caller splits by `plan_micro_batches`).

    Args:
        backbone: the model to score with. Gradients flow if they are enabled.
        samples: `B` samples; equal prompts are computed once.
        sampling: the transforms the completions were sampled under (temperature, top-k, top-p,
            min-p); log-probabilities are those of the transformed distribution. None: of the
            model's own. Entropies and `full_kl` are of the tempered distribution.
        entropy, greedy: whether to compute these too.
        entropy_gradient: whether the entropies carry a gradient (an entropy bonus).
        reference: the reference's predicting states of the same samples (`predicting_states`),
            to compute the full KL against.
        value_head: maps hidden states `[M, D]` to values `[M]`.
        router_loss: whether to compute a mixture of experts' load-balancing loss.
    """
    packed = _lay_out(backbone, samples)
    hidden, aux = _hidden(backbone, packed, router_loss)
    states = hidden.flatten(0, 1)[packed.source]
    columns = _read_head(
        backbone,
        states,
        packed.target_ids,
        _Wanted(sampling, entropy, entropy_gradient, greedy),
        reference,
    )

    def place(values: Tensor | None) -> Tensor | None:
        return None if values is None else _place(values, packed, samples)

    logprobs = _place(columns.logprobs, packed, samples)
    return Scores(
        logprobs=logprobs,
        mask=completion_tensor([s.loss_mask for s in samples], torch.bool, logprobs.device),
        entropies=place(columns.entropies),
        greedy=place(columns.greedy),
        full_kl=place(columns.full_kl),
        values=place(None if value_head is None else value_head(states)),
        aux_loss=aux,
        n_tokens=packed.n_tokens,
    )


def read_values(
    backbone: Backbone,
    head: Callable[[Tensor], Tensor],
    samples: Sequence[Sample],
    *,
    reads: Reads,
    router_loss: bool = False,
) -> Values:
    """A scalar head over samples in one forward pass, without logits.

    Args:
        head: maps hidden states `[M, D]` to numbers `[M]`.
        reads: whether a token's number comes from the hidden state that predicts it (`before`) or
            from its own (`after`).
        router_loss: whether to compute a mixture of experts' load-balancing loss.
    """
    packed = _lay_out(backbone, samples, reads)
    hidden, aux = _hidden(backbone, packed, router_loss)
    values = head(hidden.flatten(0, 1)[packed.source])
    return Values(
        values=_place(values, packed, samples),
        mask=completion_tensor([s.loss_mask for s in samples], torch.bool, values.device),
        lengths=torch.tensor([len(s.completion_ids) for s in samples], device=values.device),
        aux_loss=aux,
        n_tokens=packed.n_tokens,
    )


def predicting_states(backbone: Backbone, samples: Sequence[Sample]) -> PredictingStates:
    """Only the hidden states that predict the completions, in the order `score` reads them."""
    packed = _lay_out(backbone, samples)
    hidden, _ = _hidden(backbone, packed, router_loss=False)
    return PredictingStates(backbone, hidden.flatten(0, 1)[packed.source])


def _place(values: Tensor, packed: Packed, samples: Sequence[Sample]) -> Tensor:
    """Packed `[M]` as `[B, T]`, zero where there is no token."""
    shape = (len(samples), max(len(s.completion_ids) for s in samples))
    empty = torch.zeros(shape, dtype=values.dtype, device=values.device)
    return empty.index_put((packed.rows, packed.cols), values)


def completion_tensor(
    rows: Sequence[Sequence[float | bool]], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Right-pad ragged rows with zero (False) into `[B, T]`."""
    out = torch.zeros(len(rows), max(len(row) for row in rows), dtype=dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=dtype)
    return out.to(device)


def choose_layout(backbone: Backbone) -> None:
    """Settle how samples are laid out for this model: in one row cut at its seams, else in rows
    under a block mask, else plainly padded; the first under which none sees another."""
    if backbone.plain_reason is None and backbone.cuts_at_seams:
        backbone.cuts_at_seams = packing_fault(backbone) is None
    if backbone.plain_reason is None and not backbone.cuts_at_seams:
        backbone.plain_reason = packing_fault(backbone)


@torch.no_grad()
def packing_fault(backbone: Backbone) -> str | None:
    """Check on a few tokens that packed samples do not see each other; None where they don't.

    A custom mask that an architecture ignores contaminates silently (log-probabilities off by 2.8
    to 5.5), so it is measured once at the start, on log-probabilities, or on hidden states (scaled
    to length 1) where there is no language-model head. Rounding stays far below the
    limit.
    """
    # Tokens from all over the vocabulary. Its first ones are often control tokens, after which low
    # precision alone moves log-probabilities by 0.8.
    ids = [backbone.config.vocab_size * place // 16 for place in range(1, 15)]
    rows = [(ids[:3], ids[3:7]), (ids[:3], ids[7:9]), (ids[9:11], ids[11:])]
    samples = [Sample(tuple(p), tuple(c), (True,) * len(c)) for p, c in rows]
    try:
        packed = _fingerprint(backbone, samples)
    except SeamsLost as error:
        return str(error)
    worst = 0.0
    cuts, backbone.cuts_at_seams = backbone.cuts_at_seams, False  # alone, the model's own attention
    for sample, together in zip(samples, packed, strict=True):
        (alone,) = _fingerprint(backbone, [sample])
        worst = max(worst, float((together - alone).norm(dim=-1).max()))
    backbone.cuts_at_seams = cuts
    limit = 1e-3 if backbone.dtype == torch.float32 else 0.25
    if worst < limit:
        return None
    return f"packed samples see each other on {backbone.config.model_type} (off by {worst:.2f})"


def _fingerprint(backbone: Backbone, samples: Sequence[Sample]) -> list[Tensor]:
    """Per sample, numbers `[n, k]` that depend on all that its n tokens look at."""
    lengths = [len(s.completion_ids) for s in samples]
    if backbone.lm_head is not None:
        logprobs = score(backbone, samples).logprobs
        return [row[:length, None] for row, length in zip(logprobs, lengths, strict=True)]
    packed = _lay_out(backbone, samples)
    hidden, _ = _hidden(backbone, packed, router_loss=False)
    states = hidden.flatten(0, 1)[packed.source].float()
    states = states / states.norm(dim=-1, keepdim=True)
    return [states[packed.rows == row] for row in range(len(samples))]


@dataclass(frozen=True, slots=True)
class _Wanted:
    sampling: SamplingParams | None
    entropy: bool
    entropy_gradient: bool
    greedy: bool


@dataclass(frozen=True, slots=True)
class _Columns:
    logprobs: Tensor
    entropies: Tensor | None
    greedy: Tensor | None
    full_kl: Tensor | None


def _lay_out(backbone: Backbone, samples: Sequence[Sample], reads: Reads = "before") -> Packed:
    if backbone.plain_reason is not None:
        return pad(samples, device=backbone.device, reads=reads)
    return pack(
        samples,
        device=backbone.device,
        reads=reads,
        cut_at_seams=backbone.cuts_at_seams,
        window=getattr(backbone.config, "sliding_window", None),
    )


def _hidden(backbone: Backbone, packed: Packed, router_loss: bool) -> tuple[Tensor, Tensor | None]:
    """Hidden states `[R, L, D]`, and the router loss where asked for."""
    mask: Tensor | dict[str, Tensor]
    if packed.allowed is None:
        mask = packed.real.long()
    else:
        mask = backbone.masks(packed.allowed, packed.position_ids, packed.key_positions)
    inputs = (packed.input_ids, packed.position_ids, mask)
    if router_loss:
        return backbone.hidden_and_router_loss(*inputs, packed.real, seams=packed.seams)
    return backbone.hidden(*inputs, seams=packed.seams), None


def _read_head(
    backbone: Backbone,
    states: Tensor,
    targets: Tensor,
    want: _Wanted,
    reference: PredictingStates | None,
) -> _Columns:
    """Logits of `states` `[M, D]`, `CHUNK` rows at a time, and what is read off them, `[M]`."""

    def read(chunk: Tensor, target: Tensor, reference_chunk: Tensor | None) -> tuple[Tensor, ...]:
        logits = _tempered(backbone.logits(chunk), want.sampling, target)
        logprob, log_p = _chosen_logprob(logits, target)
        out = [logprob]
        if want.entropy:
            has_gradient = want.entropy_gradient and torch.is_grad_enabled()
            out.append(_entropy(logits.log_softmax(dim=-1) if has_gradient else log_p))
        if reference_chunk is not None and reference is not None:
            with torch.no_grad():
                reference_logits = _tempered(
                    reference.backbone.logits(reference_chunk), want.sampling, target
                )
            out.append(_full_kl(logits, reference_logits.to(logits.device)))
        if want.greedy:
            out.append(log_p.argmax(dim=-1) == target)
        return tuple(out)

    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(states), CHUNK):
        piece = slice(start, start + CHUNK)
        reference_chunk = None if reference is None else reference.hidden[piece]
        if torch.is_grad_enabled():
            out = checkpoint(
                read, states[piece], targets[piece], reference_chunk, use_reentrant=False
            )
        else:
            out = read(states[piece], targets[piece], reference_chunk)
        parts.append(out)
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    logprobs = columns.pop(0)
    return _Columns(
        logprobs=logprobs,
        entropies=columns.pop(0) if want.entropy else None,
        full_kl=columns.pop(0) if reference is not None else None,
        greedy=columns.pop(0) if want.greedy else None,
    )


class _ChosenLogprob(torch.autograd.Function):
    """log p(target) `[N]`, and log p of everything `[N, V]` without a gradient, of logits `[N, V]`.

    d log p(target) / d logit_v = 1[v = target] - p(v). Softmax and log-softmax are single fused
    passes over the vocabulary, which logsumexp is not (several times slower on a CPU).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, target)
        log_p = logits.log_softmax(dim=-1)
        ctx.mark_non_differentiable(log_p)
        ctx.set_materialize_grads(False)
        return log_p.gather(-1, target[:, None]).squeeze(-1), log_p

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0]
        logits, target = ctx.saved_tensors
        of_logits = logits.softmax(dim=-1).mul_(-gradient[:, None])
        return of_logits.scatter_add_(-1, target[:, None], gradient[:, None]), None


def _chosen_logprob(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    function: Any = _ChosenLogprob
    logprob, log_p = function.apply(logits, target)
    return logprob, log_p


def _tempered(logits: Tensor, sampling: SamplingParams | None, targets: Tensor) -> Tensor:
    if logits.dtype != torch.float32:
        raise AlignmentError(f"log-softmax of {logits.dtype} logits: scoring is done in float32")
    if sampling is None:
        return logits
    # A sampled token at the very edge of the support stays in it, whatever rounding does here.
    return transform_logits(logits, sampling, keep=targets)


def _entropy(log_p: Tensor) -> Tensor:
    """Entropy `[N]` in nats; tokens outside the support (log p -inf) contribute nothing."""
    expected: Tensor = torch.linalg.vecdot(
        log_p.exp(), log_p.clamp(min=torch.finfo(log_p.dtype).min)
    )
    return -expected


def _full_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(policy || reference) `[N]`, in nats, over the vocabulary."""
    return kl_full(logits.log_softmax(dim=-1), reference_logits.log_softmax(dim=-1))
