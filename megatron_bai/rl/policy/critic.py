"""The critic of PPO: a second model that estimates each state's value, for an advantage of each token."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_bai import config
from megatron_bai.distributed.backend import Device
from megatron_bai.errors import UserError
from megatron_bai.model import build, megatron_checkpoint
from megatron_bai.model.build import MegatronModel
from megatron_bai.model.param_shards import named_weights
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.advantages import explained_variance, gae, place_rewards, whiten
from megatron_bai.rl.batches.stages import ScoredBatch, TrainingBatch, make_training_batch
from megatron_bai.rl.batches.token_batch import TokenBatch
from megatron_bai.rl.objectives import aggregate
from megatron_bai.rl.objectives.ppo import critic_loss
from megatron_bai.rl.policy.forward_backward import ForwardBackward
from megatron_bai.rl.policy.lr_schedule import set_learning_rate


class Critic:
    """A model of the actor's architecture and layout with a value for an output, and its own optimizer.

    Its routers choose for themselves, whatever is replayed in the actor: its values are no policy's, and no inference
    engine computes them a second time.

    Attributes:
        model: its output at t is the value of the state before token t + 1.
    """

    def __init__(self, actor: MegatronModel, settings: config.Config, device: Device):
        """Build the model with weights of `objective.critic_checkpoint`, or the actor's current ones. Collective.

        Args:
            actor: whose architecture and layout it has.
            settings: of the run, with `objective=ppo`.
            device: of the model.

        Raises:
            UserError: the checkpoint cannot be used.
        """
        from megatron.core import parallel_state

        assert isinstance(settings.objective, config.Ppo)
        self.settings = settings.objective
        rate = self.settings.critic_learning_rate
        self._trainer = settings.trainer if rate is None else _with_learning_rate(settings.trainer, rate)
        self._updates = self._trainer.steps * self._trainer.mini_batches
        self.model = build.build_critic(replace(settings, trainer=self._trainer, model=actor.architecture), device)
        if self.settings.critic_checkpoint:
            _load(self.model, self.settings.critic_checkpoint)
        else:
            copy_backbone(actor, self.model)
        self.forward_backward = ForwardBackward(self.model, device.device)
        self._last_stage = parallel_state.is_pipeline_last_stage()
        self._data_group, self._device = parallel_state.get_data_parallel_group(), device.device

    @torch.no_grad()
    def estimate_advantages(
        self, scored: ScoredBatch, micro_batches: Sequence[TokenBatch], stats: Stats
    ) -> TrainingBatch:
        """Make the training stage, with values, and returns and advantages of its rewards. Collective.

        The reward is that of the response's last token (arXiv 1506.02438 with r = 0 before it), but what of it an
        environment gave for an earlier turn, which is that of the turn's last token. Only ranks of the last stage,
        which alone compute losses, have other values, returns and advantages than 0; they add `value_mean`,
        `return_mean` and `explained_variance`, of tokens in the loss.

        Args:
            scored: of this rank.
            micro_batches: its tokens in micro-batches, as many on every data-parallel rank.
            stats: gets the metrics.
        """
        outputs = self.forward_backward.forward(
            list(micro_batches), lambda output, micro_batch: micro_batch.unpack(output[..., 0])
        )
        if not self._last_stage:
            return make_training_batch(scored)
        values, mask, loss_mask = torch.cat(outputs).to(scored.infer_logprobs), scored.usable_mask, scored.loss_mask
        rewards = place_rewards(scored.rewards, mask, scored.turn_rewards)
        advantages, returns = gae(rewards, values, mask, self.settings.gamma, self.settings.lam)
        if self.settings.whiten:
            advantages = whiten(advantages, loss_mask, self._sum_over_ranks)
        stats.mean("value_mean", values[loss_mask])
        stats.mean("return_mean", returns[loss_mask])
        explained = explained_variance(values[loss_mask], returns[loss_mask], self._sum_over_ranks)
        if explained is not None:
            stats.ratio("explained_variance", explained, 1)
        return make_training_batch(scored, advantages, values, returns)

    def update(self, mini_batches: list[list[TrainingBatch]], first: int) -> tuple[Stats, list[float], float]:
        """Make one optimizer step on each mini-batch, with `ppo.critic_loss` as a mean over its tokens. Collective.

        Args:
            mini_batches: micro-batches of each mini-batch.
            first: index of the first of these updates in the run, for the learning rate's schedule.

        Returns:
            Statistics of the loss, on ranks of the last stage; norms of the gradients before clipping; the last
            learning rate.

        Raises:
            UserError: a gradient is not finite.
        """
        stats, norms, rate = Stats(), [], 0.0

        def loss(output: torch.Tensor, micro_batch: TrainingBatch) -> torch.Tensor:
            losses, loss_stats = critic_loss(
                micro_batch.unpack(output[..., 0]),
                micro_batch.values,
                micro_batch.returns,
                micro_batch.loss_mask,
                self.settings.value_clip,
            )
            stats.add(loss_stats)
            return losses.sum()

        for update, micro_batches in enumerate(mini_batches, start=first):
            rate = set_learning_rate(self.model.optimizer, self._trainer, update, self._updates)
            norms.append(
                self.forward_backward.update(
                    micro_batches, loss, aggregate.loss_denominator(micro_batches, "token_mean")
                )
            )
        return stats, norms, rate

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        values = values.to(self._device)
        dist.all_reduce(values, group=self._data_group)
        return values.cpu()


def _with_learning_rate(trainer: config.Trainer, rate: float) -> config.Trainer:
    return replace(trainer, learning_rate=rate, min_learning_rate=min(rate, trainer.min_learning_rate))


@torch.no_grad()
def copy_backbone(actor: MegatronModel, critic: MegatronModel) -> None:
    """Copy the actor's weights but for the head, which becomes 0: the first advantages are the rewards.

    Args:
        actor: this rank's part of the policy.
        critic: filled in place, with the master weights of its optimizer; its architecture and layout are the actor's.
    """
    for actor_module, critic_module in zip(actor.modules, critic.modules, strict=True):
        remaining = dict(named_weights(actor_module))
        for name, tensor in named_weights(critic_module):
            if name.startswith("output_layer."):
                tensor.zero_()
            else:
                tensor.copy_(remaining.pop(name))
        assert all(name.startswith("output_layer.") for name in remaining), f"the critic lacks {sorted(remaining)}"
    megatron_checkpoint.reload_master_weights(critic)


def _load(critic: MegatronModel, path: str) -> None:
    try:
        megatron_checkpoint.load(critic, path, critic=True)
    except UserError as error:
        raise UserError(f"objective.critic_checkpoint: {error}") from None
