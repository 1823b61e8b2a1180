"""How many bytes collectives move: a running count of this process, fed by engine/dist.py and by DeepSpeed's backend.

A rank of n receives, on average over the ranks, (n - 1) / n of the whole in an all-gather, a broadcast, a reduction to
one rank and a reduce-scatter, and twice that in an all-reduce: it is a reduce-scatter and an all-gather (the accounting
of nccl-tests, PERFORMANCE.md). The whole is the gathered tensor, or the one that is reduced. One rank alone receives
nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from engine import progress

received = {"gathered": 0.0, "reduced": 0.0}
"""Bytes since the process began."""

# DeepSpeed's backend: the method, what it counts as, how often the whole passes, and the argument that holds the whole.
# Where DeepSpeed passes no names, that argument is the first one.
_COLLECTIVES = (
    ("all_gather_into_tensor", "gathered", 1, "output_tensor"),
    ("all_gather", "gathered", 1, "tensor_list"),
    ("all_gather_coalesced", "gathered", 1, "output_tensors"),
    ("broadcast", "gathered", 1, "tensor"),
    ("reduce_scatter_tensor", "reduced", 1, "input_tensor"),
    ("reduce_scatter", "reduced", 1, "input_list"),
    ("reduce", "reduced", 1, "tensor"),
    ("all_to_all_single", "reduced", 1, "input"),  # ZeRO++ reduces quantized gradients by it
    ("all_reduce", "reduced", 2, "tensor"),
    ("all_reduce_coalesced", "reduced", 2, "tensors"),
    ("inference_all_reduce", "reduced", 2, "tensor"),
)
_UNCOUNTED = ("barrier", "monitored_barrier", "all_gather_object", "broadcast_object_list", "all_to_all")
"""Methods that move next to nothing, or that nobody uses here; they wait for other ranks all the same."""


def count(kind: str, whole: Tensor | Iterable[Tensor], ranks: int, passes: int = 1) -> None:
    """Add a collective of `ranks` ranks over `whole`, which passes through once or twice."""
    tensors = [whole] if isinstance(whole, Tensor) else whole
    received[kind] += passes * sum(tensor.nbytes for tensor in tensors) * (ranks - 1) / ranks


@contextmanager
def uncounted() -> Iterator[None]:
    """Inside, nothing counts: a checkpoint is no part of an iteration."""
    before = dict(received)
    try:
        yield
    finally:
        received.update(before)


def watch(backend) -> None:
    """Count every collective that goes through DeepSpeed's backend object from now on: a few Python lines for each."""
    for method, kind, passes, argument in _COLLECTIVES:
        noted = progress.noted(getattr(backend, method), method)
        setattr(backend, method, _counted(noted, kind, passes, argument, backend.get_world_size))
    for method in _UNCOUNTED:
        setattr(backend, method, progress.noted(getattr(backend, method), method))


def _counted(collective: Callable, kind: str, passes: int, argument: str, group_size: Callable) -> Callable:
    @functools.wraps(collective)
    def counting(*args, **named):
        whole = named[argument] if argument in named else args[0]
        group = named["group"] if "group" in named else args[2]  # always third where it has no name
        count(kind, whole, group_size(group), passes)
        return collective(*args, **named)

    return counting
