"""Experience -> UpdateStats: PPO epochs over minibatches, the joint loss, the optimizer step, the KL stop."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import dist, ppo
from engine.batch import Experience, UpdateStats
from engine.config import Recipe
from engine.hybrid_engine import HybridEngine
from engine.minibatches import deal, minibatch_rows, padded_tokens
from engine.roles import ACTOR, RolesOutput


@dataclass(frozen=True)
class _Update:
    """What all minibatches of an iteration have in common; the arguments of `update`."""

    engine: HybridEngine
    experience: Experience
    recipe: Recipe
    kl_coef: float
    frozen: frozenset[str]

    def rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """Some rows of a tensor of the experience, where the engine computes."""
        return x[rows].to(self.engine.device)


def update(
    engine: HybridEngine,
    experience: Experience,
    recipe: Recipe,
    iteration: int,
    kl_coef: float,
    frozen: frozenset[str],
    stats: UpdateStats | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> UpdateStats:
    """One iteration's update of all roles. Every rank passes the same experience: the rows of all ranks.

    Args:
        kl_coef: weight of the KL term in the loss; used with kl.placement loss alone.
        frozen: roles that stand still in this iteration (critic warm-up freezes the actor).
        stats: of the minibatches that were learned from before the run was stopped; they grow in place.
        after_step: called after every optimizer step, when `stats` and weights belong together.

    Raises:
        FloatingPointError: the loss or a gradient is not finite; raised on every rank before the optimizer steps,
            and no gradient of the minibatch is left.
    """
    common = _Update(engine, experience, recipe, kl_coef, frozen)
    stats = UpdateStats() if stats is None else stats
    if not stats.steps:
        stats.sampler_kl = _sampler_kl(experience)
    minibatches = [
        rows
        for epoch in range(recipe.ppo.epochs)
        for rows in minibatch_rows(
            recipe.seed, iteration, epoch, len(experience.rollout), recipe.ppo.minibatch_sequences
        )
    ]
    for index, rows in enumerate(minibatches[stats.steps :], start=stats.steps):
        minibatch = _accumulate(common, rows, stats)
        where = f"iteration {iteration + 1}, minibatch {index + 1}"
        deviation = minibatch.pop("policy/ratio_deviation_max")  # a maximum: not for the sums
        if not all(map(math.isfinite, minibatch.values())):
            engine.discard()
            raise FloatingPointError(
                f"{where}: the loss or its statistics are not finite, and nothing was stepped ({dict(minibatch)}); a "
                "lower learning rate, score clipping or float32 usually help"
            )
        approx_kl = minibatch["policy/approx_kl_sum"] / max(1, minibatch["policy/tokens"])
        if index == 0:
            stats.first_ratio_deviation = deviation
            if recipe.ppo.old_logprobs != "recompute":  # the first that these weights say of the sampler's tokens
                stats.sampler_kl = approx_kl
        stats.sums.update(minibatch)
        if recipe.ppo.target_kl is not None and approx_kl > recipe.ppo.target_kl:
            engine.discard()
            stats.skipped = len(minibatches) - index
            break
        stats.learning_rates = engine.learning_rates(frozen)
        try:
            norms = engine.step(frozen)
        except FloatingPointError as error:
            raise FloatingPointError(f"{where}: {error}") from error
        for role, norm in norms.items():
            stats.grad_norms.setdefault(role, []).append(norm)
        stats.overflows += len(norms) < len(engine.role_steps)
        stats.steps += 1
        after_step()
    return stats


def _sampler_kl(experience: Experience) -> float:
    """k3 of the sampler's log-probs against the old ones; 0 where the old ones ARE the sampler's."""
    rollout, old_logprobs = experience.rollout, experience.evaluation.old_logprobs
    k3 = ppo.kl_estimate(rollout.sampler_logprobs, old_logprobs, "k3")
    return ppo.masked_mean(k3, rollout.response_mask).item()


def _accumulate(common: _Update, rows: Tensor, stats: UpdateStats) -> Counter:
    """Forward and backward of one minibatch; returns its sums over all ranks."""
    rollout, world_size = common.experience.rollout, dist.world_size()
    # DeepSpeed averages gradients over ranks; the loss divides by the tokens of ALL ranks. Hence / world size.
    tokens = int(rollout.response_lengths[rows].sum())
    denominator = tokens / world_size
    lengths = rollout.sequence_lengths
    plan = deal(rows, lengths, common.recipe.ppo, world_size)
    stats.real_tokens += int(lengths[rows].sum())
    stats.padded_tokens += sum(padded_tokens(part, lengths, common.recipe.ppo.packing) for own in plan for part in own)
    parts, found = plan[dist.rank()], []
    for index, part in enumerate(parts):
        policy, value, sums = _losses(common, part, denominator)
        common.engine.backward(policy, value, last=index == len(parts) - 1)
        found.append(sums)
    return _over_ranks(found)


def _losses(common: _Update, rows: Tensor, denominator: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The actor's and the critic's loss on one micro-batch, and their statistics."""
    experience, recipe = common.experience, common.recipe
    output = common.engine.forward(
        experience.rollout,
        rows,
        entropy=True,
        entropy_grad=recipe.ppo.entropy_coef > 0,
        values=True,
        full_kl=recipe.kl.placement == "loss" and recipe.kl.estimator == "full",
    )
    policy, found = _policy_loss(common, rows, output, denominator)
    value, value_stats = ppo.value_loss(
        output.values,
        common.rows(experience.evaluation.old_values, rows),
        common.rows(experience.returns, rows),
        common.rows(experience.rollout.response_mask, rows),
        recipe.ppo.value_clip,
        denominator,
    )
    found |= {f"value/{name}": x for name, x in value_stats.items()}
    # A frozen role still goes through forward and backward: under ZeRO-3 every parameter needs its gradient, even 0.
    policy = policy * (0.0 if ACTOR in common.frozen else 1.0)
    value = recipe.ppo.value_coef * value
    found["joint_loss"] = policy.detach() + value.detach()
    return policy, value, found


