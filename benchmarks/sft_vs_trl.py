"""Supervised fine-tuning side by side with trl: the same model, rows, batch and loss.

    python benchmarks/sft_vs_trl.py [--model PATH] [--rounds 3] [--steps 4] [--device cpu]

Sixteen samples of mixed lengths (20 to 400 tokens, log-uniform) make one update; every step has
the same sixteen. trl runs in each way that makes the same update, and is measured by its fastest:

    padded         one padded batch
    single         one sample at a time, without padding
    rebalanced     micro-batches of similar lengths (`train_sampling_strategy="batch_rebalance"`)
    padding-free   all samples in one row, kept apart by their positions

`packing` cannot be compared: it chooses itself how many samples an update has, and computes as
padding-free does.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from side_by_side import Benchmark, Job, Measured
from sides import measured, measured_trl, train_recipe, trl_settings
from workload import demonstrations, write_rows

SAMPLES = 16

TRL: dict[str, dict[str, Any]] = {
    "padded": {"per_device_train_batch_size": SAMPLES},
    "single": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": SAMPLES},
    "rebalanced": {
        "per_device_train_batch_size": SAMPLES // 4,
        "gradient_accumulation_steps": 4,
        "train_sampling_strategy": "batch_rebalance",
    },
    "padding-free": {
        "per_device_train_batch_size": SAMPLES,
        "padding_free": True,
    },
}


def run_ours(job: Job) -> Measured:
    path = write_rows(job.folder / "rows.jsonl", demonstrations(SAMPLES))
    rows = train_recipe(
        job,
        {
            "data": {"type": "file", "path": str(path), "shuffle": False, "style": "plain"},
            "algorithm": {"type": "sft", "steps": job.steps, "samples_per_step": SAMPLES},
            "optim": {"micro_batch_tokens": 2048},
        },
    )
    return measured(rows, **{"first loss": rows[0]["loss"]})


def run_trl(job: Job, variant: str) -> Measured:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=job.model,
        args=SFTConfig(**trl_settings(job), **TRL[variant], max_length=None),
        train_dataset=Dataset.from_list(demonstrations(SAMPLES)),
    )
    return measured_trl(trainer, job, first_loss="loss")


BENCHMARK = Benchmark(
    title=f"SFT, {SAMPLES} samples of 20 to 400 tokens an update, full fine-tuning in bf16",
    file=__file__,
    sides={"ours": run_ours, **{f"trl-{name}": partial(run_trl, variant=name) for name in TRL}},
    samples_per_step=SAMPLES,
)

if __name__ == "__main__":
    BENCHMARK.main()
