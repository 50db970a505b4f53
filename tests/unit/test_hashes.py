"""Hashes of what a model computes with besides its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.modeling.hashes import settings_hash
from alignment.modeling.load import LoraOptions, load_causal_lm, model_hash
from alignment.modeling.tiny import build_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"), seed=1)


def adapted(tiny: Path, folder: Path, alpha: float) -> Path:
    """An adapter that holds an update; only what its product is scaled by differs."""
    model: Any = load_causal_lm(tiny, lora=LoraOptions(rank=2, alpha=alpha))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    model.save_pretrained(folder)
    return folder


def test_equal_models_in_other_folders_and_formats_have_the_same(
    tiny: Path, tmp_path: Path
) -> None:
    model: Any = load_causal_lm(tiny)
    model.save_pretrained(tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    config["transformers_version"] = "4.0.0"
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    again = load_causal_lm(tmp_path / "copy", dtype="bfloat16")
    assert settings_hash(again) == settings_hash(model)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {"rms_norm_eps": 1e-3},
    ],
    ids=["base of RoPE", "scaling of RoPE", "epsilon"],
)
def test_another_configuration_of_the_same_weights_is_another(
    tiny: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    model: Any = load_causal_lm(tiny)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    other = load_causal_lm(tmp_path)
    assert model_hash(other) == model_hash(model)
    assert settings_hash(other) != settings_hash(model)


def test_the_scale_of_an_adapter_counts(tiny: Path, tmp_path: Path) -> None:
    small, same, large = (
        load_causal_lm(adapted(tiny, tmp_path / str(number), alpha))
        for number, alpha in enumerate((4.0, 4.0, 8.0))
    )
    assert model_hash(small) == model_hash(large)
    assert settings_hash(small) == settings_hash(same) != settings_hash(large)


def test_buffers_count_where_they_are_saved(tiny: Path) -> None:
    def with_buffer(value: float, persistent: bool) -> str:
        model: Any = load_causal_lm(tiny)
        model.register_buffer("router_bias", torch.tensor([value]), persistent=persistent)
        return settings_hash(model)

    assert with_buffer(1.0, True) == with_buffer(1.0, True) != with_buffer(2.0, True)
    assert with_buffer(1.0, False) == with_buffer(2.0, False)
