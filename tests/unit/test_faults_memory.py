"""Memory that does not hold a pass through the model: smaller parts, the same numbers, an event.

What runs out of memory here does so with the allocator's own error: it asks for 2^45 floats.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ppo_runs
import pytest
import tiny_runs
import torch
from fault_runs import run_out
from tiny_models import tiny_model
from tiny_runs import events_of, metrics_of, steps_of, weights_of
from torch import Tensor, nn
from typer.testing import CliRunner

from alignment.cli import app
from alignment.config.load import load_recipe
from alignment.config.schema import Recipe
from alignment.modeling import heads, memory, policy
from alignment.modeling.memory import OutOfMemory, TokenCap, is_out_of_memory, micro_batched
from alignment.modeling.optimizer import AdamWOptions, MasterWeightOptimizer
from alignment.modeling.packing import plan_micro_batches
from alignment.modeling.policy import PolicyWithReference
from alignment.modeling.reference import make_reference
from alignment.modeling.shards import Whole
from alignment.runs.checkpoint import list_checkpoints
from alignment.runs.directory import RunDirectory
from alignment.runs.metrics import MetricSums
from alignment.trainers.run import train
from alignment.types import Sample

EXACT_ADAM = "optim.eps=1e-3"  # noise in a gradient of zero is no step of full size


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second a time in a process of this size, and of no use here: see
    `test_a_failed_pass_is_freed_before_the_next`."""
    monkeypatch.setattr(memory, "gc", SimpleNamespace(collect=lambda: 0))


def tokens(samples: Sequence[Sample]) -> int:
    """Tokens of samples, a shared prompt's once."""
    prompts = {sample.prompt_ids for sample in samples}
    return sum(map(len, prompts)) + sum(len(sample.completion_ids) for sample in samples)


def run(method: str, folder: Path, *settings: str) -> RunDirectory:
    """A short run of a method with several micro-batches an update."""
    common = (f"run.dir={folder}", "expect=[]", EXACT_ADAM, "eval={tasks: []}", *settings)
    if method == "ppo":
        return ppo_runs.run(folder, *common)
    if method in ("sft", "grpo"):
        return tiny_runs.run(method, folder, *common)
    recipe = load_recipe(f"tiny/{method}", ["run.name=it", "algorithm.steps=3", *common])
    assert isinstance(recipe, Recipe)
    return train(recipe)


BUDGETS = {"sft": 100, "grpo": 80, "dpo": 220, "reward_model": 220, "ppo": 100}
"""Tokens of a micro-batch with which an update has two of them or more."""


@contextmanager
def failing(
    call: int, *, fail: Callable[[Any], None] = lambda scores: run_out()
) -> Iterator[list[int]]:
    """The model runs out of memory once, in the given forward pass with gradients (from 1).

    Args:
        fail: is handed what the pass computed.

    Yields:
        the number of samples of each pass with gradients.
    """
    sizes: list[int] = []

    def wrap(original: Callable[..., Any], place: int) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            scores = original(*arguments, **options)
            if torch.is_grad_enabled():
                sizes.append(len(arguments[place]))
                if len(sizes) == call:
                    fail(scores)
            return scores

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "score", wrap(policy.score, 1))
        patch.setattr(heads, "read_values", wrap(heads.read_values, 2))
        yield sizes


def assert_same(found: RunDirectory, expected: RunDirectory) -> None:
    """The same numbers but for the order of sums."""
    for one, other in zip(steps_of(found), steps_of(expected), strict=True):
        if abs(other.get("dpo/reward/margin", 1.0)) < 1e-6:  # rounding decides which side is ahead
            one, other = ({**m, "dpo/reward/accuracy": 0.0} for m in (one, other))
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    theirs = weights_of(expected)
    for name, weight in weights_of(found).items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", BUDGETS)
def test_an_update_out_of_memory_is_made_in_smaller_micro_batches(
    tmp_path: Path, method: str
) -> None:
    budget = f"optim.micro_batch_tokens={BUDGETS[method]}"
    whole = run(method, tmp_path / "whole", budget)
    with failing(2) as sizes:
        directory = run(method, tmp_path / "failing", budget)
    assert len(sizes) > 2
    assert_same(directory, whole)
    (event,) = events_of(directory, "out_of_memory")
    assert (event["step"], event["old"]) == (1, BUDGETS[method])
    assert 1 <= event["new"] <= BUDGETS[method] // 2
    assert f"is {event['new']} instead of {event['old']} for the rest" in event["message"]
    assert not events_of(directory, "error")


