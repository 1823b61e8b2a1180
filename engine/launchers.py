"""What Open MPI's mpirun tells a process, in the words of torch and DeepSpeed: rank, size, and where ranks meet.

`deepspeed` and `torchrun` use these words themselves. Slurm's variables are not read: they are there in every shell of
a job, started by srun or not; launch/slurm.sbatch starts DeepSpeed's launcher on each node instead.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, MutableMapping

from engine.errors import RecipeError

OPEN_MPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}
PORT = "29500"
"""Where ranks meet if nobody says: the default of DeepSpeed and torchrun."""
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a process that is none of this job's ranks."""
    return {name: value for name, value in environment.items() if name not in OF_A_RANK}


def free_port() -> int:
    """One of this host that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def adopt(environment: MutableMapping[str, str]) -> None:
    """Complete `environment`, which is os.environ, where a launcher of MPI filled it. Before anything reads it.

    Raises:
        RecipeError: ranks of several hosts were not told where rank 0 is.
    """
    if "RANK" in environment or not all(name in environment for name in OPEN_MPI.values()):
        return
    environment.update({name: environment[theirs] for name, theirs in OPEN_MPI.items()})
    if "MASTER_ADDR" not in environment:
        if environment["LOCAL_SIZE"] != environment["WORLD_SIZE"]:
            raise RecipeError(
                f"mpirun started {environment['WORLD_SIZE']} ranks, {environment['LOCAL_SIZE']} of them on this host, "
                "and MASTER_ADDR is not set; give the address of the first host: mpirun -x MASTER_ADDR=..."
            )
        environment["MASTER_ADDR"] = "127.0.0.1"
    environment.setdefault("MASTER_PORT", PORT)
