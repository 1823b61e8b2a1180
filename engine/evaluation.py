"""Rollout -> Evaluation: what the iteration's weights, still unchanged, say of the sampled responses."""

from __future__ import annotations

import torch
from torch import Tensor

from engine import dist, ppo
from engine.batch import Evaluation, Rollout
from engine.config import Recipe
from engine.errors import RunError
from engine.hybrid_engine import HybridEngine
from engine.minibatches import deal, padded_tokens
from engine.reward_sources import RewardSource, Texts


def score(sources: list[RewardSource], rollout: Rollout, texts: Texts) -> Tensor:
    """`[B, S]` raw scores of all ranks' responses, in rank order: each rank has its own looked at, whose texts it has.

    Args:
        rollout, texts: this rank's.

    Raises:
        RunError: on every rank, when a source failed on any of them.
    """
    scores = []
    for source in sources:
        problem = None
        try:
            scores.append(source.score(rollout, texts))
        except RunError as error:
            problem = str(error)
        dist.agree(problem)
    (everywhere,) = dist.all_gather_rows([torch.stack(scores, dim=1)])
    return everywhere


def evaluate(engine: HybridEngine, rollout: Rollout, source_scores: Tensor, recipe: Recipe) -> Evaluation:
    """Log-probs, KL to the reference and values. Every rank passes the rows of all, does its share, and gets all.

    Args:
        source_scores: `[B, S]` from `score`, of the same rows.
    """
    recompute, estimator = recipe.ppo.old_logprobs == "recompute", recipe.kl.estimator
    wanted = {"logprobs": recompute, "ref_logprobs": True, "values": True, "full_kl": recompute and estimator == "full"}
    lengths = rollout.sequence_lengths
    plan = deal(torch.arange(len(rollout)), lengths, recipe.ppo.for_inference, dist.world_size())
    parts = []
    for rows in plan[dist.rank()]:
        output = engine.forward(rollout, rows, **wanted)
        parts.append(torch.stack([getattr(output, name).float().cpu() for name, on in wanted.items() if on], dim=1))
    (dealt,) = dist.all_gather_rows([torch.cat(parts)])
    forwards = [rows for own in plan for rows in own]
    in_order = dealt[torch.cat(forwards).argsort()]
    per_token = torch.where(rollout.response_mask[:, None], in_order, 0.0).unbind(1)
    found = dict(zip((name for name, on in wanted.items() if on), per_token, strict=True))
    old_logprobs = found.get("logprobs")
    if old_logprobs is None:
        old_logprobs = torch.where(rollout.response_mask, rollout.sampler_logprobs, 0.0)
    kl = found.get("full_kl")
    if kl is None:  # `full` without a pass is a term of the loss: here it is for the metrics alone
        kl = ppo.kl_estimate(old_logprobs, found["ref_logprobs"], "k1" if estimator == "full" else estimator)
    return Evaluation(
        old_logprobs=old_logprobs,
        ref_logprobs=found["ref_logprobs"],
        kl=kl,
        old_values=found["values"],
        source_scores=source_scores,
        padded_lengths=lengths if recipe.ppo.packing else _padded_lengths(forwards, lengths),
    )


def _padded_lengths(forwards: list[Tensor], lengths: Tensor) -> Tensor:
    """`[B]` tokens that each row took up in its forward, padding included."""
    found = torch.zeros(len(lengths), dtype=torch.int64)
    for rows in forwards:
        found[rows] = padded_tokens(rows, lengths) // max(1, len(rows))
    return found
