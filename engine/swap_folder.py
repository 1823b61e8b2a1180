"""Where DeepSpeed keeps on a disk what it offloads to NVMe: a folder for each engine and rank, gone with it.

A process that is killed removes nothing. So each folder is held by a lock that goes with its process, however it ends,
and whoever makes the next folder beside it sweeps away those that nobody holds.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from engine.ds_checks import to_nvme
from engine.errors import RecipeError

PREFIX = f"alternator-{os.uname().nodename}-"
"""Locks of other hosts can't be seen on every shared disk: their folders are left alone."""


class SwapFolder:
    """A new folder in `parent`, of this process alone; gone when closed, or with the object.

    Raises:
        RecipeError: `parent` takes no new files.
    """

    def __init__(self, parent: str | Path):
        parent = Path(parent).expanduser().absolute()
        try:
            parent.mkdir(parents=True, exist_ok=True)
            door = _hold(parent)  # or another rank would sweep away what this one is about to hold
            try:
                _sweep(parent)
                self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
                held = _hold(self.path)
            finally:
                os.close(door)
        except OSError as error:
            raise RecipeError(
                f"zero.nvme_path: what goes to NVMe can't be written to {parent} ({error.strerror}); name a folder on "
                "a local disk of each host"
            ) from None
        self.close = weakref.finalize(self, _remove, self.path, held)


def redirected(ds_config: dict) -> tuple[dict, SwapFolder | None]:
    """A resolved configuration that keeps what goes to NVMe in a new folder of this process, and that folder."""
    zero = ds_config.get("zero_optimization", {})
    if not to_nvme(zero):
        return ds_config, None
    folder = SwapFolder(zero["offload_optimizer"]["nvme_path"])
    offload = zero["offload_optimizer"] | {"nvme_path": str(folder.path)}
    return ds_config | {"zero_optimization": zero | {"offload_optimizer": offload}}, folder


def _hold(folder: Path, wait: bool = True) -> int:
    """The folder, opened and held by this process until it is closed.

    Raises:
        OSError: another process holds it, and this one shall not wait.
    """
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(opened)
        raise
    return opened


def _sweep(parent: Path) -> None:
    """Remove the folders of processes that are gone."""
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            held = _hold(folder, wait=False)
        except OSError:  # a living process holds it
            continue
        _remove(folder, held)


def _remove(folder: Path, held: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(held)
