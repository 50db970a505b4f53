"""Rollout speed: the native engine against transformers' generate and generate_batch.

    python benchmarks/rollout.py                # random weights in the shape of SmolLM2-135M
    python benchmarks/rollout.py --model PATH --device cuda --repeats 5

Every engine is asked for the same completions: the same prompts, G for each, and the same number of
tokens for each completion (mean 60, at most 256, drawn once). `generate` gets one batch with
`num_return_sequences`, and a stopping criterion that ends each row at its length. `generate_batch`
gets one request a completion with its own `max_new_tokens`. End tokens are switched off for all.
Runs alternate within one process, so a busy machine slows all engines alike; the medians and the
ratio of medians are reported.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from alignment.rollout.native import NativeEngine
from alignment.types import Prompt, SamplingParams


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Workload:
    prompts: list[list[int]]
    group_size: int
    lengths: list[int]  # one for each completion, prompt-major
    limit: int


class NoTokenizer:
    """The engines under test need nothing of a tokenizer but an end token that never comes."""

    eos_token_id = None

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return ""


class PlannedLengths(StoppingCriteria):
    """Ends row i of a batch after `lengths[i]` new tokens."""

    def __init__(self, prompt_length: int, lengths: list[int], device: torch.device) -> None:
        self.ends = prompt_length + torch.tensor(lengths, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


def make_workload(args: argparse.Namespace, vocabulary: int) -> Workload:
    """Prompts of random tokens; lengths exponential with the asked mean, cut at the limit."""
    random = np.random.default_rng(0)
    prompts = random.integers(10, vocabulary, (args.prompts, args.prompt_length)).tolist()
    draws = random.exponential(args.mean_length, args.prompts * args.group_size)
    lengths = np.clip(np.ceil(draws), 1, args.max_new_tokens).astype(int).tolist()
    return Workload(prompts, args.group_size, lengths, args.max_new_tokens)


def load_model(path: str, device: str, dtype: torch.dtype) -> Any:
    """The model at `path`, or random weights in the shape of SmolLM2-135M."""
    if path != "random":
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()


def native(model: Any, work: Workload, max_rows: int) -> int:
    engine = NativeEngine(model, NoTokenizer(), max_rows=max_rows, stop_token_ids=())
    prompts = [Prompt(tuple(ids), "", i) for i, ids in enumerate(work.prompts)]
    params = SamplingParams(max_new_tokens=work.limit, n=work.group_size)
    rows = engine.lay_out(prompts, params)
    for row, length in zip(rows, work.lengths, strict=True):
        row.limit = length
    engine.run(rows, params)
    return sum(len(row.tokens) for row in rows)


def generate(model: Any, work: Workload, max_rows: int) -> int:
    """As many whole prompts a batch as `max_rows` allows."""
    delivered = 0
    per_batch = max(1, max_rows // work.group_size)
    for start in range(0, len(work.prompts), per_batch):
        prompts = torch.tensor(work.prompts[start : start + per_batch], device=model.device)
        first = start * work.group_size
        lengths = work.lengths[first : first + len(prompts) * work.group_size]
        output = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=GenerationConfig(
                do_sample=True,
                top_k=0,
                num_return_sequences=work.group_size,
                max_new_tokens=work.limit,
                pad_token_id=0,
            ),
            stopping_criteria=StoppingCriteriaList(
                [PlannedLengths(prompts.shape[1], lengths, model.device)]
            ),
        )
        assert output.shape[1] == prompts.shape[1] + max(lengths)
        delivered += sum(lengths)
    return delivered


def generate_batch(model: Any, work: Workload, max_rows: int) -> int:
    """Continuous batching of transformers, log-probabilities on."""
    longest = len(work.prompts[0]) + work.limit
    page = 32
    on_cpu = model.device.type == "cpu"
    settings = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=max_rows * -(-longest // page) if on_cpu else None,
        max_batch_tokens=512 if on_cpu else None,
        max_memory_percent=0.8,
        return_logprobs=True,
    )
    delivered = 0
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(do_sample=True, top_k=0, max_new_tokens=work.limit),
        continuous_batching_config=settings,
        block=True,
        timeout=5,
    ) as manager:
        for i, length in enumerate(work.lengths):
            manager.add_request(work.prompts[i // work.group_size], max_new_tokens=length)
        done = 0
        while done < len(work.lengths):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("generate_batch ended before its requests")
                continue
            if result.error is not None:
                raise RuntimeError(result.error)
            done += 1
            delivered += len(result.generated_tokens)
    return delivered


def measure(
    engines: dict[str, Callable[..., int]], model: Any, work: Workload, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Tokens per second of each engine, one entry a repeat, in alternation."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(args.repeats + args.warmup):
        for name, run in engines.items():
            synchronize(model.device)
            start = time.perf_counter()
            with torch.no_grad():
                delivered = run(model, work, args.max_rows)
            synchronize(model.device)
            seconds = time.perf_counter() - start
            if delivered != sum(work.lengths):
                raise RuntimeError(f"{name} delivered {delivered} of {sum(work.lengths)} tokens")
            if repeat >= args.warmup:
                rates[name].append(delivered / seconds)
                say(f"  {name:15s} {delivered / seconds:9.1f} tokens/s  ({seconds:.1f} s)")
    return rates


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, read and write counted."""
    size = 1 << (30 if device.type == "cuda" else 28)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size / min(times)


