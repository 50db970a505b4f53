"""Tiny random models of every family the toolkit holds itself to, for tests."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 64
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts_per_tok": 2, "output_router_logits": False}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 6},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "gemma2": {
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 5.0,
    },
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "mixtral": {**_MOE, "num_local_experts": 4},
    "qwen3_moe": {
        **_MOE,
        "num_experts": 4,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
    },
    "granite": {"logits_scaling": 3.0},
    "olmo2": {},
}


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """A tiny fp32 causal LM in eval mode, with weights large enough to tell positions apart."""
    torch.manual_seed(seed)
    extra = dict(FAMILIES[family])
    small = dict(_SMALL)
    if family == "gpt2":
        small = {
            k: small[k] for k in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
        }
        extra |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    config = AutoConfig.for_model(family, **(small | extra | overrides))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    return model.eval()


RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}


def recurrent_model(family: str) -> Any:
    """A tiny fp32 model whose layers keep a state that no attention mask can keep apart."""
    torch.manual_seed(0)
    common = {k: v for k, v in _SMALL.items() if family != "mamba" or "heads" not in k}
    config = AutoConfig.for_model(family, **(common | RECURRENT[family]))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
