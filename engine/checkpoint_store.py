"""Checkpoints on disk: each is written whole or not at all, a torn one is recognised, and the newest good one is found.

    checkpoints/
      latest                    the name of the newest one; moves last
      000008/                   renamed into place when everything in it is on the disk
        actor.safetensors  critic.safetensors  ...
        state.json
        manifest.json           bytes and SHA-256 of every other file
      .000009-1234/             one that is being written, or was when the power went

Checksums tell of accidents, not of a person who wants to deceive.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: named tensors by part, and everything else."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict


def write(folder: Path, name: str, checkpoint: Checkpoint) -> Path:
    """Write `folder/name` and point to it. A kill at any moment leaves what was there before.

    Args:
        name: sorts after the names of earlier ones; one that exists is replaced.

    Raises:
        OSError: the disk is full, say; nothing of this one is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, unfinished = folder / name, folder / f".{name}-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        for part, tensors in checkpoint.tensors.items():
            save_file(tensors, unfinished / f"{part}.safetensors")
        (unfinished / STATE).write_text(json.dumps(checkpoint.state, allow_nan=False))
        (unfinished / MANIFEST).write_text(json.dumps(_manifest(unfinished), indent=1))
        for file in unfinished.iterdir():
            _sync(file)
        _sync(unfinished)
        replaced = folder / f".{name}-replaced"
        if target.exists():  # a torn one
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        unfinished.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
        _point(folder, name)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return target


def read(path: Path) -> Checkpoint:
    """What `write` was given. Call `problem_of` first."""
    files = sorted(path.glob("*.safetensors"))
    return Checkpoint({file.stem: load_file(file) for file in files}, read_state(path))


def read_state(path: Path) -> dict:
    """Everything but the tensors."""
    return json.loads((path / STATE).read_text())


def problem_of(path: Path) -> str | None:
    """What is wrong with a checkpoint: a file is missing, cut off, altered or not listed. None: it is whole."""
    try:
        listed: Mapping[str, dict] = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{path} has no {MANIFEST}"
    except ValueError:
        return f"{path / MANIFEST} is no JSON"
    for name, wanted in listed.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != wanted["bytes"]:
            return f"{file} has {file.stat().st_size} bytes, not {wanted['bytes']}"
        if _sha256(file) != wanted["sha256"]:
            return f"{file} has changed since it was written (its SHA-256 is another)"
    return None


def finished(folder: Path) -> list[Path]:
    """The checkpoints in a folder, torn ones included, the newest first."""
    return sorted((p for p in folder.glob("*") if p.is_dir() and not p.name.startswith(".")), reverse=True)


def thin_out(folder: Path, kept: Collection[str]) -> None:
    """Delete all checkpoints but these, and what was left unfinished."""
    for path in finished(folder):
        if path.name not in kept:
            shutil.rmtree(path)
    for path in folder.glob(".*-*"):
        shutil.rmtree(path, ignore_errors=True)


def _manifest(folder: Path) -> dict[str, dict]:
    files = sorted(folder.iterdir())
    return {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _point(folder: Path, name: str) -> None:
    pointer = folder / f".{LATEST}-{os.getpid()}"
    pointer.write_text(name + "\n")
    _sync(pointer)
    pointer.replace(folder / LATEST)
    _sync(folder)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
