"""`align export`: what is written is the run's model, for transformers and peft as they come."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import preference_runs
import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from tiny_runs import run
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from typer.testing import CliRunner, Result

from alignment.cli import app
from alignment.config import Recipe, dump_recipe, load_recipe
from alignment.data.text_form import TEXT_FORM
from alignment.modeling.catalog import fetch
from alignment.modeling.scalar import SCORE_NORMALIZATION, load_scalar_model
from alignment.runs.directory import RunDirectory
from alignment.trainers import export as export_module
from alignment.trainers.run import train
from alignment.types import Sample

IDS = torch.tensor([[9, 8, 7, 6, 5, 4, 3, 2]])
SAMPLE = Sample((9, 8, 7), (6, 5, 4, 3), (True,) * 4)


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("runs")
    return run("sft", folder, "model.lora={rank: 4}", "optim.lr=0.1", "model.dtype=float32")


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("runs")
    settings = ["algorithm.steps=2", "model.lora={rank: 4}", "optim.lr=0.1", "expect=[]"]
    recipe = load_recipe("tiny/reward_model", [*settings, f"run.dir={folder}"])
    assert isinstance(recipe, Recipe)
    return train(recipe)


def export(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@torch.no_grad()
def logits(folder: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> Tensor:
    """What transformers makes of a folder."""
    model: Any = auto.from_pretrained(folder, **options)
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def test_a_merged_model_is_the_runs(lora_run: RunDirectory, tmp_path: Path) -> None:
    target = tmp_path / "new" / "model"
    result = export(lora_run.path, target)
    assert result.exit_code == 0, result.output
    assert "the model, in float32" in result.output
    assert torch.equal(logits(target), logits(lora_run.model_dir))
    assert not (target / "adapter").exists()
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    tokenizers: Any = [AutoTokenizer.from_pretrained(p) for p in (target, lora_run.model_dir)]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template is not None
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def test_another_number_format_is_one_rounding(lora_run: RunDirectory, tmp_path: Path) -> None:
    assert export(lora_run.path, tmp_path / "half", "--dtype", "bfloat16").exit_code == 0
    expected = AutoModelForCausalLM.from_pretrained(lora_run.model_dir).bfloat16()
    found: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert found.dtype == torch.bfloat16
    theirs = expected.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in found.state_dict().items())
    refused = export(lora_run.path, tmp_path / "no", "--dtype", "int8")
    assert refused.exit_code == 2 and "known: float32, bfloat16, float16" in refused.output


def test_an_adapter_is_one_for_peft(lora_run: RunDirectory, tmp_path: Path) -> None:
    result = export(lora_run.path, tmp_path / "adapter", "--adapter")
    assert result.exit_code == 0, result.output
    assert "the adapter of the base model tiny-random" in result.output
    base: Any = AutoModelForCausalLM.from_pretrained(fetch("tiny-random"))
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        found = adapted(input_ids=IDS).logits
    # Merged, the same sum is taken in another order.
    torch.testing.assert_close(found, logits(lora_run.model_dir), rtol=0, atol=2e-5)
    assert (found - logits(fetch("tiny-random"))).abs().max() > 1e-2
    assert (tmp_path / "adapter" / "tokenizer.json").is_file()


def test_an_adapter_alone_is_merged_with_its_base(lora_run: RunDirectory, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    export(lora_run.path, adapter, "--adapter")
    assert export(adapter, tmp_path / "merged").exit_code == 0
    assert torch.equal(logits(tmp_path / "merged"), logits(lora_run.model_dir))


def test_a_reward_model_keeps_its_head(reward_run: RunDirectory, tmp_path: Path) -> None:
    result = export(reward_run.path, tmp_path / "rm")
    assert result.exit_code == 0, result.output
    assert "with its scalar head" in result.output
    auto = AutoModelForSequenceClassification
    assert torch.equal(logits(tmp_path / "rm", auto), logits(reward_run.model_dir, auto))
    # Named as a model, it is known by its form.
    assert export(reward_run.model_dir, tmp_path / "again").exit_code == 0
    assert torch.equal(logits(tmp_path / "again", auto), logits(reward_run.model_dir, auto))


def test_a_reward_models_adapter_is_one_for_peft(reward_run: RunDirectory, tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    result = export(reward_run.path, target, "--adapter")
    assert result.exit_code == 0, result.output
    said = "the adapter and the scalar head, of the base model tiny-random"
    assert said in result.output.replace("\n", " ")
    auto: Any = AutoModelForSequenceClassification
    base = auto.from_pretrained(fetch("tiny-random"), num_labels=1)
    adapted = PeftModel.from_pretrained(base, str(target)).eval()
    with torch.no_grad():
        found = adapted(input_ids=IDS).logits
    torch.testing.assert_close(found, logits(reward_run.model_dir, auto), rtol=0, atol=2e-5)
    assert (target / "tokenizer.json").is_file()
    scores = [
        load_scalar_model(path).scores([SAMPLE], 64) for path in (target, reward_run.model_dir)
    ]
    assert scores[0] == scores[1]


def test_a_model_that_was_trained_in_full_has_no_adapter(tmp_path: Path) -> None:
    refused = export("tiny-random", tmp_path / "adapter", "--adapter")
    assert refused.exit_code == 2 and "has no adapter" in refused.output


def test_what_is_noted_beside_a_reward_model_goes_with_it(
    reward_run: RunDirectory, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(reward_run.model_dir, model)
    (model / SCORE_NORMALIZATION).write_text('{"mean": 1.0, "std": 2.0}')
    (model / TEXT_FORM).write_text('{"style": "plain"}')
    assert export(model, tmp_path / "rm").exit_code == 0
    assert (tmp_path / "rm" / SCORE_NORMALIZATION).read_text() == '{"mean": 1.0, "std": 2.0}'
    assert (tmp_path / "rm" / TEXT_FORM).read_text() == '{"style": "plain"}'


def test_a_runs_folder_is_where_it_goes_unless_another_is_named(
    lora_run: RunDirectory, tmp_path: Path
) -> None:
    shutil.copytree(lora_run.path, tmp_path / "run")
    result = export(tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert torch.equal(logits(tmp_path / "run" / "export"), logits(lora_run.model_dir))
    again = export(tmp_path / "run")
    assert again.exit_code == 2 and "exists already and is not overwritten" in again.output
    unnamed = export(lora_run.model_dir)
    assert unnamed.exit_code == 2
    assert "is not a run's folder; name a folder to write the model to" in unnamed.output


def test_a_full_disk_is_said_and_nothing_is_kept(
    lora_run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export_module, "save_policy", full)
    result = export(lora_run.path, tmp_path / "model")
    assert result.exit_code == 1
    assert f"cannot export to {tmp_path / 'model'}: " in result.output
    assert "the disk is full; free some space" in result.output
    assert isinstance(result.exception, SystemExit)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(lora_run: RunDirectory, tmp_path: Path) -> None:
    result = export(lora_run.path, tmp_path)
    assert result.exit_code == 2
    assert "exists already and is not overwritten" in result.output
    result = export(lora_run.path, tmp_path / "x", "--adapter", "--dtype", "float16")
    assert result.exit_code == 2
    assert "exported as it is" in result.output


def test_what_does_not_load_back_as_it_was_is_not_kept(
    lora_run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = export_module.save_policy

    def damage(model: Any, tokenizer: Any, folder: Path) -> None:
        before = model.lm_head.weight.detach().clone()
        model.lm_head.weight.data[0] += 1.0
        save(model, tokenizer, folder)
        model.lm_head.weight.data.copy_(before)

    monkeypatch.setattr(export_module, "save_policy", damage)
    result = export(lora_run.path, tmp_path / "model")
    assert result.exit_code == 1
    assert "differs by" in result.output
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_model_is_refused(tmp_path: Path) -> None:
    recipe = preference_runs.recipe_of("dpo", tmp_path)
    run_dir = RunDirectory.create(tmp_path, "dpo", recipe_yaml=dump_recipe(recipe), info={})
    result = export(run_dir.path, tmp_path / "x")
    assert result.exit_code == 2
    assert "not finished; go on with it by" in result.output
    (run_dir.path / "finished.json").write_text("{}")
    assert "made data, not a model" in export(run_dir.path, tmp_path / "x").output
    assert "no such directory" in export("./nowhere", tmp_path / "x").output
