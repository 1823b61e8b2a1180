"""The recipe's section on training that fails."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat

from engine.section import Section


class FailureConfig(Section):
    """What becomes of a run when training diverges: when a number stops being finite, or the KL runs away."""

    on_divergence: Literal["stop", "roll_back"] = "stop"
    """stop: with an error. roll_back: go on from the last good checkpoint, with smaller steps and other prompts."""
    kl_abort: PositiveFloat | None = None
    """KL to the reference (kl/k1_sequence_mean), in nats per response, beyond which nothing is learned; null: off."""
    max_roll_backs: int = Field(2, ge=1, le=99)
    """So many times a run goes back, then it stops."""
    learning_rate_factor: float = Field(0.5, gt=0, le=1)
    """Each roll-back multiplies the learning rates of both roles by this; 1: they stay."""
