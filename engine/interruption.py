"""A run is asked to stop: by a signal to any of its processes, by the end of its launcher, or by its time limit.

On every rank a thread listens, and ranks tell each other through the rendezvous store, never by a collective: one that
decodes, waits for others or runs somebody's reward function need not come along. While weights rest, a checkpoint lies
ready in memory: it is written at once, and all leave. While they move, the run ends behind the next optimizer step.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
import uuid

import psutil

from engine import dist
from engine.checkpoint import Checkpoints
from engine.errors import Stopped
from engine.watchdog import Watchdog

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 10.0
"""How long one rank waits for another in leaving."""
STOPPED_EXIT_STATUS = 75
"""EX_TEMPFAIL of sysexits.h: not an error, try again. What there was to save is on the disk."""


class Interruption:
    """Listens as long as it is open. Made and closed in the main thread, by every rank together.

    Args:
        limit_seconds: how long the run may take; None: as long as it likes.
        watchdog: what it knows of goes before signals, by which launchers tell of it, too.
    """

    def __init__(self, limit_seconds: float | None, watchdog: Watchdog):
        self.watchdog = watchdog
        self.checkpoints: Checkpoints | None = None
        self.reason: str | None = None
        """Why the run must stop, once this rank knows."""
        self._store, self._run = dist.rendezvous(), dist.broadcast_object(uuid.uuid4().hex)
        self._limit, self._end = limit_seconds, time.monotonic() + (limit_seconds or float("inf"))
        self._launchers = _launchers()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # Python's own handlers wait for the main thread, which may sit in a collective; this one writes at once.
        self._handlers = {number: signal.signal(number, self._in_main_thread) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._open = True
        self._thread = threading.Thread(target=self._listen, name="interruption", daemon=True)
        self._thread.start()

    def check(self) -> bool:
        """Whether some rank knows of a reason to stop; the same answer on every rank (a collective)."""
        return any(dist.all_gather_objects(self.reason is not None))

    def stop(self) -> None:
        """Leave, in the main thread.

        Raises:
            Stopped: with the reason.
        """
        reasons = dist.all_gather_objects(self.reason)
        raise Stopped(next(reason for reason in reasons if reason is not None), STOPPED_EXIT_STATUS)

    def close(self) -> None:
        """Hear nothing more."""
        self._open = False
        self._thread.join()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)

    def _in_main_thread(self, number: int, frame) -> None:
        if not self._thread.is_alive():  # nobody listens any more
            raise SystemExit(128 + number)

    def _listen(self) -> None:
        while self._open:
            woken, _, _ = select.select([self._read], [], [], POLL_SECONDS)
            try:
                self.reason = self.reason or self._heard() or self._tell(self._own_reason(bool(woken)))
                if self.reason is not None and self._open and self.watchdog.failure is None:
                    self._leave_if_at_rest()
            except Exception:  # the store went with rank 0: its end is known by other ways
                if self.reason is not None:
                    self._leave()
                if not self.watchdog.on:
                    return
                self._store = None

    def _own_reason(self, woken: bool) -> str | None:
        where = f"rank {dist.rank()} on {os.uname().nodename}"
        if woken:
            numbers = [number for number in os.read(self._read, 64) if number in SIGNALS]
            if numbers and not self.watchdog.explains_a_signal():
                return f"{signal.Signals(numbers[0]).name} to {where}"
        gone = [name for process, name in self._launchers if _has_ended(process)]
        if gone:
            return f"{gone[0]} of {where} has ended"
        if time.monotonic() > self._end:
            return f"the time limit of {self._limit:g} s is reached"
        return None

    def _heard(self) -> str | None:
        key = f"{self._run}/stop"
        return self._store.get(key).decode() if self._store and self._store.check([key]) else None

    def _tell(self, reason: str | None) -> str | None:
        if reason is not None and self._store:
            self._store.set(f"{self._run}/stop", reason)
        return reason

    def _leave_if_at_rest(self) -> None:
        checkpoints = self.checkpoints
        if checkpoints is None:
            self._say(f"stopped while starting: {self.reason}; nothing was learned yet")
            self._leave()
        if checkpoints.writes:
            try:
                done, name = checkpoints.write_ready()
            except OSError as error:
                self._say(f"stopped: {self.reason}; a last checkpoint could not be written: {error}")
                self._leave(status=1)
            if not done:
                return
            kept = f"checkpoint {name} is on the disk, go on with --resume" if name else "nothing new to keep"
            self._say(f"stopped: {self.reason}; {kept}")
            self._count("kept")
        elif not self._count("kept", 0):
            return
        self._count("left")
        # Rank 0 holds the store: it goes when the others have heard.
        others, end = dist.world_size() if dist.rank() == 0 else 0, time.monotonic() + PATIENCE_SECONDS
        while self._count("left", 0) < others and time.monotonic() < end:
            time.sleep(POLL_SECONDS / 4)
        self._leave()

    def _count(self, what: str, more: int = 1) -> int:
        return self._store.add(f"{self._run}/{what}", more)

    def _leave(self, status: int = STOPPED_EXIT_STATUS) -> None:
        """From this thread, whatever the main one is waiting for."""
        self.watchdog.say_goodbye()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _say(self, message: str) -> None:
        if dist.rank() == 0:
            sys.stderr.write(f"\n{message}\n")


def _launchers() -> list[tuple[psutil.Process, str]]:
    """The process that started this rank, and DeepSpeed's runner behind it: neither takes the ranks along."""
    found = []
    with contextlib.suppress(psutil.Error):  # a process that may not be looked at
        parents = psutil.Process().parents()[:2]
        found += [(parent, "the launcher") for parent in parents[:1]]
        for grandparent in parents[1:]:
            if any(word.endswith("deepspeed") for word in grandparent.cmdline()[:2]):
                found.append((grandparent, "deepspeed"))
    return found


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE or not process.is_running()
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False
