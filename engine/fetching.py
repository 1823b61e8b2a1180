"""How ZeRO-3 fetches weights around a forward: a decoder layer at a time, ahead of use. Cuts hooks and traffic.

Written for DeepSpeed 0.19.8, whose objects it is handed; engine/zero.py alone imports DeepSpeed.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

PREFETCH = 50_000_000
"""DeepSpeed's default."""


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """The blocks that transformers says belong together, of every model inside.

    DeepSpeed hooks each submodule otherwise, several hooks for each matrix of an adapter, and fetches weight by weight:
    half a CPU second a micro-batch with 8 layers, however small they are.
    """
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    names = {name for model in models for name in model._no_split_modules or ()}
    return [part for part in module.modules() if type(part).__name__ in names]


def prefetch_elements(module: nn.Module) -> int:
    """How much to fetch ahead: one layer while another computes, within DeepSpeed's default.

    More would be gathered into one buffer: of a small model all of it, anew in each forward.
    """
    layers = ((getattr(p, "ds_numel", p.numel()) for p in layer.parameters()) for layer in decoder_layers(module))
    return min(max(map(sum, layers), default=PREFETCH), PREFETCH)


def kind_of(function=None, *arguments, **asked) -> Hashable:
    """What decides the order of modules in a forward and its backward: gradients, function, what was asked."""
    names = frozenset(name for name, value in asked.items() if value is not None and value is not False)
    return torch.is_grad_enabled(), function if callable(function) else None, names


class PhaseWeights:
    """Weights that stay gathered from their first use in a phase to its end: all its passes share one fetch.

    An optimizer step ends it too: DeepSpeed then cuts every weight, and a trained one is another afterwards.

    Args:
        module: under ZeRO-3; below it there is nothing to keep.
        room_bytes: frozen weights are kept if all of them, whole, take no more, then trained ones if these fit as well.
    """

    def __init__(self, module: nn.Module, room_bytes: int):
        cut = [p for p in module.parameters() if hasattr(p, "ds_id") and not p.ds_persist]
        self.parameters: list[nn.Parameter] = []
        for trained in (False, True):
            group = [p for p in cut if p.requires_grad == trained]
            room_bytes -= sum(p.ds_numel * p.element_size() for p in group)
            if room_bytes < 0:
                break
            self.parameters += group
        for parameter in self.parameters:
            parameter.ds_persist = True  # for DeepSpeed's hooks, which remember what they release: never taken back

    def let_go(self) -> None:
        """Back to the shards; every rank calls it, nothing travels."""
        for parameter in self.parameters:
            if parameter.ds_status.name == "AVAILABLE":
                parameter.partition()


class FetchOrders:
    """One remembered order of weights for each kind of forward, instead of DeepSpeed's only one.

    From the second forward of a kind on DeepSpeed knows the order and fetches ahead, keeping what comes again soon. But
    it forgets the order when another module comes than it expects, and inference and training come in turns: with its
    single memory nearly every forward is a first one, which also drops and refetches the weights too small to cut.

    Args:
        offload: DeepSpeed's DeepSpeedZeRoOffload, before its first forward.
    """

    def __init__(self, offload):
        self.offload = offload
        self.blank = offload.param_coordinator
        self.coordinators: dict[Hashable, object] = {}

    def expect(self, kind: Hashable) -> None:
        """Have the coming forward, and its backward, follow the order of `kind`. Every rank names the same kinds."""
        if kind not in self.coordinators:
            coordinator = copy.copy(self.blank)  # what is in flight or in use stays common to all
            coordinator._clear_trace_structures()  # the order becomes its own
            self.coordinators[kind] = coordinator
        self.offload.param_coordinator = self.coordinators[kind]


@contextmanager
def unremembered(engine, orders: FetchOrders | None = None) -> Iterator[None]:
    """Inside, DeepSpeed learns from forwards for these alone, and what they gathered is cut up at the end.

    For before a run's first forward: that one then finds everything as it would have without.

    Args:
        engine: DeepSpeed's; below ZeRO-3 there is nothing to learn.
        orders: the remembered ones, where there are several.
    """
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    if not hasattr(offload, "param_coordinator"):
        yield
        return
    orders = orders or FetchOrders(offload)
    before, remembered = offload.param_coordinator, orders.coordinators
    orders.coordinators = {}
    orders.expect("what comes without a kind")
    try:
        yield
    finally:
        offload.param_coordinator.release_and_reset_all(engine.module)
        offload.param_coordinator, orders.coordinators = before, remembered
