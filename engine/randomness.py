"""Every random choice of a run is a pure function of the run's seed and of what the choice is for."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What random numbers are for: streams never share a number."""

    TRAINING = 0
    EVALUATION = 1
    MINIBATCHES = 2
    PROMPTS = 3
    SELF_CHECKS = 4


def generator(seed: int, stream: Stream, high: int = 0, low: int = 0) -> np.random.Generator:
    """A counter-based generator (Philox, Salmon et al. 2011) of its own for (seed, stream, high, low)."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, low, high]))


def global_state() -> dict:
    """The state of the generators that everybody shares, as JSON knows it.

    The engine never draws from them; a reward function may.
    """
    _, keys, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    found = {"torch": _text(torch.get_rng_state().numpy()), "numpy": [_text(keys), *rest]}
    return found | {"python": [version, _text(np.array(numbers, dtype=np.uint32)), gauss]}


def restore_global_state(state: dict) -> None:
    """Put back what `global_state` gave."""
    torch.set_rng_state(torch.from_numpy(_numbers(state["torch"], np.uint8)))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", _numbers(keys, np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(_numbers(numbers, np.uint32).tolist()), gauss))


@contextmanager
def untouched() -> Iterator[None]:
    """Inside, whatever draws from the generators that everybody shares leaves them as they were, devices' included."""
    before = global_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            restore_global_state(before)


def _text(numbers: np.ndarray) -> str:
    return base64.b64encode(numbers.tobytes()).decode()


def _numbers(text: str, kind: type) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=kind).copy()
