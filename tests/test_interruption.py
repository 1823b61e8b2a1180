"""A signal to any process of a run: its state is on the disk in seconds, nobody is left, and it goes on bitwise."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from engine import checkpoint_store
from tests import checkpoints
from tests.launching import DEEPSPEED, ROOT, launch
from tests.test_resume import record

pytestmark = pytest.mark.dist

ON_DISK_SECONDS = 20
LEVELS = ("runner", "launcher", "rank 0", "rank 1")


class Launched:
    """A running `deepspeed tests/slow_train.py`, whose processes can be signalled one by one."""

    def __init__(self, recipe: Path, output: Path, phase: str, folder: Path, dwell_seconds: float = 5):
        self.marker = folder / f"marker-{phase}-{time.monotonic_ns()}-"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [DEEPSPEED, "--num_accelerators", "2", "--master_port", port, ROOT / "tests/slow_train.py", recipe]
        command += ["--output", output, "--resume", "auto"]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "SLOW": phase, "MARKER": str(self.marker)}
        environment["DWELL_SECONDS"] = str(dwell_seconds)
        self.log = (folder / "log.txt").open("w+")
        self.process = subprocess.Popen(
            [str(part) for part in command], cwd=ROOT, env=environment, stdout=self.log, stderr=subprocess.STDOUT
        )

    def wait_for_the_phase(self) -> None:
        end = time.monotonic() + 200
        while not all(Path(f"{self.marker}{rank}").exists() for rank in (0, 1)):
            assert self.process.poll() is None and time.monotonic() < end, self.text()
            time.sleep(0.05)

    def tree(self) -> dict[str, psutil.Process]:
        runner = psutil.Process(self.process.pid)
        (launcher,) = [p for p in runner.children() if "deepspeed.launcher.launch" in p.cmdline()]
        ranks = {f"rank {p.environ()['LOCAL_RANK']}": p for p in launcher.children()}
        return {"runner": runner, "launcher": launcher, **ranks}

    def text(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text()


def interrupt(recipe: Path, output: Path, phase: str, level: str, number: signal.Signals) -> dict:
    """Start or go on, signal one process in the phase's second iteration, wait until all are gone."""
    launched = Launched(recipe, output, phase, recipe.parent)
    launched.wait_for_the_phase()
    tree, sent = launched.tree(), time.monotonic()
    tree[level].send_signal(number)
    gone, alive = psutil.wait_procs(tree.values(), timeout=60)
    seconds = time.monotonic() - sent
    for process in alive:
        process.kill()
    newest = checkpoint_store.finished(output / "checkpoints")[0]
    return {
        "alive": alive,
        "seconds": seconds,
        "checkpoint": newest.name,
        "problem": checkpoint_store.problem_of(newest),
        "status": tree["runner"].returncode,
        "text": launched.text(),
    }


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interruption")
    return checkpoints.save_recipe(folder, iterations=9, checkpoint={"every_iterations": 100}, kl={"target": 1.0})


def test_stopped_in_each_phase_at_each_level_it_goes_on_bitwise(recipe):
    output = recipe.parent / "run"
    stops = [
        ("generation", "runner", signal.SIGTERM, "000001", -signal.SIGTERM),
        ("inference", "launcher", signal.SIGUSR1, "000002.1-generation", 0),
        ("training", "rank 1", signal.SIGINT, "000003.3-training-0001", 75),
        ("generation", "rank 0", signal.SIGTERM, "000005", 75),
        ("training", "launcher", signal.SIGTERM, "000006.3-training-0001", 1),
    ]
    for phase, level, number, checkpoint, status in stops:
        found = interrupt(recipe, output, phase, level, number)
        assert not found["alive"], found
        assert found["checkpoint"] == checkpoint and found["problem"] is None, found["text"]
        assert found["seconds"] < ON_DISK_SECONDS and found["status"] == status, found
        assert "stopped: " in found["text"] and "Traceback" not in found["text"] or level == "runner", found["text"]
    done = launch(recipe, "--output", output, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    whole = launch(recipe, "--output", recipe.parent / "whole")
    assert whole.returncode == 0, whole.stderr
    assert record(output) == record(recipe.parent / "whole")


def test_a_time_limit_stops_it_too(recipe):
    output = recipe.parent / "limited"
    stopped = launch(recipe, "--iterations", "1000", "--output", output, "--time-limit", "20s")
    assert stopped.returncode == 75, stopped.stderr
    assert "the time limit of 20 s is reached" in stopped.stderr and "go on with --resume" in stopped.stderr
    newest = checkpoint_store.finished(output / "checkpoints")[0]
    assert checkpoint_store.problem_of(newest) is None
