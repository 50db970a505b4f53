"""Load and save models with a scalar head: reward models, process reward models, critics."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.utils.hub import cached_file
from transformers.utils.logging import get_verbosity, set_verbosity

from alignment.modeling.cast import cast_parameters
from alignment.modeling.catalog import resolve
from alignment.modeling.classifier_adapter import (
    is_classifier_adapter,
    merged_classifier,
    save_classifier_adapter,
)
from alignment.modeling.export import merged_copy
from alignment.modeling.heads import ScalarHead, ScalarModel
from alignment.modeling.load import (
    DTYPES,
    Attention,
    LoraOptions,
    add_lora,
    is_adapter,
    load_pretrained,
    portable_name,
)
from alignment.modeling.padding import give_own_padding
from alignment.types import UserInputError

logger = logging.getLogger(__name__)

HEAD = "score.weight"
"""Name of the head's weight, as `AutoModelForSequenceClassification` has it."""

SCORE_NORMALIZATION = "score_normalization.json"
"""Beside a model: mean, standard deviation and count of its scores on training pairs."""

Initial = Literal["normal", "zero"]

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Weights of language models that a scalar model does without.
_NOT_NEEDED = ("lm_head.", "embed_out.")


def load_scalar_model(
    path: str | Path,
    *,
    dtype: str = "float32",
    attention: Attention = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    lora: LoraOptions | None = None,
    seed: int = 0,
    initial: Initial = "normal",
    router_loss: bool = False,
) -> ScalarModel:
    """A decoder with a scalar head, in eval mode, ready to be trained.

    A model that has a head (a reward model saved here, or any sequence-classification model with
    one label) keeps it; a causal language model gets a new one. A sequence-classification model
    that is an adapter beside its base is merged with it, in float32 with one rounding at the end.

    Args:
        path: catalogue name, directory or hub id.
        initial: of a new head: `normal`, with standard deviation 1 / sqrt(D + 1) (Stiennon et al.
            2020), or `zero`, so that every value starts at 0.
        seed: of a new head and of the adapter.
        router_loss: see `ScalarModel`.
        The others are those of `load_causal_lm`. With `lora`, the head is trained in full.

    Raises:
        UserInputError: the model cannot be found or loaded, is a language model's adapter alone,
            or has another head than one of one number.
    """
    if dtype not in DTYPES:
        raise UserInputError(f"model dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    source = resolve(str(path))
    base_name = portable_name(path, source)
    if is_classifier_adapter(source):
        base_name = ""  # what it was merged to is nowhere on disk
        with _quiet():
            merged, weight = merged_classifier(Path(source), attention, trust_remote_code)
        decoder: Any = cast_parameters(merged, DTYPES[dtype])
    elif is_adapter(source):
        raise UserInputError(
            f"model {str(path)!r} is an adapter without its base; give the merged model (the "
            "folder that holds the adapter's, in a run of this toolkit)"
        )
    else:
        decoder, others = _load_decoder(
            source, DTYPES[dtype], attention, trust_remote_code, revision
        )
        hidden_size = decoder.config.get_text_config().hidden_size
        if any(name.startswith("score.") for name in others):
            weight = _saved_head(source, revision, others, hidden_size)
        else:
            weight = _new_head(hidden_size, initial, seed)
    head = ScalarHead(weight.shape[1], dtype=DTYPES[dtype])
    with torch.no_grad():
        head.weight.copy_(weight)
    adapted: nn.Module = decoder
    if lora is not None:
        adapted = add_lora(
            decoder, lora, seed=seed, base_name=base_name, task_type="FEATURE_EXTRACTION"
        )
    return ScalarModel(adapted, head, router_loss=router_loss)


def save_scalar_model(model: ScalarModel, tokenizer: Any, folder: Path) -> None:
    """Write the model so that `load_scalar_model` and `AutoModelForSequenceClassification` load it.

    An adapter is merged on a copy, in float32 with one rounding at the end, as `save_policy` does:
    what is loaded scores as that copy does. Adapter and head are written beside it, in `adapter/`,
    for peft and for `load_scalar_model`, which makes the same model of them. The model and the
    tokenizer in memory are untouched.

    `AutoModelForSequenceClassification` reads a row at its last token that is not padding, so the
    saved tokenizer pads with a token that ends no text (`give_own_padding`). Architectures that
    transformers cannot classify with (Granite) are saved all the same, for `load_scalar_model`
    alone, with a warning, and without the adapter. An adapter on a model that is itself an adapter
    beside its base is saved merged only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adapted: Any = model.decoder if hasattr(model.decoder, "merge_and_unload") else None
    decoder: Any = model.decoder if adapted is None else merged_copy(adapted)
    tokenizer = give_own_padding(tokenizer, decoder.get_input_embeddings().num_embeddings)
    config = decoder.config.__class__.from_dict(decoder.config.to_dict())
    config.num_labels = 1
    config.use_cache = True  # as the model came; training runs without
    config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id
    whole = _classifier(config, decoder, model.head)
    if whole is not None:
        whole.save_pretrained(folder)
        if adapted is not None and adapted.peft_config["default"].base_model_name_or_path:
            prefix = whole.base_model_prefix
            save_classifier_adapter(adapted, model.head.weight, prefix, folder / "adapter")
    else:
        _save_unclassified(config, decoder, model.head, folder)
    tokenizer.save_pretrained(folder)


def _save_unclassified(config: Any, decoder: Any, head: ScalarHead, folder: Path) -> None:
    logger.warning(
        "%s has no sequence-classification form in transformers: the model in %s can be loaded by "
        "load_scalar_model alone",
        config.model_type,
        folder,
    )
    weights = {**decoder.state_dict(), HEAD: head.weight.detach()}
    decoder.save_pretrained(folder, state_dict=weights)
    config.architectures = [type(decoder).__name__]
    config.save_pretrained(folder)


def _classifier(config: Any, decoder: nn.Module, head: ScalarHead) -> Any:
    """`decoder` and `head` as transformers' classifier, sharing their memory; None where it has
    none for the architecture, or one whose head is built otherwise."""
    auto: Any = AutoModelForSequenceClassification
    try:
        with torch.device("meta"):
            whole = auto.from_config(config, dtype=next(decoder.parameters()).dtype)
    except ValueError:
        return None
    names = {name for name, _ in whole.named_parameters()}
    prefix = whole.base_model_prefix
    own = {name for name in names if not name.startswith(f"{prefix}.")}
    if own != {HEAD} or type(getattr(whole, prefix, None)) is not type(decoder):
        return None
    setattr(whole, prefix, decoder)
    whole.score.weight = nn.Parameter(head.weight.detach(), requires_grad=False)
    return whole


def _load_decoder(source: Path | str, *settings: Any) -> tuple[Any, list[str]]:
    """The decoder, and the names of further weights that its files hold (the head's among them)."""
    with _quiet():
        decoder, others = load_pretrained(AutoModel, source, *settings)
    unused = [name for name in others if not name.startswith(("score.", *_NOT_NEEDED))]
    if unused:
        logger.warning("model %s: unused weights %s", source, unused[:4])
    return decoder, others


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of weights that there is no use for, or that come later."""
    before = get_verbosity()
    set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        set_verbosity(before)


def _new_head(hidden_size: int, initial: Initial, seed: int) -> Tensor:
    """The weight `[1, D]` of a head that nobody trained."""
    if initial == "zero":
        return torch.zeros(1, hidden_size)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, hidden_size, generator=generator) / math.sqrt(hidden_size + 1)


def _saved_head(
    source: Path | str, revision: str | None, names: Collection[str], hidden_size: int
) -> Tensor:
    """The weight `[1, D]` of the head in a model's files.

    Raises:
        UserInputError: it has another form, or is not in a safetensors file.
    """
    heads = sorted(name for name in names if name.startswith("score."))
    if heads != [HEAD]:
        raise UserInputError(
            f"model {str(source)!r} has a head of the weights {', '.join(heads)}; a reward model "
            f"or critic has {HEAD} alone"
        )
    weight = _read_head(source, revision)
    if weight.shape != (1, hidden_size):
        raise UserInputError(
            f"model {str(source)!r} has {weight.shape[0]} labels; a reward model or critic has one"
        )
    return weight


def _read_head(source: Path | str, revision: str | None) -> Tensor:
    def find(name: str) -> str | None:
        found: str | None = cached_file(
            str(source), name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        return found

    index = find(_INDEX)
    name = _WEIGHTS
    if index is not None:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        name = weight_map[HEAD]
    file = find(name)
    if file is None:
        raise UserInputError(
            f"model {str(source)!r} has its head in a file of another format than safetensors; "
            "load and save it once with transformers (save_pretrained)"
        )
    with safe_open(file, framework="pt") as tensors:
        weight: Tensor = tensors.get_tensor(HEAD)
    return weight
