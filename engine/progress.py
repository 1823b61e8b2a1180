"""What this rank is doing: a record that phases, forwards and collectives keep, and that the watchdog reads.

Keeping it costs a few Python instructions; nothing here communicates or waits. Ranks of one host can look into each
other's memory: what is there stays true when a rank was killed a moment ago.
"""

from __future__ import annotations

import functools
import mmap
import struct
import sys
import sysconfig
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_HERE = Path(__file__).parent
_NOT_THE_PLACE = (*{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}, "<frozen")
_NOT_THE_PLACE += tuple(str(_HERE / name) for name in ("progress.py", "traffic.py", "dist.py"))
_LAYOUT = struct.Struct("QQ?24s40s")


class _Now:
    """Of this process; one main thread writes, any thread reads."""

    phase, iteration = "starting", 0
    moves = 0
    collectives, collective, depth = 0, "none", 0
    work: weakref.ref | None = None
    shared: mmap.mmap | None = None


_now = _Now()


def moved() -> None:
    """Another decode step, micro-batch or scored batch has begun."""
    _now.moves += 1


def begin_iteration(iteration: int) -> None:
    """`iteration` counts from 1."""
    _now.iteration = iteration
    _share()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Inside, this rank is in the phase of that name; an exception leaves it there."""
    outer, _now.phase = _now.phase, name
    _share()
    yield
    _now.phase = outer
    _share()


@contextmanager
def collective(name: str) -> Iterator[None]:
    """Around a call that may wait for other ranks."""
    _now.collectives += 1
    _now.collective, _now.work, _now.depth = name, None, _now.depth + 1
    _share()
    try:
        yield
    finally:
        _now.depth -= 1
        _share()


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


def place(frame: FrameType | None = None) -> str:
    """Where in the code the main thread is, or was in `frame`: the innermost line of no library and no wrapper."""
    innermost = frame = frame or sys._current_frames()[threading.main_thread().ident]
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_PLACE):
        frame = frame.f_back
    frame = frame or innermost
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def share(name: str) -> Path:
    """Keep the record where others can look; returns the file, which nobody needs once they have it open."""
    folder = Path("/dev/shm")
    path = (folder if folder.is_dir() else Path(tempfile.gettempdir())) / name
    path.write_bytes(bytes(_LAYOUT.size))
    _now.shared = map_file(path)
    _share()
    return path


def map_file(path: Path) -> mmap.mmap:
    """The memory behind what `share` gave."""
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), _LAYOUT.size)


def read(shared: mmap.mmap) -> dict:
    """What the record of its process says, or said last."""
    iteration, collectives, inside, phase, collective = _LAYOUT.unpack_from(shared)
    texts = {"phase": phase, "collective": collective}
    found = {name: text.rstrip(b"\0").decode(errors="replace") for name, text in texts.items()}
    return found | {"iteration": iteration, "collectives": collectives, "inside": inside}


def _share() -> None:
    if _now.shared is not None:
        phase, collective = _now.phase.encode(), _now.collective.encode()
        _LAYOUT.pack_into(_now.shared, 0, _now.iteration, _now.collectives, _now.depth > 0, phase, collective)
