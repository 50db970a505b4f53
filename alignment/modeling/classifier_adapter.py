"""Reward models that are a peft adapter on a base model, as other trainers leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from alignment.modeling.load import ADAPTER_FILE, Attention, base_of, cannot_load
from alignment.types import UserInputError


def is_classifier_adapter(folder: Path | str) -> bool:
    """Whether it holds an adapter of a sequence-classification model."""
    file = Path(folder) / ADAPTER_FILE
    return file.is_file() and json.loads(file.read_text("utf-8")).get("task_type") == "SEQ_CLS"


def merged_classifier(
    adapter: Path, attention: Attention, trust_remote_code: bool
) -> tuple[nn.Module, Tensor]:
    """The decoder with the adapter merged into it, and its head's weight `[1, D]`, in float32.

    Args: as of `load_causal_lm`.

    Raises:
        UserInputError: base or adapter cannot be loaded, or no head of one number comes with them.
    """
    auto: Any = AutoModelForSequenceClassification
    try:
        classifier, info = auto.from_pretrained(
            base_of(adapter),
            num_labels=1,
            dtype=torch.float32,
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        _check_head(adapter, classifier, set(info["missing_keys"]))
        adapted: Any = PeftModel.from_pretrained(classifier, str(adapter))
        merged = adapted.merge_and_unload()
    except UserInputError:
        raise
    except Exception as error:
        raise UserInputError(cannot_load("adapter", adapter, error)) from error
    decoder: Any = getattr(merged, merged.base_model_prefix)
    decoder.config.use_cache = False
    return decoder.requires_grad_(True).eval(), merged.score.weight.detach()


def _check_head(adapter: Path, classifier: nn.Module, absent: set[str]) -> None:
    """What the base lacks has to come with the adapter."""
    brought = {name.removeprefix("base_model.model.") for name in load_peft_weights(str(adapter))}
    still_absent = sorted(absent - brought)
    if still_absent or not hasattr(classifier, "score"):
        raise UserInputError(
            f"adapter {str(adapter)!r}: neither it nor its base holds "
            f"{', '.join(still_absent[:4]) or 'score.weight'}, which would be random; save the "
            "adapter with its head (modules_to_save: [score]), or give a merged model"
        )
