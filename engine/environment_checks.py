"""Whether this machine can carry the run: ports, limits, memory, disks; and whether all ranks run the same thing.

What DeepSpeed's start would trip over is looked at before it (`before_start`), the rest once ranks can talk.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import time
import uuid
from importlib.metadata import version
from pathlib import Path

import torch

from engine import dist, zero
from engine.config import REPOSITORY, Recipe, locate
from engine.findings import Finding, Result, find, refuse, together
from engine.identity import digest, identity_of

SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_BYTES = 69_300_000
"""Of a rank: what DeepSpeed's CPU operator maps there, 66 MiB and its counters (csrc/cpu/comm/shm.cpp)."""
OPEN_FILES, OPEN_FILES_OF_A_PEER = 256, 8
"""For libraries, a model's files and the run's; and for each other rank, to which gloo and NCCL keep connections."""
TRAINED_BYTES = 12
"""Of a trained number in a checkpoint: master, exp_avg, exp_avg_sq."""
FINAL_BYTES = 4
"""Of a trained number in final/, at most."""
LOG_BYTES = 64 * 2**20
"""For metrics, samples and curves."""
REMEDIES = {
    "same code": "install the same Alternator and the same requirements.txt on every node",
    "same recipe": "start every rank with the same recipe, ds_config, reward functions and options",
    "same model": "give every node the same model and adapter folders",
    "same tokenizer": "give every node the same tokenizer files",
    "same data": "give every node the same files of prompts",
}


def before_start() -> list[Finding]:
    """What this rank sees before it joins the others.

    Raises:
        RecipeError: without a port or shared memory the start itself would hang or die.
    """
    checks = {"master port": master_port, "shared memory": shared_memory, "open files": open_files}
    found = [find(name, check) for name, check in checks.items()]
    if any(one.problem for one in found[:2]):
        refuse(found)
    return found


def examine(recipe: Recipe, found: list[Finding]) -> list[Finding]:
    """The findings of all ranks; `found` are this rank's from before the start (a collective)."""
    return together([*found, find("shared path", shared_path, folder_of(recipe))]) + same_everywhere(recipe)


def master_port() -> Result:
    """Rank 0 will listen there, and it alone can say whether somebody else does."""
    if dist.is_distributed() or "MASTER_PORT" not in os.environ or os.environ.get("RANK") != "0":
        return "not asked here", None
    port = int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return f"{port}, torchrun's", None
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return f"{port} taken", (
                f"ranks meet at port {port} of {os.uname().nodename}, which can't be had ({error.strerror}): another "
                "run listens there, or what is left of one; end it, or give another port (deepspeed --master_port)"
            )
    return f"{port} free", None


def shared_memory() -> Result:
    """On a CPU, ranks of one host exchange tensors there; a bus error is all that a full one would say."""
    if torch.cuda.is_available() or dist.local_rank() != 0 or dist.is_distributed() or not SHARED_MEMORY.is_dir():
        return "not asked here", None
    ranks = zero.local_ranks()
    needed, free = ranks * SHARED_MEMORY_BYTES, _free_bytes(SHARED_MEMORY)
    return f"{_mb(free)} free of {_mb(needed)}", None if free >= needed else (
        f"{ranks} ranks need {_mb(needed)} of shared memory, got {_mb(free)} free in {SHARED_MEMORY}; enlarge it "
        "(docker run --shm-size 1g), or remove what other runs left there"
    )


def open_files() -> Result:
    """The soft limit of this process."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OPEN_FILES + OPEN_FILES_OF_A_PEER * int(os.environ.get("WORLD_SIZE", 1))
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return f"{limit} of {needed}", None
    return f"{limit} of {needed}", f"a rank may open {limit} files and needs up to {needed}; raise it (ulimit -n 65536)"


def folder_of(recipe: Recipe) -> Path:
    """Where the run's folder lies or will lie."""
    resumed = Path(recipe.resume) if recipe.resume not in (None, "auto") else None
    return Path(recipe.output) if recipe.output else resumed or Path("runs")


