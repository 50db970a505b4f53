"""Loading models and tokenizers: dtypes, adapters, hashes, and errors that name the remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment.modeling.catalog import cached, catalog, fetch
from alignment.modeling.load import (
    LoraOptions,
    load_causal_lm,
    load_tokenizer,
    model_hash,
    template_hash,
    tokenizer_hash,
)
from alignment.modeling.tiny import SPECIAL_TOKENS, build_tiny
from alignment.types import UserInputError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"), seed=1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_tiny_models_of_every_family_load_and_repeat(family: str, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    one = build_tiny(tmp_path / "one", family=family, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = build_tiny(tmp_path / "other", family=family, seed=3)
    another = build_tiny(tmp_path / "another", family=family, seed=4)
    assert model_hash(one) == model_hash(other) != model_hash(another)
    tokenizer = load_tokenizer(one)
    model: Any = load_causal_lm(one)
    ids = torch.tensor([tokenizer.encode("what is 1 + 2?")])
    assert model(input_ids=ids).logits.shape == (1, 14, 256 + len(SPECIAL_TOKENS))
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 258


def test_tiny_tokenizer_is_the_bytes(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    text = "".join(map(chr, range(300))) + "é\u2028\U0001f600  x ."
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.encode("".join(SPECIAL_TOKENS)) == [256, 257, 258, 259]
    with pytest.raises(UserInputError, match="unknown family"):
        build_tiny(tiny, family="lama")
    with pytest.raises(UserInputError, match="multiple of 16"):
        build_tiny(tiny, hidden_size=40)


def test_dtype_mode_and_cache(tiny: Path) -> None:
    model: Any = load_causal_lm(tiny, dtype="bfloat16", lora=LoraOptions(rank=2))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert model.config.use_cache is False
    full: Any = load_causal_lm(tiny, attention="eager")
    assert all(p.requires_grad for p in full.parameters())
    assert full.config._attn_implementation == "eager"
    with pytest.raises(UserInputError, match="dtype 'bf16' is unknown"):
        load_causal_lm(tiny, dtype="bf16")


def test_lora_is_seeded_and_starts_as_the_base(tiny: Path) -> None:
    ids = torch.tensor([[1, 2, 3, 4]])
    before = torch.random.get_rng_state()
    one: Any = load_causal_lm(tiny, lora=LoraOptions(rank=4), seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    other, another = (load_causal_lm(tiny, lora=LoraOptions(rank=4), seed=s) for s in (5, 6))
    assert model_hash(one) == model_hash(other) != model_hash(another)
    base: Any = load_causal_lm(tiny)
    assert torch.equal(one(input_ids=ids).logits, base(input_ids=ids).logits)
    config = one.peft_config["default"]
    assert (config.r, config.lora_alpha) == (4, 8)
    assert not any("lm_head" in n for n, p in one.named_parameters() if p.requires_grad)


def test_an_adapter_directory_goes_on_with_its_adapter(tiny: Path, tmp_path: Path) -> None:
    model: Any = load_causal_lm(tiny, lora=LoraOptions(rank=4))
    model.save_pretrained(tmp_path)
    again = load_causal_lm(tmp_path, lora=LoraOptions(rank=4))
    assert model_hash(again) == model_hash(model)
    with pytest.raises(UserInputError, match=r"adapter of rank 4 and alpha 8.*rank 8"):
        load_causal_lm(tmp_path, lora=LoraOptions(rank=8))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "./gone"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserInputError, match=r"its base model: .*gone"):
        load_causal_lm(tmp_path)


def test_an_adapter_names_a_catalogue_model_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "one machine"))
    model: Any = load_causal_lm("tiny-random", lora=LoraOptions(rank=2))
    n_base = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    assert n_base == next(e.parameters for e in catalog() if e.name == "tiny-random")
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "another machine"))
    assert model_hash(load_causal_lm(tmp_path / "adapter")) == model_hash(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "rank is 0"), ({"dropout": 1.0}, "dropout"), ({"targets": ()}, "empty")],
)
def test_lora_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        LoraOptions(**options)


def test_missing_weights_are_not_made_up(tiny: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserInputError, match=r"lack 1 weights.*up_proj"):
        load_causal_lm(broken)


def test_what_cannot_be_loaded_says_so(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="cannot be loaded"):
        load_causal_lm(tmp_path)
    with pytest.raises(UserInputError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    strange = shutil.copytree(tiny, tmp_path / "strange")
    config = json.loads((strange / "config.json").read_text())
    config["model_type"] = "nosuchtype"
    (strange / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserInputError, match="nosuchtype"):
        load_causal_lm(strange)
    with pytest.raises(UserInputError, match="holds no weight files"):
        model_hash(tmp_path / "nothing")


def test_chat_templates_and_padding(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0]['content'] }}")
    for given in (str(file), file.read_text()):
        assert load_tokenizer(tiny, chat_template=given).chat_template == file.read_text()
    assert "im_start" in load_tokenizer(tiny, chat_template="chatml").chat_template
    with pytest.raises(UserInputError, match="neither a file"):
        load_tokenizer(tiny, chat_template="mine.jnja")
    tokenizer = load_tokenizer(tiny)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "unpadded")
    assert load_tokenizer(tmp_path / "unpadded").pad_token_id == 258
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(UserInputError, match="no EOS"):
        load_tokenizer(tmp_path / "endless")


def test_hashes_see_what_matters_and_nothing_else(tiny: Path) -> None:
    one, other = load_tokenizer(tiny), load_tokenizer(tiny)
    other(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(one) == tokenizer_hash(other)
    assert template_hash(one) == template_hash(other)
    other.chat_template = "{{ 1 }}"
    assert template_hash(one) != template_hash(other)
    other.add_tokens(["new"])
    assert tokenizer_hash(one) != tokenizer_hash(other)
    model: Any = load_causal_lm(tiny)
    before = model_hash(model)
    assert model_hash(load_causal_lm(tiny)) == before
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1e-3
    assert model_hash(model) != before


@pytest.mark.real_model
def test_the_default_model_is_what_the_catalogue_says() -> None:
    if cached("smollm2-135m-instruct") is None:
        pytest.skip("the default model has not been fetched")
    path = fetch("smollm2-135m-instruct")
    model: Any = load_causal_lm(path, dtype="bfloat16")
    entry = next(e for e in catalog() if e.name == "smollm2-135m-instruct")
    assert sum(p.numel() for p in model.parameters()) == entry.parameters
    megabytes = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    assert abs(megabytes - entry.disk_mb) < 5
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("a\n\n1. 12") == tokenizer.convert_tokens_to_ids(
        ["a", "ĊĊ", "1", ".", "Ġ", "1", "2"]
    )
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    best = model(input_ids=ids).logits[0, -1].argmax().item()
    assert tokenizer.decode([best]) == " Paris"
