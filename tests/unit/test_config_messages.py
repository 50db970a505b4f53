"""What a mistake in a recipe is answered with: file, line, path, what was found, what is near."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignment import registry
from alignment.config import load_recipe
from alignment.types import UserInputError

RECIPE = """\
# a comment
run:
  name: t
model:
  path: m
  lora:
    rank: 16
data: {type: toy, size: 5}
algorithm:
  type: grpo
  steps: 60
  prompts_per_step: 12
  group_size: 8
  kl:
    coef: 0.02
rollout: {max_new_tokens: 48}
rewards:
  - type: good
  - type: good
    name: twice
optim:
  lr: 1e-4
"""


class Good:
    def __init__(self, scale: float = 1.0, mode: str | None = None) -> None: ...


def column_reward(completions: list[str], answer: list[str], strict: bool = False) -> list[float]:
    return [float(strict) for _ in completions]


def toy(size: int) -> None: ...


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registered, "reward", {"good": Good, "column": column_reward})
    monkeypatch.setitem(registry._registered, "source", {"toy": toy})
    monkeypatch.setattr(registry, "_entry_points", lambda kind: {})


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def message(*overrides: str, path: str = "r.yaml") -> str:
    with pytest.raises(UserInputError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def edited(recipe: Path, old: str, new: str) -> str:
    assert old in RECIPE
    recipe.write_text(RECIPE.replace(old, new, 1))
    return message()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        pytest.param(
            "    coef: 0.02",
            "    coeff: 0.02",
            "r.yaml:15: algorithm.kl.coeff: unknown key; did you mean 'coef'? Allowed: coef, "
            "placement, estimator, controller, target, horizon",
            id="mistyped key at depth",
        ),
        pytest.param(
            "    rank: 16",
            "    Rank: 16",
            "r.yaml: 2 problems\n"
            "r.yaml:6: model.lora.rank: required, but missing (Rank of the adapters)\n"
            "r.yaml:7: model.lora.Rank: unknown key; did you mean 'rank'? "
            "Allowed: rank, alpha, dropout, target_modules",
            id="wrong case",
        ),
        pytest.param(
            "  group_size: 8",
            "  group_size: eight",
            'r.yaml:13: algorithm.group_size: expected a whole number, found "eight" (text)',
            id="wrong type",
        ),
        pytest.param(
            "  lr: 1e-4",
            '  lr: "1e-4"',
            'r.yaml:22: optim.lr: expected a number, found "1e-4" (text); remove the quotes',
            id="number in quotes",
        ),
        pytest.param(
            "  name: t",
            "  name: 7",
            "r.yaml:3: run.name: expected text, found 7; put it in quotes",
            id="number for text",
        ),
        pytest.param(
            "  group_size: 8",
            "  group_size: true",
            "r.yaml:13: algorithm.group_size: expected a whole number, found true",
            id="bool is no number",
        ),
        pytest.param(
            "  group_size: 8",
            "  group_size: 8.0",
            "r.yaml:13: algorithm.group_size: expected a whole number, found 8.0",
            id="fraction",
        ),
        pytest.param(
            "  path: m",
            "  path: m\n  dtype: bf16",
            "r.yaml:6: model.dtype: expected 'float32', 'bfloat16' or 'float16', found \"bf16\"; "
            "did you mean 'bfloat16'?",
            id="wrong enum",
        ),
        pytest.param(
            "  lr: 1e-4",
            "  lr: .inf",
            "r.yaml:22: optim.lr: expected a finite number, found Infinity",
            id="infinite",
        ),
        pytest.param(
            "  path: m\n",
            "",
            "r.yaml:4: model.path: required, but missing (A folder in Hugging Face format, a "
            "catalogue name (`align models list`), or a hub id)",
            id="missing required",
        ),
        pytest.param(
            "optim:\n  lr: 1e-4\n",
            "",
            "r.yaml:2: optim.lr: required by grpo, but missing: peak learning rate",
            id="missing section",
        ),
        pytest.param(
            "    name: twice",
            "    nmae: twice",
            "r.yaml:20: rewards.1.nmae: unknown key; did you mean 'name'? "
            "Allowed: scale, mode, type, weight, name",
            id="list index",
        ),
        pytest.param(
            "    name: twice",
            "    name: twice\n    scale: big",
            'r.yaml:21: rewards.1.scale: expected a number, found "big" (text)',
            id="option of a plug-in",
        ),
        pytest.param(
            "  - type: good\n    name",
            "  - type: godo\n    name",
            "r.yaml:19: rewards.1.type: unknown reward 'godo'; did you mean 'good'? "
            "Known: column, good.",
            id="unknown reward",
        ),
        pytest.param(
            "{type: toy, size: 5}",
            "{type: tyo, size: 5}",
            "r.yaml:8: data.type: unknown source 'tyo'; did you mean 'toy'? "
            f"Known: {', '.join(sorted([*registry.names('source'), 'toy']))}.",
            id="unknown source",
        ),
        pytest.param(
            "  type: grpo",
            "  type: gpro",
            "r.yaml:10: algorithm.type: unknown trainer 'gpro'; did you mean 'grpo'? "
            f"Known: {', '.join(registry.names('trainer'))}.",
            id="unknown algorithm",
        ),
        pytest.param(
            "  type: grpo\n",
            "",
            "r.yaml:9: algorithm.type: required, but missing; one of "
            + ", ".join(registry.names("trainer")),
            id="algorithm without type",
        ),
        pytest.param(
            "{max_new_tokens: 48}",
            "{max_new_tokens: 48, engine: vlm}",
            "r.yaml:16: rollout.engine: unknown engine 'vlm'; did you mean 'vllm'? "
            "Known: hf, native, paged, vllm.",
            id="unknown engine",
        ),
        pytest.param(
            "  - type: good\n    name: twice",
            "  - good",
            "r.yaml:19: rewards.1: expected a section with the keys type, weight, name, "
            'found "good"',
            id="text for a section",
        ),
        pytest.param(
            "  name: t",
            "  name: ../t",
            "r.yaml:3: run.name: '../t' cannot name a folder; use letters, digits, '.', '_' and "
            "'-', at most 100, beginning with a letter or digit",
            id="unsafe run name",
        ),
        pytest.param(
            "  group_size: 8",
            "  group_size: 8\n  group_size: 9",
            "r.yaml:14: algorithm.group_size: the key is given twice, first on line 13; keep one",
            id="duplicate key",
        ),
        pytest.param(
            "optim:",
            "expect: [reward >]\noptim:",
            "r.yaml:21: expect.0: ",
            id="expectation",
        ),
    ],
)
def test_a_mistake_in_the_file(recipe: Path, old: str, new: str, expected: str) -> None:
    found = edited(recipe, old, new)
    if expected.endswith(": "):
        assert found.startswith(expected)
    else:
        assert found == expected


def test_all_mistakes_are_told_at_once(recipe: Path) -> None:
    recipe.write_text(
        RECIPE.replace("steps: 60", "stpes: 60")
        .replace("lr: 1e-4", "lr: -1")
        .replace("rank", "rnk")
    )
    lines = message().splitlines()
    assert lines[0] == "r.yaml: 5 problems"
    assert [line.split(": ")[:2] for line in lines[1:]] == [
        ["r.yaml:6", "model.lora.rank"],
        ["r.yaml:7", "model.lora.rnk"],
        ["r.yaml:9", "algorithm.steps"],
        ["r.yaml:11", "algorithm.stpes"],
        ["r.yaml:22", "optim.lr"],
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "algorithm.kl.coeff=1",
            "override 'algorithm.kl.coeff=1': algorithm.kl.coeff: unknown key; did you mean 'coef'?"
            " Allowed: coef, placement, estimator, controller, target, horizon",
        ),
        (
            "optm.lr=1",
            "override 'optm.lr=1': optm: unknown key; did you mean 'optim'? Allowed: run, model, "
            "data, algorithm, rollout, rewards, optim, checkpoint, eval, limits, expect",
        ),
        (
            "optim.lr='1'",
            'override "optim.lr=\'1\'": optim.lr: expected a number, found "1" (text); '
            "remove the quotes",
        ),
        (
            "optim.lr=",
            "override 'optim.lr=': optim.lr: required by grpo, but missing: peak learning rate",
        ),
        (
            "rewards.5.weight=1",
            "override 'rewards.5.weight=1': rewards has no item '5'; use an index (0 to 1), or a "
            "name (twice)",
        ),
        (
            "rewards.x.weight=1",
            "override 'rewards.x.weight=1': rewards has no item 'x'; use an index (0 to 1), or a "
            "name (twice)",
        ),
        (
            "rewards.-1.weight=1",
            "override 'rewards.-1.weight=1': rewards has no item '-1'; use an index (0 to 1), or a "
            "name (twice)",
        ),
        (
            "optim.lr.value=1",
            "override 'optim.lr.value=1': optim.lr is 0.0001, which has no key 'value' inside; "
            "set optim.lr as a whole",
        ),
        (
            "optim.lr",
            "override 'optim.lr': write key.path=value, such as optim.lr=1e-5 or "
            "rewards.0.weight=2",
        ),
        (
            "=1",
            "override '=1': write key.path=value, such as optim.lr=1e-5 or rewards.0.weight=2",
        ),
        ("optim..lr=1", "override 'optim..lr=1': the key 'optim..lr' has an empty part"),
        (
            "optim.lr=[1,",
            "override 'optim.lr=[1,': not valid YAML: expected the node content, but found "
            "'<stream end>'",
        ),
        (
            "optim.lr={a: 1, a: 2}",
            "override 'optim.lr={a: 1, a: 2}':1: a: the key is given twice, first on line 1; "
            "keep one",
        ),
    ],
)
@pytest.mark.usefixtures("recipe")
def test_a_mistake_in_an_override(override: str, expected: str) -> None:
    assert message(override) == expected


@pytest.mark.usefixtures("recipe")
def test_overrides_set_what_they_name() -> None:
    recipe: Any = load_recipe(
        "r.yaml",
        [
            "optim.lr=1e-5",
            "rewards.0.weight=2",
            "rewards.twice.weight=3",
            "model.lora=null",
            "checkpoint.every=5",
            "optim.betas=[0.9, 0.95]",
            "algorithm.dynamic_sampling=off",
            "data.system=answer: yes",
            "run.dir=a=b",
            "optim.lr=2e-5",
        ],
    )
    assert recipe.optim.lr == 2e-5
    assert [reward.weight for reward in recipe.rewards] == [2.0, 3.0]
    assert recipe.model.lora is None
    assert recipe.checkpoint.every == 5
    assert recipe.optim.betas == (0.9, 0.95)
    assert recipe.algorithm.dynamic_sampling == "off"
    assert recipe.run.dir == "a=b"


@pytest.mark.usefixtures("recipe")
def test_a_reward_function_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own.py").write_text("def score(completions, answer, strict=False): return []\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    # The columns of the data, such as `answer`, are not the recipe's to give.
    load_recipe("r.yaml", ["rewards=[{type: 'my_own:score', strict: true}]"])
    load_recipe("r.yaml", ["rewards=[{type: column}]"])
    assert "rewards.0.stric: unknown key; did you mean 'strict'?" in message(
        "rewards=[{type: 'my_own:score', stric: true}]"
    )
    assert "my_own has no 'scor'; did you mean 'score'?" in message(
        "rewards=[{type: 'my_own:scor'}]"
    )
    assert "No module named 'my_won'" in message("rewards=[{type: 'my_won:score'}]")


@pytest.mark.usefixtures("recipe")
def test_files_that_are_not_recipes(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: caf\xe9}\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(RECIPE)
    assert message(path="empty.yaml").startswith("empty.yaml: the file is empty")
    assert message(path="latin.yaml").startswith("latin.yaml: not UTF-8 text")
    assert message(path="folder") == "recipe 'folder' is a folder, not a file"
    assert message(path="run").endswith("did you mean 'run/recipe.yaml'?")
    assert "there is no recipe file 'q.yaml'" in message(path="q.yaml")
    assert "did you mean 'r.yaml'?" in message(path="rr.yaml")


def test_a_missing_name_is_answered_with_the_nearest_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("smollm2-135m/grpo", "smollm2-135m/sft", "tiny/grpo", "accelerate/ddp"):
        path = tmp_path / "shipped" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(RECIPE)
    monkeypatch.setattr("alignment.config.load._SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("tiny/grpo") == load_recipe(tmp_path / "shipped" / "tiny" / "grpo.yaml")
    assert message(path="smollm-135m/grpo") == (
        "there is no recipe file 'smollm-135m/grpo' and no shipped recipe 'smollm-135m/grpo'; did "
        "you mean 'smollm2-135m/grpo'? Shipped: smollm2-135m/grpo, smollm2-135m/sft, tiny/grpo"
    )
    assert "did you mean 'tiny/grpo'?" in message(path="recipes/tiny/grpo.yaml")
    broken = tmp_path / "shipped" / "tiny" / "grpo.yaml"
    broken.write_text(RECIPE.replace("lr: 1e-4", "lr: 0"))
    assert message(path="tiny/grpo").startswith("tiny/grpo.yaml:22: optim.lr: expected a number")
