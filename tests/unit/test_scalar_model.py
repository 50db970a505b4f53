"""Models with a scalar head: made, trained, saved, and loaded back by us and by transformers."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, VOCAB, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from alignment.modeling.export import merged_copy
from alignment.modeling.heads import ScalarHead, ScalarModel
from alignment.modeling.load import LoraOptions, load_tokenizer, tokenizer_hash
from alignment.modeling.padding import give_own_padding
from alignment.modeling.reference import trainable
from alignment.modeling.scalar import load_scalar_model, save_scalar_model
from alignment.modeling.tiny import build_tiny, byte_tokenizer
from alignment.types import Sample, UserInputError

UNCLASSIFIED = ("granite",)
"""Families that transformers has no sequence classification for."""


def samples(n: int = 5, vocabulary: int = VOCAB) -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for i in range(n):
        prompt = tuple(range(4 + i // 2, 11 + i // 2))
        tokens = torch.randint(3, vocabulary, (2 + 2 * i,), generator=generator).tolist()
        found.append(Sample(prompt, tuple(tokens), (True,) * len(tokens)))
    return found


def saved_causal_lm(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """With as many tokens as the byte-level tokenizer has."""
    tokens = {"vocab_size": 260, "eos_token_id": 258}
    tiny_model(family, **(tokens | overrides)).save_pretrained(folder)
    return folder


def train_a_step(model: ScalarModel) -> None:
    """Plain gradient descent, of all that is trainable."""
    (-model(samples()).last.square().sum()).backward()
    with torch.no_grad():
        for parameter in trainable(model).values():
            assert parameter.grad is not None
            parameter -= 1e-3 * parameter.grad
            parameter.grad = None


def rows(of: list[Sample], *, pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and attention mask, as a tokenizer makes them."""
    whole = [[*sample.prompt_ids, *sample.completion_ids] for sample in of]
    longest = max(map(len, whole))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in whole])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in whole])
    return ids, mask


def classified(folder: Path, of: list[Sample]) -> list[float]:
    """What transformers' own class says of padded rows."""
    auto: Any = AutoModelForSequenceClassification
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids, mask = rows(of, pad=load_tokenizer(folder).pad_token_id)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()


