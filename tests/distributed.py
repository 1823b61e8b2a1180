"""Two real processes under DeepSpeed, started once for the whole test session.

A test hands `Pool.run` a module-level function; both ranks import and call it, and the test gets both results.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import time
import traceback
from collections.abc import Callable

from engine.launchers import free_port

TIMEOUT_SECONDS = 300


def _serve(rank: int, world_size: int, port: int, connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
    )
    import torch

    torch.set_num_threads(1)
    from engine import trainer, zero

    zero.start()
    # What was imported stays: each engine that DeepSpeed makes has everything looked through for garbage.
    del trainer
    gc.collect()
    gc.freeze()
    connection.send(("ready", None))
    while (job := connection.recv()) is not None:
        function, arguments = job
        try:
            connection.send(("ok", function(*arguments)))
        except BaseException as error:
            connection.send(("error", (type(error), str(error), traceback.format_exc())))


class WorkerError(RuntimeError):
    """A rank raised; `kind` is the exception's type, the message its text and traceback."""

    def __init__(self, rank: int, kind: type, message: str, trace: str):
        super().__init__(f"rank {rank}: {kind.__name__}: {message}\n{trace}")
        self.rank, self.kind, self.message = rank, kind, message


class Pool:
    """`world_size` ranks in one process group, reused by every test; restarted after a rank hung."""

    def __init__(self, world_size: int = 2):
        self.world_size = world_size
        self._start()

    def _start(self) -> None:
        port = free_port()
        context = multiprocessing.get_context("spawn")  # fork would copy torch's threads half-alive
        self.processes, self.connections = [], []
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, port, theirs), daemon=True)
            process.start()
            self.processes.append(process)
            self.connections.append(ours)
        self._collect()

    def run(self, function: Callable, *arguments) -> list:
        """`function(*arguments)` on every rank; their results in rank order.

        Raises:
            WorkerError: the first rank that raised.
            TimeoutError: a rank didn't answer; the pool starts afresh.
        """
        for connection in self.connections:
            connection.send((function, arguments))
        return self._collect()

    def _collect(self) -> list:
        replies: dict[int, tuple] = {}
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(replies) < self.world_size:
            waiting = [c for rank, c in enumerate(self.connections) if rank not in replies]
            for connection in multiprocessing.connection.wait(waiting, timeout=1):
                replies[self.connections.index(connection)] = connection.recv()
            if any(status == "error" for status, _ in replies.values()):
                # The others may wait for the failed rank in a collective: give them a moment, not minutes.
                deadline = min(deadline, time.monotonic() + 10)
            if time.monotonic() > deadline:
                self.close()
                self._start()
                break
        failed = {rank: value for rank, (status, value) in sorted(replies.items()) if status == "error"}
        for rank, value in failed.items():
            raise WorkerError(rank, *value)
        if len(replies) < self.world_size:
            raise TimeoutError(f"only the ranks {sorted(replies)} answered within {TIMEOUT_SECONDS} s")
        return [replies[rank][1] for rank in range(self.world_size)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
