"""What a checkpoint costs the training that goes on: waiting while the state is copied, and sharing
the machine with the thread that writes it.

    python benchmarks/checkpoint.py                        # LoRA of rank 16, and all weights
    python benchmarks/checkpoint.py --states lora --every 10 --step-seconds 5 18 --folder runs

The states have the tensors that training SmolLM2-135M has, of random numbers: weights in bfloat16,
masters and both moments in float32. In place of steps, matrices are multiplied on all threads; the
same work is timed with and without a checkpoint that is being written, in turn. Medians.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment.runs.checkpoint_writer import CheckpointWriter
from alignment.runs.events import EventLog, read_events
from alignment.runs.state_tree import encode_tree, tensor_bytes

RANK = 16
LAYERS, HIDDEN, KEYS, INNER, VOCABULARY = 30, 576, 192, 1536, 49152
LINEAR = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (KEYS, HIDDEN),
    "v_proj": (KEYS, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (INNER, HIDDEN),
    "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}


@dataclass(frozen=True)
class Cost:
    """Seconds, one entry a checkpoint."""

    n_bytes: int
    copy: list[float]
    write: list[float]
    slowed: list[float]

    def share(self, every: int, step_seconds: float) -> float:
        """Of the time of `every` steps: waiting for the copy, and what the writing takes away."""
        lost = statistics.median(self.copy) + max(statistics.median(self.slowed), 0.0)
        return lost / (every * step_seconds)


def shapes(kind: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of what is trained."""
    for layer in range(LAYERS):
        for name, (rows, columns) in LINEAR.items():
            path = f"model.layers.{layer}.{name}"
            if kind == "lora":
                yield f"{path}.lora_A.weight", (RANK, columns)
                yield f"{path}.lora_B.weight", (rows, RANK)
            else:
                yield f"{path}.weight", (rows, columns)
    if kind == "full":
        yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
        yield from ((f"model.norm.{n}.weight", (HIDDEN,)) for n in range(2 * LAYERS + 1))


def make_state(kind: str) -> dict[str, Any]:
    """What training saves, in the shape that `training_state` gives it."""
    masters = {name: torch.randn(shape) for name, shape in shapes(kind)}
    moments: dict[str, dict[str, Tensor]] = {
        name: {
            "step": torch.tensor(1.0),
            "exp_avg": torch.randn_like(master),
            "exp_avg_sq": torch.rand_like(master),
        }
        for name, master in masters.items()
    }
    weights = {name: master.bfloat16() for name, master in masters.items()}
    optimizer = {"masters": masters, "moments": moments}
    return {"step": 1, "model": {"weights": weights, "optimizer": optimizer}}


def work(seconds: float) -> int:
    """How many multiplications take so long."""
    count, began = 0, time.monotonic()
    while time.monotonic() - began < seconds:
        multiply(1)
        count += 1
    return count


def multiply(count: int) -> float:
    """Seconds that so many multiplications take."""
    left, right = torch.ones(512, 512), torch.ones(512, 512)
    began = time.monotonic()
    for _ in range(count):
        left @ right
    return time.monotonic() - began


def measure(kind: str, folder: Path, repeats: int) -> Cost:
    """Write the state `repeats` times, while the same work is done."""
    state = make_state(kind)
    log = folder / "events.jsonl"
    slowed = []
    with CheckpointWriter(folder / "checkpoints", EventLog(log), keep=1) as writer:
        writer.submit(0, state)  # not counted: the first one has the least to remove
        writer.wait()
        (first,) = read_events(log)
        count = work(1.5 * first["write_seconds"] + 0.5)
        for step in range(1, repeats + 1):
            alone = multiply(count)
            writer.submit(step, state)
            beside = multiply(count)
            writer.wait()
            slowed.append(beside - alone)
    events = read_events(log)[1:]
    return Cost(
        n_bytes=sum(map(tensor_bytes, encode_tree(state).tensors.values())),
        copy=[event["copy_seconds"] for event in events],
        write=[event["write_seconds"] for event in events],
        slowed=slowed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--states", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--step-seconds", nargs="+", type=float, default=[5.0, 18.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; on which disk")
    options = parser.parse_args()
    say(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.platform()}")
    for kind in options.states:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            cost = measure(kind, Path(folder), options.repeats)
        say(f"{kind}: {cost.n_bytes / 2**20:.0f} MiB, checkpoint.every {options.every}")
        say(f"  copy, in the step    {milliseconds(cost.copy)}")
        say(f"  write, beside steps  {milliseconds(cost.write)}")
        say(f"  steps slowed by it   {milliseconds(cost.slowed)}")
        for seconds in options.step_seconds:
            share = cost.share(options.every, seconds)
            say(f"  share of the time of steps of {seconds:g} s: {share:.2%}")


def milliseconds(seconds: list[float]) -> str:
    low, middle, high = (1000 * f(seconds) for f in (min, statistics.median, max))
    return f"{middle:8.0f} ms  ({low:.0f} to {high:.0f})"


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
