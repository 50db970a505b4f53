"""Invariants of models with a scalar head (rows 1, 5, 6, 12, 25, 26, 28)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from tiny_models import VOCAB, recurrent_model, tiny_model
from torch import Tensor, nn

from alignment.losses import bradley_terry_loss
from alignment.modeling.heads import ScalarHead, ScalarModel
from alignment.modeling.packing import Reads
from alignment.modeling.policy import updating
from alignment.types import Sample

FAMILIES = ["llama", "gemma3_text", "gpt2", "mixtral"]
"""Plain, with sliding windows shorter than the rows, with learned positions, with experts."""
READS: list[Reads] = ["after", "before"]
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def scalar(decoder: nn.Module, **options: bool) -> ScalarModel:
    torch.manual_seed(5)
    head = ScalarHead(decoder.config.get_text_config().hidden_size, dtype=torch.float32)
    with torch.no_grad():
        head.weight.normal_(0.0, 0.3)
    return ScalarModel(decoder, head, **options)


def pairs(n: int = 4) -> list[Sample]:
    """Chosen and rejected in turn, of unequal lengths and longer than the sliding window."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(2 * n):
        prompt = tuple(range(5 + i // 2, 14 + i // 2))
        tokens = torch.randint(3, VOCAB, (3 + 2 * i,), generator=generator).tolist()
        found.append(Sample(prompt, tuple(tokens), (True,) * len(tokens)))
    return found


def plainly(model: ScalarModel, sample: Sample, reads: Reads) -> Tensor:
    """One row, transformers' own causal mask: the head at each completion token `[T]`."""
    ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
    hidden = model.decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
    first = len(sample.prompt_ids) - (1 if reads == "before" else 0)
    read = hidden[first : first + len(sample.completion_ids)]
    return read @ model.head.weight[0]


def weights(samples: Sequence[Sample]) -> list[Tensor]:
    """A different weight for the value of each token, so that none can stand for another."""
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(len(s.completion_ids), generator=generator) for s in samples]


def gradients(model: ScalarModel, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss().backward()
    # A load-balancing loss is not asked for, so routers learn through the experts alone.
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and "head.weight" in one
    for name, gradient in other.items():
        scale = max(float(gradient.abs().max()), 1.0)
        torch.testing.assert_close(one[name] / scale, gradient / scale, **TOLERANCE)


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("family", FAMILIES)
def test_i25_packed_is_padded_is_one_by_one(family: str, reads: Reads) -> None:
    """Values and gradients, of the head and of the decoder."""
    model = scalar(tiny_model(family).base_model)
    assert model.backbone.plain_reason is None
    samples = pairs()
    token_weights = weights(samples)

    def packed() -> Tensor:
        values = model(samples, reads=reads).values
        terms = zip(values, token_weights, strict=True)
        return sum((row[: len(w)] * w).sum() for row, w in terms) + 0.0

    def one_by_one() -> Tensor:
        terms = zip(samples, token_weights, strict=True)
        return sum((plainly(model, s, reads) * w).sum() for s, w in terms) + 0.0

    values = model(samples, reads=reads)
    for row, sample in zip(values.values, samples, strict=True):
        length = len(sample.completion_ids)
        torch.testing.assert_close(row[:length], plainly(model, sample, reads), **TOLERANCE)
        assert torch.all(row[length:] == 0)
    together, alone = gradients(model, packed), gradients(model, one_by_one)
    assert_same(together, alone)
    model.backbone.plain_reason = "padded, for comparison"
    padded = model(samples, reads=reads).values
    torch.testing.assert_close(padded, values.values, **TOLERANCE)
    assert_same(gradients(model, packed), alone)


@pytest.mark.parametrize("family", ["mamba", "lfm2"])
def test_i25_recurrent_decoders_get_plain_rows(family: str) -> None:
    model = scalar(recurrent_model(family).base_model)
    assert model.backbone.plain_reason is not None
    samples = pairs(2)
    for reads in READS:
        for row, sample in zip(model(samples, reads=reads).values, samples, strict=True):
            expected = plainly(model, sample, reads)
            torch.testing.assert_close(row[: len(expected)], expected, **TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_i26_the_score_is_the_head_at_the_last_true_token(family: str) -> None:
    """Whatever the last token is, EOS and padding ids among them, and whoever is in the batch."""
    model = scalar(tiny_model(family).base_model)
    samples = [
        Sample(s.prompt_ids, (*s.completion_ids, last), (False,) * (len(s.completion_ids) + 1))
        for s, last in zip(pairs(), [2, 0, 0, 2, 2, 2, 0, 0], strict=True)
    ]
    expected = torch.stack([plainly(model, s, "after")[-1] for s in samples]).detach()
    torch.testing.assert_close(model(samples).last, expected, **TOLERANCE)
    for budget in (1, 64, 4096):
        torch.testing.assert_close(
            torch.tensor(model.scores(samples, budget)), expected, **TOLERANCE
        )


def test_reads_before_is_the_state_the_token_is_chosen_in() -> None:
    """A token's own id cannot change its value before, and does change its value after."""
    model = scalar(tiny_model().base_model)
    one = Sample((5, 6, 7), (8, 9, 10), (True,) * 3)
    other = Sample((5, 6, 7), (8, 9, 11), (True,) * 3)
    before = model([one, other], reads="before").values
    after = model([one, other], reads="after").values
    torch.testing.assert_close(before[0], before[1], **TOLERANCE)
    torch.testing.assert_close(after[0, :2], after[1, :2], **TOLERANCE)
    assert abs((after[0, 2] - after[1, 2]).item()) > 1e-3
    # The value after a token is the value before the next one.
    torch.testing.assert_close(after[0, :2], before[0, 1:], **TOLERANCE)


@pytest.mark.parametrize("budget", [1, 40, 90, 4096])
def test_i01_the_gradient_of_pairs_does_not_depend_on_micro_batches(budget: int) -> None:
    model = scalar(tiny_model().base_model)
    samples = pairs()

    def loss_of(batch: list[Sample]) -> Tensor:
        scores = model(batch).last
        return bradley_terry_loss(scores[::2], scores[1::2]).per_sequence.sum() / 4

    whole = gradients(model, lambda: loss_of(samples))
    plan = model.plan(samples, budget, together=2)
    assert [i for batch in plan for i in batch] == list(range(8))
    assert all(len(batch) % 2 == 0 for batch in plan)
    parts = gradients(model, lambda: sum(loss_of([samples[i] for i in b]) for b in plan) + 0.0)
    assert_same(parts, whole)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("shares_prompts", [True, False])
def test_micro_batches_that_are_read_after_each_token_stay_within_the_budget(
    shares_prompts: bool, together: int
) -> None:
    """A reward model reads the last token too: 10 tokens a sample here, where a policy reads 9."""
    model = scalar(tiny_model().base_model)
    if not shares_prompts:
        model.backbone.plain_reason = "as if its layers kept a state"
    samples = [Sample((3 + i, 4, 5, 6), (7,) * 6, (True,) * 6) for i in range(8)]
    for budget in (20, 36, 40):
        plan = model.plan(samples, budget, together=together)
        costs = [model([samples[i] for i in batch]).n_tokens for batch in plan]
        assert sum(costs) == 80
        assert max(costs) <= budget
    assert plan == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_i12_there_is_no_dropout_outside_the_update() -> None:
    model = scalar(tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).base_model)
    samples = pairs(2)
    first, again = model(samples).values, model(samples).values
    assert torch.equal(first, again)
    with updating(model):
        torch.manual_seed(0)
        dropped = model(samples).values
    assert not torch.allclose(dropped, first)
    assert not model.training and not model.decoder.training


def test_a_mixture_of_experts_carries_its_router_loss_under_gradients_alone() -> None:
    model = scalar(tiny_model("mixtral").base_model, router_loss=True)
    aux_loss = model(pairs(2)).aux_loss
    assert aux_loss is not None and aux_loss.item() >= 1.0 - 1e-4  # 1 is perfect balance
    with torch.no_grad():
        assert model(pairs(2)).aux_loss is None
    assert scalar(tiny_model("mixtral").base_model)(pairs(2)).aux_loss is None
