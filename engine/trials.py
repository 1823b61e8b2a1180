"""Trials of a search: each a process group of its own, with a folder that says how it went; none is made twice."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from engine import launchers
from engine.config import REPOSITORY, Recipe
from engine.errors import RecipeError
from engine.tuning import FAILED, NO_MEMORY, RAN, Trial
from engine.tuning_space import PHASES, Point, Space, changed, write_files

WARM_UP = 1
"""Iterations before the measured ones: DeepSpeed learns in them what to fetch ahead, allocators fill."""
RECORD, RESULT, SEARCH = "measured.json", "trial.json", "search.json"
WITHOUT_MEMORY = re.compile(r"out of memory|OutOfMemory|allocate memory", re.IGNORECASE)
KILLED = "return code = -9"
LONGEST_TIDYING_SECONDS = 40
"""DeepSpeed's launcher lets its ranks live so long after it is told to end, and 30 s are its own patience."""


def claim(folder: Path, recipe: Recipe, options: dict) -> TextIO:
    """Take a folder for a search: a new one, or that of the same search, which then goes on.

    Returns:
        The lock, which goes with the last process that holds it open.

    Raises:
        RecipeError: it holds something else, or the same search runs in it.
    """
    said = json.dumps({"recipe": recipe.model_dump(mode="json"), "options": options}, indent=2, default=str) + "\n"
    file, remedy = folder / SEARCH, "give another folder with --search"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists() and any(one.name not in (".lock", f".{SEARCH}") for one in folder.iterdir()):
            raise RecipeError(f"--search: {folder} is no search's folder; {remedy}")
        lock = (folder / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not file.exists():
            (folder / f".{SEARCH}").write_text(said)
            (folder / f".{SEARCH}").rename(file)
    except BlockingIOError:
        raise RecipeError(f"--search: another process searches in {folder}; wait for its end, or {remedy}") from None
    except OSError as error:
        raise RecipeError(f"--search: can't write {folder} ({error.strerror}); {remedy}") from None
    if file.read_text() != said:
        raise RecipeError(
            f"--search: {folder} holds a search of another recipe, with other options or other files, see {file}; "
            + remedy
        )
    return lock


@dataclass
class Trials:
    """What tries combinations of a space, in a folder.

    Args:
        lock: the folder's; each trial holds it too, so as long as one lives nobody else searches there.
        ranks: devices of the whole job.
        by: the seconds that count: wall, or cpu on machines that others use too.
        device_memory: bytes that a rank's device may hold.
        limit_seconds: of one trial, start included.
        hostfile: DeepSpeed's; None: this host.
        done: is called after each trial.
    """

    space: Space
    folder: Path
    lock: TextIO
    ranks: int
    by: str
    device_memory: int
    limit_seconds: float
    on_cuda: bool = False
    hostfile: Path | None = None
    done: Callable[[Trial], None] = lambda trial: None
    made: list[Trial] = field(default_factory=list)

    def __post_init__(self):
        for folder in sorted(self.folder.glob("[0-9]*")):
            if not (folder / RESULT).exists():  # the search was broken off in it
                shutil.rmtree(folder)
                continue
            trial = Trial(**json.loads((folder / RESULT).read_text()))
            if trial.status != FAILED:  # what failed, for whatever reason, is tried again
                self.made.append(trial)

    def measure(self, point: Point, iterations: int) -> Trial:
        """Try a combination, or find what came of it before."""
        settings = self.space.settings(point)
        found = [trial for trial in self.made if trial.settings == settings and trial.iterations == iterations]
        if not found:
            found = [self._make(settings, iterations)]
            self.made += found
        self.done(found[0])
        return found[0]

    def _make(self, settings: dict[str, object], iterations: int) -> Trial:
        number = max((int(folder.name) for folder in self.folder.glob("[0-9]*")), default=0) + 1
        folder = self.folder / f"{number:03d}"
        folder.mkdir(parents=True)
        recipe, raw = changed(self.space.recipe, settings)
        write_files(_for_trial(recipe, folder / "run", iterations), raw, folder)
        begin = time.monotonic()
        status, said = self._run(folder)
        trial = Trial(settings, iterations, status, said=said, wall_seconds=time.monotonic() - begin)
        if status == RAN:
            trial = self._read(trial, json.loads((folder / RECORD).read_text()))
        unfinished = folder / f".{RESULT}"
        unfinished.write_text(json.dumps(trial.as_json(), indent=2) + "\n")
        unfinished.rename(folder / RESULT)
        return trial

    def _run(self, folder: Path) -> tuple[str, str]:
        """How a trial ended, and why."""
        where = ["--hostfile", str(self.hostfile)] if self.hostfile else ["--num_accelerators", str(self.ranks)]
        command = [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            *where,
            "--master_port",
            str(launchers.free_port()),
        ]
        command += [str(REPOSITORY / "launch/trial.py"), str(folder / "recipe.yaml"), str(folder / RECORD)]
        environment = launchers.without_ranks(os.environ)
        # The launcher starts its ranks with the python3 that comes first.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
        process = None
        with (folder / "log.txt").open("w") as log:
            try:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=[self.lock.fileno()],
                )
                status = process.wait(self.limit_seconds)
            except subprocess.TimeoutExpired:
                return FAILED, f"took longer than {self.limit_seconds:.0f} s"
            finally:
                if process is not None:
                    _end(process)
        if status == 0 and (folder / RECORD).exists():
            return RAN, ""
        text = (folder / "log.txt").read_text(errors="replace")
        if KILLED in text:  # by the system, for host memory: on a CPU that is what the plan is of
            return (FAILED if self.on_cuda else NO_MEMORY), "the system killed a rank"
        return (NO_MEMORY if WITHOUT_MEMORY.search(text) else FAILED), _reason(text)

    def _read(self, trial: Trial, record: dict) -> Trial:
        """A trial with what its ranks measured."""
        if record["ranks"] != self.ranks:
            said = f"{record['ranks']} ranks were started, and --gpus is {self.ranks}; give the hosts so many slots"
            return replace(trial, status=FAILED, said=said)
        timed = record["iterations"][WARM_UP:]
        seconds = {
            phase: statistics.median(statistics.mean(one[f"{self.by}_seconds"][phase]) for one in timed)
            for phase in PHASES
        }
        on_device = [max(one["peak_device_bytes"]) for one in timed if one["peak_device_bytes"]]
        peak = max(on_device or [max(one["peak_rss_bytes"]) for one in timed])
        trial = replace(trial, seconds=seconds, peak_bytes=peak)
        if on_device and peak > self.device_memory:
            said = f"a device held {peak / 1e9:.1f} GB, more than the {self.device_memory / 1e9:.1f} GB that it may"
            return replace(trial, status=NO_MEMORY, said=said)
        return trial


def _for_trial(recipe: Recipe, run: Path, iterations: int) -> Recipe:
    """What of a recipe costs the same time with every setting is left out."""
    values = recipe.model_dump()
    values |= {"iterations": WARM_UP + iterations, "output": str(run), "resume": None, "time_limit": None}
    values |= {"self_check": False, "watchdog_seconds": None}
    values["evaluation"] = {}
    values["critic"]["warmup_iterations"] = 0
    values["checkpoint"]["mid_phase"] = False
    values["failures"]["on_divergence"] = "stop"
    return Recipe.model_validate(values)


def _end(process: subprocess.Popen) -> None:
    """Of a launcher and its ranks nothing is left, even if a second signal comes meanwhile."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LONGEST_TIDYING_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _reason(log: str) -> str:
    """The line of a log that says most: our own, an exception's, or the last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip() and "sigkill_handler" not in line]
    for wanted in (r"^error: ", r"^(\w+\.)*\w*(Error|Exception|Interrupt)\b", r"out of memory"):
        if found := [line for line in lines if re.search(wanted, line)]:
            return found[-1][:300]
    return (lines or ["it said nothing"])[-1][:300]
