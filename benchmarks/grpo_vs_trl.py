"""GRPO side by side with trl: the same model, prompts, reward, group size, token limit and KL.

    python benchmarks/grpo_vs_trl.py [--model PATH] [--rounds 3] [--steps 4] [--device cpu]

Each round runs both in processes of their own, one after the other, in alternating order, so that
a machine whose speed drifts treats both alike. The first step of each process is not counted.
Printed: seconds a step by phase, samples per second and peak memory, and the ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PROMPTS_PER_STEP = 4
GROUP_SIZE = 8
MAX_NEW_TOKENS = 32
LEARNING_RATE = 1e-6
KL_COEF = 0.04
SAMPLES = PROMPTS_PER_STEP * GROUP_SIZE


def run_ours(model: str, folder: Path, steps: int, device: str) -> dict[str, Any]:
    """Train with this toolkit; seconds of each step by phase."""
    from alignment.config import load_recipe
    from alignment.runs.metrics import read_metrics
    from alignment.trainers.run import train

    recipe = {
        "run": {"name": "bench", "dir": str(folder)},
        "model": {"path": model, "dtype": "bfloat16", "master_dtype": "none"},
        "data": {"type": "file", "path": str(folder / "prompts.jsonl"), "shuffle": False},
        "algorithm": {
            "type": "grpo",
            "steps": steps,
            "prompts_per_step": PROMPTS_PER_STEP,
            "group_size": GROUP_SIZE,
            "kl": {"coef": KL_COEF},
        },
        "rollout": {"max_new_tokens": MAX_NEW_TOKENS},
        "rewards": [{"type": "workload:brevity"}],
        "optim": {"lr": LEARNING_RATE, "schedule": "constant", "micro_batch_tokens": 1024},
        "eval": {"at_start": False},
        # Throughput is measured whatever the random completions reward.
        "limits": {"idle_steps": 1000},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    directory = train(load_recipe(path))
    rows = [row for row in read_metrics(directory.metrics) if row["step"] > 0]
    names = {"rollout": "rollout", "reference": "record", "update": "update"}
    return {
        "step": [row["time/step_seconds"] for row in rows],
        "length": [row["completion/length"] for row in rows],
        # Before anything is saved, as on trl's side.
        "gigabytes": [row["memory/peak_gigabytes"] for row in rows],
        **{k: [row[f"time/{name}_seconds"] for row in rows] for k, name in names.items()},
    }


def run_trl(model: str, folder: Path, steps: int, device: str) -> dict[str, Any]:
    """Train with trl's `GRPOTrainer`; seconds of each step, generation and the rest."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from workload import brevity, prompts

    chats = [[{"role": "user", "content": p}] for p in prompts(PROMPTS_PER_STEP * steps)]
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        per_device_train_batch_size=SAMPLES,
        num_generations=GROUP_SIZE,
        max_completion_length=MAX_NEW_TOKENS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        beta=KL_COEF,
        loss_type="dapo",
        temperature=1.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=device == "cpu",
        model_init_kwargs={"dtype": "bfloat16"},
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    times: dict[str, list[float]] = {"step": [], "rollout": [], "length": []}

    class Timed(GRPOTrainer):
        """trl's trainer with a clock around its two phases."""

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            synchronize(device)
            began = time.monotonic()
            times["rollout"].append(0.0)
            out = super().training_step(*args, **kwargs)
            synchronize(device)
            times["step"].append(time.monotonic() - began)
            return out

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            began = time.monotonic()
            out = super()._generate_single_turn(*args, **kwargs)
            synchronize(device)
            times["rollout"][-1] += time.monotonic() - began
            return out

    trainer = Timed(
        model=model,
        reward_funcs=brevity,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": chats}),
    )
    optimizer_times: list[float] = []
    make = trainer.create_optimizer

    def create_timed(*args: Any, **kwargs: Any) -> Any:
        out = make(*args, **kwargs)
        step = trainer.optimizer.step

        def timed_step(*a: Any, **k: Any) -> Any:
            began = time.monotonic()
            result = step(*a, **k)
            synchronize(device)
            optimizer_times.append(time.monotonic() - began)
            return result

        trainer.optimizer.step = timed_step
        return out

    trainer.create_optimizer = create_timed
    trainer.train()
    times["length"] = [
        row["completions/mean_length"]
        for row in trainer.state.log_history
        if "completions/mean_length" in row
    ]
    # The optimizer steps outside `training_step`.
    times["step"] = [a + b for a, b in zip(times["step"], optimizer_times, strict=False)]
    times["update"] = [a - b for a, b in zip(times["step"], times["rollout"], strict=False)]
    times["gigabytes"] = [peak_gigabytes(device)]
    return times


