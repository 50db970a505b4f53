"""Reward models trained with LoRA, here or elsewhere: scored as transformers and peft do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from alignment.config import Recipe, load_recipe
from alignment.data.chat import encode_prompt
from alignment.modeling.heads import ScalarModel
from alignment.modeling.load import LoraOptions, load_causal_lm, load_tokenizer
from alignment.modeling.reference import trainable
from alignment.modeling.scalar import load_scalar_model, save_scalar_model
from alignment.modeling.tiny import build_tiny, byte_tokenizer
from alignment.trainers.export import export
from alignment.trainers.run import train
from alignment.types import Completion, Prompt, Sample, StopReason, UserInputError
from reward_models.learned import RewardModelReward

SAMPLES = [
    Sample((5, 6, 7), (20, 21, 22, 23), (True,) * 4),
    Sample((5, 6, 7), (30, 31), (True,) * 2),
    Sample((8, 9), (40,), (True,)),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("base"), seed=3)


@pytest.fixture(scope="module")
def adapted(base: Path) -> Any:
    """A classifier of one label with an adapter, as peft leaves it after training."""
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32
    )
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_" in name or "score" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def adapter(base: Path, adapted: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return folder


@torch.no_grad()
def theirs(adapted: Any) -> list[float]:
    """Each row alone, so that nothing is padded."""
    ids = [torch.tensor([[*one.prompt_ids, *one.completion_ids]]) for one in SAMPLES]
    logits: list[Tensor] = [adapted(input_ids=row).logits for row in ids]
    return [float(row) for row in logits]


def test_base_adapter_and_head_make_the_score(adapter: Path, adapted: Any) -> None:
    model = load_scalar_model(adapter)
    expected = theirs(adapted)
    assert model.scores(SAMPLES, 4096) == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1
    assert len(trainable(model)) == len(list(model.parameters()))


def test_the_learned_reward_takes_it(adapter: Path, base: Path, adapted: Any) -> None:
    tokenizer = load_tokenizer(base)
    prompt_ids, text = encode_prompt(tokenizer, [{"role": "user", "content": "hi"}])
    completion = Completion(0, 0, (65, 66, 258), (0.0,) * 3, StopReason.STOP, 0, "AB")
    reward = RewardModelReward(path=str(adapter), dtype="float32")
    reward.bind(tokenizer)
    (score,) = reward([(Prompt(prompt_ids, text, 0), completion)])
    with torch.no_grad():
        ids = torch.tensor([[*prompt_ids, *completion.token_ids]])
        assert score.value == pytest.approx(float(adapted(input_ids=ids).logits), abs=1e-4)


def test_the_learned_reward_takes_a_run_with_lora(tmp_path: Path) -> None:
    settings = ["algorithm.steps=2", "model.lora={rank: 4}", "optim.lr=0.1", "expect=[]"]
    recipe = load_recipe("tiny/reward_model", [*settings, f"run.dir={tmp_path}"])
    assert isinstance(recipe, Recipe)
    run = train(recipe)
    tokenizer = load_tokenizer(run.model_dir)
    completion = Completion(0, 0, (65, 66, 258), (0.0,) * 3, StopReason.STOP, 0, "AB")
    reward = RewardModelReward(path=str(run.model_dir), dtype="float32", normalize=False)
    reward.bind(tokenizer)
    (score,) = reward([(Prompt((5, 6, 7), "", 0), completion)])
    whole: Any = AutoModelForSequenceClassification.from_pretrained(run.model_dir)
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7, *completion.token_ids]])
        assert score.value == pytest.approx(float(whole(input_ids=ids).logits), abs=1e-5)
    with pytest.raises(UserInputError, match=r"is a run; give the model that it made, .*/model$"):
        RewardModelReward(path=str(run.path)).bind(tokenizer)


def test_it_is_exported_merged(adapter: Path, adapted: Any, tmp_path: Path) -> None:
    assert "scalar head" in export(str(adapter), tmp_path / "merged")
    assert load_scalar_model(tmp_path / "merged").scores(SAMPLES, 4096) == pytest.approx(
        theirs(adapted), abs=1e-4
    )


def test_without_a_head_it_is_refused(adapter: Path, tmp_path: Path) -> None:
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(adapter / "adapter_model.safetensors")
    headless = {name: value for name, value in weights.items() if "score" not in name}
    assert len(headless) == len(weights) - 1
    save_file(headless, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserInputError, match=r"holds score\.weight, which would be random"):
        load_scalar_model(tmp_path)


def test_a_language_models_adapter_is_no_reward_model(base: Path, tmp_path: Path) -> None:
    untyped: Any = load_causal_lm(base)
    get_peft_model(untyped, LoraConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(tmp_path)
    with pytest.raises(UserInputError, match="an adapter without its base"):
        load_scalar_model(tmp_path)


# -- saved here -------------------------------------------------------------------------------


def trained_with_lora(base: Path, dtype: str, *, seed: int = 7) -> ScalarModel:
    """A reward model whose adapter and head have moved."""
    model = load_scalar_model(base, dtype=dtype, lora=LoraOptions(rank=4))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += (0.1 * noise).to(parameter.dtype)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_an_adapter_saved_here_loads_back_to_the_scores_of_the_merged_model(
    tmp_path: Path, family: str, dtype: str
) -> None:
    """Bit for bit, also where the base's files have more digits than the model in training."""
    tiny_model(family, vocab_size=260, eos_token_id=258).save_pretrained(tmp_path / "base")
    model = trained_with_lora(tmp_path / "base", dtype)
    saved = tmp_path / "reward"
    save_scalar_model(model, byte_tokenizer(), saved)
    merged = load_scalar_model(saved, dtype=dtype).scores(SAMPLES, 4096)
    assert load_scalar_model(saved / "adapter", dtype=dtype).scores(SAMPLES, 4096) == merged
    # Without merging, the same sum is taken in another order, and rounded otherwise.
    tolerance = 1e-4 if dtype == "float32" else 0.1
    assert model.scores(SAMPLES, 4096) == pytest.approx(merged, abs=tolerance)
    before = load_scalar_model(tmp_path / "base", dtype=dtype).scores(SAMPLES, 4096)
    assert max(abs(a - b) for a, b in zip(merged, before, strict=True)) > 0.2


def test_an_adapter_saved_here_is_one_for_peft(base: Path, tmp_path: Path) -> None:
    model = trained_with_lora(base, "float32")
    save_scalar_model(model, byte_tokenizer(), tmp_path)
    auto: Any = AutoModelForSequenceClassification
    whole = auto.from_pretrained(base, num_labels=1, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(whole, str(tmp_path / "adapter")).eval()
    assert model.scores(SAMPLES, 4096) == pytest.approx(theirs(loaded), abs=1e-5)
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == len(
        trainable(model)
    )


def test_an_adapter_on_a_merged_adapter_is_saved_merged_only(adapter: Path, tmp_path: Path) -> None:
    model = trained_with_lora(adapter, "float32")
    save_scalar_model(model, byte_tokenizer(), tmp_path)
    assert not (tmp_path / "adapter").exists()
    loaded = load_scalar_model(tmp_path).scores(SAMPLES, 4096)
    assert loaded == pytest.approx(model.scores(SAMPLES, 4096), abs=1e-4)
