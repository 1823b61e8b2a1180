"""Ranks, reductions and the rank-aware logger: the engine's only user of torch.distributed.

Every function works in a plain single process too, where it is the identity.
"""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import RunError


def is_distributed() -> bool:
    """Whether a process group is up (one of a single rank counts)."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's index among all ranks; 0 in a plain process."""
    return dist.get_rank() if is_distributed() else int(os.environ.get("RANK", 0))


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
    dist.all_reduce(moved, getattr(dist.ReduceOp, op.upper()))
    return moved.to(tensor.device)


def all_gather_objects(value) -> list:
    """One picklable value per rank, in rank order, on every rank. The peers are our own processes."""
    if not is_distributed():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather_rows(rows: Tensor) -> Tensor:
    """Rows `[B_r, ...]` of every rank joined in rank order, on every rank; B_r may differ and may be 0."""
    if not is_distributed():
        return rows
    counts = all_gather_objects(rows.shape[0])
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    # Bytes travel, so that bool and float64 need no backend support.
    wire = padded.to(_device()).contiguous().view(torch.uint8) if padded.numel() else padded.to(_device())
    parts = [torch.empty_like(wire) for _ in counts]
    if wire.numel():
        dist.all_gather(parts, wire)
    whole = [part.view(rows.dtype).to(rows.device)[:n] for part, n in zip(parts, counts, strict=True)]
    return torch.cat(whole)


def broadcast_object(value, source: int = 0):
    """`value` of rank `source`, on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def barrier() -> None:
    """Wait until every rank has come here."""
    if is_distributed():
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
