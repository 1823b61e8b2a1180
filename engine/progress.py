"""What this rank is doing: a record that phases, forwards and collectives keep, and that the watchdog reads.

Keeping it costs a few Python instructions; nothing here communicates or waits.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_HERE = Path(__file__).parent
_NOT_THE_PLACE = (*{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}, "<frozen")
_NOT_THE_PLACE += tuple(str(_HERE / name) for name in ("progress.py", "traffic.py", "dist.py"))


class _Now:
    """Of this process; one main thread writes, any thread reads."""

    phase, iteration = "starting", 0
    moves = 0
    collectives, collective, depth = 0, "none", 0
    work: weakref.ref | None = None


_now = _Now()
changed = threading.Event()
"""Set at the borders of phases, which others should hear of at once. Who waits for it clears it."""


def moved() -> None:
    """Another decode step, micro-batch or scored batch has begun."""
    _now.moves += 1


def begin_iteration(iteration: int) -> None:
    """`iteration` counts from 1."""
    _now.iteration = iteration
    changed.set()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Inside, this rank is in the phase of that name."""
    outer, _now.phase = _now.phase, name
    changed.set()
    try:
        yield
    finally:
        _now.phase = outer
        changed.set()


@contextmanager
def collective(name: str) -> Iterator[None]:
    """Around a call that may wait for other ranks."""
    _enter(name)
    try:
        yield
    finally:
        _now.depth -= 1


def noted(call: Callable, name: str) -> Callable:
    """A collective that is recorded whenever it is called, until it is complete if it returns at once."""

    @functools.wraps(call)
    def noting(*args, **named):
        with collective(name):
            work = call(*args, **named)
        if hasattr(work, "is_completed"):
            _now.work = weakref.ref(work)  # it holds tensors: a phase that gives memory back must be able to
        return work

    return noting


def _enter(name: str) -> None:
    _now.depth += 1
    _now.collectives += 1
    _now.collective, _now.work = name, None


def record() -> dict:
    """What is known now, as JSON knows it."""
    work = _now.work and _now.work()
    return {
        "phase": _now.phase,
        "iteration": _now.iteration,
        "moves": _now.moves,
        "collectives": _now.collectives,
        "collective": _now.collective,
        "inside": _now.depth > 0 or (work is not None and not work.is_completed()),
    }


def place() -> str:
    """Where in the code the main thread is: the innermost line of no library and no wrapper."""
    innermost = frame = sys._current_frames()[threading.main_thread().ident]
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_PLACE):
        frame = frame.f_back
    frame = frame or innermost
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
