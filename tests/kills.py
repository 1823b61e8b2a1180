"""Kills and signals a run again and again and compares what it comes to with a run that nobody touched.

    python -m tests.kills 100        that many SIGKILLs at random moments, then the comparison
    python -m tests.kills signals    every signal to every process in every phase

Prints a line for each and a verdict; exit status 0 if all went on bitwise. Longer than a test may take.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil

from engine import checkpoint_store
from tests import checkpoints
from tests.launching import launch
from tests.test_interruption import LEVELS, Launched, interrupt
from tests.test_resume import record

PHASES = ("generation", "inference", "training")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def recipe_of(folder: Path, iterations: int) -> Path:
    return checkpoints.save_recipe(
        folder,
        iterations=iterations,
        kl={"target": 1.0},
        scores={"normalize": True},
        checkpoint={"every_iterations": 1, "mid_phase": True, "keep_last": 3},
    )


def torn(output: Path) -> list[str]:
    """What is wrong with any checkpoint that has its name: nothing may be."""
    found = [checkpoint_store.problem_of(path) for path in checkpoint_store.finished(output / "checkpoints")]
    return [problem for problem in found if problem]


def random_kills(folder: Path, kills: int, seed: int = 0) -> bool:
    """SIGKILL to one rank or to all processes, at a random moment from the first checkpoint on."""
    choices = random.Random(seed)
    recipe, output, bad = recipe_of(folder, iterations=10**6), folder / "run", 0
    for kill in range(kills):
        launched = Launched(recipe, output, "generation", folder, dwell_seconds=0)
        launched.wait_for_the_phase()
        time.sleep(choices.uniform(0, 4))
        tree = launched.tree()
        level = choices.choice((*LEVELS, "all"))
        for name, process in tree.items():
            if level in (name, "all"):
                process.kill()
        _, alive = psutil.wait_procs(tree.values(), timeout=90)
        newest, problems = checkpoint_store.finished(output / "checkpoints")[0].name, torn(output)
        bad += bool(alive or problems or "Traceback" in launched.text() and "passed over" in launched.text())
        print(
            f"kill {kill + 1}: {level}, newest {newest}, torn {problems or 'none'}, left {alive or 'none'}", flush=True
        )
    return compare(recipe, output, folder, int(newest[:6]) + 2) and not bad


def compare(recipe: Path, output: Path, folder: Path, iterations: int) -> bool:
    """Both to the same end."""
    for arguments in (("--output", output, "--resume", "auto"), ("--output", folder / "whole")):
        done = launch(recipe, "--iterations", str(iterations), *arguments, timeout=10**5)
        assert done.returncode == 0, done.stderr
    same = record(output) == record(folder / "whole")
    print(f"{iterations} iterations: {'the same, bitwise' if same else 'DIFFERENT'}")
    return same


def all_signals(folder: Path) -> bool:
    recipe, output, bad = recipe_of(folder, iterations=10**6), folder / "run", 0
    for phase in PHASES:
        for level in LEVELS:
            for number in SIGNALS:
                found = interrupt(recipe, output, phase, level, number)
                bad += bool(found["alive"] or found["problem"] or found["seconds"] > 20)
                print(
                    f"{phase}, {number.name} to {level}: all gone after {found['seconds']:.1f} s, status "
                    f"{found['status']}, {found['checkpoint']}, left {found['alive'] or 'none'}",
                    flush=True,
                )
    return compare(recipe, output, folder, int(found["checkpoint"][:6]) + 2) and not bad


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        wanted = sys.argv[1]
        good = all_signals(Path(name)) if wanted == "signals" else random_kills(Path(name), int(wanted))
    sys.exit(0 if good else 1)
