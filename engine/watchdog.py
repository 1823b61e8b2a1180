"""Watches over the ranks: when one dies or hangs, all of them end, with a report of who, where and in what.

On every rank two threads: one renews this rank's record in the rendezvous store and fetches others', and may be held up
there; one looks at what is known, and never waits. Each sees the ranks of its host and rank 0, which sees them all and
tells who hangs. Nothing here is a collective.
"""

from __future__ import annotations

import contextlib
import faulthandler
import ipaddress
import json
import mmap
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from engine import dist, progress
from engine.command_line import LOST_PEER
from engine.errors import RunError, Stopped
from engine.liveness import (
    FAILED,
    GONE,
    GRACE_SECONDS,
    HERE,
    LEFT,
    QUIET_SECONDS,
    STOPPED,
    SUSPICIOUS_SECONDS,
    Seen,
    blame,
    failure_of,
    report,
)

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoints

BEAT_SECONDS = 1.0
POLL_SECONDS = 0.25
ARM_SECONDS = 1.0
AGREE_SECONDS = 2.0
"""How long a rank waits for the store's answer before it goes by what it knows."""
LAST_DEEDS_SECONDS = 20.0
"""How long the report and the checkpoint that is ready may take."""
MARGIN_SECONDS = 5.0
"""So much earlier, or a quarter of it, patience ends, for all to be gone in the time that was asked for."""
FAILED_EXIT_STATUS = 70
"""EX_SOFTWARE of sysexits.h: another rank, or this one, died or hung."""
FILE = "failures.jsonl"


