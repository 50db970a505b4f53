"""Drawing tokens: numbers that depend on counters alone, and the inverse of the CDF.

A random number belongs to (run seed, step, prompt index, sample index, token position) and to
nothing else. There is no generator whose state advances, so it does not matter which rows share
a batch, in which order they finish, whether an evaluation ran in between, or whether the run was
restarted.

The numbers form a tree of SplitMix64 generators (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators"). The c-th output of the generator seeded with s is

    child(s, c) = mix(s + (c + 1) * 0x9E3779B97F4A7C15)   modulo 2**64,

with `mix` its published finalizer; each counter in turn picks an output that seeds the next.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

UInt64Array = npt.NDArray[np.uint64]
IntArray = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1
# Two-level search: sums over blocks first, then inside one block. Summing is much faster than a
# cumulative sum over the whole vocabulary.
_BLOCK = 256


def row_key(seed: int, step: int, prompt_index: int, sample_index: int) -> int:
    """The 64-bit key of one completion: its tokens' numbers are `uniforms(key, position)`."""
    key = np.array([seed & _MASK], dtype=np.uint64)
    for counter in (step, prompt_index, sample_index):
        key = _child(key, np.array([counter & _MASK], dtype=np.uint64))
    return int(key[0])


def uniforms(keys: UInt64Array, positions: IntArray) -> npt.NDArray[np.float64]:
    """Numbers in the open interval (0, 1), one for each (row key, token position).

    The upper 52 bits of the 64 plus one half, times 2**-52: symmetric around 1/2, never 0 or 1.
    """
    bits = _child(keys, positions.astype(np.uint64)) >> np.uint64(12)
    return np.asarray((bits.astype(np.float64) + 0.5) * 2.0**-52, dtype=np.float64)


def _child(state: UInt64Array, counter: UInt64Array) -> UInt64Array:
    z = state + (counter + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)), dtype=np.uint64)


def draw_tokens(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the CDF in order of token id.

    Token i is drawn for a uniform u where  F(i - 1) <= u * Z < F(i),  F the running sum of
    exp(logit) and Z its end. A token of probability zero has F(i - 1) = F(i) and cannot be drawn.
    Exponentials are fp32; sums are fp64.

    Args:
        logits: fp32 `[N, V]`, transformed; -inf outside the support.
        uniform: fp64 `[N]` in (0, 1).

    Returns:
        Token ids `[N]`, and their log-probabilities `[N]` (fp32) under softmax(logits).
    """
    best = logits.amax(-1, keepdim=True)
    weights = (logits - best).exp_()
    padding = -weights.shape[-1] % _BLOCK
    if padding:
        weights = torch.nn.functional.pad(weights, (0, padding))
    blocks = weights.view(weights.shape[0], -1, _BLOCK)
    block_cdf = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    total = block_cdf[:, -1:]
    block, below = _search(block_cdf, uniform[:, None] * total)
    rows = torch.arange(len(logits), device=logits.device)
    inner_cdf = blocks[rows, block[:, 0]].double().cumsum(-1)
    inner, _ = _search(inner_cdf, uniform[:, None] * total - below)
    tokens = (block * _BLOCK + inner).clamp_max(logits.shape[-1] - 1)
    logprobs = logits.gather(-1, tokens) - best - total.log()
    return tokens[:, 0], logprobs[:, 0].float()


def _search(cdf: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose CDF exceeds the target, and the CDF before it; both `[N, 1]`.

    The target is held inside the CDF's range: two orders of summation may differ in the last
    digit. (Not a number everywhere, as a broken model gives, comes out as the last index.)
    """
    end = cdf[:, -1:]
    target = torch.minimum(target.clamp_min(0.0), end * (1 - 2.0**-53))
    index = torch.searchsorted(cdf, target, right=True).clamp_max(cdf.shape[-1] - 1)
    before = cdf.gather(-1, (index - 1).clamp_min(0))
    return index, torch.where(index > 0, before, 0.0)
