"""Rollout, Evaluation -> Experience: scores become token rewards, rewards become advantages and returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import ppo
from engine.batch import Evaluation, Experience, Rollout
from engine.config import KLConfig, Recipe


@dataclass
class RunningMoments:
    """Mean and variance of all scores of one source so far (Chan et al. 1979, equations 1.5)."""

    count: float = 0.0
    mean: float = 0.0
    square_sum: float = 0.0

    def add(self, values: Tensor) -> None:
        values = values.double()
        count, mean = len(values), values.mean().item()
        total, shift = self.count + count, mean - self.mean
        self.square_sum += ((values - mean) ** 2).sum().item() + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    @property
    def std(self) -> float:
        return math.sqrt(self.square_sum / self.count) if self.count else 0.0


class ScoreCombiner:
    """Raw scores of several sources -> one score per response.

    Each source raw -> running normalisation (optional) -> weighted sum -> clip (optional) -> minus the missing-EOS
    penalty -> scale. The running statistics include the current iteration and see the rows of all ranks.
    """

    def __init__(self, recipe: Recipe):
        self.settings = recipe.scores
        self.weights = torch.tensor([reward.weight for reward in recipe.rewards])
        self.moments = [RunningMoments() for _ in recipe.rewards]

    def raw(self, evaluation: Evaluation) -> Tensor:
        """`[B]` the raw weighted sum: `score/mean`."""
        return evaluation.source_scores @ self.weights

    def combine(self, rollout: Rollout, evaluation: Evaluation) -> Tensor:
        """`[B]` the scores that PPO sees."""
        raw = evaluation.source_scores
        if self.settings.normalize:
            for moments, column in zip(self.moments, raw.unbind(1), strict=True):
                moments.add(column)
            mean = torch.tensor([m.mean for m in self.moments], dtype=torch.float64)
            std = torch.tensor([m.std for m in self.moments], dtype=torch.float64)
            # In float64 a constant source comes out 0, not its float32 rounding divided by 1e-8.
            raw = ((raw.double() - mean) / (std + 1e-8)).float()
        scores = raw @ self.weights
        if self.settings.clip is not None:
            scores = scores.clamp(-self.settings.clip, self.settings.clip)
        scores = scores - self.settings.missing_eos_penalty * (~rollout.ended).float()
        return scores * self.settings.scale


class KLController:
    """The weight of the KL: fixed, or steered to a target (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, settings: KLConfig):
        self.settings = settings
        self.kl_coef = settings.kl_coef

    def update(self, kl_per_sequence: float, sequences: int) -> None:
        """Adapt after an iteration of `sequences` responses whose mean sequence KL was `kl_per_sequence` nats."""
        if self.settings.target is not None:
            self.kl_coef = ppo.adaptive_kl_coef(
                self.kl_coef, kl_per_sequence, self.settings.target, sequences, self.settings.horizon
            )


def make_experience(
    rollout: Rollout, evaluation: Evaluation, recipe: Recipe, combiner: ScoreCombiner, kl_coef: float
) -> Experience:
    """Token rewards, GAE, and whitening over every row given: pass the rows of all ranks."""
    mask = rollout.response_mask
    scores = combiner.combine(rollout, evaluation)
    in_reward = kl_coef if recipe.kl.placement == "reward" else 0.0
    rewards = ppo.token_rewards(scores, evaluation.kl, in_reward, mask)
    advantages, returns = ppo.gae(rewards, evaluation.old_values, mask, recipe.ppo.gamma, recipe.ppo.gae_lambda)
    if recipe.ppo.whiten_advantages:
        advantages = ppo.masked_whiten(advantages, mask)
    return Experience(rollout, evaluation, scores, rewards, advantages, returns)
