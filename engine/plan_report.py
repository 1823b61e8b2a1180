"""A plan for people: one table of a rank's bytes by part and phase, and what is left of its memory."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from pydantic import ByteSize
from rich.console import Console
from rich.table import Table

from engine.planner import ACTIVATIONS, Bytes
from engine.volume import Moved


def page(phases: dict[str, dict[str, Bytes]], device_memory: int | None) -> str:
    """The plan as text.

    Args:
        phases: bytes by phase and home.
        device_memory: of one device; None: nobody said.
    """
    rows = dict.fromkeys((name, part) for homes in phases.values() for name, of in homes.items() for part in of.device)
    table = Table("home", "part", *phases, title="bytes of a rank on its device", title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    for name, part in rows:
        table.add_row(name, part, *(_readable(homes[name].device[part]) for homes in phases.values()))
    table.add_section()
    totals = {phase: device_total(homes) for phase, homes in phases.items()}
    table.add_row("all", "", *map(_readable, totals.values()))
    if device_memory is not None:
        table.add_row("", "left", *(_readable(device_memory - total) for total in totals.values()))
    homes = phases["training"].values()
    elsewhere = {"in host memory": [of.host for of in homes], "on NVMe": [of.disk for of in homes]}
    text = io.StringIO()
    console = Console(file=text, width=140)
    console.print(table)
    for place, counters in elsewhere.items():
        if held := sum(counters, Counter()):
            parts = ", ".join(f"{part} {_readable(size)}" for part, size in held.items())
            console.print(f"{place}, for each rank: {_readable(sum(held.values()))} ({parts})")
    counted = any(
        part == ACTIVATIONS for homes in phases.values() for of in homes.values() for part in of.device + of.host
    )
    left_out = "" if counted else "activations, "
    console.print(f"Not counted: {left_out}what a layer needs while it computes, and what the allocator can't use.")
    return text.getvalue()


def draw(phases: dict[str, dict[str, Bytes]], device_memory: int | None, path: Path) -> None:
    """A bar for each phase, its parts one above the other, and a line where the device's memory ends."""
    import matplotlib  # here: a plan without a picture needn't wait for it

    matplotlib.use("Agg")  # no screen on a cluster
    import matplotlib.pyplot as plt

    rows = dict.fromkeys((name, part) for homes in phases.values() for name, of in homes.items() for part in of.device)
    colours = matplotlib.colormaps["tab20"].colors
    figure, axis = plt.subplots(figsize=(9, 5), constrained_layout=True)
    below = [0.0] * len(phases)
    for index, (name, part) in enumerate(rows):
        sizes = [homes[name].device[part] / 1e9 for homes in phases.values()]
        colour = colours[index % len(colours)]
        axis.bar(list(phases), sizes, bottom=below, width=0.6, color=colour, label=f"{name}: {part}")
        below = [start + size for start, size in zip(below, sizes, strict=True)]
    if device_memory is not None:
        axis.axhline(device_memory / 1e9, color="black", linestyle="--", label="the device's memory")
    axis.set_ylabel("GB of a rank's device")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper")  # as they lie
    figure.savefig(path, dpi=110)
    plt.close(figure)


def device_total(homes: dict[str, Bytes]) -> int:
    """Bytes of a rank on its device, of all homes."""
    return sum(sum(of.device.values()) for of in homes.values())


def most(phases: dict[str, dict[str, Bytes]], place: str) -> int:
    """Bytes of a rank in the phase that needs most.

    Args:
        place: device, host or disk.
    """
    return max(sum(sum(getattr(of, place).values()) for of in homes.values()) for homes in phases.values())


def traffic_page(moved: dict[str, Moved], times: dict[str, tuple[float, float]] | None) -> str:
    """What ranks receive in an iteration, and how long it takes where somebody gave rates."""
    table = Table("", *moved, title="in an iteration, each rank", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("receives weights", *(_readable(round(of.gathered)) for of in moved.values()))
    table.add_row("receives gradients", *(_readable(round(of.reduced)) for of in moved.values()))
    if times is not None:
        table.add_row("computes, seconds", *(f"{times[phase][0]:.1f}" for phase in moved))
        table.add_row("network, seconds", *(f"{times[phase][1]:.1f}" for phase in moved))
    text = io.StringIO()
    Console(file=text, width=140).print(table)
    return text.getvalue()


def as_json(
    phases: dict[str, dict[str, Bytes]], moved: dict[str, Moved], times: dict[str, tuple[float, float]] | None
) -> dict:
    """The same for machines.

    `held`: phase -> home -> {"device": {part: bytes}, "host": ..., "disk": ...}; `received`: phase -> kind -> bytes;
    `seconds`: phase -> {"computing", "network"}, or null.
    """
    held = {
        phase: {name: {place: dict(parts) for place, parts in vars(of).items()} for name, of in homes.items()}
        for phase, homes in phases.items()
    }
    seconds = times and {phase: dict(zip(("computing", "network"), of, strict=True)) for phase, of in times.items()}
    return {"held": held, "received": {phase: asdict(of) for phase, of in moved.items()}, "seconds": seconds}


def _readable(size: int) -> str:
    if size < 0:
        return f"-{_readable(-size)}"
    return ByteSize(size).human_readable(decimal=True, separator=" ") if size else ""