def in_backward(scores: Any) -> None:
    """Run out of memory when the gradient has come half way through the model."""
    tensor: Tensor = scores.logprobs
    function: Any = tensor.grad_fn
    for _ in range(40):  # some operations before the scores
        function = next(f for f, _ in function.next_functions if f is not None)
        if not function.next_functions:
            break
        last = function
    last.register_prehook(lambda _: run_out())


def test_a_backward_pass_out_of_memory_leaves_no_half_gradient(tmp_path: Path) -> None:
    whole = run("sft", tmp_path / "whole", "optim.micro_batch_tokens=100")
    with failing(2, fail=in_backward) as sizes:
        directory = run("sft", tmp_path / "failing", "optim.micro_batch_tokens=100")
    assert len(sizes) > 2
    assert_same(directory, whole)
    assert len(events_of(directory, "out_of_memory")) == 1


def test_a_failed_backward_pass_leaves_nothing_in_a_parameter_with_a_master() -> None:
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = MasterWeightOptimizer({"w": parameter}, AdamWOptions(lr=1.0))
    with pytest.MonkeyPatch.context() as patch:  # the copy in fp32 is what does not fit
        patch.setattr(Tensor, "to", lambda *_: run_out())
        with pytest.raises(RuntimeError, match="allocate memory"):
            parameter.sum().backward()
    assert parameter.grad is not None
    optimizer.drop_gradients()
    (parameter.sum() * 3).backward()
    (gradient,) = optimizer.gradients
    assert gradient.tolist() == [3.0, 3.0]


def test_a_failed_pass_is_freed_before_the_next(tmp_path: Path) -> None:
    """Nothing holds its tensors, such as the frames of an exception: no collection is needed."""
    left: list[weakref.ref[Tensor]] = []

    def fail(scores: Any) -> None:
        left.append(weakref.ref(scores.logprobs))
        run_out()

    held: list[bool] = []
    original = policy.score

    def score(*arguments: Any, **options: Any) -> Any:
        held.extend(one() is not None for one in left)
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "score", score)
        with failing(2, fail=fail):
            run("sft", tmp_path, "optim.micro_batch_tokens=100")
    assert held and not any(held)


