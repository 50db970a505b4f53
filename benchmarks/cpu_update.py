"""An update in bfloat16 on a CPU: by the toolkit, and with torch's and transformers' own kernels.

    python benchmarks/cpu_update.py [--model PATH] [--rounds 3] [--steps 4]

Scores and gradients of 16 samples of 4 prompts in one micro-batch, all weights; no optimizer. Both
sides pack the samples alike. What differs: docs/decisions/0019-bf16-on-a-cpu.md and 0021.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from side_by_side import Benchmark, Job, Measured, peak_gigabytes
from transformers import AutoModelForCausalLM

from alignment.modeling import attention_cpu
from alignment.modeling.backbone import Backbone
from alignment.modeling.heap import keep_freed_memory
from alignment.modeling.load import load_causal_lm
from alignment.modeling.scorer import score
from alignment.types import Sample

PROMPTS, GROUP = 4, 4


def random_samples(n_vocabulary: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, n_vocabulary, (n,), generator=generator).tolist())

    prompts = [tokens(120) for _ in range(PROMPTS)]
    return [Sample(p, tokens(240), (True,) * 240) for p in prompts for _ in range(GROUP)]


def measured(model: Any, job: Job) -> Measured:
    backbone = Backbone(model)
    samples = random_samples(model.config.vocab_size)
    seconds = []
    for _ in range(job.steps):
        start = time.perf_counter()
        score(backbone, samples).logprobs.mean().backward()
        seconds.append(time.perf_counter() - start)
        model.zero_grad()
    return Measured({"step": seconds}, peak_gigabytes(job.device))


def run_ours(job: Job) -> Measured:
    model = load_causal_lm(job.model, dtype="bfloat16")
    keep_freed_memory()
    return measured(model, job)


def run_theirs(job: Job) -> Measured:
    attention_cpu.MULTIPLIES_FAST = False
    return measured(AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16), job)


BENCHMARK = Benchmark(
    title=f"Scores and gradients of {PROMPTS * GROUP} samples of {PROMPTS} prompts in bf16",
    file=__file__,
    sides={"ours": run_ours, "theirs": run_theirs},
    samples_per_step=PROMPTS * GROUP,
)

if __name__ == "__main__":
    BENCHMARK.main()