@pytest.fixture(scope="module")
def byte_level() -> Any:
    """It pads with EOS, as the default model's does."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token_id = 258  # <|im_end|>, which is EOS
    return tokenizer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_model_loads_back_to_equal_scores(
    tmp_path: Path, byte_level: Any, family: str, dtype: str
) -> None:
    model = load_scalar_model(saved_causal_lm(tmp_path / "base", family), dtype=dtype, seed=1)
    before = model.scores(samples(), 64)
    train_a_step(model)
    trained = model.scores(samples(), 64)
    assert trained != before
    save_scalar_model(model, byte_level, tmp_path / "reward")
    assert model.scores(samples(), 64) == trained
    loaded = load_scalar_model(tmp_path / "reward", dtype=dtype, seed=2)
    assert loaded.scores(samples(), 64) == trained


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in UNCLASSIFIED])
def test_i26_transformers_reads_the_same_score_at_the_last_true_token(
    tmp_path: Path, byte_level: Any, family: str
) -> None:
    """Texts that end in EOS, from a tokenizer that pads with EOS."""
    base = saved_causal_lm(tmp_path / "base", family)
    model = load_scalar_model(base, seed=1)
    ended = [
        Sample(s.prompt_ids, (*s.completion_ids, 258), (*s.loss_mask, True)) for s in samples()
    ]
    save_scalar_model(model, byte_level, tmp_path / "reward")
    ours = model.scores(ended, 4096)
    assert classified(tmp_path / "reward", ended) == pytest.approx(ours, abs=1e-5)
    alone = [classified(tmp_path / "reward", [sample])[0] for sample in ended]
    assert alone == pytest.approx(ours, abs=1e-5)


@pytest.mark.parametrize("family", UNCLASSIFIED)
def test_an_architecture_without_classification_is_saved_with_a_warning(
    tmp_path: Path, byte_level: Any, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_scalar_model(saved_causal_lm(tmp_path / "base", family))
    with caplog.at_level(logging.WARNING):
        save_scalar_model(model, byte_level, tmp_path / "reward")
    assert "no sequence-classification form" in caplog.text
    with pytest.raises(ValueError, match="Unrecognized configuration"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")


def test_a_head_among_sharded_files_is_found(tmp_path: Path) -> None:
    auto: Any = AutoModelForSequenceClassification
    config = tiny_model().config
    config.num_labels = 1
    theirs = auto.from_config(config)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    loaded = load_scalar_model(tmp_path)
    assert torch.equal(loaded.head.weight, theirs.score.weight)


@pytest.mark.parametrize("n_labels", [1, 2])
def test_other_peoples_classifiers(tmp_path: Path, n_labels: int) -> None:
    auto: Any = AutoModelForSequenceClassification
    config = tiny_model().config
    config.num_labels = n_labels
    theirs = auto.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    if n_labels == 2:
        with pytest.raises(UserInputError, match="has 2 labels; a reward model or critic has one"):
            load_scalar_model(tmp_path)
        return
    (sample,) = samples(1)
    ids, mask = rows([sample], pad=0)
    with torch.no_grad():
        expected = float(theirs(input_ids=ids, attention_mask=mask).logits)
    assert load_scalar_model(tmp_path).scores([sample], 64) == pytest.approx([expected], abs=1e-5)


def test_a_head_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    weights = {**tiny_model().state_dict(), "score.weight": torch.zeros(1, 32)}
    model = tiny_model()
    model.save_pretrained(tmp_path, state_dict=weights | {"score.bias": torch.zeros(1)})
    with pytest.raises(UserInputError, match=r"weights score\.bias, score\.weight"):
        load_scalar_model(tmp_path)


def test_a_head_that_cannot_be_read_is_never_replaced_by_a_random_one(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    weights = model.state_dict() | {"score.weight": torch.zeros(1, 32)}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserInputError, match="another format than safetensors"):
        load_scalar_model(tmp_path)


def test_weights_that_have_no_place_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    head = {"v_head.summary.weight": torch.zeros(1, 32)}
    model.save_pretrained(tmp_path, state_dict=model.state_dict() | head)
    with caplog.at_level(logging.WARNING):
        load_scalar_model(tmp_path)
    assert "unused weights ['v_head.summary.weight']" in caplog.text
    assert "lm_head" not in caplog.text


def test_a_model_that_is_not_there_or_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="no such directory"):
        load_scalar_model(tmp_path / "nothing")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserInputError, match="an adapter without its base"):
        load_scalar_model(tmp_path)
    with pytest.raises(UserInputError, match="dtype 'float8' is unknown"):
        load_scalar_model(tmp_path, dtype="float8")


def test_new_heads(tmp_path: Path) -> None:
    base = saved_causal_lm(tmp_path)
    one, same, other = (load_scalar_model(base, seed=seed).head.weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    heads = [load_scalar_model(base, seed=seed).head.weight for seed in range(40)]
    many = torch.cat(heads).detach()
    assert float(many.std()) == pytest.approx(1 / math.sqrt(33), rel=0.06)
    zero = load_scalar_model(base, initial="zero")
    assert zero.scores(samples(), 64) == [0.0] * 5


def test_a_head_computes_in_float32() -> None:
    head = ScalarHead(4096, dtype=torch.bfloat16)
    hidden = torch.randn(3, 4096).bfloat16()
    exact = (hidden.double() @ head.weight.detach().double().T).squeeze(-1)
    torch.testing.assert_close(head(hidden).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gemma3_text"])
def test_i20_an_adapter_is_merged_on_a_copy(
    tmp_path: Path, byte_level: Any, family: str, dtype: str
) -> None:
    """What is saved is the merged copy, bit for bit; the base in memory is untouched."""
    base = saved_causal_lm(tmp_path / "base", family)
    model = load_scalar_model(base, dtype=dtype, lora=LoraOptions(rank=4), seed=1)
    moved = trainable(model)
    assert any("lora_A" in name for name in moved) and "head.weight" in moved
    assert all("lora_" in name or name == "head.weight" for name in moved)
    with torch.no_grad():
        for name, parameter in moved.items():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    train_a_step(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    scores = model.scores(samples(), 64)
    save_scalar_model(model, byte_level, tmp_path / "reward")
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert model.scores(samples(), 64) == scores
    loaded = load_scalar_model(tmp_path / "reward", dtype=dtype)
    merged = merged_copy(model.decoder).state_dict()
    assert all(torch.equal(weight, merged[k]) for k, weight in loaded.decoder.state_dict().items())
    assert torch.equal(loaded.head.weight, model.head.weight)
    if dtype == "float32":
        assert loaded.scores(samples(), 64) == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_i22_tied_embeddings_are_saved_once_and_loaded_back(
    tmp_path: Path, byte_level: Any, tied: bool
) -> None:
    base = saved_causal_lm(tmp_path / "base", "llama", tie_word_embeddings=tied)
    model = load_scalar_model(base, lora=LoraOptions(rank=4))
    train_a_step(model)
    save_scalar_model(model, byte_level, tmp_path / "reward")
    loaded = load_scalar_model(tmp_path / "reward")
    assert loaded.scores(samples(), 64) == pytest.approx(model.scores(samples(), 64), abs=1e-5)


# -- padding ----------------------------------------------------------------------------------


def test_i26_the_saved_tokenizer_pads_with_what_ends_no_text(byte_level: Any) -> None:
    own = give_own_padding(byte_level, 260)
    assert (own.pad_token, byte_level.pad_token) == ("<|pad|>", "<|im_end|>")
    assert tokenizer_hash(own) == tokenizer_hash(byte_level)
    # Three tokens less: what is left is <|endoftext|>, which the template does not write.
    assert give_own_padding(byte_level, 259).pad_token == "<|endoftext|>"


def test_i26_a_padding_token_that_ends_turns_is_replaced() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token = "<|endoftext|>", "<|im_end|>"
    assert give_own_padding(tokenizer, 260).pad_token == "<|pad|>"
    tokenizer.pad_token = "<|pad|>"
    assert give_own_padding(tokenizer, 260).pad_token == "<|pad|>"


def test_i26_without_a_spare_token_there_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = "<|endoftext|>"
    with caplog.at_level(logging.WARNING):
        kept = give_own_padding(tokenizer, 257)
    assert kept.pad_token == "<|endoftext|>"
    assert "pads with <|endoftext|>, which also ends texts" in caplog.text


def test_the_tiny_model_of_the_catalogue_round_trips(tmp_path: Path) -> None:
    base = build_tiny(tmp_path / "base")
    model = load_scalar_model(base)
    assert isinstance(model.head, nn.Linear)
    save_scalar_model(model, load_tokenizer(base), tmp_path / "reward")
    tokenizer = load_tokenizer(tmp_path / "reward")
    assert tokenizer.chat_template == load_tokenizer(base).chat_template
    config = json.loads((tmp_path / "reward" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["pad_token_id"] == tokenizer.pad_token_id == 259
    assert config["use_cache"] is True
