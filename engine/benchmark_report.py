"""A benchmark's result as people read it: a page of text and a picture."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen on a cluster

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from engine import flops

GIGA = 1e9


def page(result: dict) -> str:
    """Tables of the phases and of their FLOPs, the formulas, and what else was measured."""
    console = Console(file=io.StringIO(), width=140, markup=False, emoji=False, highlight=False)
    for part in (_heading(result), _phases(result), _parts(result), flops.FORMULAS, "", *_notes(result)):
        console.print(part)
    return console.file.getvalue()


def _heading(result: dict) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"{result['workload']}: {result['sequences']} sequences, {result['prompt_tokens']} prompt and "
        f"{result['response_tokens']} response tokens an iteration\n"
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, {machine['device']}; "
        f"{result['ranks']} ranks of {machine['threads_of_a_rank']} thread(s), {result['dtype']}\n{versions}\n"
    )


def _phases(result: dict) -> Table:
    timed = len(result["iterations"]) - 1
    table = Table(title=f"a rank, minimum and median of {timed} iterations after the first", title_justify="left")
    columns = ("phase", "CPU s min", "median", "wall s min", "median", "response tok/s", "GFLOP", "GFLOP/s", "of limit")
    for column in columns:
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name, phase in result["phases"].items():
        seconds = [phase[kind][which] for kind in ("cpu_seconds", "wall_seconds") for which in ("min", "median")]
        table.add_row(
            name,
            *(f"{value:.2f}" for value in seconds),
            f"{phase['response_tokens_per_second']:.0f}",
            f"{phase['flops_of_a_rank'] / GIGA:.1f}",
            f"{phase['flops_per_second'] / GIGA:.1f}",
            f"{phase['share_of_limit']:.0%}",
        )
    return table


def _parts(result: dict) -> Table:
    ranks = result["ranks"]
    table = Table(title="useful GFLOP of a rank", title_justify="left")
    for column in ("phase", "pass", "GFLOP"):
        table.add_column(column, justify="right" if column == "GFLOP" else "left")
    for phase, parts in result["flops"].items():
        for name, count in parts.items():
            table.add_row(phase, name, f"{count / ranks / GIGA:.1f}")
    return table


def _notes(result: dict) -> list[str]:
    limits = [rate / GIGA for rate in result["limit_flops_per_second"]]
    peaks = [max(of) / GIGA for of in zip(*(one["peak_rss_bytes"] for one in result["iterations"][1:]), strict=True)]
    plain = result["generation_against_plain"]
    notes = [
        f"limit: {max(limits):.1f} GFLOP/s, the best of the matrix products between the iterations (from "
        f"{min(limits):.1f})",
        f"peak resident memory by rank: {', '.join(f'{peak:.2f}' for peak in peaks)} GB",
        f"gathered generation: {plain['gathered_seconds']:.2f} s, a plain model: {plain['plain_seconds']:.2f} s, "
        f"ratio {plain['ratio']:.2f}",
    ]
    if "logprob_memory" in result:
        memory = result["logprob_memory"]
        notes.append(
            f"log-probs and entropy with backward: {memory['engine_bytes'] / GIGA:.2f} GB at most, written out "
            f"{memory['naive_bytes'] / GIGA:.2f} GB, ratio {memory['ratio']:.2f}"
        )
    return notes


def draw_phases(result: dict, path: Path) -> None:
    """Bars of each phase's median CPU seconds, and inside them what its FLOPs cost at the machine's limit."""
    names = [name for name in result["phases"] if name != "iteration"]
    phases, limit = [result["phases"][name] for name in names], max(result["limit_flops_per_second"])
    measured = [phase["cpu_seconds"]["median"] for phase in phases]
    figure, axis = plt.subplots(figsize=(8, 4), constrained_layout=True)
    axis.bar(names, measured, color="lightsteelblue", label="measured")
    axis.bar(names, [phase["flops_of_a_rank"] / limit for phase in phases], width=0.5, label="at the machine's limit")
    for index, phase in enumerate(phases):
        text = f"{measured[index]:.2f} s, {phase['share_of_limit']:.0%}"
        axis.annotate(text, (index, measured[index]), ha="center", va="bottom")
    axis.set_ylabel("CPU seconds of a rank, median")
    axis.set_title(f"{result['workload']}, {result['dtype']}, {result['ranks']} ranks")
    axis.margins(y=0.15)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
