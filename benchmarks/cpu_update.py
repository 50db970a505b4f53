"""Seconds of one update in bfloat16 on a CPU, with our kernels and with torch's and transformers'.

    python benchmarks/cpu_update.py [--rounds 5]

Random weights in the shape of SmolLM2-135M; 16 samples of 4 prompts. Both ways take turns, so that
a busy machine slows both. docs/decisions/0019-bf16-on-a-cpu.md.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from typing import Any

import torch
from rollout import load_model

from alignment.modeling import attention_cpu
from alignment.modeling.backbone import Backbone
from alignment.modeling.rms_norm import replace_rms_norms
from alignment.modeling.scorer import score
from alignment.types import Sample


def random_samples() -> list[Sample]:
    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 49152, (n,)).tolist())

    prompts = [tokens(120) for _ in range(4)]
    return [Sample(p, tokens(240), (True,) * 240) for p in prompts for _ in range(4)]


def seconds(model: Any, samples: list[Sample], own: bool) -> float:
    """Scores and gradients of all samples in one micro-batch."""
    fast, attention_cpu._MULTIPLIES_FAST = attention_cpu._MULTIPLIES_FAST, own
    start = time.perf_counter()
    scores = score(Backbone(model), samples)
    scores.logprobs.mean().backward()
    taken = time.perf_counter() - start
    attention_cpu._MULTIPLIES_FAST = fast
    model.zero_grad()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    theirs, samples = load_model("random", "cpu", torch.bfloat16), random_samples()
    ours = copy.deepcopy(theirs)
    replace_rms_norms(ours)
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds + 1):
        times["ours"].append(seconds(ours, samples, own=True))
        times["theirs"].append(seconds(theirs, samples, own=False))
    for name, (_, *found) in times.items():  # the first round warms up
        sys.stdout.write(f"{name:<7}{statistics.median(found):.2f} s, median of {rounds}\n")


if __name__ == "__main__":
    main()