def synchronize(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


def peak_gigabytes(device: str) -> float:
    """Peak of the process's memory: resident on a CPU, allocated on a GPU."""
    import torch

    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def worker(side: str, model: str, steps: int, device: str) -> None:
    from workload import write_rows

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "prompts.jsonl", PROMPTS_PER_STEP * steps)
        run = {"ours": run_ours, "trl": run_trl}[side]
        times = run(model, folder, steps, device)
    result = {"times": times, "gigabytes": times["gigabytes"][-1]}
    sys.stdout.write("RESULT " + json.dumps(result) + "\n")


def launch(side: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", side, "--model", args.model]
    command += ["--steps", str(args.steps), "--device", args.device]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return dict(json.loads(lines[-1].removeprefix("RESULT ")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--worker", choices=("ours", "trl"))
    args = parser.parse_args()
    from alignment.modeling.catalog import resolve

    args.model = str(resolve(args.model))
    if args.worker:
        worker(args.worker, args.model, args.steps, args.device)
        return
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for round_ in range(args.rounds):
        for side in ("ours", "trl") if round_ % 2 == 0 else ("trl", "ours"):
            results[side].append(launch(side, args))
            last = results[side][-1]
            median = statistics.median(last["times"]["step"][1:])
            sys.stdout.write(
                f"round {round_ + 1} {side}: {median:.2f} s/step, {last['gigabytes']:.2f} GB\n"
            )
            sys.stdout.flush()
    report(results, args)


def report(results: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    import torch
    import transformers
    import trl

    def median(side: str, phase: str) -> float | None:
        values = [v for run in results[side] for v in run["times"].get(phase, [])[1:]]
        return statistics.median(values) if values else None

    where = torch.cuda.get_device_name() if args.device != "cpu" else platform.processor()
    lines = [
        f"GRPO, {PROMPTS_PER_STEP} prompts x {GROUP_SIZE} completions x {MAX_NEW_TOKENS} tokens, "
        f"full fine-tuning in bf16, reference model, KL {KL_COEF}",
        f"{datetime.now(UTC):%Y-%m-%d}, {args.device} {where or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, trl {trl.__version__}; medians over {args.rounds} rounds "
        f"of {args.steps - 1} steps",
        f"{'':24}{'ours':>10}{'trl':>10}{'ratio':>10}",
    ]
    for phase in ("step", "rollout", "reference", "update"):
        ours, theirs = median("ours", phase), median("trl", phase)
        cells = [f"{v:10.2f}" if v is not None else f"{'-':>10}" for v in (ours, theirs)]
        ratio = f"{theirs / ours:9.2f}x" if ours and theirs else ""
        lines.append(f"{phase + ', seconds':24}{''.join(cells)}{ratio}")
    ours_step, trl_step = median("ours", "step"), median("trl", "step")
    assert ours_step is not None and trl_step is not None
    rates = f"{SAMPLES / ours_step:10.2f}{SAMPLES / trl_step:10.2f}{trl_step / ours_step:9.2f}x"
    lines.append(f"{'samples per second':24}{rates}")
    memory = [statistics.median(run["gigabytes"] for run in results[s]) for s in ("ours", "trl")]
    lines.append(
        f"{'peak memory, GB':24}{memory[0]:10.2f}{memory[1]:10.2f}{memory[0] / memory[1]:9.2f}x"
    )
    lengths = [median(side, "length") for side in ("ours", "trl")]
    lines.append(f"{'mean completion, tokens':24}{lengths[0]:10.1f}{lengths[1]:10.1f}")
    lines.append("trl's update holds the reference's forward pass and the rewards.")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
