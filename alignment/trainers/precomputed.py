"""Reference log-probabilities scored once, before training, and kept on disk.

The reference is the policy as handed over, so it is the policy itself that is scored, and nothing
but its numbers stays in memory. They depend on the model, the tokens and how those were laid out,
which is what the file's name is made from: another run on the same ones reads the file.
"""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from alignment.downloads import cache_directory
from alignment.modeling.finite import require_finite
from alignment.modeling.hashes import settings_hash
from alignment.modeling.memory import memory_for
from alignment.modeling.policy import PolicyWithReference
from alignment.modeling.shards import lockstep, rows_of
from alignment.runs.files import readable_errors, write_atomic
from alignment.trainers.context import TrainingContext
from alignment.types import Sample

_FORMAT = 1  # raised when the numbers or the file change


def precomputed_logprobs(context: TrainingContext, samples: Sequence[Sample]) -> list[Tensor]:
    """The policy's log-probabilities of interleaved pairs, one float32 tensor a sample, on the CPU.

    From the toolkit's cache directory where it has them; else they are scored, each rank its part
    of the micro-batches, and put there. A damaged file is scored anew.

    Raises:
        AlignmentError: the cache cannot be written.
    """
    path = cache_file(context, samples)
    lengths = [len(sample.completion_ids) for sample in samples]
    distributed = context.distributed
    found, fault = _read(path, sum(lengths)) if distributed.is_main else (None, "")
    # Rank 0's disk need not be the others'.
    flat, fault = distributed.broadcast((found, fault))
    if flat is not None:
        said = f"read from {path}"
    else:
        began = time.monotonic()
        flat = torch.cat(_scored(context, samples))
        if distributed.is_main:
            _write(path, flat)
        said = f"scored in {time.monotonic() - began:.1f} s and kept in {path}"
    if fault:
        context.events.write("warning", f"{path} is damaged ({fault}) and was made anew")
    context.events.write("reference", f"log-probabilities of {len(samples)} completions: {said}")
    return list(torch.split(flat, lengths))


def cache_file(context: TrainingContext, samples: Sequence[Sample]) -> Path:
    """Where the numbers of these samples are kept.

    The name is a hash of the run's fingerprint (weights, tokenizer, template, data), of what else
    the model computes with (`settings_hash`), of what the numbers' rounding depends on (dtype,
    attention, tokens of a micro-batch, kind of device), and of the tokens themselves, which the
    limits on their number have shaped.
    """
    recipe = context.recipe
    digest = hashlib.sha256()
    settings = {
        "format": _FORMAT,
        "fingerprint": context.fingerprint,
        "model": settings_hash(context.policy.model),
        "device": context.distributed.device.type,
        "dtype": recipe.model.dtype,
        "attention": recipe.model.attention,
        "micro_batch_tokens": recipe.optim.micro_batch_tokens,
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for sample in samples:
        for ids in (sample.prompt_ids, sample.completion_ids):
            digest.update(array("q", [len(ids), *ids]).tobytes())
    return cache_directory() / "reference_logprobs" / f"{digest.hexdigest()}.safetensors"


def _scored(context: TrainingContext, samples: Sequence[Sample]) -> list[Tensor]:
    """Scored now, in the order of the samples; the same for any number of ranks."""
    policy, distributed = context.policy, context.distributed
    plan = policy.plan(samples, context.recipe.optim.micro_batch_tokens, together=2)
    mine = logprobs_of(policy, samples, distributed.deal(plan))
    everyone = dict(distributed.gather([(i, row.float().cpu()) for i, row in mine]))
    rows = [everyone[i] for i in range(len(samples))]
    require_finite(rows, policy.model, "a log-probability of the reference")
    return rows


@torch.no_grad()
def logprobs_of(
    policy: PolicyWithReference, samples: Sequence[Sample], batches: Sequence[list[int]]
) -> Iterator[tuple[int, Tensor]]:
    """(index, `[completion length]` log-probabilities) of the samples of these micro-batches."""
    for batch in lockstep(policy.shards, batches):
        rows = rows_of(samples, batch)
        with memory_for(rows):
            scores = policy(rows)
        for row, i in enumerate(batch):
            yield i, scores.logprobs[row, : len(samples[i].completion_ids)]


def _read(path: Path, n_tokens: int) -> tuple[Tensor | None, str]:
    """(the numbers or None, why a file that is there cannot be used)."""
    if not path.is_file():
        return None, ""
    try:
        with safe_open(path, framework="pt") as file:
            flat: Tensor = file.get_tensor("logprobs")
            stated = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        return None, str(error)
    if flat.shape != (n_tokens,) or flat.dtype != torch.float32 or _sum_of(flat) != stated:
        return None, "its numbers are not those that were written"
    return flat, ""


def _write(path: Path, flat: Tensor) -> None:
    with readable_errors("create the folder", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save({"logprobs": flat}, metadata={"sha256": _sum_of(flat)}))


def _sum_of(flat: Tensor) -> str:
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()
