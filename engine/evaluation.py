"""Rollout -> Evaluation: what the iteration's weights, still unchanged, say of the sampled responses."""

from __future__ import annotations

import torch
from torch import Tensor

from engine import dist, ppo
from engine.batch import Evaluation, Rollout
from engine.config import KLConfig
from engine.errors import RunError
from engine.hybrid_engine import HybridEngine
from engine.minibatches import micro_batches
from engine.reward_sources import RewardSource, Texts


def evaluate(
    engine: HybridEngine,
    sources: list[RewardSource],
    rollout: Rollout,
    texts: Texts,
    kl: KLConfig,
    micro_batch_sequences: int,
) -> Evaluation:
    """Log-probs, KL to the reference, values and raw scores of this rank's rows.

    Raises:
        RunError: on every rank, when a source failed on any of them.
    """
    columns: dict[str, list[Tensor]] = {name: [] for name in ("logprobs", "ref_logprobs", "kl", "values")}
    for rows in micro_batches(torch.arange(len(rollout)), micro_batch_sequences):
        output = engine.forward(rollout, rows, values=True, ref_logprobs=True, full_kl=kl.estimator == "full")
        estimate = output.full_kl
        if estimate is None:
            estimate = ppo.kl_estimate(output.logprobs, output.ref_logprobs, kl.estimator)
        found = {**vars(output), "kl": estimate}
        for name, parts in columns.items():
            parts.append(found[name].float().cpu())
    mask = rollout.response_mask
    per_token = {name: torch.where(mask, torch.cat(parts), 0.0) for name, parts in columns.items()}
    return Evaluation(
        old_logprobs=per_token["logprobs"],
        ref_logprobs=per_token["ref_logprobs"],
        kl=per_token["kl"],
        old_values=per_token["values"],
        source_scores=_scores(sources, rollout, texts),
    )


def _scores(sources: list[RewardSource], rollout: Rollout, texts: Texts) -> Tensor:
    """`[B, S]` raw scores."""
    scores = []
    for source in sources:
        problem = None
        try:
            scores.append(source.score(rollout, texts))
        except RunError as error:
            problem = str(error)
        dist.agree(problem)
    return torch.stack(scores, dim=1)
