"""Every random choice of a run is a pure function of the run's seed and of what the choice is for."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What random numbers are for: streams never share a number."""

    TRAINING = 0
    EVALUATION = 1
    MINIBATCHES = 2
    PROMPTS = 3


def generator(seed: int, stream: Stream, high: int = 0, low: int = 0) -> np.random.Generator:
    """A counter-based generator (Philox, Salmon et al. 2011) of its own for (seed, stream, high, low)."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, low, high]))
