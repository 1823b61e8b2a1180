"""Which sequences form a minibatch, and how one is cut into forwards: the result depends on neither ranks nor cuts."""

from __future__ import annotations

import torch
from torch import Tensor

from engine import dist
from engine.randomness import Stream, generator


def minibatch_rows(seed: int, iteration: int, epoch: int, rows: int, minibatch_sequences: int) -> list[Tensor]:
    """The global row indices of each minibatch of one epoch: a function of (seed, iteration, epoch) alone.

    Returns:
        int64 tensors; the last one is shorter when `rows` doesn't divide.
    """
    order = generator(seed, Stream.MINIBATCHES, iteration, epoch).permutation(rows)
    return list(torch.from_numpy(order).split(minibatch_sequences))


def rows_of_rank(rows: Tensor, rank: int, world_size: int) -> Tensor:
    """This rank's contiguous part of `rows`; parts differ by at most one row."""
    return rows.tensor_split(world_size)[rank]


def micro_batches(rows: Tensor, micro_batch_sequences: int) -> list[Tensor]:
    """`rows` cut into forwards, as many on every rank (a collective): ZeRO-3 hangs when one rank runs fewer.

    A rank with fewer rows gets empty micro-batches at the end.
    """
    needed = -(-len(rows) // micro_batch_sequences)
    count = max(1, int(dist.all_reduce(torch.tensor(needed), "max")))
    parts = list(rows.split(micro_batch_sequences)) if len(rows) else []
    return parts + [rows[:0]] * (count - len(parts))
