"""sha256 of what a model computes with: tensors by name, and all that is no parameter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

# Where a model came from and by which version; its number format is that of its parameters.
_NOT_COMPUTED_WITH = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, dtypes, shapes and bytes, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def settings_hash(model: nn.Module) -> str:
    """sha256 of what a forward pass depends on besides the parameters.

    That is the configuration (the base of RoPE, the scale of logits, ...), the buffers that are
    saved with the weights (the bias of a router, ...), and the scale of each LoRA layer. Equal
    models in different folders have the same.

    Args:
        model: a transformers model, with an adapter or without.
    """
    untyped: Any = model
    saved = model.state_dict().keys()
    settings = {
        "config": _computed_with(untyped.config.to_dict()),
        "buffers": tensors_hash({k: v for k, v in model.named_buffers() if k in saved}),
        "lora": {
            name: module.scaling
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
        },
    }
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _computed_with(config: Any) -> Any:
    """A configuration, and those inside it, without what does not count."""
    if not isinstance(config, Mapping):
        return config
    return {
        str(key): _computed_with(value)
        for key, value in config.items()
        if key not in _NOT_COMPUTED_WITH
    }
