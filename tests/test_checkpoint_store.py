"""A checkpoint is there whole or not at all, and what is torn is passed over by name."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
import torch

from engine import checkpoint_store
from engine.checkpoint_store import Checkpoint, finished, problem_of, read, thin_out, write


def some(number: float) -> Checkpoint:
    tensors = {"actor": {"a": torch.full((2, 3), number), "step": torch.tensor(3.0)}, "critic": {"b": torch.ones(0)}}
    return Checkpoint(tensors, {"iteration": number, "kl_coef": 0.1})


def newest(folder) -> tuple:
    """The newest whole one, and what is wrong with those after it."""
    problems = []
    for path in finished(folder):
        if problem_of(path) is None:
            return path, problems
        problems.append(problem_of(path))
    return None, problems


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path / "checkpoints", "000008", some(8))
    found, wanted = read(path), some(8)
    assert found.state == wanted.state and found.tensors.keys() == wanted.tensors.keys()
    for part, tensors in wanted.tensors.items():
        assert all(torch.equal(found.tensors[part][name], tensor) for name, tensor in tensors.items())
    assert problem_of(path) is None and newest(path.parent) == (path, [])
    assert (path.parent / "latest").read_text().strip() == "000008"


def cut_off(path):
    file = path / "actor.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip(path):
    file = path / "actor.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "cut off": (cut_off, "bytes, not"),
    "a flipped bit": (flip, "has changed since"),
    "a missing file": (lambda path: (path / "critic.safetensors").unlink(), "critic.safetensors is missing"),
    "no state": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
    "half a manifest": (lambda path: (path / "manifest.json").write_text('{"a'), "is no JSON"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_torn_one_is_passed_over_by_name(tmp_path, kind):
    damage, said = DAMAGE[kind]
    good, torn = write(tmp_path, "000008", some(8)), write(tmp_path, "000009", some(9))
    damage(torn)
    assert said in problem_of(torn)
    found, problems = newest(tmp_path)
    assert found == good and len(problems) == 1 and said in problems[0]
    damage(good)
    assert newest(tmp_path)[0] is None and len(newest(tmp_path)[1]) == 2
    assert write(tmp_path, "000009", some(9.5)) == torn and newest(tmp_path) == (torn, []), "written over"


STEPS = ["save_file", "_manifest", "_sync", "_point"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("call", range(3))
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, step, call):
    good, calls = write(tmp_path, "000008", some(8)), []
    plain = getattr(checkpoint_store, step)

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_store, step, full)
        try:
            write(tmp_path, "000009", some(9))
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert not list(tmp_path.glob(".0*")), "nothing half-written stays"
    found, problems = newest(tmp_path)
    assert not problems and found in (good, tmp_path / "000009") and problem_of(good) is None


@pytest.mark.parametrize("moment", ["rename", "replace"])
def test_a_kill_leaves_a_good_one(tmp_path, moment):
    """The process is gone between the last sync and the rename, or before the pointer moved."""
    good = write(tmp_path, "000008", some(8))
    child = os.fork()
    if child == 0:
        checkpoint_store.Path.rename = checkpoint_store.Path.rename if moment == "replace" else lambda *_: os._exit(9)
        checkpoint_store.Path.replace = lambda *_: os._exit(9)
        write(tmp_path, "000009", some(9))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    found, problems = newest(tmp_path)
    assert not problems and found == (good if moment == "rename" else tmp_path / "000009")
    thin_out(tmp_path, {found.name})
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [found.name]


def test_only_what_is_kept_stays(tmp_path):
    for number in range(6):
        write(tmp_path, f"{number:06}", some(number))
    (tmp_path / ".000009-77").mkdir()
    thin_out(tmp_path, {"000001", "000004", "000005"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000001", "000004", "000005", "latest"]
    shutil.rmtree(tmp_path / "000005")
    assert newest(tmp_path)[0] == tmp_path / "000004", "a pointer to nothing misleads nobody"
