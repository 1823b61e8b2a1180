"""Ways to start ranks other than `deepspeed`: the same run by torchrun, by Open MPI and by the Slurm script."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import RecipeError
from engine.launchers import adopt
from tests import checkpoints
from tests.launching import ROOT, free_port, launch, run
from tests.test_resume import record

SLURM = ROOT / "launch/slurm.sbatch"


def mpi(rank: int, size: int, local_rank: int, local_size: int) -> dict[str, str]:
    values = {"RANK": rank, "SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_SIZE": local_size}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in values.items()}


def test_what_open_mpi_says_is_understood():
    environment = mpi(1, 2, 1, 2)
    adopt(environment)
    found = {name: value for name, value in environment.items() if not name.startswith("OMPI")}
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    assert found == {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    environment = {**mpi(9, 16, 1, 8), "MASTER_ADDR": "first", "MASTER_PORT": "1234"}
    adopt(environment)
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["LOCAL_SIZE"]) == ("9", "1", "8")
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("first", "1234")


def test_ranks_of_several_hosts_must_be_told_where_the_first_is():
    with pytest.raises(RecipeError, match="16 ranks, 8 of them on this host, and MASTER_ADDR is not set; .*-x MASTER"):
        adopt(mpi(9, 16, 1, 8))


@pytest.mark.parametrize("others", [{}, {"RANK": "3"}, {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}])
def test_what_another_launcher_says_stays(others):
    environment = dict(others) if "RANK" not in others else {**others, **mpi(0, 2, 0, 2)}
    before = dict(environment)
    adopt(environment)
    assert environment == before


# --- whole runs; each starts two ranks on this host


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Two layers of width 32 with random weights."""
    return checkpoints.save_recipe(tmp_path_factory.mktemp("launchers"))


@pytest.fixture(scope="module")
def by_deepspeed(recipe) -> dict:
    done = launch(recipe, "--output", recipe.parent / "deepspeed", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return record(recipe.parent / "deepspeed")


@pytest.mark.dist
def test_torchrun(recipe, by_deepspeed):
    command = [Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2", "--master-port", free_port()]
    done = run([*command, "launch/train.py", recipe, "--output", recipe.parent / "torchrun"], OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert record(recipe.parent / "torchrun") == by_deepspeed


@pytest.mark.dist
@pytest.mark.skipif(not shutil.which("mpirun"), reason="Open MPI's mpirun (package openmpi-bin) is not installed")
def test_mpirun(recipe, by_deepspeed):
    command = ["mpirun", "-n", "2", "--oversubscribe", "--bind-to", "none", "-x", f"MASTER_PORT={free_port()}"]
    command += [sys.executable, "launch/train.py", recipe, "--output", recipe.parent / "mpirun"]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = run(command, OMP_NUM_THREADS="1", **as_root)
    assert done.returncode == 0, done.stderr
    assert record(recipe.parent / "mpirun") == by_deepspeed


# --- launch/slurm.sbatch, with commands of Slurm that pretend: two nodes, which are this host

SCONTROL = """#!/bin/bash
echo "$@" >> "$CALLS"
[ "$1" = show ] && printf "localhost\\nother\\n"
exit 0
"""
SRUN = """#!/bin/bash
[ -n "${STATUS:-}" ] && exit "$STATUS"
while [[ "$1" == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first; one=$?
wait $second; other=$?
exit $((one > other ? one : other))
"""


def sbatch(folder: Path, *arguments, **environment) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The script as Slurm would start it on the first node, and what scontrol was asked."""
    commands, calls = folder / "commands", folder / f"calls-{len(list(folder.glob('calls-*')))}"
    commands.mkdir(exist_ok=True)
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    job = {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "two", "MASTER_PORT": str(free_port())}
    done = run(
        ["bash", SLURM, *arguments], CALLS=str(calls), **{**job, "OMP_NUM_THREADS": "1", **environment, "PATH": path}
    )
    return done, calls.read_text().splitlines()


def test_the_slurm_script_starts_a_rank_on_each_node(tmp_path, recipe, by_deepspeed):
    done, calls = sbatch(tmp_path, recipe, "--output", recipe.parent / "slurm", RANKS_PER_NODE="1")
    assert done.returncode == 0, done.stderr
    assert calls == ["show hostnames two"] and not list(ROOT.glob(".hosts-*"))
    assert record(recipe.parent / "slurm") == by_deepspeed


@pytest.mark.parametrize(
    "status, restarts, again",
    [(75, "0", True), (75, "99", True), (70, "0", True), (70, "10", False), (1, "0", False), (2, "0", False)],
)
def test_the_slurm_script_asks_to_be_started_again_where_that_helps(tmp_path, status, restarts, again):
    done, calls = sbatch(tmp_path, "recipe.yaml", STATUS=str(status), SLURM_RESTART_COUNT=restarts)
    assert done.returncode == status
    assert ("requeue 4711" in calls) == again


def test_the_slurm_script_is_bash():
    assert subprocess.run(["bash", "-n", SLURM]).returncode == 0
