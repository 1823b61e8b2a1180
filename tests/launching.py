"""Runs the project's commands as a user would: from a shell, through DeepSpeed's launcher or plain Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from engine import launchers
from engine.launchers import free_port

ROOT = Path(__file__).resolve().parent.parent
DEEPSPEED = Path(sys.executable).parent / "deepspeed"


def launch(
    *arguments,
    script: str = "launch/train.py",
    ranks: int = 2,
    cwd: Path = ROOT,
    timeout: float = 600,
    **environment,
) -> subprocess.CompletedProcess:
    """`deepspeed --num_accelerators RANKS SCRIPT ARGUMENTS` from the repository's root or `cwd`."""
    command = [DEEPSPEED, "--num_accelerators", ranks, "--master_port", free_port(), ROOT / script]
    return _run([*command, *arguments], cwd, timeout, environment)


def launch_plain(
    *arguments, script: str = "launch/train.py", timeout: float = 600, **environment
) -> subprocess.CompletedProcess:
    """`python SCRIPT ARGUMENTS`: one process."""
    return _run([sys.executable, script, *arguments], ROOT, timeout, environment)


def run(command: list, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """Any other command, from the repository's root."""
    return _run(command, ROOT, timeout, environment)


def _run(command: list, cwd: Path, timeout: float, environment: dict) -> subprocess.CompletedProcess:
    # `deepspeed` starts its ranks with the `python3` on the PATH: it must be this one.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**launchers.without_ranks(os.environ), "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
