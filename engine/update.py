"""Experience -> UpdateStats: PPO epochs over minibatches, the joint loss, the optimizer step, the KL stop."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

from engine import dist, ppo
from engine.batch import Experience, UpdateStats
from engine.config import Recipe
from engine.hybrid_engine import HybridEngine
from engine.minibatches import micro_batches, minibatch_rows, rows_of_rank
from engine.roles import ACTOR


def update(
    engine: HybridEngine, experience: Experience, recipe: Recipe, iteration: int, kl_coef: float, frozen: frozenset[str]
) -> UpdateStats:
    """One iteration's update of all roles. Every rank passes the same experience: the rows of all ranks.

    Args:
        kl_coef: weight of the KL term in the loss; used with kl.placement loss alone.
        frozen: roles that stand still in this iteration (critic warm-up freezes the actor).

    Raises:
        FloatingPointError: the loss or a gradient is not finite; raised on every rank before the optimizer steps.
    """
    stats = UpdateStats()
    minibatches = [
        rows
        for epoch in range(recipe.ppo.epochs)
        for rows in minibatch_rows(
            recipe.seed, iteration, epoch, len(experience.rollout), recipe.ppo.minibatch_sequences
        )
    ]
    for index, rows in enumerate(minibatches):
        minibatch = _accumulate(engine, experience, rows, recipe, kl_coef, frozen)
        where = f"iteration {iteration + 1}, minibatch {index + 1}"
        deviation = minibatch.pop("policy/ratio_deviation_max")  # a maximum: not for the sums
        if not all(map(math.isfinite, minibatch.values())):
            raise FloatingPointError(
                f"{where}: the loss or its statistics are not finite, and nothing was stepped ({dict(minibatch)}); a "
                "lower learning rate, score clipping or float32 usually help"
            )
        if index == 0:
            stats.first_ratio_deviation = deviation
        approx_kl = minibatch["policy/approx_kl_sum"] / max(1, minibatch["policy/tokens"])
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
    return stats


def _accumulate(
    engine: HybridEngine, experience: Experience, rows: Tensor, recipe: Recipe, kl_coef: float, frozen: frozenset[str]
) -> Counter:
    """Forward and backward of one minibatch; returns its sums over all ranks."""
    # DeepSpeed averages gradients over ranks; the loss divides by the tokens of ALL ranks. Hence / world size.
    tokens = int(experience.rollout.response_lengths[rows].sum())
    denominator = tokens / dist.world_size()
    mine = rows_of_rank(rows, dist.rank(), dist.world_size())
    parts = micro_batches(mine, recipe.ppo.micro_batch_sequences)
    sums: Counter = Counter()
    largest_deviation = 0.0
    for index, part in enumerate(parts):
        policy, value, found = _losses(engine, experience, part, recipe, kl_coef, frozen, denominator)
        engine.backward(policy, value, last=index == len(parts) - 1)
        largest_deviation = max(largest_deviation, found.pop("policy/ratio_deviation_max").item())
        sums.update({name: value.item() for name, value in found.items()})
    return _over_ranks(sums, largest_deviation)


def _losses(
    engine: HybridEngine,
    experience: Experience,
    rows: Tensor,
    recipe: Recipe,
    kl_coef: float,
    frozen: frozenset[str],
    denominator: float,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The actor's and the critic's loss on one micro-batch, and their statistics."""
    settings, device = recipe.ppo, engine.device
    kl_in_loss = recipe.kl.placement == "loss"
    full = kl_in_loss and recipe.kl.estimator == "full"
    output = engine.forward(experience.rollout, rows, values=True, full_kl=full, entropy_grad=settings.entropy_coef > 0)

    def of(x: Tensor) -> Tensor:
        return x[rows].to(device)

    mask = of(experience.rollout.response_mask)
    old_logprobs = of(experience.evaluation.old_logprobs)
    policy, policy_stats = ppo.policy_loss(
        output.logprobs,
        old_logprobs,
        of(experience.advantages),
        mask,
        settings.clip_ratio,
        denominator,
        settings.dual_clip,
    )
    value, value_stats = ppo.value_loss(
        output.values,
        of(experience.evaluation.old_values),
        of(experience.returns),
        mask,
        settings.value_clip,
        denominator,
    )
    found = {f"policy/{name}": x for name, x in policy_stats.items()}
    found |= {f"value/{name}": x for name, x in value_stats.items()}
    found["entropy_sum"] = ppo.masked_sum(output.entropy.detach(), mask)
    if settings.entropy_coef:
        policy = policy - settings.entropy_coef * ppo.masked_mean(output.entropy, mask, denominator)
    if kl_in_loss:
        ref_logprobs = of(experience.evaluation.ref_logprobs)
        kl, kl_stats = ppo.kl_loss(
            output.logprobs, old_logprobs, ref_logprobs, mask, recipe.kl.estimator, denominator, output.full_kl
        )
        found["kl_loss/loss_sum"] = kl_stats["loss_sum"]
        policy = policy + kl_coef * kl
    # A frozen role still goes through forward and backward: under ZeRO-3 every parameter needs its gradient, even 0.
    policy = policy * (0.0 if ACTOR in frozen else 1.0)
    value = settings.value_coef * value
    found["joint_loss"] = policy.detach() + value.detach()
    return policy, value, found


def _over_ranks(sums: Counter, largest_deviation: float) -> Counter:
    """Sums over all ranks, and the largest deviation of any: two reductions a minibatch."""
    names = sorted(sums)
    total = dist.all_reduce(torch.tensor([sums[name] for name in names], dtype=torch.float64))
    largest = dist.all_reduce(torch.tensor(largest_deviation, dtype=torch.float64), "max")
    return Counter(dict(zip(names, total.tolist(), strict=True)) | {"policy/ratio_deviation_max": largest.item()})
