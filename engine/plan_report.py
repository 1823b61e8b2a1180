"""A plan for people: one table of a rank's bytes by part and phase, and what is left of its memory."""

from __future__ import annotations

import io
from collections import Counter

from pydantic import ByteSize
from rich.console import Console
from rich.table import Table

from engine.planner import Bytes


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
        table.add_row(
            "", "left for activations and gathered layers", *(_readable(device_memory - t) for t in totals.values())
        )
    homes = phases["training"].values()
    elsewhere = {"in host memory": [of.host for of in homes], "on NVMe": [of.disk for of in homes]}
    text = io.StringIO()
    console = Console(file=text, width=140)
    console.print(table)
    for place, counters in elsewhere.items():
        if held := sum(counters, Counter()):
            parts = ", ".join(f"{part} {_readable(size)}" for part, size in held.items())
            console.print(f"{place}, for each rank: {_readable(sum(held.values()))} ({parts})")
    console.print("Not counted: activations, and the layers that ZeRO-3 gathers for a forward.")
    return text.getvalue()


def device_total(homes: dict[str, Bytes]) -> int:
    """Bytes of a rank on its device, of all homes."""
    return sum(sum(of.device.values()) for of in homes.values())


def as_json(phases: dict[str, dict[str, Bytes]]) -> dict:
    """The same for machines: phase -> home -> {"device": {part: bytes}, "host": ..., "disk": ...}."""
    return {
        phase: {name: {place: dict(held) for place, held in vars(of).items()} for name, of in homes.items()}
        for phase, homes in phases.items()
    }


def _readable(size: int) -> str:
    if size < 0:
        return f"-{_readable(-size)}"
    return ByteSize(size).human_readable(decimal=True, separator=" ") if size else ""