def decode_bandwidth(model: Any, work: Workload, max_rows: int) -> float:
    """Bytes per second that decoding must read: weights once a step, and each live key and value
    once. Taken as the extra time of 64 steps over 8 with all rows running."""
    prompts = [Prompt(tuple(ids), "", i) for i, ids in enumerate(work.prompts)]
    engine = NativeEngine(model, NoTokenizer(), max_rows=max_rows, stop_token_ids=())
    seconds = {}
    for steps in (8, 64, 8, 64):
        synchronize(model.device)
        start = time.perf_counter()
        engine.generate(prompts, SamplingParams(max_new_tokens=steps, n=work.group_size))
        synchronize(model.device)
        seconds[steps] = time.perf_counter() - start
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = (
        2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
    )
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    live = len(prompts) * len(work.prompts[0]) + len(prompts) * work.group_size * 36
    return 56 * (weights + live * per_token) / (seconds[64] - seconds[8])


def report(rates: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, median in medians.items():
        say(f"{name:15s} median {median:9.1f} tokens/s of {len(rates[name])} runs")
    others = {name: median for name, median in medians.items() if name != "native"}
    if "native" in medians and others:
        best = max(others, key=lambda name: others[name])
        say(f"native / {best} = {medians['native'] / others[best]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="random", help="a model directory, or 'random'")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=None, help="torch threads on the CPU")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=200)
    parser.add_argument("--mean-length", type=float, default=60)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--max-rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--engines", default="native,generate,generate_batch")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    model = load_model(args.model, args.device, getattr(torch, args.dtype))
    work = make_workload(args, model.config.vocab_size)
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    say(
        f"{datetime.date.today()}  {device or platform.machine()}, "
        f"{torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    say(
        f"{args.model} in {args.dtype}: {args.prompts} prompts of {args.prompt_length} tokens, "
        f"{args.group_size} completions each, {sum(work.lengths)} tokens in all "
        f"(mean {statistics.mean(work.lengths):.0f}, longest {max(work.lengths)})"
    )
    table = {"native": native, "generate": generate, "generate_batch": generate_batch}
    engines = {name: table[name] for name in args.engines.split(",")}
    report(measure(engines, model, work, args))
    reached = decode_bandwidth(model, work, args.max_rows)
    possible = copy_bandwidth(model.device)
    say(
        f"native decoding reads {reached / 1e9:.1f} GB/s of the {possible / 1e9:.1f} GB/s of a "
        f"large copy: {reached / possible:.0%}"
    )


if __name__ == "__main__":
    sys.exit(main())
