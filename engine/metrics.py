"""Numbers of an iteration from sums over all ranks, and where they go. docs/metrics.md is the glossary."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from engine import dist, ppo
from engine.batch import Experience, UpdateStats

Metrics = dict[str, float]


class PhaseClock:
    """Wall and process seconds of the phases of one iteration."""

    def __init__(self):
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self.start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall
        self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - cpu

    def metrics(self) -> Metrics:
        found = {f"time/{name}_seconds": seconds for name, seconds in self.wall.items()}
        found["time/iteration_seconds"] = time.perf_counter() - self.start
        return found | {f"cpu/{name}_seconds": seconds for name, seconds in self.cpu.items()}


def rollout_metrics(experience: Experience, raw_scores: Tensor, source_names: list[str]) -> Metrics:
    """What was sampled and how it was judged. `experience` holds the rows of all ranks."""
    rollout, evaluation = experience.rollout, experience.evaluation
    mask = rollout.response_mask
    tokens = mask.sum().item()
    found = {
        "score/mean": raw_scores.mean().item(),
        "score/std": raw_scores.std(correction=0).item(),
        "score/used_mean": experience.scores.mean().item(),
        "kl/token_mean": ppo.masked_mean(evaluation.kl, mask).item(),
        "kl/sequence_mean": evaluation.kl.sum(1).mean().item(),
        "kl/k1_sequence_mean": (evaluation.old_logprobs - evaluation.ref_logprobs).sum(1).mean().item(),
        "value/explained_variance": ppo.explained_variance(evaluation.old_values, experience.returns, mask).item(),
        "value/mean": ppo.masked_mean(evaluation.old_values, mask).item(),
        "returns/mean": ppo.masked_mean(experience.returns, mask).item(),
        "rollout/prompt_tokens_mean": rollout.prompt_lengths.float().mean().item(),
        "rollout/response_tokens_mean": rollout.response_lengths.float().mean().item(),
        "rollout/eos_fraction": rollout.ended.float().mean().item(),
        "rollout/tokens": tokens,
        "rollout/train_kl": ppo.masked_mean(
            ppo.kl_estimate(rollout.sampler_logprobs, evaluation.old_logprobs, "k3"), mask
        ).item(),
    }
    for name, column in zip(source_names, evaluation.source_scores.unbind(1), strict=True):
        found[f"score/{name}/mean"] = column.mean().item()
        found[f"score/{name}/std"] = column.std(correction=0).item()
    return found


def update_metrics(stats: UpdateStats) -> Metrics:
    """What the update did: token sums over token counts. Without an optimizer step (KL stop), norms and rates are 0."""
    sums = stats.sums
    tokens = max(1, sums["policy/tokens"])
    found = {
        "policy/loss": sums["policy/loss_sum"] / tokens,
        "policy/clip_fraction": sums["policy/clipped"] / tokens,
        "policy/dual_clip_fraction": sums["policy/dual_clipped"] / tokens,
        "policy/approx_kl": sums["policy/approx_kl_sum"] / tokens,
        "policy/entropy": sums["entropy_sum"] / tokens,
        "policy/first_ratio_deviation": stats.first_ratio_deviation,
        "value/loss": sums["value/loss_sum"] / tokens,
        "value/clip_fraction": sums["value/clipped"] / tokens,
        "kl/loss": sums["kl_loss/loss_sum"] / tokens,
        "update/steps": stats.steps,
        "update/overflows": stats.overflows,
        "update/skipped_minibatches": stats.skipped,
    }
    for role in ("actor", "critic"):
        norms = stats.grad_norms.get(role, [])
        found[f"grad_norm/{role}"] = sum(norms) / max(1, len(norms))
        found[f"lr/{role}"] = stats.learning_rates.get(role, 0.0)
    return found


def memory_metrics() -> Metrics:
    """The largest resident memory of any rank so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: kilobytes, but bytes on macOS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"memory/rss_peak_bytes": max(dist.all_gather_objects(peak))}


class MetricSinks:
    """metrics.jsonl, TensorBoard and one readable line per iteration, written by rank 0."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.writer = SummaryWriter(str(folder / "tensorboard")) if dist.rank() == 0 else None

    def write(self, iteration: int, metrics: Metrics) -> None:
        """Append one iteration; `iteration` counts from 1.

        Raises:
            FloatingPointError: a metric is not finite; on every rank, since every rank holds the same sums.
        """
        wrong = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        if wrong:
            raise FloatingPointError(f"metrics of iteration {iteration} are not finite: {wrong}")
        if self.writer is None:
            return
        append_jsonl(self.folder / "metrics.jsonl", [{"iteration": iteration, **metrics}])
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def append_jsonl(path: Path, rows: list[dict]) -> None:
    """Append one line per row; a number that isn't finite is an error, not `NaN`, which is no JSON."""
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def console_line(iteration: int, iterations: int, metrics: Metrics) -> str:
    """One line for people."""
    return (
        f"iteration {iteration:>{len(str(iterations))}}/{iterations}  score {metrics['score/mean']:+.3f}"
        f"  kl {metrics['kl/k1_sequence_mean']:.2f}  entropy {metrics['policy/entropy']:.2f}"
        f"  clip {metrics['policy/clip_fraction']:.2f}  value loss {metrics['value/loss']:.3f}"
        f"  length {metrics['rollout/response_tokens_mean']:.1f}  {metrics['time/iteration_seconds']:.1f} s"
    )
