"""What every rollout engine is: prompts in, completions out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from alignment.types import Completion, Prompt, SamplingParams


class RolloutEngine(Protocol):
    """A way to sample completions from the current policy.

    The contract, held by the conformance suite for every engine:

    * completions come back in prompt-major order: all `params.n` of the first prompt, in order of
      `sample_index`, then those of the second; exactly one per request, or an error;
    * `token_ids` includes the stop token; `sampling_logprobs` are those of the distribution
      actually sampled, transforms included;
    * the model's dtype, train/eval mode and gradients are as they were before the call;
    * with counter-based randomness (`native`), a completion depends only on (weights, prompt,
      params.seed, params.step, prompt.index, sample index).
    """

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """Sample `params.n` completions for each prompt."""
        ...

    def weights_updated(self, policy_version: int) -> None:
        """The policy's weights changed: drop what was derived from the old ones.

        Every rank calls it, before the first `generate` and after each change.

        Args:
            policy_version: what completions are marked with: the updates behind the weights in
                training, the step in an evaluation.
        """
        ...
