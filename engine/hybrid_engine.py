"""HybridEngine: the roles on one ZeRO engine, alternating between generation, inference and training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine import dist, zero
from engine.batch import Rollout, length_mask
from engine.config import OptimizerSettings, Recipe, steps_per_iteration
from engine.ds_config import read_ds_config, resolve_ds_config
from engine.replica import Replica
from engine.roles import ACTOR, CRITIC, Layout, PolicyOutput, RolesModel

logger = dist.get_logger(__name__)


@dataclass(frozen=True)
class Schedule:
    """A role's learning rate as a pure function of its own optimizer steps.

    Args:
        settings: peak, shape and warm-up.
        total_steps: optimizer steps of the whole run in which the role learns.
    """

    settings: OptimizerSettings
    total_steps: int

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0; the first warm-up step is not 0."""
        settings = self.settings
        if step < settings.warmup_steps:
            return settings.learning_rate * (step + 1) / settings.warmup_steps
        span = max(1, self.total_steps - settings.warmup_steps)
        progress = min(1.0, (step - settings.warmup_steps) / span)
        shape = {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + torch.cos(torch.tensor(torch.pi * progress)).item()),
        }
        return settings.learning_rate * shape[settings.schedule]


class HybridEngine:
    """Actor, critic and reference on one shared base in one DeepSpeed engine.

    Args:
        roles: the module with its adapters, on the CPU.
    """

    def __init__(self, roles: RolesModel, recipe: Recipe):
        self.roles = roles
        settings = {ACTOR: recipe.actor.optimizer, CRITIC: recipe.critic.optimizer}
        groups = [
            zero.ParameterGroup(role, list(roles.role_parameters(role).values()), settings[role]) for role in settings
        ]
        if recipe.zero.activation_checkpointing:
            roles.checkpoint_activations()
        steps = steps_per_iteration(recipe)
        learning = {ACTOR: recipe.iterations - recipe.critic.warmup_iterations, CRITIC: recipe.iterations}
        self.schedules = {role: Schedule(settings[role], steps * learning[role]) for role in settings}
        self.role_steps = dict.fromkeys(settings, 0)
        self.ds_config = resolve_ds_config(
            read_ds_config(recipe.zero.ds_config),
            dtype=recipe.model.dtype,
            world_size=dist.world_size(),
            micro_batch=recipe.ppo.micro_batch_sequences,
            trainable_parameters=sum(p.numel() for group in groups for p in group.parameters),
        )
        self.engine = zero.TrainedEngine(roles, groups, self.ds_config)
        self.replica = Replica(roles)

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @contextmanager
    def generation(self) -> Iterator[PreTrainedModel]:
        """Inside, the actor as a plain module on every rank: no hook, no collective. Its weights go at the end."""
        module = self.replica.fill()
        try:
            with torch.inference_mode():
                yield module
        finally:
            self.replica.free()

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Inside, nothing keeps a graph."""
        with torch.no_grad():
            yield

    def forward(self, rollout: Rollout, rows: Tensor, **wanted: bool) -> PolicyOutput:
        """The roles' outputs at the response tokens of some rows, `[len(rows), R]` over the rollout's full width.

        Every rank must call it equally often (ZeRO-3 fetches weights in it); a rank without rows passes none and
        computes on a made-up row that it then drops, with the graph still attached.

        Args:
            rows: int64 indices; empty is fine.
            wanted: `values`, `ref_logprobs`, `full_kl`, `entropy_grad` as for `RolesModel.forward`.
        """
        output = self.engine(self._layout(rollout, rows), **wanted)
        width = rollout.response_ids.shape[1]

        def fit(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            return torch.nn.functional.pad(x[: len(rows)], (0, width - x.shape[1]))

        return PolicyOutput(**{name: fit(value) for name, value in vars(output).items()})

    def _layout(self, rollout: Rollout, rows: Tensor) -> Layout:
        """Rows trimmed to their own longest prompt and response."""
        if len(rows) == 0:
            ids = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
            return Layout(ids, torch.ones_like(ids, dtype=torch.bool), response_width=1)
        prompt_lengths, response_lengths = rollout.prompt_lengths[rows], rollout.response_lengths[rows]
        prompts, responses = int(prompt_lengths.max()), int(response_lengths.max())
        ids = [rollout.prompt_ids[rows][:, -prompts:], rollout.response_ids[rows][:, :responses]]
        masks = [length_mask(prompt_lengths, prompts).flip(1), length_mask(response_lengths, responses)]
        sequences, mask = torch.cat(ids, 1).to(self.device), torch.cat(masks, 1).to(self.device)
        return Layout(sequences, mask, response_width=responses)

    def backward(self, loss: Tensor, last: bool) -> None:
        """One joint backward of a micro-batch; `last` marks the minibatch's last one."""
        self.engine.backward(loss, last)

    def step(self, frozen: frozenset[str] = frozenset()) -> dict[str, float]:
        """The optimizer step of a minibatch; returns each role's gradient norm before its clipping.

        Args:
            frozen: roles that stand still: learning rate 0, and their schedule waits.
        """
        norms = self.engine.step(self.learning_rates(frozen), frozen)
        for role in self.role_steps:
            self.role_steps[role] += role not in frozen
        return norms

    def discard(self) -> None:
        """Drop the minibatch's gradients; nothing moves."""
        self.engine.discard()

    def learning_rates(self, frozen: frozenset[str] = frozenset()) -> dict[str, float]:
        """Each role's rate at the next optimizer step."""
        return {
            role: 0.0 if role in frozen else self.schedules[role].rate(step) for role, step in self.role_steps.items()
        }

    def base_hash(self) -> str:
        """SHA-256 of this rank's shards of the frozen base."""
        return zero.shards_hash(self.roles.frozen_parameters().items())

    def close(self) -> None:
        self.engine.close()
