"""Ranks, reductions and the rank-aware logger: the engine's only user of torch.distributed.

Every function works in a plain single process too, where it is the identity.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from engine import progress, traffic
from engine.errors import RunError

_NO_LIMIT = timedelta(days=7)  # in milliseconds it has to fit 32 bits
_exchanges = itertools.count()  # those before there is a group; in one order on all ranks


def is_distributed() -> bool:
    """Whether a process group is up (one of a single rank counts)."""
    return dist.is_available() and dist.is_initialized()


def leave() -> None:
    """Take down the process group, at the end of all work: its threads could outlive what they stand on."""
    if is_distributed():
        dist.destroy_process_group()


def rank() -> int:
    """This process's index among all ranks; 0 in a plain process."""
    return dist.get_rank() if is_distributed() else int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """This process's index among the ranks of its node; 0 in a plain process."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """Number of ranks; 1 in a plain process."""
    return dist.get_world_size() if is_distributed() else 1


def all_reduce(tensor: Tensor, op: str = "sum") -> Tensor:
    """`tensor` reduced over all ranks; the argument is left as it was.

    Args:
        tensor: any shape, the same on every rank.
        op: "sum", "max" or "min".
    """
    if not is_distributed():
        return tensor.clone()
    # NCCL reduces device tensors only; a host scalar (an offloaded optimizer's norm) travels there and back.
    moved = tensor.detach().clone().to(_device())
    with progress.collective("all_reduce"):
        dist.all_reduce(moved, getattr(dist.ReduceOp, op.upper()))
    traffic.count("reduced", moved, world_size(), passes=2)
    return moved.to(tensor.device)


def all_gather_rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Rows of every rank joined in rank order, on every rank: one exchange for all tensors.

    Args:
        tensors: `[B_r, ...]` each, with as many rows as this rank has; B_r may differ between ranks and may be 0.
    """
    if not is_distributed():
        return list(tensors)
    # Bytes travel, so that tensors of any type share a message, bool and float64 included.
    rows = [_row_bytes(tensor) for tensor in tensors]
    whole = torch.cat(_gather_ragged(torch.cat(rows, dim=1)))
    columns = whole.split([part.shape[1] for part in rows], dim=1)
    return [_rows_from_bytes(column, like) for column, like in zip(columns, tensors, strict=True)]


def all_gather_objects(value) -> list:
    """One value that JSON knows per rank, in rank order, on every rank; a tuple comes back as a list."""
    if not is_distributed():
        return [value]
    message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(part.cpu().numpy().tobytes()) for part in _gather_ragged(message.to(_device())[:, None])]


def broadcast_object(value, source: int = 0):
    """`value` of rank `source`, on every rank. Small ones: it travels as one gathered value among Nones."""
    return all_gather_objects(value if rank() == source else None)[source]


