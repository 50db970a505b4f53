"""Casting a model rounds its weights and leaves its positions alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from alignment.cli import app
from alignment.modeling.cast import cast_parameters
from alignment.modeling.export import merged_copy, save_policy
from alignment.modeling.load import load_causal_lm, load_tokenizer
from alignment.modeling.policy import PolicyWithReference
from alignment.modeling.reference import FrozenCopy, make_reference
from alignment.modeling.scalar import load_scalar_model, save_scalar_model
from alignment.modeling.tiny import build_tiny
from alignment.types import Sample

IDS = torch.randint(0, 256, (1, 600), generator=torch.Generator().manual_seed(0))
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights are large enough that its output tells positions apart."""
    folder = build_tiny(tmp_path_factory.mktemp("base"), seed=1)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    enlarge(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapted(base, tmp_path_factory.mktemp("adapter"), AutoModelForCausalLM, "CAUSAL_LM")


def enlarge(model: nn.Module) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)


def adapted(base: Path, folder: Path, auto: Any, task: str, **options: Any) -> Path:
    """An adapter that does something, as peft saves it."""
    config: Any = LoraConfig
    settings = {"task_type": task, "r": 2, "target_modules": ["q_proj", "v_proj"]}
    model = get_peft_model(auto.from_pretrained(base, **options), config(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(str(folder))
    load_tokenizer(base).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return found


def rope(model: nn.Module) -> dict[str, torch.dtype]:
    found = {name: b.dtype for name, b in model.named_buffers() if "inv_freq" in name}
    assert found
    return found


def in_bf16(folder: Path, auto: Any = AutoModelForCausalLM) -> Any:
    """The oracle: transformers' own way to a model in bfloat16."""
    model = auto.from_pretrained(folder, dtype=BF16)
    assert set(rope(model).values()) == {torch.float32}
    return model


def assert_same(model: nn.Module, oracle: nn.Module) -> None:
    assert {p.dtype for p in model.parameters()} == {BF16}
    assert set(rope(model).values()) == {torch.float32}
    assert torch.equal(logits(model), logits(oracle))


def test_weights_are_rounded_and_buffers_are_not(base: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    parameters = list(model.parameters())
    assert cast_parameters(model, BF16) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(model, in_bf16(base))
    # What the test is sensitive to: positions that are off show in the output.
    rounded: Any = AutoModelForCausalLM.from_pretrained(base)
    rounded.to(BF16)
    assert not torch.equal(logits(rounded), logits(model))


def test_numbers_that_are_whole_stay_as_they_are() -> None:
    layer = nn.Linear(2, 2)
    codes = nn.Parameter(torch.tensor([1, 300], dtype=torch.int32), requires_grad=False)
    layer.register_parameter("codes", codes)
    cast_parameters(layer, BF16)
    assert codes.dtype == torch.int32 and codes.tolist() == [1, 300]
    assert layer.weight.dtype == BF16


def test_an_adapters_folder_loads_in_bfloat16(base: Path, adapter: Path) -> None:
    oracle = PeftModel.from_pretrained(in_bf16(base), str(adapter), autocast_adapter_dtype=False)
    for name, parameter in oracle.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(BF16)
    assert_same(load_causal_lm(adapter, dtype="bfloat16"), oracle)


def test_a_merged_copy_is_what_is_loaded_from_its_files(adapter: Path, tmp_path: Path) -> None:
    model = load_causal_lm(adapter, dtype="bfloat16")
    save_policy(model, load_tokenizer(adapter), tmp_path)
    assert_same(merged_copy(model), in_bf16(tmp_path))


def test_a_frozen_copy_in_bfloat16_is_the_model_loaded_in_it(base: Path) -> None:
    policy = load_causal_lm(base)
    assert_same(FrozenCopy(policy, dtype=BF16).model, in_bf16(base))
    assert set(rope(policy).values()) == {torch.float32}
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_i19_a_frozen_copy_of_the_policys_own_dtype_has_no_kl(base: Path) -> None:
    model = load_causal_lm(base, dtype="bfloat16")
    policy = PolicyWithReference(model, make_reference(model, "frozen_copy", dtype=BF16))
    ids = tuple(IDS[0].tolist())
    samples = [Sample(ids[:8], ids[8:], (True,) * (len(ids) - 8))]
    (own,) = policy.logprobs(samples, 1024)
    (theirs,) = policy.logprobs(samples, 1024, of_reference=True)
    assert torch.equal(own, theirs)


def test_a_merged_classifier_in_bfloat16(base: Path, tmp_path: Path) -> None:
    auto: Any = AutoModelForSequenceClassification
    whole: Any = auto.from_pretrained(base, num_labels=1, pad_token_id=259)
    whole.save_pretrained(tmp_path / "base")
    load_tokenizer(base).save_pretrained(tmp_path / "base")
    folder = adapted(tmp_path / "base", tmp_path / "adapter", auto, "SEQ_CLS", num_labels=1)
    model = load_scalar_model(folder, dtype="bfloat16")
    assert set(rope(model).values()) == {torch.float32}
    save_scalar_model(model, load_tokenizer(folder), tmp_path / "merged")
    oracle = in_bf16(tmp_path / "merged", auto)
    with torch.no_grad():
        found, expected = (
            m(input_ids=IDS).last_hidden_state for m in (model.decoder, oracle.model)
        )
    assert torch.equal(found, expected)


def test_an_adapter_is_exported_in_bfloat16(adapter: Path, base: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    result = CliRunner().invoke(app, ["export", str(adapter), str(target), "--dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    merged: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(adapter)
    ).merge_and_unload()
    theirs = merged.state_dict()
    for name, value in in_bf16(target).state_dict().items():
        assert torch.equal(value, theirs[name].to(BF16)), name
