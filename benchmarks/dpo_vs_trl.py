"""Direct preference optimization side by side with trl: the same model, pairs, batch and loss.

    python benchmarks/dpo_vs_trl.py [--model PATH] [--rounds 3] [--steps 4] [--device cpu]

Eight pairs make one update: prompts of about 200 tokens, answers of about 100 (50 to 180). Both
sides keep a frozen copy of the model as the reference and score with it in every step. trl runs in
each way that makes the same update, and is measured by its fastest; its `padding_free` is switched
off in this version. The toolkit's micro-batches hold about five pairs: of a pair it computes the
prompt once, and both answers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from side_by_side import Benchmark, Job, Measured
from sides import measured, measured_trl, train_recipe, trl_settings
from workload import preferences, write_rows

PAIRS = 8
BETA = 0.1

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
            "model": {"reference": "frozen_copy"},
            "data": {"type": "file", "path": str(path), "shuffle": False, "style": "plain"},
            "algorithm": {
                "type": "dpo",
                "steps": job.steps,
                "pairs_per_step": PAIRS,
                "loss": {"beta": BETA},
            },
            "optim": {"micro_batch_tokens": 2048},
        },
    )
    return measured(rows, **{"log p(chosen)": rows[0]["dpo/logps/chosen"]})


def run_trl(job: Job, variant: str) -> Measured:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=job.model,
        args=DPOConfig(**trl_settings(job), **TRL[variant], max_length=None, beta=BETA),
        train_dataset=Dataset.from_list(preferences(PAIRS)),
    )
    return measured_trl(trainer, job, **{"log p(chosen)": "logps/chosen"})


BENCHMARK = Benchmark(
    title=f"DPO, {PAIRS} pairs an update, prompts of 200 tokens and answers of 100, full "
    "fine-tuning in bf16, frozen reference",
    file=__file__,
    sides={"ours": run_ours, **{f"trl-{name}": partial(run_trl, variant=name) for name in TRL}},
    samples_per_step=PAIRS,
    sample="pairs",
)

if __name__ == "__main__":
    BENCHMARK.main()
