"""Which sequences form a minibatch, which rank takes which of them, and how they are cut into forwards.

The result of an update depends on the first alone. Lengths are `[B]` tokens of a row; a forward pads to its longest.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine import dist
from engine.config import PPOConfig
from engine.randomness import Stream, generator

FORWARD_SHARE = 1 / 16
"""What a forward costs whatever its size, as a share of the budget's tokens: weights to fetch, kernels to launch.

On two CPU ranks with the model of docs/performance.md, about 70 tokens beside a budget of 1088.
"""


def minibatch_rows(seed: int, iteration: int, epoch: int, rows: int, minibatch_sequences: int) -> list[Tensor]:
    """The global row indices of each minibatch of one epoch: a function of (seed, iteration, epoch) alone.

    Returns:
        int64 tensors; the last one is shorter when `rows` doesn't divide.
    """
    order = generator(seed, Stream.MINIBATCHES, iteration, epoch).permutation(rows)
    return list(torch.from_numpy(order).split(minibatch_sequences))


def padded_tokens(rows: Tensor, lengths: Tensor, packing: bool = False) -> int:
    """Tokens of one forward of `rows`, with what padding there is. Without rows 0: the made-up one is not counted."""
    if packing:
        return int(lengths[rows].sum())
    return len(rows) * int(lengths[rows].max()) if len(rows) else 0


def deal(rows: Tensor, lengths: Tensor, settings: PPOConfig, world_size: int) -> list[list[Tensor]]:
    """For each rank the forwards that it runs, as many on every rank: ZeRO-3 hangs when one runs fewer.

    Every rank works out the plan of all from the same lengths: nothing is exchanged.

    Args:
        rows: int64 indices into `lengths`; each lands in exactly one forward.
    """
    if settings.tokens_per_micro_batch is None:
        shares = list(rows.tensor_split(world_size))
    else:
        shares = balanced_shares(rows, lengths[rows], world_size)
    parts = [_cut(share, lengths, settings) for share in shares]
    most = max(map(len, parts))
    return [_split_into(most, own, lengths, settings.packing) for own in parts]


def micro_batches(lengths: Tensor, settings: PPOConfig) -> list[Tensor]:
    """This rank's own rows cut into forwards, as many on every rank (a collective)."""
    parts = _cut(torch.arange(len(lengths)), lengths, settings)
    return _split_into(int(dist.all_reduce(torch.tensor(len(parts)), "max")), parts, lengths, settings.packing)


def balanced_shares(rows: Tensor, work: Tensor, world_size: int) -> list[Tensor]:
    """`rows` dealt to ranks, the longest first, each to the rank that has least so far (Graham 1969: LPT).

    The largest share is at most the mean plus one row's work.

    Args:
        work: `[len(rows)]`, here a sequence's real tokens: a forward's matrix products grow with them.
    """
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for index in work.argsort(descending=True, stable=True).tolist():
        least = loads.index(min(loads))
        shares[least].append(index)
        loads[least] += int(work[index])
    return [rows[torch.tensor(share, dtype=torch.int64)] for share in shares]


def _cut(rows: Tensor, lengths: Tensor, settings: PPOConfig) -> list[Tensor]:
    """One rank's rows as forwards, in order, or the longest first where tokens are counted; at least one, if empty."""
    budget = settings.tokens_per_micro_batch
    if budget is None:
        return list(rows.split(settings.micro_batch_sequences))
    if settings.packing:
        return _fewest_packs(rows, lengths[rows], budget)
    rows = rows[lengths[rows].argsort(descending=True, stable=True)]
    return list(rows.tensor_split(_cheapest_cuts(lengths[rows].numpy(), budget)))


def _cheapest_cuts(lengths: np.ndarray, budget: int) -> list[int]:
    """Where to cut falling lengths into forwards within a budget of tokens, for the least padding and few forwards.

    The cheapest way to cut the first `end` rows ends with one forward, before which lies the cheapest way to cut those
    before it (Bellman 1957). A row longer than the budget stands alone.
    """
    cheapest = np.zeros(len(lengths) + 1)
    last_start = np.zeros(len(lengths) + 1, dtype=np.int64)
    for end in range(1, len(lengths) + 1):
        tokens = np.arange(end, 0, -1) * lengths[:end]  # of the last forward, by its first row
        cost = cheapest[:end] + tokens + budget * FORWARD_SHARE
        cost[:-1][tokens[:-1] > budget] = np.inf
        last_start[end] = cost.argmin()
        cheapest[end] = cost[last_start[end]]
    cuts = [len(lengths)]
    while cuts[-1] > 0:
        cuts.append(int(last_start[cuts[-1]]))
    return cuts[-2:0:-1]


def _fewest_packs(rows: Tensor, lengths: Tensor, budget: int) -> list[Tensor]:
    """Rows in few forwards of at most `budget` tokens each, of equal work where that fits; a longer row stands alone.

    As few as first-fit decreasing needs (Johnson 1973: at most 11/9 of the fewest, and one).
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for index in lengths.argsort(descending=True, stable=True).tolist():
        length = int(lengths[index])
        at = next((pack for pack, left in enumerate(room) if length <= left), len(packs))
        if at == len(packs):
            packs.append([])
            room.append(budget)
        packs[at].append(index)
        room[at] -= length
    balanced = balanced_shares(torch.arange(len(rows)), lengths, max(1, len(packs)))
    if all(len(part) <= 1 or int(lengths[part].sum()) <= budget for part in balanced):
        return [rows[part] for part in balanced]
    return [rows[torch.tensor(pack, dtype=torch.int64)] for pack in packs]


def _split_into(count: int, parts: list[Tensor], lengths: Tensor, packing: bool) -> list[Tensor]:
    """`parts` with the largest halved until there are `count`; empty ones only where every row stands alone."""
    parts = list(parts)
    while len(parts) < count:
        sizes = [padded_tokens(rows, lengths, packing) if len(rows) > 1 else 0 for rows in parts]
        largest = sizes.index(max(sizes))
        parts[largest : largest + 1] = parts[largest].tensor_split(2)
    return parts