class Watchdog:
    """Watches while it is open, as a context. Made and left in the main thread, by every rank together.

    Args:
        seconds: after which all are gone when one stands still; None: nobody watches.
    """

    def __init__(self, seconds: float | None):
        self.seconds, self.on = seconds, seconds is not None
        self.checkpoints: Checkpoints | None = None
        self.failure: dict | None = None
        """Why this rank is about to end."""
        self._state, self._error, self._place, self._open = HERE, "", None, self.on
        if not self.on:
            return
        self._patience = seconds - min(MARGIN_SECONDS, seconds / 4)
        self._key = f"watchdog-{dist.broadcast_object(uuid.uuid4().hex)}"
        self._rank, self._ranks = dist.rank(), dist.all_gather_objects(_myself(self._key))
        mine = self._ranks[self._rank]
        mates = [rank for rank, one in enumerate(self._ranks) if one["machine"] == mine["machine"]]
        self._mates = {rank: _process(self._ranks[rank]["pid"]) for rank in mates if rank != self._rank}
        self._memory = self._look_into_memory()
        self._gone: set[int] = set()
        self._visible = sorted({0, *mates} if self._rank else range(len(self._ranks)))
        self._awake, self._still_since, self._last, self._beat = 0.0, 0.0, {}, 0
        self._heard = {rank: (self._my_record(), 0.0) for rank in self._visible}  # and when each was renewed
        self._contact, self._lost_since = 0.0, None
        self._proposal: str | None = None
        self._agreed: dict | None = None
        self._wake, self._came_round = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._watch)]

    def __enter__(self) -> Watchdog:
        for thread in self._threads if self.on else ():
            thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if not self.on:
            return
        if error is not None:
            self._error = f"{kind.__name__}: {error}"
            self._place = progress.place([frame for frame, _ in traceback.walk_tb(trace)][-1])
        if error is None or isinstance(error, Stopped):
            self.say_goodbye()
        elif self._is_another_ones(error):
            self._threads[1].join()  # the rank that was lost will be found out, and that ends this process
        else:
            self._state = FAILED
            self._round_trip()
        self._open = False
        self._wake.set()
        self._threads[1].join()  # for good, where it is about to end this process
        self._threads[0].join(AGREE_SECONDS)
        faulthandler.cancel_dump_traceback_later()

    def _look_into_memory(self) -> dict[int, mmap.mmap]:
        """What the ranks of this host keep there; those of which it can't be had are left out (a collective)."""
        found = {}
        for rank in self._mates:
            with contextlib.suppress(OSError, TypeError):
                found[rank] = progress.map_file(Path(self._ranks[rank]["memory"]))
        dist.barrier()
        if self._ranks[self._rank]["memory"]:
            Path(self._ranks[self._rank]["memory"]).unlink()
        return found

    def say_goodbye(self) -> None:
        """This rank ends as it should. Rank 0, which keeps the store, stays until the others do, too."""
        if not self._open:
            return
        self._state = LEFT
        self._round_trip()
        while self._rank == 0 and self.failure is None and self._still_here(self._visible):
            time.sleep(POLL_SECONDS)

    def _is_another_ones(self, error: BaseException) -> bool:
        """Whether it only says that a rank has gone which this one was connected to."""
        own = isinstance(error, RunError) or not isinstance(error, RuntimeError)
        return not own and (LOST_PEER.search(str(error)) is not None or self.explains_a_signal())

    def explains_a_signal(self) -> bool:
        """Whether DeepSpeed's launcher has a reason to send one that is no person's: a rank of this host has ended."""
        if not self._open:
            return False
        ended = [rank for rank, process in self._mates.items() if _state_of(process) == GONE]
        if ended and self.failure is None and self._agreed is None:
            self._round_trip()  # it may have told of a failure before it went
        told = self.failure is not None or self._agreed is not None
        return told or any(self._heard[rank][0]["state"] != LEFT for rank in ended)

    # The thread that may be held up.

    def _exchange(self) -> None:
        store = None
        while self._open:
            self._wake.clear()
            try:
                if store is None and not self._refused():
                    store = dist.rendezvous()
                if store is not None:
                    self._exchange_once(store)
            except Exception:  # the other thread decides what it means
                store = None
            self._came_round.set()
            self._wake.wait(BEAT_SECONDS)

    def _refused(self) -> bool:
        """Whether nobody keeps the store any more: its host answers, and no process listens."""
        refused = False
        with contextlib.suppress(OSError):
            try:
                socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), 1.0).close()
            except ConnectionRefusedError:
                refused = True
        if not refused:
            self._lost_since = None
        elif self._lost_since is None:
            self._lost_since = self._awake
        return refused

    def _exchange_once(self, store) -> None:
        self._beat += 1
        store.set(f"{self._key}/{self._rank}", json.dumps(self._my_record()))
        failure = f"{self._key}/failure"
        if self._proposal is not None:
            store.compare_set(failure, "", self._proposal)  # the first one counts
        texts = store.multi_get([f"{self._key}/{rank}" for rank in self._visible])
        for rank, text in zip(self._visible, texts, strict=True):
            record = json.loads(text)
            if self._heard[rank][0]["beat"] != record["beat"]:
                self._heard[rank] = record, self._awake
        if store.check([failure]):
            self._agreed = json.loads(store.get(failure))
        self._contact = self._awake

    def _round_trip(self) -> None:
        """Let the other thread exchange once more from the beginning, if it can."""
        if self._awake - self._contact > AGREE_SECONDS:
            return
        for _ in range(2):  # it may be in the middle
            self._came_round.clear()
            self._wake.set()
            self._came_round.wait(AGREE_SECONDS / 2)

    def _my_record(self) -> dict:
        return {
            **progress.record(),
            "place": self._place or progress.place(),
            "still_seconds": self._awake - self._still_since,
            "state": self._state,
            "error": self._error,
            "beat": self._beat,
        }

    # The thread that never waits.

    def _watch(self) -> None:
        before, armed = time.monotonic(), float("-inf")
        while self._open:
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            # What this thread did not see, since the process was stopped or the machine slept, ages nobody.
            self._awake += min(now - before, 4 * POLL_SECONDS)
            before = now
            if now - armed > ARM_SECONDS and sys.__stderr__ is not None:
                # If something holds Python's lock for good, no thread here runs any more: this ends the process.
                faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)
                armed = now
            self._look()

    def _look(self) -> None:
        current = progress.record()
        if current != self._last:
            self._last, self._still_since = current, self._awake
        if self._agreed is not None:
            self._end(self._agreed)
        if self._state == FAILED:
            return
        ranks = self._seen()
        culprits = blame(ranks, self._patience, everyone=len(ranks) == len(self._ranks))
        if not culprits and self._rank and (trouble := self._trouble_with_the_store()):
            culprits = [(seen, trouble) for seen in ranks if seen.rank == 0]
        if culprits:
            failure = failure_of(culprits, ranks)
            blamed = {row["rank"] for row in failure["culprits"]}
            failure["told_by"] = self._speaker(range(len(self._ranks)), blamed)
            self._proposal = json.dumps(failure)
            self._round_trip()
            # Where the store is away each host speaks for itself.
            self._end(self._agreed or failure | {"told_by": self._speaker([self._rank, *self._mates], blamed)})

    def _speaker(self, ranks: Iterable[int], blamed: set[int]) -> int:
        left = {rank for rank, (record, _) in self._heard.items() if record["state"] != HERE}
        return min(set(ranks) - blamed - left, default=self._rank)

    def _seen(self) -> list[Seen]:
        processes = {rank: _state_of(process) for rank, process in self._mates.items()}
        gone = {rank for rank, state in processes.items() if state == GONE}
        if gone - self._gone:
            self._round_trip()  # it may have left as it should, and have said so
            self._gone = gone
        hosts, found = [one["host"] for one in self._ranks], []
        for rank, (record, renewed) in self._heard.items():
            if rank == self._rank:
                found.append(Seen(rank, hosts[rank], self._my_record()))
                continue
            silent, process = self._awake - renewed, processes.get(rank)
            if rank in self._memory and (process or silent > AGREE_SECONDS):
                record = record | progress.read(self._memory[rank])
            found.append(Seen(rank, hosts[rank], record, silent, process))
        return found

    def _trouble_with_the_store(self) -> str | None:
        silent = self._awake - self._contact
        if silent >= self._patience:
            return f"can't be reached for {silent:.0f} s, nor can the rendezvous store, which it keeps"
        if self._lost_since is not None and self._awake - self._lost_since >= min(GRACE_SECONDS, self._patience):
            return "is gone: nobody keeps the rendezvous store any more"
        return None

    # The end.

    def _end(self, failure: dict) -> None:
        """The report, the checkpoint that is ready, and nobody of this host stays behind."""
        self.failure = failure
        deeds = threading.Thread(target=self._last_deeds, args=(failure,), daemon=True)
        deeds.start()
        deeds.join(LAST_DEEDS_SECONDS)
        self._state = LEFT
        self._round_trip()
        blamed = {row["rank"] for row in failure["culprits"]} & self._mates.keys()
        # Who is to blame and silent, on a host that was cut off, will not hear of it: only the time would be lost.
        lost = {rank for rank, (_, renewed) in self._heard.items() if self._awake - renewed > QUIET_SECONDS}
        lost &= {row["rank"] for row in failure["culprits"]}
        waits_for = [rank for rank in self._visible if rank not in lost] if self._rank == 0 else blamed
        end = time.monotonic() + GRACE_SECONDS
        while self._still_here(waits_for) and time.monotonic() < end:
            self._wake.set()
            time.sleep(POLL_SECONDS / 2)
        for rank in blamed:
            with contextlib.suppress(psutil.Error):  # psutil hits no other process that was given the number
                self._mates[rank].kill()
        os._exit(FAILED_EXIT_STATUS)

    def _still_here(self, ranks: Iterable[int]) -> list[int]:
        """Which of them, as far as anybody can tell, are on their way."""

        def is_on_its_way(rank: int) -> bool:
            record, renewed = self._heard[rank]
            heard = self._awake - renewed < min(self._patience, SUSPICIOUS_SECONDS)
            stands = rank not in self._mates or _state_of(self._mates[rank]) is None
            return rank != self._rank and record["state"] == HERE and heard and stands

        return [rank for rank in ranks if is_on_its_way(rank)]

    def _last_deeds(self, failure: dict) -> None:
        if self._rank == failure["told_by"]:
            self._keep(failure)  # first: the pipe behind stderr may have gone with the connection to another host
            sys.stderr.write(f"\n{report(failure)}\nall ranks end, with status {FAILED_EXIT_STATUS}\n")
        if any(row["rank"] == self._rank for row in failure["culprits"]):
            stack = "".join(traceback.format_stack(sys._current_frames()[threading.main_thread().ident]))
            sys.stderr.write(f"\nthe main thread of rank {self._rank}:\n{stack}")
        if self.checkpoints is not None and self.checkpoints.writes:
            try:
                _, name = self.checkpoints.write_ready()
                if name:
                    sys.stderr.write(f"checkpoint {name} is on the disk, go on with --resume\n")
            except OSError as error:
                sys.stderr.write(f"a last checkpoint could not be written: {error}\n")
        sys.stdout.flush()
        sys.stderr.flush()

    def _keep(self, failure: dict) -> None:
        if self.checkpoints is None:
            return  # the run has no folder yet
        row = {"time": f"{datetime.now():%Y-%m-%d %H:%M:%S}", **failure}
        with contextlib.suppress(OSError), (self.checkpoints.folder.parent / FILE).open("a") as file:
            file.write(json.dumps(row) + "\n")


def _myself(key: str) -> dict:
    """This rank, as JSON knows it; `machine` is the same where processes see each other."""
    memory = None
    with contextlib.suppress(OSError):
        memory = str(progress.share(f"{key}-{dist.rank()}"))
    host, boot, namespace = _host(), Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    machine = [host, boot.read_text() if boot.exists() else "", os.readlink(namespace) if namespace.exists() else ""]
    return {"host": host, "machine": machine, "pid": os.getpid(), "memory": memory}


def _host() -> str:
    """The host's name, with the address that the other hosts know it by, if there are others."""
    name, (place, port) = os.uname().nodename, (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    try:
        family, _, _, _, address = socket.getaddrinfo(place, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing, and shows which way it would go
            own = probe.getsockname()[0]
    except OSError:
        return name
    return name if ipaddress.ip_address(own).is_loopback else f"{name} ({own})"


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _state_of(process: psutil.Process | None) -> str | None:
    """GONE, STOPPED or None."""
    try:
        if process is None or not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return GONE
        return STOPPED if process.status() == psutil.STATUS_STOPPED else None
    except psutil.NoSuchProcess:
        return GONE
    except psutil.Error:
        return None
