"""Counted random numbers, the inverse-CDF draw, and the transforms of logits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from alignment.modeling.logits import check_sampling_params, transform_logits
from alignment.rollout.sampling import draw_tokens, row_key, uniforms
from alignment.types import SamplingParams, UserInputError

PARAMS = SamplingParams(max_new_tokens=1)
INF = math.inf


def splitmix64(seed: int, index: int) -> int:
    """Output `index` of the published generator, in Python integers."""
    mask = (1 << 64) - 1
    state = seed
    for _ in range(index + 1):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        output = z ^ (z >> 31)
    return output


def draws(keys: list[int], positions: list[int]) -> np.ndarray:
    return uniforms(np.array(keys, dtype=np.uint64), np.array(positions))


def test_the_generator_is_splitmix64() -> None:
    # The sequence published for seed 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix64(1234567, i) for i in range(3)] == published
    expected = [((value >> 12) + 0.5) / 2**52 for value in published]
    assert draws([1234567] * 3, [0, 1, 2]).tolist() == expected


def test_a_row_key_is_a_walk_down_the_tree() -> None:
    expected = splitmix64(splitmix64(splitmix64(7, 3), 5), 2)
    assert row_key(7, 3, 5, 2) == expected
    assert row_key(-1, 0, 0, 0) == splitmix64(splitmix64(splitmix64(2**64 - 1, 0), 0), 0)


def test_golden_numbers_never_change() -> None:
    # A change here changes every run's samples: it must be on purpose.
    assert row_key(0, 0, 0, 0) == 2558736989570252433
    assert draws([row_key(0, 0, 0, 0)], [0]).tolist() == [0.12964561829974752]


@pytest.mark.parametrize("counter", ["seed", "step", "prompt_index", "sample_index", "position"])
def test_numbers_are_uniform_and_uncorrelated_along_each_counter(counter: str) -> None:
    n = 4000
    base = {"seed": 3, "step": 1, "prompt_index": 4, "sample_index": 1}
    if counter == "position":
        values = draws([row_key(**base)] * n, list(range(n)))
    else:
        keys = [row_key(**(base | {counter: i})) for i in range(n)]
        values = draws(keys, [0] * n)
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    for lag in (1, 2, 8):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 4 / math.sqrt(n)


def test_numbers_stay_inside_the_open_interval() -> None:
    values = draws(list(range(20000)), [0] * 20000)
    assert 0 < values.min() < values.max() < 1


@pytest.mark.parametrize("vocabulary", [2, 255, 256, 257, 1000])
def test_draw_inverts_the_cdf(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(64, vocabulary, generator=generator) * 3
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    tokens, logprobs = draw_tokens(logits, uniform)
    probabilities = logits.double().softmax(-1).numpy()
    for row in range(64):
        cdf = np.cumsum(probabilities[row])
        token = int(tokens[row])
        assert (cdf[token - 1] if token else 0.0) - 1e-6 <= uniform[row] <= cdf[token] + 1e-6
        assert logprobs[row].item() == pytest.approx(math.log(probabilities[row, token]), abs=2e-6)


def test_draw_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().expand(5, 4)
    uniform = torch.tensor([0.05, 0.15, 0.45, 0.65, 0.999], dtype=torch.float64)
    tokens, logprobs = draw_tokens(logits, uniform)
    assert tokens.tolist() == [0, 1, 2, 3, 3]
    assert logprobs.exp().tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4], abs=1e-6)


@pytest.mark.parametrize("u", [2.0**-53, 0.25, 0.5, 0.75, 1 - 2.0**-53])
def test_a_token_of_probability_zero_is_never_drawn(u: float) -> None:
    rows = []
    for support in ([0], [599], [255, 256], [3, 300, 598], list(range(100, 120))):
        row = torch.full((600,), -INF)
        row[support] = torch.linspace(-5, 5, len(support))
        rows.append(row)
    logits = torch.stack(rows)
    tokens, logprobs = draw_tokens(logits, torch.full((5,), u, dtype=torch.float64))
    assert torch.isfinite(logits.gather(1, tokens[:, None])).all()
    assert torch.isfinite(logprobs).all()


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    uniform = torch.from_numpy(draws([row_key(0, 0, 0, 0)] * 20000, list(range(20000))))
    tokens, _ = draw_tokens(probabilities.log().expand(20000, 5), uniform)
    counts = torch.bincount(tokens, minlength=5).numpy()
    assert stats.chisquare(counts, 20000 * probabilities.numpy()).pvalue > 1e-3


def support(logits: list[float], **params: float) -> list[int]:
    transformed = transform_logits(torch.tensor([logits]), replace(PARAMS, **params))
    return torch.isfinite(transformed[0]).nonzero()[:, 0].tolist()


def test_nothing_asked_returns_the_logits_themselves() -> None:
    logits = torch.randn(2, 5)
    assert transform_logits(logits, PARAMS) is logits


def test_transforms_by_hand() -> None:
    logits = [math.log(p) for p in (0.4, 0.05, 0.3, 0.15, 0.1)]
    assert support(logits, top_k=2) == [0, 2]
    assert support(logits, top_k=99) == [0, 1, 2, 3, 4]
    assert support(logits, top_p=0.39) == [0]
    assert support(logits, top_p=0.41) == [0, 2]
    assert support(logits, top_p=0.71) == [0, 2, 3]
    assert support(logits, min_p=0.3) == [0, 2, 3]  # 0.3 * 0.4 = 0.12
    assert support(logits, temperature=0.0) == [0]
    # top-p acts on what top-k left: 0.4 / 0.7 = 0.571
    assert support(logits, top_k=2, top_p=0.55) == [0]
    assert support(logits, top_k=2, top_p=0.6) == [0, 2]
    # temperature comes first: at T = 0.5 probabilities are proportional to squares
    assert support(logits, temperature=0.5, min_p=0.3) == [0, 2]
    halved = transform_logits(torch.tensor([logits]), replace(PARAMS, temperature=0.5))
    assert halved[0].tolist() == pytest.approx([2 * x for x in logits], rel=1e-6)


def test_ties_at_the_cut_all_stay() -> None:
    assert support([1.0, 2.0, 1.0, 1.0], top_k=2) == [0, 1, 2, 3]
    assert support([0.0, 0.0, 0.0, 0.0], top_p=0.3) == [0, 1, 2, 3]
    assert support([0.0, 3.0, 3.0], temperature=0.0) == [1]


def test_a_flat_nucleus_is_sorted_in_full() -> None:
    logits = torch.randn(3, 5000) * 0.1
    transformed = transform_logits(logits, replace(PARAMS, top_p=0.9))
    for row, kept in zip(logits.double().softmax(-1), torch.isfinite(transformed), strict=True):
        ordered = row.sort(descending=True).values.cumsum(0)
        assert int(kept.sum()) == int((ordered < 0.9).sum()) + 1
        assert row[kept].min() > row[~kept].max()


def test_kept_tokens_stay_possible() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    for change in ({"top_k": 1}, {"temperature": 0.0}):
        kept = transform_logits(logits, replace(PARAMS, **change), keep=torch.tensor([0, 2]))
        assert torch.isfinite(kept).tolist() == [[True, False, False], [True, False, True]]


def test_gradients_pass_the_support_only() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    params = replace(PARAMS, top_k=2, temperature=0.5)
    transform_logits(logits, params).log_softmax(-1)[0, 0].backward()
    second = 1 / (1 + math.exp(2))  # softmax of (4, 2), its second entry
    assert logits.grad[0].tolist() == pytest.approx([2 * second, -2 * second, 0.0], abs=1e-6)


def test_parameters_are_checked_by_name() -> None:
    check_sampling_params(PARAMS)
    with pytest.raises(UserInputError, match=r"top_p is 1\.5; it must be above 0"):
        check_sampling_params(replace(PARAMS, top_p=1.5))