def test_ranks_in_lockstep_do_not_retry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sharded weights, the other ranks wait in the pass that failed."""
    monkeypatch.setattr(Whole, "lockstep", True)
    with failing(2) as sizes, pytest.raises(OutOfMemory, match="Lower optim"):
        run("sft", tmp_path, "optim.micro_batch_tokens=100")
    assert len(sizes) == 2
    model = Plan(1)
    with pytest.raises(OutOfMemory, match="on 8 samples at once"):
        list(micro_batched(model, samples(), 4096, model.run))


def test_the_smaller_budget_stays(tmp_path: Path) -> None:
    with failing(1) as sizes:
        directory = run("sft", tmp_path, "algorithm.samples_per_step=8", "algorithm.steps=4")
    assert sizes[0] == 8
    assert max(sizes[1:]) < 8
    assert len(events_of(directory, "out_of_memory")) == 1


def too_large(limit: int) -> Callable[..., Any]:
    """`score` with memory for so many tokens at once."""
    original = policy.score

    def scored(backbone: Any, samples: Sequence[Sample], **options: Any) -> Any:
        if tokens(samples) > limit:
            run_out()
        return original(backbone, samples, **options)

    return scored


def test_a_sample_that_does_not_fit_alone_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("checkpoint.every=1", "algorithm.steps=4", "eval={tasks: []}")
    original = PolicyWithReference.forward
    passes: list[int] = []

    def forward(self: Any, samples: Sequence[Sample], **options: Any) -> Any:
        passes.append(len(samples))
        if sum(passes) > 8:  # two steps of four samples
            run_out()
        return original(self, samples, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PolicyWithReference, "forward", forward)
        with pytest.raises(OutOfMemory, match=r"on one sample of \d+ tokens .*gradient_checkpoint"):
            tiny_runs.run("sft", tmp_path, *settings)
    directory = RunDirectory.open(tmp_path / "sft")
    assert [step for step, _ in list_checkpoints(directory.checkpoints_dir)] == [1, 2]
    sizes = [event.get("new") for event in events_of(directory, "out_of_memory")]
    assert sizes[0] is not None and sizes[-1] is None  # smaller first, then what ended the run
    (event,) = events_of(directory, "error")
    assert (event["step"], event["type"]) == (3, "OutOfMemory")
    assert len(metrics_of(tiny_runs.run("sft", tmp_path, *settings))) == 4


def test_a_pair_is_never_parted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "score", too_large(0))
    with pytest.raises(OutOfMemory, match="on 2 samples at once, the longest of"):
        run("dpo", tmp_path, "algorithm.pairs_per_step=4", "model.reference=frozen_copy")


def test_out_of_memory_elsewhere_stops_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = MasterWeightOptimizer.step
    made: list[int] = []

    def step(self: MasterWeightOptimizer) -> float:
        made.append(1)
        if len(made) == 3:
            run_out()
        return steps(self)

    monkeypatch.setattr(MasterWeightOptimizer, "step", step)
    recipe = ["train", "tiny/sft", *tiny_runs.SFT, f"run.dir={tmp_path}", "algorithm.steps=4"]
    result = CliRunner().invoke(app, [*recipe, "checkpoint.every=2"])
    assert result.exit_code == 1
    assert "step 3, update: out of memory (RuntimeError: " in result.output
    assert "Lower optim.micro_batch_tokens" in result.output
    assert "step-000002 is the last checkpoint; to go on from there: align train" in result.output
    (event,) = events_of(RunDirectory.open(tmp_path / "sft"), "out_of_memory")
    assert (event["step"], event["phase"]) == (3, "update")


# -- scoring ----------------------------------------------------------------------------------


def samples() -> list[Sample]:
    """Eight samples of four prompts, 5 to 12 tokens long."""
    out = []
    for i in range(8):
        prompt, completion = (3, 4, 5 + i // 2), tuple(range(10, 12 + i))
        out.append(Sample(prompt, completion, (True,) * len(completion)))
    return out


@pytest.mark.parametrize("of_reference", [False, True])
def test_scoring_out_of_memory_goes_on_in_smaller_micro_batches(
    monkeypatch: pytest.MonkeyPatch, of_reference: bool
) -> None:
    model = tiny_model("llama")
    reference = make_reference(model, "frozen_copy")
    whole = PolicyWithReference(model, reference)
    expected = whole.logprobs(samples(), 4096, of_reference=of_reference)
    monkeypatch.setattr(policy, "score", too_large(22))
    small = PolicyWithReference(model, reference)
    found = small.logprobs(samples(), 4096, of_reference=of_reference)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert small.cap.tokens is not None and small.cap.tokens < 50
    assert whole.cap.tokens is None


class Plan:
    """A model that holds so many samples at once, and notes what went through it."""

    def __init__(self, holds: int) -> None:
        self.cap = TokenCap()
        self.shards = Whole()
        self.holds = holds
        self.seen: list[int] = []

    def plan(
        self, samples: Sequence[Sample], token_budget: int, *, together: int = 1
    ) -> list[list[int]]:
        return plan_micro_batches(samples, token_budget, together=together)

    def run(self, part: list[Sample]) -> list[int]:
        self.seen.append(len(part))
        if len(part) > self.holds:
            run_out()
        return [len(sample.completion_ids) for sample in part]


@pytest.mark.parametrize(("together", "holds"), [(1, 1), (1, 3), (2, 2), (2, 5)])
def test_every_sample_is_scored_once_and_pairs_stay_together(together: int, holds: int) -> None:
    model = Plan(holds)
    done = list(micro_batched(model, samples(), 4096, model.run, together=together))
    assert sorted(i for _, batch in done for i in batch) == list(range(8))
    for found, batch in done:
        assert found == [2 + i for i in batch]
        assert len(batch) <= holds
        if together == 2:
            assert all(b == a + 1 for a, b in zip(batch[::2], batch[1::2], strict=True))
    again = [batch for _, batch in micro_batched(model, samples(), 4096, model.run)]
    assert max(map(len, again)) <= holds  # at the first attempt
    assert model.seen.count(8) == 1


def test_other_errors_are_not_taken_for_memory() -> None:
    def fails(part: list[Sample]) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model = Plan(8)
    with pytest.raises(RuntimeError, match="shapes"):
        list(micro_batched(model, samples(), 4096, fails))
    assert model.cap.tokens is None


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8"), True),
        (MemoryError(), True),
        (RuntimeError("expected scalar type Float but found BFloat16"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_an_allocator_says(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory


def test_the_allocator_of_this_machine() -> None:
    with pytest.raises(RuntimeError) as caught:
        run_out()
    assert is_out_of_memory(caught.value)


def test_a_failed_attempt_counts_for_nothing() -> None:
    sums = MetricSums()
    sums.add("a", 1.0, 2)
    before = sums.copy()
    for _ in range(2):
        sums.add("a", 5.0, 3)
        sums.add_max("b", 2.0)
        sums.add_count("c", 1.0)
        sums.restore(before)
        assert sums == MetricSums({"a": (1.0, 2)})
