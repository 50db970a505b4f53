"""PPO's critic: a model of its own, or a head on the policy's hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from alignment.config.methods.ppo import CriticConfig
from alignment.losses import clipped_value_loss
from alignment.modeling.heads import ScalarModel
from alignment.modeling.load import load_tokenizer, tokenizer_hash
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import TrainingContext
from alignment.trainers.moments import RunningMoments
from alignment.trainers.update import record
from alignment.types import Sample, UserInputError


class Critic:
    """Estimates the reward still to come, in the state that each token is chosen in.

    With `normalize` its head predicts that reward divided by `scale`, the running root mean square
    of the returns. Whenever the scale moves, the head's weight moves against it, so that no
    prediction changes (PopArt, van Hasselt et al. 2016; without the shift of the mean, which a head
    without a bias cannot undo).

    Attributes:
        scale: units of reward in one unit of the head.

    Raises:
        UserInputError: the critic's model reads other tokens than the policy's.
    """

    def __init__(self, context: TrainingContext, config: CriticConfig) -> None:
        if config.path is not None:
            _check_tokenizer(config.path, context)
        self._config = config
        self._policy = context.policy
        self._separate = context.critic.model if context.critic is not None else None
        self._optimizer = (context.critic or context.trained).optimizer
        self._budget = context.recipe.optim.micro_batch_tokens
        self._distributed = context.distributed
        self._returns = RunningMoments()
        self.scale = 1.0

    def values(self, samples: Sequence[Sample], parts: Sequence[slice]) -> list[Tensor]:
        """Its predictions in units of reward, `[completion length]` each, on the CPU.

        Minibatch by minibatch, as the update does: what is predicted again there is the same.
        """
        raw: list[Tensor] = []
        for part in parts:
            if self._separate is None:
                raw += self._policy.values(samples[part], self._budget)
            else:
                assert isinstance(self._separate, ScalarModel)
                raw += self._separate.values(samples[part], self._budget, reads="before")
        return [row.cpu() * self.scale for row in raw]

    def loss(
        self,
        predicted: Tensor,
        old_values: Tensor,
        returns: Tensor,
        mask: Tensor,
        metrics: MetricSums,
    ) -> Tensor:
        """Clipped squared error per token `[B, T]`, in units of the head.

        Args:
            predicted: by the head, in its own units.
            old_values, returns: in units of reward.
        """
        loss = clipped_value_loss(
            predicted,
            old_values / self.scale,
            returns / self.scale,
            mask,
            clip=self._config.clip,
        )
        record(metrics, loss.metrics, "critic/")
        return loss.per_token

    def rescale(self, returns: Tensor, metrics: MetricSums) -> None:
        """Take a step's returns into the scale, before the updates on them."""
        if not self._config.normalize:
            return
        self._returns.update(returns, self._distributed.sum)
        assert self._optimizer is not None
        head = "value_head.weight" if self._separate is None else "head.weight"
        self._optimizer.scale_(head, self.scale / self._returns.rms)
        self.scale = self._returns.rms
        metrics.add("critic/scale", self.scale)

    def measure(self, values: Tensor, returns: Tensor, metrics: MetricSums) -> None:
        """The share of the returns' variance that `values` foresaw: 1 is all, 0 none; below 0, a
        constant would have been nearer. Both `[number of tokens]`, of this rank."""
        error = (returns - values).double()
        returns = returns.double()
        sums = [x.sum() for x in (error, error.square(), returns, returns.square())]
        n, e, e2, r, r2 = self._distributed.sum([len(returns), *(float(x) for x in sums)])
        variance = r2 / n - (r / n) ** 2 if n else 0.0
        if variance > 0 and self._distributed.is_main:
            unexplained = e2 / n - (e / n) ** 2
            metrics.add("critic/explained_variance", 1.0 - unexplained / variance)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "returns": self._returns.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scale = state["scale"]
        self._returns.load_state_dict(state["returns"])


def _check_tokenizer(path: str, context: TrainingContext) -> None:
    trusted = context.recipe.model.trust_remote_code
    own = load_tokenizer(path, trust_remote_code=trusted)
    if tokenizer_hash(own) != tokenizer_hash(context.tokenizer):
        raise UserInputError(
            f"algorithm.critic.path: {path} has another tokenizer than the policy, whose tokens it "
            "is to judge; give a critic or reward model of the policy's own base, or remove path"
        )
