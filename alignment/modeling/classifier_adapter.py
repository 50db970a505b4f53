"""Reward models that are a peft adapter on a base model, saved here or by other trainers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from alignment.modeling.cast import cast_parameters
from alignment.modeling.load import ADAPTER_FILE, Attention, base_of, cannot_load
from alignment.types import UserInputError

_BASE = "base_model.model."
"""What peft puts before the names of a model's weights."""


def is_classifier_adapter(folder: Path | str) -> bool:
    """Whether it holds an adapter of a sequence-classification model."""
    file = Path(folder) / ADAPTER_FILE
    return file.is_file() and json.loads(file.read_text("utf-8")).get("task_type") == "SEQ_CLS"


def merged_classifier(
    adapter: Path, attention: Attention, trust_remote_code: bool
) -> tuple[nn.Module, Tensor]:
    """The decoder with the adapter merged into it, and its head's weight `[1, D]`, in float32.

    The base is taken in the number format of the adapter's own weights, as it was while those were
    trained.

    Args: as of `load_causal_lm`.

    Raises:
        UserInputError: base or adapter cannot be loaded, or no head of one number comes with them.
    """
    auto: Any = AutoModelForSequenceClassification
    try:
        weights = load_peft_weights(str(adapter))
        classifier, info = auto.from_pretrained(
            base_of(adapter),
            num_labels=1,
            dtype=_dtype_of(weights),
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        _check_head(adapter, set(weights), classifier, set(info["missing_keys"]))
        in_float32: Any = cast_parameters(classifier, torch.float32)
        adapted: Any = PeftModel.from_pretrained(in_float32, str(adapter))
        merged = adapted.merge_and_unload()
    except UserInputError:
        raise
    except Exception as error:
        raise UserInputError(cannot_load("adapter", adapter, error)) from error
    decoder: Any = getattr(merged, merged.base_model_prefix)
    decoder.config.use_cache = False
    return decoder.requires_grad_(True).eval(), merged.score.weight.detach()


def save_classifier_adapter(adapted: Any, head: Tensor, prefix: str, folder: Path) -> None:
    """Write the adapter of a decoder and a head, as peft does for transformers' classifier of them.

    Args:
        adapted: the decoder with the adapter on it.
        head: weight `[1, D]`.
        prefix: what the classifier calls its decoder.
    """
    config = copy.deepcopy(adapted.peft_config["default"])
    config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", ["score"], True
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    weights = {f"{_BASE}{prefix}.{name.removeprefix(_BASE)}": value for name, value in own.items()}
    weights[f"{_BASE}score.weight"] = head
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    whole = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(whole, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def _dtype_of(weights: Mapping[str, Tensor]) -> torch.dtype:
    """That of an adapter's matrices; float32 where they have several."""
    found = {value.dtype for name, value in weights.items() if "lora_" in name}
    return found.pop() if len(found) == 1 else torch.float32


def _check_head(adapter: Path, brings: set[str], classifier: nn.Module, absent: set[str]) -> None:
    """What the base lacks has to come with the adapter."""
    brought = {name.removeprefix(_BASE) for name in brings}
    still_absent = sorted(absent - brought)
    if still_absent or not hasattr(classifier, "score"):
        raise UserInputError(
            f"adapter {str(adapter)!r}: neither it nor its base holds "
            f"{', '.join(still_absent[:4]) or 'score.weight'}, which would be random; save the "
            "adapter with its head (modules_to_save: [score]), or give a merged model"
        )
