"""GRPO side by side with trl: the same model, prompts, reward, group size, token limit and KL.

    python benchmarks/grpo_vs_trl.py [--model PATH] [--rounds 3] [--steps 4] [--device cpu]

Each side runs in processes of its own, in alternating order; the first step of each process is not
counted. Printed: seconds a step by phase, samples per second and peak memory, and the ratios of
medians.
"""

from __future__ import annotations

import time
from typing import Any

from side_by_side import Benchmark, Job, Measured, peak_gigabytes, synchronize
from sides import measured, train_clocked, train_recipe, trl_settings
from workload import brevity, prompts, write_rows

PROMPTS_PER_STEP = 4
GROUP_SIZE = 8
MAX_NEW_TOKENS = 32
KL_COEF = 0.04
SAMPLES = PROMPTS_PER_STEP * GROUP_SIZE
LENGTH = "mean completion, tokens"


def run_ours(job: Job) -> Measured:
    """Train with this toolkit; seconds of each step by phase."""
    rows = [{"prompt": prompt} for prompt in prompts(PROMPTS_PER_STEP * job.steps)]
    path = write_rows(job.folder / "prompts.jsonl", rows)
    steps = train_recipe(
        job,
        {
            "data": {"type": "file", "path": str(path), "shuffle": False},
            "algorithm": {
                "type": "grpo",
                "steps": job.steps,
                "prompts_per_step": PROMPTS_PER_STEP,
                "group_size": GROUP_SIZE,
                "kl": {"coef": KL_COEF},
            },
            "rollout": {"max_new_tokens": MAX_NEW_TOKENS},
            "rewards": [{"type": "workload:brevity"}],
            "optim": {"micro_batch_tokens": 1024},
        },
    )
    result = measured(steps, **{LENGTH: _mean([row["completion/length"] for row in steps[1:]])})
    names = {"rollout": "rollout", "reference": "record", "update": "update"}
    for phase, name in names.items():
        result.seconds[phase] = [row[f"time/{name}_seconds"] for row in steps]
    return result


def run_trl(job: Job) -> Measured:
    """Train with trl's `GRPOTrainer`; seconds of each step, generation and the rest."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    chats = [[{"role": "user", "content": p}] for p in prompts(PROMPTS_PER_STEP * job.steps)]
    config = GRPOConfig(
        **trl_settings(job),
        per_device_train_batch_size=SAMPLES,
        num_generations=GROUP_SIZE,
        max_completion_length=MAX_NEW_TOKENS,
        beta=KL_COEF,
        loss_type="dapo",
        temperature=1.0,
        shuffle_dataset=False,
    )
    rollouts: list[float] = []

    class Timed(GRPOTrainer):
        """trl's trainer with a clock around its generation."""

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            began = time.monotonic()
            out = super()._generate_single_turn(*args, **kwargs)
            synchronize(job.device)
            rollouts.append(time.monotonic() - began)
            return out

    trainer = Timed(
        model=job.model,
        reward_funcs=brevity,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": chats}),
    )
    seconds, logged = train_clocked(trainer, job)
    updates = [step - rollout for step, rollout in zip(seconds["step"], rollouts, strict=True)]
    lengths = [row["completions/mean_length"] for row in logged[1:]]
    return Measured(
        seconds={**seconds, "rollout": rollouts, "update": updates},
        gigabytes=peak_gigabytes(job.device),
        shown={LENGTH: _mean(lengths)},
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


BENCHMARK = Benchmark(
    title=f"GRPO, {PROMPTS_PER_STEP} prompts x {GROUP_SIZE} completions x {MAX_NEW_TOKENS} tokens, "
    f"full fine-tuning in bf16, reference model, KL {KL_COEF}",
    file=__file__,
    sides={"ours": run_ours, "trl": run_trl},
    samples_per_step=SAMPLES,
    phases=("step", "rollout", "reference", "update"),
    notes=("trl's update holds the reference's forward pass and the rewards.",),
)

if __name__ == "__main__":
    BENCHMARK.main()
