"""Rollouts from a vLLM server: this process trains, that one samples.

The server is given the policy's weights by way of a folder that both see, in Hugging Face format,
after each change; so it needs no process group with the trainers, and they need no vLLM. What it
holds is marked with a version, which is read back after each rollout: completions of a server that
was restarted, or that another run uses as well, are never taken for the policy's.

vLLM draws the tokens, each completion from a seed of its own: what is drawn depends on (run seed,
step, prompt index, sample index), as far as the server's arithmetic does not depend on what else
it computes at the time.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError
from torch import nn

from alignment.activity import ACTIVITY, doing
from alignment.config.schema import ServerConfig
from alignment.distributed import Distributed
from alignment.modeling.export import save_weights
from alignment.modeling.finite import explained
from alignment.rollout.live import LiveModel
from alignment.rollout.rows import Row
from alignment.rollout.server import Sampled, ServerError, VLLMServer
from alignment.rollout.stopping import StopRule
from alignment.types import (
    AlignmentError,
    Completion,
    Prompt,
    SamplingParams,
    StopReason,
    UserInputError,
)

logger = logging.getLogger(__name__)

ADDRESS_VARIABLE = "ALIGN_ROLLOUT_SERVER"
_SEEDS = 2**63  # vLLM takes those of a signed 64-bit number


class VLLMEngine:
    """Samples completions on a vLLM server; see `RolloutEngine` for the contract.

    `weights_updated` comes before the first `generate`, on every rank.

    Args:
        model: a transformers causal LM, or a peft model around one.
        tokenizer: decodes completions.
        server: where it is, and how the weights get there.
        distributed: rank 0 sends the weights; each rank samples its own completions.
        whole_model: the policy with all its weights on rank 0, called on every rank; by default
            `model` as it is.
        max_rows: requests that a rank has running at the same time.
        stop_token_ids: ids that end a completion; None: those of the model and the tokenizer.

    Raises:
        UserInputError: there is no such server, or it was not started as it must be.
    """

    counter_based = False

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        server: ServerConfig,
        distributed: Distributed,
        whole_model: Callable[[], nn.Module | None] | None = None,
        max_rows: int = 64,
        stop_token_ids: Sequence[int] | None = None,
    ) -> None:
        self._live = LiveModel(model, tokenizer, stop_token_ids)
        self._server = VLLMServer(
            _address(server), timeout_seconds=server.timeout_seconds, in_flight=max_rows
        )
        own = self._live.context
        if own is not None and self._server.context < own:
            logger.warning(
                "the server takes %d tokens for prompt and completion together, the model %d: "
                "completions may be cut off there (--max-model-len)",
                self._server.context,
                own,
            )
        self._live.context = min(self._server.context, own or self._server.context)
        self._distributed = distributed
        self._whole_model = whole_model or (lambda: model)
        self._max_rows = max_rows
        self._folders = _WeightFolders(server.weights_dir)
        self._version: str | None = None

    def weights_updated(self, policy_version: int) -> None:
        """Give the server the policy's weights as they are now. Every rank calls this.

        Raises:
            ServerError: it does not take them.
        """
        self._live.policy_version = policy_version
        with doing("sampling", "sending the weights to the server"):
            version = uuid.uuid4().hex
            whole = self._whole_model()
            if self._distributed.is_main:
                assert whole is not None
                folder = self._folders.filled(whole)
                ACTIVITY.move()
                self._server.load_weights(folder, version)
                ACTIVITY.move()
            self._version = self._distributed.broadcast(version)

    @doing("sampling")
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """Sample `params.n` completions for each prompt, in prompt-major order.

        Raises:
            UserInputError: parameters that define no distribution, or a prompt that is empty or
                fills the context.
            NonFiniteError: the model's logits are not finite.
            ServerError: no answer, or completions of other weights.
        """
        live = self._live
        rows = live.rows(prompts, params)
        if not rows:
            return []
        if self._version is None:
            raise AlignmentError("the server was never given the policy's weights")
        rule = live.stop_rule(params)
        threads = ThreadPoolExecutor(self._max_rows)
        with explained(live.model, f"step {params.step}, sampling"):
            futures = [threads.submit(self._sample, row, params) for row in rows]
            try:
                for row, future in zip(rows, futures, strict=True):
                    _take_in(row, future.result(), params, rule)
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        threads.shutdown()
        found = self._server.weight_version()
        if found != self._version:
            raise ServerError(
                f"the server holds other weights than it was given (version {found!r}, not "
                f"{self._version!r}): it was restarted, or another run uses it, too. Nothing was "
                "learned from its completions; a run needs a server of its own"
            )
        return live.completions(rows)

    def _sample(self, row: Row, params: SamplingParams) -> Sampled:
        sampled = self._server.complete(
            {
                "prompt": list(row.prompt_ids),
                "max_tokens": row.limit,
                "temperature": params.temperature,
                "top_k": params.top_k,
                "top_p": params.top_p,
                "min_p": params.min_p,
                # Left out, they would be those of the served model's generation_config.json.
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "seed": row.key % _SEEDS,
                # The end tokens are the run's, not those that the server read from the model.
                "ignore_eos": True,
                "stop_token_ids": sorted(self._live.stop_ids),
                "stop": list(params.stop),
                "skip_special_tokens": False,
            }
        )
        ACTIVITY.move()
        return sampled


def _address(server: ServerConfig) -> str:
    address = server.url or os.environ.get(ADDRESS_VARIABLE, "")
    if not address:
        raise UserInputError(
            f"rollout.server.url is not given, and the variable {ADDRESS_VARIABLE} is not set; "
            "give one of them the server's address, such as http://localhost:8000"
        )
    return address


def _take_in(row: Row, sampled: Sampled, params: SamplingParams, rule: StopRule) -> None:
    greedy = params.temperature == 0
    for token, logprob in zip(sampled.token_ids, sampled.logprobs, strict=True):
        if row.stop_reason is not None:
            break  # what follows a stop string was sampled in vain
        row.append(token, 0.0 if greedy and math.isfinite(logprob) else logprob, rule)
    if row.stop_reason is None:
        if not sampled.ended:
            raise ServerError(
                f"the server ended a completion after {len(sampled.token_ids)} tokens, which had "
                f"room for {row.limit}"
            )
        row.stop_reason = StopReason.STOP


class _WeightFolders:
    """A new folder for each version of the weights; the one before is removed.

    What a process of this machine that was killed has left is removed with the first.

    Args:
        parent: where the server sees them, too; None: the machine's folder for temporary files.
    """

    def __init__(self, parent: str | None) -> None:
        self._parent = Path(parent or tempfile.gettempdir())
        self._prefix = f"policy-weights-{socket.gethostname()}-"
        self._last: tempfile.TemporaryDirectory[str] | None = None

    def filled(self, model: nn.Module) -> Path:
        """The next folder, with the weights of a model.

        Raises:
            AlignmentError: they cannot be written.
        """
        try:
            folder = self._next()
            save_weights(model, folder)
        except (OSError, SafetensorError) as error:
            raise AlignmentError(
                f"rollout.server.weights_dir: the weights cannot be written to {self._parent}: "
                f"{error}"
            ) from error
        return folder

    def _next(self) -> Path:
        self._parent.mkdir(parents=True, exist_ok=True)
        if self._last is None:
            self._remove_of_the_dead()
        else:
            self._last.cleanup()
        self._last = tempfile.TemporaryDirectory(
            dir=self._parent, prefix=f"{self._prefix}{os.getpid()}-", ignore_cleanup_errors=True
        )
        folder = Path(self._last.name)
        folder.chmod(0o755)  # the server may run under another user
        return folder

    def _remove_of_the_dead(self) -> None:
        for folder in self._parent.glob(f"{self._prefix}*"):
            pid = folder.name.removeprefix(self._prefix).partition("-")[0]
            if pid.isdigit() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)