def shared_path(folder: Path) -> Result:
    """Whether ranks see what rank 0 writes where the run's folder goes; a node with a disk of its own writes itself."""
    place, node = _existing(folder), os.uname().nodename
    token = f".self-check-{dist.broadcast_object(uuid.uuid4().hex)}"
    problem = _touch(place / token) if dist.rank() == 0 else None
    dist.barrier()
    nodes = dist.all_gather_objects([node, (place / token).exists()])
    if dist.rank() == 0:
        (place / token).unlink(missing_ok=True)
    elif dist.local_rank() == 0 and not nodes[dist.rank()][1]:
        problem = _touch(place / f"{token}-{dist.rank()}")
        (place / f"{token}-{dist.rank()}").unlink(missing_ok=True)
    if nodes[0][1] and len({sees for other, sees in nodes if other == node}) > 1:
        problem = (
            f"ranks of {node} see different folders at {folder}, so that one would look for what another wrote; start "
            "them in one working folder, or give an absolute --output"
        )
    alone = sorted({other for other, sees in nodes if not sees})
    return f"own disks: {', '.join(alone)}" if alone else "one for all ranks", problem


def disk_space(folder: Path, trained: int, checkpoints: int) -> Result:
    """Room for the checkpoints that lie side by side, the final weights and the logs.

    Args:
        trained: numbers that the run trains.
        checkpoints: how many there are at a time, at most.
    """
    if dist.local_rank() != 0:
        return "not asked here", None
    place, held = _existing(folder), sum(f.stat().st_size for f in folder.glob("checkpoints/*/*") if f.is_file())
    needed = trained * (TRAINED_BYTES * checkpoints + FINAL_BYTES) + LOG_BYTES
    free = _free_bytes(place) + held  # a resumed run's checkpoints make room for its next ones
    return f"{_mb(free)} free of {_mb(needed)}", None if free >= needed else (
        f"{checkpoints} checkpoints, final weights and logs need {_mb(needed)}, got {_mb(free)} free in "
        f"{place.absolute()}; make room, lower checkpoint.keep_last, or give another disk with --output"
    )


def same_everywhere(recipe: Recipe) -> list[Finding]:
    """Code, versions, recipe, models, tokenizer and data are equal on all ranks: hashes, by one exchange."""
    start, identity = time.monotonic(), identity_of(recipe)
    mine = {
        "same code": [digest(str(REPOSITORY / "engine"), lambda file: file.suffix == ".py"), _versions()],
        "same recipe": [recipe.model_dump(mode="json"), *_files_beside(recipe)],
        "same model": [identity["base"], identity["roles"], identity["adapter shapes"]],
        "same tokenizer": identity["tokenizer"],
        "same data": [digest(path) or path for path in recipe.datasets],
    }
    ranks = dist.exchange_with_hosts({name: _hash(value) for name, value in mine.items()})
    each, hosts = (time.monotonic() - start) / len(mine), [host for host, _ in ranks]
    return [Finding(name, *_agree(name, [one[name] for _, one in ranks], hosts), each) for name in mine]


def _agree(name: str, hashes: list[str], hosts: list[str]) -> Result:
    first = hashes[0]
    others = [rank for rank, one in enumerate(hashes) if one != first]
    if not others:
        return f"{first[:12]} on {len(hashes)} ranks", None
    said = ", ".join(f"rank {rank} on {hosts[rank]} {hashes[rank][:12]}" for rank in others[:4])
    return f"{len(others)} ranks differ", f"ranks differ: rank 0 has {first[:12]}, {said}; {REMEDIES[name]}"


def _versions() -> dict[str, str]:
    libraries = ("torch", "deepspeed", "transformers", "peft", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in libraries}}


def _files_beside(recipe: Recipe) -> list[str | None]:
    """Of what the recipe names beside models and data: DeepSpeed's JSON, reward functions, the judge."""
    functions = [*(reward.function for reward in recipe.rewards), recipe.evaluation.judge]
    files = [recipe.zero.ds_config, recipe.zero.frozen_ds_config]
    files += [function.rpartition(":")[0] for function in functions if function]
    return [digest(file) for file in files if locate(file).is_file()]


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())


def _touch(file: Path) -> str | None:
    try:
        file.write_bytes(b"\0")
    except OSError as error:
        return f"{file.parent.absolute()} takes no new files ({error.strerror}); give another folder with --output"
    return None


def _free_bytes(place: Path) -> int:
    return shutil.disk_usage(place).free


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"