def _policy_loss(
    common: _Update, rows: Tensor, output: RolesOutput, denominator: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The actor's loss with its optional terms, and their statistics."""
    settings, estimator = common.recipe.ppo, common.recipe.kl.estimator
    rollout, evaluation = common.experience.rollout, common.experience.evaluation
    mask, logprobs = common.rows(rollout.response_mask, rows), output.logprobs
    sampled_at = old_logprobs = common.rows(evaluation.old_logprobs, rows)
    if settings.old_logprobs == "on_policy":
        old_logprobs = logprobs.detach()  # nothing has moved since the sampling: ratio 1, with its gradient
    weights, found = None, {}
    if settings.importance_cap is not None:
        sampler_logprobs = common.rows(rollout.sampler_logprobs, rows)
        weights = ppo.importance_weights(old_logprobs, sampler_logprobs, settings.importance_cap)
        found["importance/weight_sum"] = ppo.masked_sum(weights, mask)
        found["importance/capped"] = ((weights == settings.importance_cap) & mask).sum()
    advantages = common.rows(common.experience.advantages, rows)
    loss, stats = ppo.policy_loss(
        logprobs, old_logprobs, advantages, mask, settings.clip_ratio, denominator, settings.dual_clip, weights
    )
    stats |= ppo.ratio_stats(logprobs, sampled_at, mask)
    found |= {f"policy/{name}": x for name, x in stats.items()}
    found["entropy_sum"] = ppo.masked_sum(output.entropy.detach(), mask)
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * ppo.masked_mean(output.entropy, mask, denominator)
    if common.recipe.kl.placement == "loss":
        ref_logprobs = common.rows(evaluation.ref_logprobs, rows)
        kl, stats = ppo.kl_loss(logprobs, old_logprobs, ref_logprobs, mask, estimator, denominator, output.full_kl)
        found["kl_loss/loss_sum"] = stats["loss_sum"]
        loss = loss + common.kl_coef * kl
    return loss, found


def _over_ranks(found: list[dict[str, Tensor]]) -> Counter:
    """Statistics of this rank's micro-batches -> over all ranks: sums, and the largest of those named ..._max.

    One transfer from the device and one exchange: each rank fills its own row of a table of zeros, and adds.
    """
    names = list(found[0])
    largest = torch.tensor([name.endswith("_max") for name in names])

    def over_rows(table: Tensor) -> Tensor:
        return torch.where(largest, table.amax(0), table.sum(0))

    table = torch.zeros(dist.world_size(), len(names), dtype=torch.float64)
    mine = torch.stack([torch.stack([sums[name].double() for name in names]) for sums in found])
    table[dist.rank()] = over_rows(mine.cpu())
    return Counter(dict(zip(names, over_rows(dist.all_reduce(table)).tolist(), strict=True)))
