"""Reward modeling side by side with trl: the same model, pairs, batch and loss.

    python benchmarks/rm_vs_trl.py [--model PATH] [--rounds 3] [--steps 4] [--device cpu]

Eight pairs make one update: prompts of about 200 tokens, answers of about 100 (50 to 180); full
fine-tuning with a fresh scalar head. trl runs in each way that makes the same update, and is
measured by its fastest. The toolkit's one micro-batch holds all eight pairs: of a pair it computes
the prompt once, and both answers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from side_by_side import Benchmark, Job, Measured
from sides import measured, measured_trl, train_recipe, trl_settings
from workload import preferences, write_rows

PAIRS = 8

TRL: dict[str, dict[str, Any]] = {
    "padded": {"per_device_train_batch_size": PAIRS},
    "halves": {"per_device_train_batch_size": PAIRS // 2, "gradient_accumulation_steps": 2},
    "single": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": PAIRS},
}


def run_ours(job: Job) -> Measured:
    path = write_rows(job.folder / "rows.jsonl", preferences(PAIRS))
    rows = train_recipe(
        job,
        {
            "data": {"type": "file", "path": str(path), "shuffle": False, "style": "plain"},
            "algorithm": {"type": "reward_model", "steps": job.steps, "pairs_per_step": PAIRS},
            "optim": {"micro_batch_tokens": 4096},
        },
    )
    return measured(rows)


def run_trl(job: Job, variant: str) -> Measured:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    trainer = RewardTrainer(
        model=job.model,
        args=RewardConfig(**trl_settings(job), **TRL[variant], max_length=None),
        train_dataset=Dataset.from_list(preferences(PAIRS)),
    )
    return measured_trl(trainer, job)


BENCHMARK = Benchmark(
    title=f"Reward model, {PAIRS} pairs an update, prompts of 200 tokens and answers of 100, full "
    "fine-tuning in bf16",
    file=__file__,
    sides={"ours": run_ours, **{f"trl-{name}": partial(run_trl, variant=name) for name in TRL}},
    samples_per_step=PAIRS,
    sample="pairs",
)

if __name__ == "__main__":
    BENCHMARK.main()
