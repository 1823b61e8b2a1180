"""What this machine is and can do at most, and what this process has used of it."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch

from engine import dist

LIMIT_SIZE = 2048
"""Rows and columns of the matrices whose product shows what the machine can do."""
REPEATS = 3


def describe(device: torch.device) -> dict:
    """Hardware and versions, as a published figure has to name them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "processor": names[0] if names else "unknown",
        "cores": os.cpu_count(),
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads_of_a_rank": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers", "peft")},
    }


def matrix_flops_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """The best of some large matrix products, per CPU second of this process (per second on an accelerator).

    All ranks work at once, as they do in the phases; returns the fastest rank's.
    """
    a, b = (torch.randn(LIMIT_SIZE, LIMIT_SIZE, dtype=dtype, device=device) for _ in range(2))
    a @ b
    dist.barrier()
    best = min(seconds_of(lambda: a @ b, device) for _ in range(REPEATS))
    rate = torch.tensor(2 * LIMIT_SIZE**3 / best, dtype=torch.float64)
    return dist.all_reduce(rate, "max").item()


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """CPU seconds of this process; on an accelerator, wall seconds until it is done."""
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def reset_peaks(device: torch.device) -> None:
    """Let peaks start from what is held now. Where the system can't, resident memory's is since the process began."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process since the last reset."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peak_device_bytes(device: torch.device) -> int | None:
    """Most bytes of tensors on a CUDA device since the last reset; None: a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
