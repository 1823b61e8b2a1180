"""The record of what a rank does: what it says of phases and collectives, and what is left of it after a kill."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch.distributed.distributed_c10d import _get_default_group

from engine import dist, progress
from tests.launching import ROOT


def test_phases_nest_and_an_exception_stays_where_it_came_from():
    with progress.phase("outer"):
        with progress.phase("inner"):
            assert progress.record()["phase"] == "inner"
        assert progress.record()["phase"] == "outer"
        with pytest.raises(KeyError), progress.phase("broken"):
            raise KeyError
        assert progress.record()["phase"] == "broken"


def test_a_collective_counts_and_is_left_after_an_exception_too():
    before = progress.record()
    with pytest.raises(RuntimeError), progress.collective("all_reduce"):
        inside = progress.record()
        raise RuntimeError
    after = progress.record()
    assert inside["inside"] and not after["inside"]
    assert after["collectives"] == before["collectives"] + 1 and after["collective"] == "all_reduce"


DYING = """
import os, signal
from pathlib import Path
from engine import progress
path = progress.share("test-progress-%d")
progress.begin_iteration(3)
with progress.phase("training"), progress.collective("reduce_scatter_tensor"):
    print(path, flush=True)
    input()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_did_can_be_read():
    code = DYING % time.monotonic_ns()
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    path = Path(process.stdout.readline().strip())
    memory = progress.map_file(path)
    path.unlink()
    process.communicate("\n", timeout=60)
    assert process.returncode == -9
    assert progress.read(memory) == {
        "phase": "training",
        "iteration": 3,
        "collective": "reduce_scatter_tensor",
        "collectives": 1,
        "inside": True,
    }


def _asynchronous() -> list[bool]:
    """Whether the record says inside: before the other rank comes, after it came, and when nobody holds the result."""
    found, noted = [], progress.noted(torch.distributed.all_reduce, "all_reduce")
    if dist.rank() == 1:
        time.sleep(1)
    work = noted(torch.ones(4), async_op=True)
    if dist.rank() == 0:
        found.append(progress.record()["inside"])
    work.wait()
    found.append(progress.record()["inside"])
    del work
    return [*found, progress._now.work() is not None]


@pytest.mark.dist
def test_a_collective_that_returned_at_once_is_left_when_it_is_complete(pool):
    assert pool.run(_asynchronous) == [[True, False, False], [False, False]]


def _limits() -> list[float]:
    new_group = dist.wait_without_limit()
    groups = _get_default_group(), new_group(list(range(dist.world_size())))
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


@pytest.mark.dist
def test_collectives_wait_longer_than_any_phase(pool):
    for limits in pool.run(_limits):
        assert min(limits) >= 5 * 24 * 3600
