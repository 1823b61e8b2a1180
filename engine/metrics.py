"""Numbers of an iteration from sums over all ranks, and where they go. docs/metrics.md is the glossary."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from engine import dist, ppo, progress, traffic
from engine.batch import Experience, UpdateStats

Metrics = dict[str, float]


class PhaseClock:
    """What the phases of one iteration cost this rank: seconds, and the bytes of its collectives.

    Args:
        spent: `so_far` of a process that began the iteration and was stopped in it.
    """

    def __init__(self, spent: dict[str, dict[str, float]] | None = None):
        spent, self.running = spent or {}, None
        self.spent: Counter = Counter(spent.get("phases", {}))
        self.start = _meters()
        self.start = {key: value - spent.get("whole", {}).get(key, 0.0) for key, value in self.start.items()}

    @property
    def so_far(self) -> dict[str, dict[str, float]]:
        return {"phases": dict(self.spent + Counter(self._of_running())), "whole": self._whole}

    @property
    def _whole(self) -> dict[str, float]:
        return {key: value - self.start[key] for key, value in _meters().items()}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.running = name, _meters()
        with progress.phase(name):
            yield
        self.spent.update(self._of_running())
        self.running = None

    def _of_running(self) -> dict[str, float]:
        if self.running is None:
            return {}
        name, before = self.running
        return {key.format(f"{name}_"): value - before[key] for key, value in _meters().items()}

    def metrics(self) -> Metrics:
        """Each phase, and the whole iteration so far: its wall time and its bytes."""
        whole = self._whole
        found = {key.format(""): value for key, value in whole.items() if key.startswith("comm/")}
        return {**self.spent, **found, "time/iteration_seconds": whole[_WALL]}


_WALL = "time/{}seconds"


def _meters() -> dict[str, float]:
    """What only ever grows, by the metric's name with room for the phase's."""
    meters = {_WALL: time.perf_counter(), "cpu/{}seconds": time.process_time()}
    return meters | {f"comm/{{}}{kind}_bytes": count for kind, count in traffic.received.items()}


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
        "policy/importance_weight": sums["importance/weight_sum"] / tokens,
        "policy/importance_capped_fraction": sums["importance/capped"] / tokens,
        "rollout/train_kl": stats.sampler_kl,
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


def padding_fraction(experience: Experience, stats: UpdateStats) -> float:
    """The padding among all tokens that the forwards of inference and training laid out, each counted once."""
    rollout, padded_lengths = experience.rollout, experience.evaluation.padded_lengths
    real = rollout.sequence_lengths.sum().item() + stats.real_tokens
    return 1 - real / (padded_lengths.sum().item() + stats.padded_tokens)


def memory_metrics() -> Metrics:
    """The largest resident memory of any rank so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: kilobytes, but bytes on macOS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"memory/rss_peak_bytes": dist.all_reduce(torch.tensor(float(peak), dtype=torch.float64), "max").item()}


class MetricSinks:
    """metrics.jsonl, TensorBoard and one readable line per iteration, written by rank 0."""

    def __init__(self, folder: Path, iterations: int = 0):
        self.folder = folder
        # TensorBoard drops what was written beyond these iterations before the run was stopped, or went back.
        where = {"log_dir": str(folder / "tensorboard"), "purge_step": iterations + 1}
        self.writer = SummaryWriter(**where) if dist.rank() == 0 else None

    def write(self, iteration: int, metrics: Metrics) -> None:
        """Append one iteration; `iteration` counts from 1.

        Raises:
            FloatingPointError: a metric is not finite; on every rank, since every rank holds the same sums.
        """
        check_finite(metrics, f"metrics of iteration {iteration}")
        if self.writer is None:
            return
        append_jsonl(self.folder / "metrics.jsonl", [{"iteration": iteration, **metrics}])
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def check_finite(metrics: Metrics, what: str) -> None:
    """Raise FloatingPointError that names the metrics that are not finite, if any is."""
    wrong = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if wrong:
        raise FloatingPointError(f"{what} are not finite: {wrong}")


def append_jsonl(path: Path, rows: list[dict]) -> None:
    """Append one line per row; a number that isn't finite is an error, not `NaN`, which is no JSON."""
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def console_line(iteration: int, iterations: int, metrics: Metrics) -> str:
    """One line for people."""
    return (
        f"iteration {iteration:>{len(str(iterations))}}/{iterations}  score {metrics['score/mean']:+.3f}"
        f"  kl {metrics['kl/k1_sequence_mean']:.2f}  entropy {metrics['policy/entropy']:.2f}"
        f"  clip {metrics['policy/clip_fraction']:.2f}  value loss {metrics['value/loss']:.3f}"
        f"  length {metrics['rollout/response_tokens_mean']:.1f}  {metrics['time/iteration_seconds']:.1f} s"
    )
