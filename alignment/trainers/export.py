"""Export what a run made: a folder in Hugging Face format that has been seen to load back."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment.config.methods.base import needs_of
from alignment.data.text_form import TEXT_FORM
from alignment.modeling.cast import cast_parameters
from alignment.modeling.catalog import resolve
from alignment.modeling.classifier_adapter import is_classifier_adapter
from alignment.modeling.export import save_policy
from alignment.modeling.heads import ScalarModel
from alignment.modeling.load import (
    DTYPES,
    base_name,
    is_adapter,
    load_causal_lm,
    load_tokenizer,
    saved_config,
)
from alignment.modeling.scalar import SCORE_NORMALIZATION, load_scalar_model, save_scalar_model
from alignment.runs.files import TEMPORARY_PREFIX, readable_errors
from alignment.trainers.finished import NamedModel, find_model
from alignment.types import AlignmentError, Sample, UserInputError

# What the exported model is compared on: token ids that every vocabulary has.
_PROBE = tuple(range(5, 37))


def export(
    name: str, folder: Path | None = None, *, adapter: bool = False, dtype: str | None = None
) -> str:
    """Write a model, its tokenizer and chat template to `folder`, which must not exist.

    The folder appears whole, and once it has given the logits (a model with a scalar head: the
    score) of what was to be exported; or not at all.

    Args:
        name: a run's folder; a pipeline's, whose last stage counts; or a model. An adapter is
            merged into its base in float32, with one rounding at the end.
        folder: of a run, `export` in its folder where left out.
        adapter: write the LoRA adapter alone, as it is.
        dtype: of the weights; None is that of the files.

    Returns:
        what was written, in words.

    Raises:
        UserInputError: there is no such model, adapter or number format, or `folder` exists, or
            is left out for a model that is no run's.
        AlignmentError: it cannot be written, or does not load back as it was.
    """
    folder = folder or _default_folder(name)
    if os.path.lexists(folder):
        raise UserInputError(f"{folder} exists already and is not overwritten; name another folder")
    if dtype is not None and dtype not in DTYPES:
        raise UserInputError(f"dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    if adapter and dtype is not None:
        raise UserInputError("an adapter is exported as it is; leave the dtype out, or merge it")
    model = find_model(name)
    temporary = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}-{secrets.token_hex(4)}")
    with readable_errors("export to", folder):
        try:
            temporary.mkdir(parents=True)
            written = _adapter(model, temporary) if adapter else _model(model, temporary, dtype)
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return f"{folder}: {written}; it loads back with the same output"


def _default_folder(name: str) -> Path:
    run = Path(name)
    if not (run / "recipe.yaml").is_file():
        raise UserInputError(f"{name} is not a run's folder; name a folder to write the model to")
    return run / "export"


def _model(named: NamedModel, folder: Path, dtype: str | None) -> str:
    source, code = named.path, _remote_code(named)
    config = saved_config(source, trust_remote_code=code)
    dtype = dtype or str(config.dtype or torch.float32).removeprefix("torch.")
    tokenizer = load_tokenizer(source, trust_remote_code=code)
    if _has_scalar_head(named, config):
        scalar = load_scalar_model(source, dtype=dtype, trust_remote_code=code)
        save_scalar_model(scalar, tokenizer, folder)
        _copy_side_files(named, folder)
        again = load_scalar_model(folder, dtype=dtype, trust_remote_code=code)
        _check_equal(_score(scalar), _score(again))
        return f"the model with its scalar head, in {dtype}"
    model: Any
    if is_adapter(source):
        model = load_causal_lm(source, trust_remote_code=code)
        model = cast_parameters(model.merge_and_unload(), DTYPES[dtype])
    else:
        model = load_causal_lm(source, dtype=dtype, trust_remote_code=code)
    save_policy(model, tokenizer, folder)
    written = load_causal_lm(folder, dtype=dtype, trust_remote_code=code)
    _check_equal(_logits(model), _logits(written))
    return f"the model, in {dtype}"


def _adapter(named: NamedModel, folder: Path) -> str:
    places = (Path(named.path), Path(named.path) / "adapter")
    source = next((place for place in places if is_adapter(place)), None)
    if source is None:
        raise UserInputError(
            f"{named.path} has no adapter: every weight was trained, or the model has a scalar "
            "head that was saved merged only; leave --adapter out"
        )
    code = _remote_code(named)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    load_tokenizer(named.path, trust_remote_code=code).save_pretrained(folder)
    if is_classifier_adapter(source):
        _copy_side_files(named, folder)
        scored = [load_scalar_model(path, trust_remote_code=code) for path in (source, folder)]
        _check_equal(*map(_score, scored))
        return f"the adapter and the scalar head, of the base model {base_name(source)}"
    models = [load_causal_lm(path, trust_remote_code=code) for path in (source, folder)]
    _check_equal(*map(_logits, models))
    return f"the adapter of the base model {base_name(source)}"


def _copy_side_files(named: NamedModel, folder: Path) -> None:
    """What a reward model reads, and the scale of its scores, go where it goes."""
    for name in (TEXT_FORM, SCORE_NORMALIZATION):
        beside = Path(resolve(named.path)) / name
        if beside.is_file():
            shutil.copy(beside, folder)


def _remote_code(named: NamedModel) -> bool:
    return named.recipe is not None and named.recipe.model.trust_remote_code


def _has_scalar_head(named: NamedModel, config: Any) -> bool:
    if named.recipe is not None:
        return needs_of(named.recipe.algorithm).model == "scalar"
    architectures = config.architectures or ()
    return is_classifier_adapter(resolve(named.path)) or any(
        "SequenceClassification" in name for name in architectures
    )


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([_PROBE]), use_cache=False).logits
    return logits


def _score(model: ScalarModel) -> Tensor:
    half = len(_PROBE) // 2
    sample = Sample(_PROBE[:half], _PROBE[half:], (True,) * (len(_PROBE) - half))
    return torch.tensor(model.scores([sample], len(_PROBE)))


def _check_equal(expected: Tensor, found: Tensor) -> None:
    if not torch.equal(expected, found):
        error = (expected.float() - found.float()).abs().max().item()
        raise AlignmentError(
            f"what was written loads back with an output that differs by {error:.2g}, so nothing "
            "is kept; please report this model"
        )
