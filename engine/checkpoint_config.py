"""The recipe's section on checkpoints."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, NonNegativeFloat, NonNegativeInt, PositiveInt

from engine.section import Section

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(text: str) -> float:
    """`90s`, `30m`, `4h` or `1.5d` in seconds.

    Raises:
        ValueError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not found or float(found[1]) == 0:
        raise ValueError(f"takes a number and its unit, as in 90s, 30m, 4h or 1d, got {text!r}")
    return float(found[1]) * UNITS[found[2]]


def _checked(text: str) -> str:
    seconds_of(text)
    return text


TimeLimit = Annotated[str, AfterValidator(_checked)]


class CheckpointConfig(Section):
    """What a run keeps to go on from, by --resume, after it was stopped: what is trained and its optimizer, no base."""

    every_iterations: NonNegativeInt = 10
    """Keep a checkpoint after every so many iterations, and after the last; 0: not by their number."""
    every_minutes: NonNegativeFloat = 0.0
    """Keep one at the end of an iteration when the last is older than this; 0: not by the clock."""
    keep_last: PositiveInt = 2
    """How many of the newest stay on the disk."""
    keep_best: str | None = None
    """Metric whose highest value keeps its checkpoint too, `-NAME` the lowest; null: none."""
    mid_phase: bool = False
    """Keep one after generation, after inference and after every optimizer step, too: a crash then costs a phase."""
    on_full_disk: Literal["continue", "stop"] = "continue"
    """When a checkpoint can't be written: go on training, and say so, or stop."""
