"""The runs that are killed: one for each method, small, with as much state to lose as it can have.

Data is passed over several times; checkpoints are saved at every step. Each method is killed in
bfloat16 and in float32: one is the run of one process, the other that of two. Half evaluate on the
way, half do not.
"""

from __future__ import annotations

STEPS = 24

_COMMON = (
    f"algorithm.steps={STEPS}",
    "optim.schedule=cosine",
    "optim.warmup_steps=3",
    "checkpoint={every: 1, keep: 2}",
    "expect=[]",
)
_SYNCED = "model.reference={mode: synced, every: 2, mix: 0.5}"
_DIGITS = "{type: regex, pattern: '[0-9]', mode: search}"

CASES: dict[str, tuple[str, ...]] = {
    "sft": (
        "algorithm.samples_per_step=8",
        "model.lora={rank: 4, dropout: 0.3}",
        "eval={every: 3, tasks: [{type: held_out_loss}]}",
        "checkpoint.keep_best={metric: eval/held_out_loss/loss, mode: min}",
    ),
    "reward_model": (
        "algorithm.pairs_per_step=8",
        "eval={every: 4, tasks: [{type: preference}]}",
    ),
    "ppo": (
        "algorithm.prompts_per_step=8",
        "algorithm.kl={coef: 0.1, placement: reward, controller: adaptive, target: 0.05, "
        "horizon: 50}",
        "algorithm.normalize_rewards=true",
        "algorithm.whiten_rewards=true",
        "algorithm.critic={normalize: true, warmup_steps: 1, lr: 3e-3}",
        _SYNCED,
    ),
    "dpo": (_SYNCED,),
    "kto": (
        "algorithm.loss.kind=bco",  # its threshold is a mean over all steps so far
        "algorithm.samples_per_step=8",
    ),
    "grpo": (
        "algorithm.updates_per_step=2",
        "algorithm.epochs_per_step=2",
        "algorithm.kl={coef: 0.1, controller: adaptive, target: 0.01, horizon: 50}",
        _SYNCED,
        "eval={every: 5, tasks: [{type: verifiable, samples: 1, prompts: 2}]}",
    ),
    "rlvr": (
        "algorithm.prompts_per_step=4",
        "algorithm.updates_per_step=2",
        "algorithm.dynamic_sampling=refill",
        "algorithm.kl={coef: 0.05, placement: reward, estimator: k1, controller: adaptive, "
        "target: 0.02, horizon: 50}",
        f"rewards=[{{type: number}}, {_DIGITS}]",
        "rollout.max_new_tokens=12",
    ),
    "preference_sampling": ("algorithm.prompts_per_step=4",),
}
"""Method to what is set in its tiny recipe. The last one makes data in place of a model."""

HOLDS: dict[str, frozenset[str]] = {
    "sft": frozenset({"model", "evals"}),
    "reward_model": frozenset({"model", "evals"}),
    "ppo": frozenset({"model", "rollouts"}),
    "dpo": frozenset({"model"}),
    "kto": frozenset({"model"}),
    "grpo": frozenset({"model", "rollouts", "evals"}),
    "rlvr": frozenset({"model", "rollouts"}),
    "preference_sampling": frozenset({"rollouts", "made", "data.jsonl"}),
}
"""Method to the parts of its run that must not be empty, besides those that every run has."""

SHARDED: dict[str, tuple[str, ...]] = {"grpo": ("fsdp2", "zero3")}
"""Method to the strategies by which two processes share out what is trained. Stage 2 of ZeRO keeps
less in parts than stage 3, and saves and restores it by the same code."""

STRATEGIES: dict[str, dict[str, str]] = {
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    },
    "zero3": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    },
}
"""Strategy to what `align train --accelerate STRATEGY` sets for each rank."""

_BFLOAT16_ALONE = frozenset({"sft", "ppo", "dpo", "kto"})
"""Methods whose run of one process is in bfloat16. That of two is in the other type."""

_RECIPES = {"preference_sampling": "tiny/preferences"}


def command(method: str, folder: str, processes: int) -> list[str]:
    """What stands after `align`, each time the run is started, but for the number of processes."""
    recipe = _RECIPES.get(method, f"tiny/{method}")
    is_low = (method in _BFLOAT16_ALONE) == (processes == 1)
    dtype = f"model.dtype={'bfloat16' if is_low else 'float32'}"
    settings = [*_COMMON, *CASES[method], dtype, f"run.dir={folder}", f"run.name={method}"]
    return ["train", recipe, *settings]
