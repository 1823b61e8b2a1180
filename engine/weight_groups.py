"""The generation module's weights in groups that come and go together: one per decoder layer, embedding, norm and head.

Under ZeRO-3 a budget says how many bytes of them stay. The rest are fetched while decoding, in one fixed order on every
rank: a group arrives before the forward that reads it, the next one is gathered meanwhile, and it leaves right after.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from engine import zero
from engine.roles import ACTOR

# How to unpack a 4-bit weight: bitsandbytes keeps it on the parameter.
PACKING = ("quant_state", "blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized")

Place = tuple[nn.Module, str]
"""A module and the name that it holds a weight by."""


@dataclass(eq=False)
class Weight:
    """One weight of the replica: where it comes from, and every place where it goes (tied weights have two)."""

    source: nn.Parameter
    merge: BaseTunerLayer | None  # the LoRA layer whose update is added
    places: list[Place] = field(default_factory=list)

    @property
    def needed(self) -> list[nn.Parameter]:
        """What must be whole to read it."""
        if self.merge is None:
            return [self.source]
        return [self.source, self.merge.lora_A[ACTOR].weight, self.merge.lora_B[ACTOR].weight]

    @property
    def gathered_bytes(self) -> int:
        """Of all that it needs: the weight itself, and the adapter that is merged into it."""
        return sum(zero.elements(p) * p.element_size() for p in self.needed)

    def read(self) -> nn.Parameter:
        """The weight as the sampler computes with it. Never written to: it can be a rank's own shard, or ZeRO's."""
        data = self.source.data
        if self.merge is not None:
            data = data + self.merge.get_delta_weight(ACTOR)
        if not hasattr(self.source, "quant_state"):
            return nn.Parameter(data, requires_grad=False)
        packed = torch.Tensor._make_subclass(type(self.source), data, False)
        for name in PACKING:
            setattr(packed, name, getattr(self.source, name))
        return packed

    @cached_property
    def absent(self) -> nn.Parameter:
        """What lies in its place while others use the memory: no bytes, but of its type and on its device.

        A sampler asks a module's first parameter where to compute.
        """
        nothing = torch.empty(0, dtype=self.source.dtype, device=self.source.device)
        return nn.Parameter(nothing, requires_grad=False)


@dataclass(frozen=True)
class Group:
    """Weights that the forward of one module reads, each with its places in there.

    Tied weights belong to each group that has a place of theirs.
    """

    unit: nn.Module | None
    """None: nobody can tell when they are read."""
    places: dict[Weight, list[Place]]

    @property
    def gathered_bytes(self) -> int:
        return sum(weight.gathered_bytes for weight in self.places)

    def fetch(self) -> zero.Fetch:
        return zero.Fetch(parameter for weight in self.places for parameter in weight.needed)

    def arrive(self, fetch: zero.Fetch) -> None:
        """Fill the places from a fetch of this group's."""
        fetch.wait()
        for weight, places in self.places.items():
            put(weight.read(), places)
            fetch.release(weight.needed)  # one by one: whole layer and merged layer side by side would be two layers

    def leave(self) -> None:
        for weight, places in self.places.items():
            put(weight.absent, places)


def put(parameter: nn.Parameter, places: list[Place]) -> None:
    for part, leaf in places:
        part._parameters[leaf] = parameter


def grouped(module: nn.Module, weights: list[Weight]) -> list[Group]:
    """All weights in groups, in the module's order; what belongs to no unit comes first."""
    units = list(_units(module))
    owner = {id(part): unit for unit in units for part in unit.modules()}
    groups = {unit: Group(unit, {}) for unit in [None, *units]}
    for weight in weights:
        for place in weight.places:
            groups[owner.get(id(place[0]))].places.setdefault(weight, []).append(place)
    return [group for group in groups.values() if group.places]


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of the outermost lists of layers, and what lies beside those lists."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif any(isinstance(part, nn.ModuleList | nn.ModuleDict) for part in child.modules()):
            yield from _units(child)
        else:
            yield child


def split(groups: list[Group], budget_bytes: int | None) -> tuple[list[Group], list[Group]]:
    """The groups that stay within a budget (None: all), and those that are fetched: what they hold beside those.

    First come, first served; a later one that still fits stays too. All save the same traffic per byte, but the first
    have nothing to hide a fetch behind, and that of the first fetched group runs while all before it compute.
    """
    staying: list[Group] = []
    kept: set[Weight] = set()
    left = budget_bytes
    for group in groups:
        fresh = Group(group.unit, {weight: weight.places for weight in group.places if weight not in kept})
        size = fresh.gathered_bytes
        if left is None or group.unit is None or size <= left:
            staying.append(fresh)
            kept.update(fresh.places)
            left = None if left is None else left - size
    others = [Group(group.unit, {w: p for w, p in group.places.items() if w not in kept}) for group in groups]
    return staying, [group for group in others if group.places]


class Visits:
    """Fetches groups of weights while a module computes.

    Which collectives a forward makes must not depend on what it computes, or ranks would wait for each other for ever:
    every pass fetches every group once, in the order given. One that the module reads earlier than that waits for those
    before it, one that it never reads is fetched and dropped.
    """

    def __init__(self, module: nn.Module, groups: list[Group]):
        self.groups = groups
        self.arrived = len(groups)
        self.ahead: zero.Fetch | None = None
        hooks = [
            module.register_forward_pre_hook(lambda *_: self._begin()),
            module.register_forward_hook(lambda *_: self._finish()),
        ]
        for index, group in enumerate(groups):
            hooks.append(group.unit.register_forward_pre_hook(lambda *_, index=index: self._need(index)))
            hooks.append(group.unit.register_forward_hook(lambda *_, group=group: group.leave()))
            group.leave()
        self.hooks = hooks

    def idle_pass(self) -> None:
        """The collectives of one forward without the forward: for a rank that has nothing to compute."""
        self._begin()
        self._finish()

    def close(self) -> None:
        """Take the hooks off, in the middle of a pass too."""
        for hook in self.hooks:
            hook.remove()
        if self.ahead is not None:
            self.ahead.release()
            self.ahead = None

    def _begin(self) -> None:
        self.arrived = 0
        self._look_ahead()

    def _look_ahead(self) -> None:
        self.ahead = self.groups[self.arrived].fetch() if self.arrived < len(self.groups) else None

    def _need(self, index: int) -> None:
        while self.arrived <= index:
            self.groups[self.arrived].arrive(self.ahead)
            self.arrived += 1
            self._look_ahead()

    def _finish(self) -> None:
        while self.arrived < len(self.groups):
            self.ahead.release()
            self.arrived += 1
            self._look_ahead()
        for group in self.groups:
            group.leave()
