"""Each check of the environment sees its fault by name: what one process sees, and what ranks must have in common."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from engine import dist, environment_checks, findings
from engine.command_line import load_recipe
from tests import checkpoints
from tests.launching import ROOT

# --- before ranks meet: real ports, limits and shared memory, in a process that is in no group yet

BEFORE_START = """
import resource, sys
from engine import environment_checks
from engine.errors import RecipeError
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
environment_checks.SHARED_MEMORY_BYTES *= int(sys.argv[3])
try:
    for found in environment_checks.before_start():
        print(found.name, "|", found.problem)
except RecipeError as error:
    print("refused", *error.problems, sep="\\n")
"""


def before_start(files: int, times: int, port: int) -> list[str]:
    group = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    command = [sys.executable, "-c", BEFORE_START, str(files), str(most), str(times)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **group}, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if " | " in line or "self-check" in line or line == "refused"]


def test_all_that_is_wrong_is_said_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused, *problems = before_start(100, 10**6, port)
    assert refused == "refused"
    assert [problem.partition(":")[0] for problem in problems] == [
        "self-check, master port",
        "self-check, shared memory",
        "self-check, open files",
    ]
    assert str(port) in problems[0] and "2 ranks need" in problems[1] and "may open 100 files" in problems[2]


def test_a_low_limit_waits_for_the_others_to_say_so():
    """It does not keep ranks from meeting, so it is told with what they find together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    *fine, problem = before_start(100, 1, port)
    assert fine == ["master port | None", "shared memory | None"]
    assert problem == "open files | a rank may open 100 files and needs up to 272; raise it (ulimit -n 65536)"


def test_the_disk_must_hold_what_lies_side_by_side(tmp_path, monkeypatch):
    """10 M trained numbers, 3 checkpoints: 3 x 12 + 4 bytes each, and 64 MiB of logs."""
    needed = 10_000_000 * (3 * 12 + 4) + 64 * 2**20
    monkeypatch.setattr(environment_checks, "_free_bytes", lambda place: needed)
    assert environment_checks.disk_space(tmp_path / "not" / "there", 10_000_000, 3)[1] is None
    monkeypatch.setattr(environment_checks, "_free_bytes", lambda place: needed - 1)
    problem = environment_checks.disk_space(tmp_path, 10_000_000, 3)[1]
    assert "3 checkpoints, final weights and logs need 467 MB" in problem and "--output" in problem
    kept = tmp_path / "checkpoints" / "000001"
    kept.mkdir(parents=True)
    (kept / "actor.safetensors").write_bytes(b"\0" * 1000)
    assert environment_checks.disk_space(tmp_path, 10_000_000, 3)[1] is None, "the next checkpoint takes its place"


# --- what ranks must have in common: each in a working folder of its own, with its own copy of everything


@pytest.fixture(scope="module")
def disks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("disks")
    first = folder / "0"
    first.mkdir()
    checkpoints.save_policy(first / "policy")
    checkpoints.save_prompts(first / "prompts.jsonl")
    shutil.copy(ROOT / "ds_configs" / "zero2.json", first / "ds_config.json")
    (first / "rewards.py").write_text("def one(prompts, responses, **columns):\n    return [1.0] * len(prompts)\n")
    shutil.copytree(ROOT / "engine", first / "engine", ignore=shutil.ignore_patterns("__pycache__"))
    (first / "recipe.yaml").write_text(
        "model: {path: policy}\nrewards: [{function: 'rewards.py:one'}]\ndata: {dataset: prompts.jsonl}\n"
        "zero: {ds_config: ds_config.json}\noutput: run\n"
    )
    shutil.copytree(first, folder / "1")
    return folder


def failures(folder: str, spoilt: str | None, own_nodes: bool, learning_rate: float | None) -> dict[str, str]:
    """What fails where each rank has a disk of its own, with one file altered on rank 1."""
    rank, before, local, nodename = dist.rank(), Path.cwd(), os.environ["LOCAL_RANK"], os.uname
    os.chdir(Path(folder) / str(rank))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment_checks, "REPOSITORY", Path.cwd())
        if own_nodes:
            os.environ["LOCAL_RANK"] = "0"
            patch.setattr(os, "uname", lambda: os.uname_result((*nodename()[:1], f"node{rank}", *nodename()[2:])))
        if rank == 1 and spoilt:
            original = Path(spoilt).read_bytes()
            Path(spoilt).write_bytes(original + b"\n")
        try:
            changes = {"actor": {"optimizer": {"learning_rate": learning_rate}}} if learning_rate and rank else {}
            recipe = load_recipe("recipe.yaml", changes)
            found = environment_checks.examine(recipe, environment_checks.before_start())
        finally:
            if rank == 1 and spoilt:
                Path(spoilt).write_bytes(original)
            os.environ["LOCAL_RANK"] = local
            os.chdir(before)
    return {one.name: one.problem for one in found if one.problem is not None}


@pytest.mark.dist
@pytest.mark.parametrize(
    "name, spoilt",
    [
        ("same model", "policy/model.safetensors"),
        ("same tokenizer", "policy/tokenizer.json"),
        ("same data", "prompts.jsonl"),
        ("same recipe", "ds_config.json"),
        ("same recipe", "rewards.py"),
        ("same code", "engine/ppo.py"),
    ],
)
def test_a_file_that_differs_on_one_rank(pool, disks, name, spoilt):
    one, other = pool.run(failures, str(disks), spoilt, True, None)
    assert one == other and one.keys() == {name}
    assert "ranks differ: rank 0 has" in one[name] and "rank 1" in one[name]
    assert environment_checks.REMEDIES[name] in one[name]


@pytest.mark.dist
def test_a_setting_that_differs_on_one_rank(pool, disks):
    assert [found.keys() for found in pool.run(failures, str(disks), None, True, 1e-3)] == [{"same recipe"}] * 2


@pytest.mark.dist
def test_own_disks_are_fine_on_nodes_of_their_own_and_not_on_one(pool, disks):
    assert pool.run(failures, str(disks), None, True, None) == [{}, {}]
    one, other = pool.run(failures, str(disks), None, False, None)
    assert one == other and one.keys() == {"shared path"}
    assert "see different folders at run" in one["shared path"]


def test_a_folder_that_takes_no_files():
    _, problem = environment_checks.shared_path(Path("/proc/self/run"))
    assert "takes no new files" in problem and "--output" in problem


def test_what_failed_on_some_ranks_is_told_with_their_numbers():
    finding = findings.Finding("open files", "7 of 9", None, 0.5)
    low = findings.Finding("open files", "1 of 9", "too low", 1.0)
    assert findings._of_all([finding, finding]) == finding
    assert findings._of_all([low, low]).problem == "too low"
    mixed = findings._of_all([finding, low, low])
    assert (mixed.problem, mixed.measured, mixed.seconds) == ("rank 1: too low; rank 2: too low", "1 of 9", 1.0)
    assert findings.within(float("nan"), 1.0, "got {measured}")[1] == "got nan, bound 1e+00"
