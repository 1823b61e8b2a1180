"""What goes to NVMe lies in a folder that goes with its engine, or with the next run after a crash."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import REPOSITORY
from engine.errors import RecipeError
from engine.swap_folder import SwapFolder, redirected

DIES = """
import os, signal, sys
from engine.swap_folder import SwapFolder
folder = SwapFolder(sys.argv[1])
(folder.path / "big").write_text("left behind")
{end}
"""


def ended(parent: Path, end: str) -> int:
    """The status of a process that made a folder and ended so."""
    return subprocess.run([sys.executable, "-c", DIES.format(end=end), str(parent)], cwd=REPOSITORY).returncode


def test_a_folder_goes_when_it_is_closed(tmp_path):
    folder = SwapFolder(tmp_path / "disk")
    (folder.path / "rank0").mkdir()
    (folder.path / "rank0" / "states").write_text("x")
    folder.close()
    folder.close()
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_folder_goes_with_its_object(tmp_path):
    folder = SwapFolder(tmp_path)
    assert folder.path.is_dir()
    del folder
    gc.collect()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "1 / 0"])
def test_a_folder_goes_with_its_process(tmp_path, end):
    ended(tmp_path, end)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(70)"])
def test_the_next_run_removes_what_a_crash_left(tmp_path, end):
    assert ended(tmp_path, end) != 0
    (left,) = tmp_path.iterdir()
    assert (left / "big").exists()
    folder = SwapFolder(tmp_path)
    assert list(tmp_path.iterdir()) == [folder.path] and folder.path != left
    folder.close()


def test_what_another_holds_is_left_alone(tmp_path):
    (tmp_path / "somebody").mkdir()
    first = SwapFolder(tmp_path)
    ended(tmp_path, "")
    second = SwapFolder(tmp_path)
    assert {path for path in tmp_path.iterdir()} == {first.path, second.path, tmp_path / "somebody"}
    first.close()
    second.close()


def test_a_disk_that_takes_nothing_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="zero.nvme_path.*file.*name a folder"):
        SwapFolder(tmp_path / "file")


def test_only_the_path_is_another(tmp_path):
    offload = {"device": "nvme", "nvme_path": str(tmp_path), "buffer_count": 5}
    given = {"steps_per_print": 9, "zero_optimization": {"stage": 3, "offload_optimizer": offload}}
    config, folder = redirected(given)
    assert config["zero_optimization"]["offload_optimizer"] == offload | {"nvme_path": str(folder.path)}
    assert offload["nvme_path"] == str(tmp_path) and config["steps_per_print"] == 9
    folder.close()
    assert redirected({"zero_optimization": {"stage": 3}}) == ({"zero_optimization": {"stage": 3}}, None)
