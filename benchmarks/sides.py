"""How each side of a benchmark trains: a recipe for the toolkit, a clocked trainer for trl."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from side_by_side import Job, Measured, peak_gigabytes, synchronize

LEARNING_RATE = 1e-6


def train_recipe(job: Job, sections: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Train a recipe with the toolkit; the metrics of each step.

    Args:
        sections: of the recipe, beside those that every benchmark has. `model` and `optim` are
            added to what is common: bfloat16 weights without masters, a constant learning rate.
    """
    from alignment.config import load_recipe
    from alignment.runs.metrics import read_metrics
    from alignment.trainers.run import train

    recipe = {
        "run": {"name": "bench", "dir": str(job.folder)},
        "eval": {"at_start": False},
        # Throughput is measured whatever is learned.
        "limits": {"idle_steps": 1000},
        **sections,
        "model": {
            "path": job.model,
            "dtype": "bfloat16",
            "master_dtype": "none",
            **sections.get("model", {}),
        },
        "optim": {"lr": LEARNING_RATE, "schedule": "constant", **sections.get("optim", {})},
    }
    path = job.folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    directory = train(load_recipe(path))
    return [row for row in read_metrics(directory.metrics) if row["step"] > 0]


def measured(rows: list[dict[str, Any]], **shown: float) -> Measured:
    """The toolkit's own figures of a run, which it takes before anything is saved."""
    return Measured(
        seconds={"step": [row["time/step_seconds"] for row in rows]},
        gigabytes=rows[-1]["memory/peak_gigabytes"],
        shown=shown,
    )


def trl_settings(job: Job) -> dict[str, Any]:
    """Settings of trl's configurations that all benchmarks have in common.

    Gradient checkpointing, on by default, would cost trl a fifth of its speed, and the toolkit has
    it off too. `bf16` is mixed precision: the weights are in bfloat16 themselves, as ours are.
    """
    return {
        "output_dir": str(job.folder / "trl"),
        "max_steps": job.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": job.device == "cpu",
        "model_init_kwargs": {"dtype": "bfloat16"},
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def train_clocked(trainer: Any, job: Job) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """Run a trl trainer; seconds of its steps, and what it logged of each.

    A step lasts from before its first micro-batch to after the optimizer: fetching data and
    logging are not counted.
    """
    from transformers import TrainerCallback

    seconds: list[float] = []

    class Clock(TrainerCallback):
        """Appends the seconds of each step."""

        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize(job.device)
            self.began = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(job.device)
            seconds.append(time.monotonic() - self.began)

    trainer.add_callback(Clock())
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return {"step": seconds}, logged


def measured_trl(trainer: Any, job: Job, **shown: str) -> Measured:
    """Run a trl trainer; its figures, and what `shown` names of the first step's log."""
    seconds, logged = train_clocked(trainer, job)
    return Measured(
        seconds=seconds,
        gigabytes=peak_gigabytes(job.device),
        shown={name.replace("_", " "): float(logged[0][key]) for name, key in shown.items()},
    )
