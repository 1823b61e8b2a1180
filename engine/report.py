"""What a person reads after a run: the before/after table and the learning curve."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen on a cluster

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from engine.heldout import Look
from engine.metrics import read_jsonl

SHOWN_SAMPLES = 6


def before_after(before: Look, after: Look) -> str:
    """Two plain-text tables: the held-out metrics, and some responses to the same prompts."""
    numbers = Table(title="held-out prompts", title_justify="left")
    for column in ("metric", "before", "after"):
        numbers.add_column(column, justify="left" if column == "metric" else "right")
    for name in after.metrics:
        numbers.add_row(name.removeprefix("eval/"), *(f"{look.metrics[name]:.3f}" for look in (before, after)))
    samples = Table(title="samples (score in brackets)", title_justify="left", show_lines=True)
    for column in ("prompt", "before", "after"):
        samples.add_column(column, ratio=1)
    for row in range(min(SHOWN_SAMPLES, len(after.prompts))):
        samples.add_row(
            after.prompts[row], *(f"{look.responses[row]} [{look.scores[row]:+.2f}]" for look in (before, after))
        )
    # What a policy writes is no markup: [bold] and :smile: stay as they are.
    page = Console(file=io.StringIO(), width=140, markup=False, emoji=False, highlight=False)
    for table in (numbers, samples):
        page.print(table)
    return page.file.getvalue()


def draw_learning_curve(folder: Path, into: Path | None = None) -> Path:
    """`learning_curve.png` from the run's metrics.jsonl and evaluation.jsonl, there or in `into`; returns its path."""
    rows = read_jsonl(folder / "metrics.jsonl")
    looks = read_jsonl(folder / "evaluation.jsonl") if (folder / "evaluation.jsonl").exists() else []
    panels = {
        "score": ["score/mean"],
        "KL to the reference, nats per sequence": ["kl/k1_sequence_mean"],
        "entropy, nats per token": ["policy/entropy"],
        "explained variance of the critic": ["value/explained_variance"],
        "response length, tokens": ["rollout/response_tokens_mean"],
        "held-out": sorted(k for k in (looks[-1] if looks else {}) if k.endswith("_fraction")),
    }
    figure, axes = plt.subplots(2, 3, figsize=(14, 7), constrained_layout=True)
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=True):
        for name in names:
            source = looks if name.startswith("eval/") else rows
            x, y = [row["iteration"] for row in source], [row[name] for row in source]
            axis.plot(x, y, marker="." if source is looks else "")
        axis.set_title(title)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend([name.removeprefix("eval/") for name in names])
    path = (into or folder) / "learning_curve.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
