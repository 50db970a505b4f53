"""Whole tiny runs of the methods that learn from preferences, and what tests look into them by."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignment.config.load import load_recipe
from alignment.config.schema import Recipe
from alignment.distributed import Distributed
from alignment.modeling.optimizer import MasterWeightOptimizer
from alignment.runs.directory import RunDirectory
from alignment.runs.events import EventLog
from alignment.trainers import precomputed
from alignment.trainers.context import TrainingContext
from alignment.trainers.run import train
from alignment.trainers.setup import Loaded, assemble, load_parts
from alignment.types import LabelledSample, PairBatch, Prompt, Sample

Gradients = dict[str, Tensor]

_COMMON = ("optim.lr=3e-3", "optim.schedule=constant", "expect=[]", "algorithm.steps=2")
_METHODS: dict[str, tuple[str, ...]] = {
    "dpo": ("model.reference=frozen_copy", "algorithm.pairs_per_step=4"),
    "kto": ("algorithm.samples_per_step=6",),
    "online_dpo": (
        "model.reference=frozen_copy",
        "algorithm.prompts_per_step=4",
        "algorithm.group_size=3",
        "rollout.max_new_tokens=8",
        "rewards=[{type: 'tiny_runs:even_tokens'}]",
    ),
}


def recipe_of(method: str, folder: Path, *overrides: str) -> Recipe:
    """The tiny recipe of a method, two steps long, kept in `folder`."""
    settings = (f"run.name={method}", *_COMMON, *_METHODS[method], f"run.dir={folder}")
    recipe = load_recipe(f"tiny/{method}", [*settings, *overrides])
    assert isinstance(recipe, Recipe)
    return recipe


def run(method: str, folder: Path, *overrides: str) -> RunDirectory:
    """Train to the end."""
    return train(recipe_of(method, folder, *overrides))


def parts_of(
    method: str,
    folder: Path,
    *overrides: str,
    change: Callable[[Loaded], None] = lambda loaded: None,
) -> TrainingContext:
    """The parts of a run; `change` may alter what was loaded before it is put together."""
    loaded = load_parts(recipe_of(method, folder, *overrides))
    change(loaded)
    return assemble(loaded, Distributed(), EventLog(folder / "events.jsonl"), cache=folder)


def catch_gradients(patch: pytest.MonkeyPatch) -> list[Gradients]:
    """The gradients that reach the optimizer from now on, under the names that the policy's model
    has for its parameters; the optimizer then stands still."""
    seen: list[Gradients] = []

    def keep(self: MasterWeightOptimizer) -> float:
        names = [name.removeprefix("model.") for name in self._parameters]
        seen.append(dict(zip(names, (g.clone() for g in self.gradients), strict=True)))
        self.drop_gradients()
        return 0.0

    patch.setattr(MasterWeightOptimizer, "step", keep)
    return seen


def _ids(draw: random.Random, low: int, high: int) -> tuple[int, ...]:
    return tuple(draw.randrange(256) for _ in range(draw.randint(low, high)))


def _sample(draw: random.Random, prompt: tuple[int, ...]) -> Sample:
    """A completion of 1 to 12 tokens, some of which may not count."""
    ids = _ids(draw, 1, 12)
    mask = [draw.random() < 0.8 for _ in ids]
    mask[-1] = True
    return Sample(prompt, ids, tuple(mask))


def made_up_pairs(n: int = 7, *, seed: int = 3) -> PairBatch:
    """Pairs of random tokens and lengths; the first two have one prompt."""
    draw = random.Random(seed)
    prompts = [_ids(draw, 3, 20) for _ in range(n)]
    prompts[1] = prompts[0]
    chosen, rejected = (tuple(_sample(draw, p) for p in prompts) for _ in range(2))
    return PairBatch(chosen, rejected)


def made_up_labelled(n: int = 7, *, seed: int = 4) -> list[LabelledSample]:
    """Labelled samples of random tokens and lengths; the first two have one prompt."""
    pairs = made_up_pairs(n, seed=seed)
    return [LabelledSample(s, i % 3 != 1) for i, s in enumerate(pairs.chosen)]


def prompts_of(pairs: PairBatch) -> list[Prompt]:
    return [Prompt(s.prompt_ids, "", i) for i, s in enumerate(pairs.chosen)]


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Precomputed reference log-probabilities are kept there inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precomputed, "cache_directory", lambda: folder)
        yield


def drift(context: TrainingContext) -> None:
    """Move the policy away from its reference, as training does."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in context.policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def with_pairs(context: TrainingContext, pairs: PairBatch) -> TrainingContext:
    """The same parts with other data."""
    order = type(context.order)(len(pairs), seed=0, shuffle=False)
    return replace(context, train=replace(context.train, pairs=pairs), order=order)


def assert_same_gradient(got: Gradients, expected: Gradients) -> None:
    assert got.keys() == expected.keys()
    size = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert size > 1e-3
    for name, gradient in expected.items():
        error = float((got[name].double() - gradient).norm() / size)
        assert error < 3e-5, f"{name}: relative error {error:.1e}"
