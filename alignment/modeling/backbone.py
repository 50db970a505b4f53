"""A causal LM split in two: hidden states from tokens, and logits from hidden states.

Everything that runs the model (scorer, native rollout engine) goes through `Backbone`. It knows
where the decoder and the head are, which logit transforms the architecture applies, and which
attention masks its layers expect.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alignment.activity import ACTIVITY
from alignment.modeling.attention import NAME, attention_as, is_exchangeable
from alignment.modeling.seams import Seams
from alignment.types import AlignmentError

# Layer kinds whose state is not a set of keys and values: no attention mask can keep packed
# sequences apart there, so such models take plain padded rows only.
_RECURRENT_WORDS = ("mamba", "linear_attention", "conv", "recurrent", "ssm", "rwkv", "hybrid")


class Backbone:
    """The two halves of a `transformers` causal LM.

    Args:
        model: a causal LM, a decoder without a head, or a peft model around one (adapters stay
            active).

    Attributes:
        plain_reason: why only plain padded rows are valid for this architecture, or None where
            custom masks are.
        cuts_at_seams: whether packed rows may be run by `packed_attention`; else by block masks.
    """

    def __init__(self, model: nn.Module) -> None:
        get_base = getattr(model, "get_base_model", None)
        causal_lm: Any = get_base() if get_base is not None else model
        self.causal_lm = causal_lm
        self.config = causal_lm.config.get_text_config()
        self.decoder: nn.Module = causal_lm.base_model
        self.lm_head: nn.Module | None = causal_lm.get_output_embeddings()
        self.plain_reason = _plain_reason(causal_lm, self.config)
        self.cuts_at_seams = is_exchangeable(causal_lm, self.config)

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Last hidden states `[B, S, D]` of `input_ids` `[B, S]`.

        `attention_mask` is what `masks` returned, or a 2-D padding mask for plain rows.
        """
        output = self._decode(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            **kwargs,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def hidden_and_router_loss(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        real: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states and the load-balancing loss of a mixture of experts.

        The loss is E * sum_e f_e P_e (Switch Transformer, eq. 4 to 6, f_e counting all k chosen
        experts of a token) averaged over layers; `real` `[B, S]` leaves padding out.

        Raises:
            AlignmentError: the architecture has no router.
        """
        output = self._decode(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=False,
            output_router_logits=True,
            **kwargs,
        )
        routers = getattr(output, "router_logits", None)
        if not routers:
            raise AlignmentError(
                f"{self.config.model_type} has no expert router: set model.router_aux_coef to 0"
            )
        per_layer = [
            _load_balancing_loss(layer.reshape(-1, layer.shape[-1])[real.flatten()], self.config)
            for layer in routers
        ]
        return output.last_hidden_state, torch.stack(per_layer).mean()

    def _decode(self, *, seams: Seams | None = None, **inputs: Any) -> Any:
        """Run the decoder; `seams` go with the masks of a row that is cut there."""
        ACTIVITY.move()
        if seams is None:
            return self.decoder(**inputs)
        with attention_as(self.config, NAME):
            return self.decoder(**inputs, seams=seams)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits `[..., V]` of hidden states `[..., D]`, scaled as the architecture asks."""
        if self.lm_head is None:
            raise AlignmentError(
                f"{type(self.causal_lm).__name__} has no output embeddings to score with"
            )
        logits: Tensor = self.lm_head(hidden).float()
        scale = getattr(self.config, "logit_scale", None)
        if scale is not None:
            logits = logits * scale
        divisor = getattr(self.config, "logits_scaling", None)
        if divisor is not None:
            logits = logits / divisor
        cap = getattr(self.config, "final_logit_softcapping", None)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def masks(
        self, allowed: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> Tensor | dict[str, Tensor]:
        """Attention masks in the form this model's layers expect.

        Args:
            allowed: bool `[B, Q, K]`, True where query q may look at key k (causality included,
                sliding windows not).
            query_positions: `[B, Q]`, position of each query inside its own sequence.
            key_positions: `[B, K]`, likewise for keys; `[B, Q, K]` where each query has its own.

        Returns:
            A 4-D mask, or a dict of them by layer type where the model mixes types.
        """
        full = allowed[:, None]
        window = getattr(self.config, "sliding_window", None)
        mixes_types = "sliding_attention" in (getattr(self.config, "layer_types", None) or ())
        if window is None:
            return self._as_mask(full)
        keys = key_positions if key_positions.dim() == 3 else key_positions[:, None, :]
        distance = query_positions[:, :, None] - keys
        sliding = full & (distance < window)[:, None]
        if not mixes_types:
            return self._as_mask(sliding)
        return {
            "full_attention": self._as_mask(full),
            "sliding_attention": self._as_mask(sliding),
        }

    def _as_mask(self, allowed: Tensor) -> Tensor:
        sdpa = self.config._attn_implementation == "sdpa"
        if sdpa and allowed.device.type != "cpu":
            return allowed
        # A CPU's kernels add a mask to the scores: made once here, not once in each layer.
        low = -torch.inf if sdpa else torch.finfo(self.dtype).min
        return torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device).masked_fill(
            ~allowed, low
        )


def _load_balancing_loss(router_logits: Tensor, config: Any) -> Tensor:
    """E * sum_e f_e P_e for one layer's router logits `[tokens, E]`."""
    n_experts = router_logits.shape[-1]
    probabilities = router_logits.float().softmax(dim=-1)
    chosen = probabilities.topk(config.num_experts_per_tok, dim=-1).indices
    share_routed = nn.functional.one_hot(chosen, n_experts).sum(dim=1).float().mean(dim=0)
    return n_experts * (share_routed * probabilities.mean(dim=0)).sum()


def _plain_reason(causal_lm: Any, config: Any) -> str | None:
    """Why custom masks are invalid for this architecture, found by inspection; None if valid."""
    if getattr(causal_lm, "_is_stateful", False):
        return f"{config.model_type} keeps a recurrent state"
    kinds = set(getattr(config, "layer_types", None) or ())
    recurrent = sorted(k for k in kinds if any(word in k for word in _RECURRENT_WORDS))
    if recurrent:
        return f"{config.model_type} has layers of type {', '.join(recurrent)}"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention implementation {config._attn_implementation!r} takes no custom mask"
    return None
