"""Saving a trained policy as a plain model directory that anything can load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignment.modeling.cast import cast_parameters


def save_policy(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write weights, tokenizer, chat template and generation config in Hugging Face format.

    A LoRA policy is merged on a copy, in float32 with one rounding at the end (merging in bf16
    drifts by 0.06 a cycle), and its adapter is written beside it under `adapter/`. The policy in
    memory is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    policy: Any = model
    if hasattr(policy, "merge_and_unload"):
        policy.save_pretrained(folder / "adapter", save_embedding_layers=False)
    save_weights(model, folder)
    tokenizer.save_pretrained(folder)


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write the weights and configs alone; those of a LoRA policy merged as by `save_policy`."""
    plain: Any = merged_copy(model) if hasattr(model, "merge_and_unload") else model
    # Training runs without a cache; whoever loads the model to generate wants one.
    was_cached = plain.config.use_cache
    plain.config.use_cache = True
    try:
        plain.save_pretrained(folder)
    finally:
        plain.config.use_cache = was_cached


def merged_copy(model: Any) -> Any:
    """The base model with the adapter added to its weights, in the base's dtype."""
    dtype = next(model.parameters()).dtype
    whole = cast_parameters(copy.deepcopy(model), torch.float32).merge_and_unload()
    return cast_parameters(whole, dtype)