def rendezvous() -> dist.TCPStore:
    """A connection of its own to the store that the ranks met at: any thread may use it, and it never waits long."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))


# Before there is a group: through the store that ranks will meet at.


@functools.cache  # kept: with its last user in this process the store would go, and ranks meet there later
def _meeting_point() -> dist.Store:
    """Rank 0 keeps it from now on, unless torchrun does."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeps = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(
            address, port, is_master=keeps, timeout=_patience(), wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        said = f"rank {rank()} on {os.uname().nodename} can't {'keep' if keeps else 'reach'} the rendezvous store"
        raise RunError(f"{said} at {address}:{port}: {str(error).splitlines()[0]}") from error
    return dist.PrefixStore(f"before-start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _patience() -> timedelta:
    """How long nodes may take to come: as long as DeepSpeed and torch let them."""
    return timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", 30)))


def _will_be_distributed() -> bool:
    return not is_distributed() and int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ


def on_first_of_each_node(job: Callable[[], None]) -> None:
    """Do a job on the first rank of each node; the others wait for that of theirs."""
    done = f"first/{rank() - local_rank()}"  # every launcher numbers the ranks of a node without a gap
    if local_rank() == 0:
        job()
        if _will_be_distributed():
            _meeting_point().set(done, "")
    elif _will_be_distributed():
        _meeting_point().wait([done])
    barrier()


def exchange_with_hosts(value) -> list[tuple[str, object]]:
    """The host's name and one value that JSON knows of each rank, on every rank, in or before the group.

    Raises:
        RunError: before the group, some rank did not come in time.
    """
    mine = [os.uname().nodename, value]
    if not _will_be_distributed():
        return [tuple(one) for one in all_gather_objects(mine)]
    store, world, number = _meeting_point(), int(os.environ["WORLD_SIZE"]), next(_exchanges)
    store.set(f"value-{number}/{rank()}", json.dumps(mine))
    keys = [f"value-{number}/{other}" for other in range(world)]
    try:
        store.wait(keys)
    except RuntimeError as error:
        raise RunError(_who_is_late(store, keys, error)) from error
    found = [tuple(json.loads(store.get(key))) for key in keys]
    # With rank 0 the store goes: it stays until all have read.
    if store.add(f"read-{number}", 1) == world:
        store.set(f"all-have-read-{number}", "")
    store.wait([f"all-have-read-{number}"])
    return found


def _who_is_late(store: dist.Store, keys: list[str], error: RuntimeError) -> str:
    try:
        late = [other for other, key in enumerate(keys) if not store.check([key])]
    except RuntimeError as lost:  # rank 0 keeps the store: its patience ended first, and it has said who is late
        return f"the rendezvous store of rank 0 is gone ({str(lost).splitlines()[0]}); look at what rank 0 says"
    said = f"{len(late)} of {len(keys)} ranks, the first of them {late[0]}, did not come" if late else str(error)
    return f"{said} within {_patience()} (DEEPSPEED_TIMEOUT, in minutes); look at their hosts"


def wait_without_limit() -> Callable:
    """Let collectives wait for any phase, however long; returns `new_group` that makes groups of the same kind."""
    distributed_c10d._set_pg_timeout(_NO_LIMIT)
    return functools.partial(dist.new_group, timeout=_NO_LIMIT)


def broadcast_tensors(tensors: dict[str, dict[str, Tensor]] | None, source: int) -> dict[str, dict[str, Tensor]]:
    """Named tensors of rank `source`, in parts, on every rank: one message each, since all could be a whole model."""
    if not is_distributed():
        return tensors
    layouts = {part: {name: _layout(t) for name, t in of.items()} for part, of in (tensors or {}).items()}
    layouts = broadcast_object(layouts if rank() == source else None, source)
    found = {}
    for part, of_part in layouts.items():
        found[part] = {}
        for name, (dtype, shape) in of_part.items():
            mine = rank() == source
            tensor = tensors[part][name] if mine else torch.empty(shape, dtype=getattr(torch, dtype))
            found[part][name] = _broadcast(tensor, source)
    return found


def _layout(tensor: Tensor) -> tuple[str, list[int]]:
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def _broadcast(tensor: Tensor, source: int) -> Tensor:
    if tensor.numel() == 0:
        return tensor
    moved = tensor.contiguous().to(_device())
    with progress.collective("broadcast"):
        dist.broadcast(moved, source)
    traffic.count("gathered", moved, world_size())
    return moved.to(tensor.device)


def _gather_ragged(rows: Tensor) -> list[Tensor]:
    """`[B_r, N]` of every rank, in rank order; B_r may differ, so the counts travel first and padding with the rest."""
    counts = _gather(torch.tensor([len(rows)], device=rows.device))[:, 0].tolist()
    padded = torch.nn.functional.pad(rows, (0, 0, 0, max(counts) - len(rows)))
    return [part[:n] for part, n in zip(_gather(padded), counts, strict=True)]


def _gather(tensor: Tensor) -> Tensor:
    """`[world, *tensor.shape]`, from tensors of one shape."""
    whole = tensor.new_empty(world_size(), *tensor.shape)
    if tensor.numel():
        with progress.collective("all_gather"):
            dist.all_gather(list(whole), tensor.contiguous())
        traffic.count("gathered", whole, world_size())
    return whole


def _row_bytes(tensor: Tensor) -> Tensor:
    """`[B, bytes of a row]` uint8, from `[B, ...]` of any type."""
    flat = tensor.detach().to(_device()).reshape(len(tensor), math.prod(tensor.shape[1:]))
    return flat.contiguous().view(torch.uint8)


def _rows_from_bytes(rows: Tensor, like: Tensor) -> Tensor:
    """The way back, `[B, ...]` with the type, trailing shape and device of `like`."""
    aligned = rows.clone(memory_format=torch.contiguous_format)  # a column may begin between two numbers
    return aligned.view(like.dtype).reshape(len(rows), *like.shape[1:]).to(like.device)


def barrier() -> None:
    """Wait until every rank has come here."""
    if is_distributed():
        with progress.collective("barrier"):
            dist.barrier()


def agree(problem: str | None) -> None:
    """Raise RunError on every rank if any rank names a problem, with the first rank's text.

    Without this, the rank that raises leaves the others waiting in their next collective.
    """
    problems = all_gather_objects(problem)
    for index, text in enumerate(problems):
        if text is not None:
            raise RunError(f"rank {index}: {text}" if len(problems) > 1 else text)


def _device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class _MainRankOnly(logging.Filter):
    """Passes errors of every rank, and the rest from rank 0 alone."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING or rank() == 0


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: rank 0 speaks, other ranks only of errors."""
    logger = logging.getLogger(name)
    if not any(isinstance(f, _MainRankOnly) for f in logger.filters):
        logger.addFilter(_MainRankOnly())
    return logger
