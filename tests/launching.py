"""Runs the project's commands as a user would: from a shell, through DeepSpeed's launcher or plain Python."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEEPSPEED = Path(sys.executable).parent / "deepspeed"


def launch(*arguments, ranks: int = 2, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """`deepspeed --num_accelerators RANKS launch/train.py ARGUMENTS` from the repository's root."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [DEEPSPEED, "--num_accelerators", str(ranks), "--master_port", str(port), "launch/train.py"]
    return _run([*command, *arguments], timeout, environment)


def launch_plain(*arguments, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """`python launch/train.py ARGUMENTS`: one process."""
    return _run([sys.executable, "launch/train.py", *arguments], timeout, environment)


def _run(command: list, timeout: float, environment: dict) -> subprocess.CompletedProcess:
    # `deepspeed` starts its ranks with the `python3` on the PATH: it must be this one.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**inherited, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
