"""The generation module: a plain copy of the policy, whole on every rank, without a single DeepSpeed hook.

DeepSpeed's hooks, not the gathering, are what makes generation through a ZeRO-3 engine slow, so the copy is a module
of its own. In float32 the actor's adapter is merged into the weights; in 16 bit, over quantized weights and with DoRA
it stays apart: merging would round most of a young adapter away (the sampler would be the old policy).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from bitsandbytes.nn import Linear8bitLt
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from engine import adapters, zero
from engine.roles import ACTOR, RolesModel

GATHER_ELEMENTS = 50_000_000
"""Most elements gathered at once on the way into the replica."""

# How to unpack a 4-bit weight: bitsandbytes keeps it on the parameter.
PACKING = ("quant_state", "blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized")


@dataclass
class _Weight:
    """One weight of the replica: where it comes from, and every place where it goes (tied weights have two)."""

    source: nn.Parameter
    merge: BaseTunerLayer | None  # the LoRA layer whose update is added
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def needed(self) -> list[nn.Parameter]:
        """What must be whole to read it."""
        if self.merge is None:
            return [self.source]
        return [self.source, self.merge.lora_A[ACTOR].weight, self.merge.lora_B[ACTOR].weight]

    def read(self) -> nn.Parameter:
        data = self.source.data
        if self.merge is not None:
            data = data + self.merge.get_delta_weight(ACTOR)
        elif hasattr(self.source, "ds_id"):
            data = data.clone()  # the gathered tensor goes; a weight that ZeRO left whole is shared
        if not hasattr(self.source, "quant_state"):
            return nn.Parameter(data, requires_grad=False)
        packed = torch.Tensor._make_subclass(type(self.source), data, False)
        for name in PACKING:
            setattr(packed, name, getattr(self.source, name))
        return packed


class Replica:
    """Fills and empties the generation module.

    Between phases the module's weights live on the meta device, so nothing but its structure is kept. Make it before
    DeepSpeed takes the roles: the copy then has no hook.
    """

    def __init__(self, roles: RolesModel):
        self.roles = roles
        self.merged = _can_merge(roles)
        self.module, self.weights = _skeleton(roles.causal, self.merged)

    def fill(self) -> PreTrainedModel:
        """Gather the weights (a collective) and return the module, ready to sample."""
        for chunk in _chunks(self.weights):
            with torch.no_grad(), zero.gathered(p for weight in chunk for p in weight.needed):
                for weight in chunk:
                    _place(weight, weight.read())
        return self.module

    def free(self) -> None:
        """Drop the weights."""
        for weight in self.weights:
            _place(weight, nn.Parameter(torch.empty(0, device="meta"), requires_grad=False))


def _can_merge(roles: RolesModel) -> bool:
    plain = all(p.dtype == torch.float32 and not hasattr(p, "quant_state") for p in roles.causal.parameters())
    config = getattr(roles.causal, "peft_config", {}).get(ACTOR)
    return plain and not getattr(config, "use_dora", False)


def _skeleton(original: PreTrainedModel, merged: bool) -> tuple[PreTrainedModel, list[_Weight]]:
    """The policy's structure with empty weights, and the list of what fills them."""
    empty = {id(p): nn.Parameter(torch.empty(0, device="meta"), requires_grad=False) for p in original.parameters()}
    keep = [p.quant_state for p in original.parameters() if getattr(p, "quant_state", None) is not None]
    keep += [m for m in original.modules() if isinstance(m, Linear8bitLt)]  # never sharded: shared as they are
    memo = empty | {id(shared): shared for shared in keep}
    module = copy.deepcopy(original, memo)
    sources = {id(empty[id(p)]): p for p in original.parameters()}
    merges = {}
    for part in original.modules():
        twin = memo[id(part)]
        # The same dictionary: wherever DeepSpeed moves the buffers, the replica finds them.
        twin._buffers = part._buffers
        if isinstance(part, BaseTunerLayer) and merged and ACTOR in part.lora_A:
            merges[id(memo[id(part.base_layer)]), "weight"] = part
    module = _without_wrappers(module, merged)
    adapters.Switch(module).to(ACTOR)
    weights: dict[tuple, _Weight] = {}
    for part in module.modules():
        for leaf, parameter in part._parameters.items():
            if parameter is not None and id(parameter) in sources:
                merge = merges.get((id(part), leaf))
                # A tied weight with an update on one side only is two weights.
                weight = weights.setdefault((id(parameter), id(merge)), _Weight(sources[id(parameter)], merge))
                weight.places.append((part, leaf))
    # In train() mode, as what trains is: bitsandbytes' layers compute differently in eval(), and repack in place.
    return module.requires_grad_(False), list(weights.values())


def _without_wrappers(module: nn.Module, merged: bool) -> nn.Module:
    """The module with peft's layers replaced by what the actor computes with."""
    for name, child in list(module.named_children()):
        if isinstance(child, AuxiliaryTrainingWrapper):
            copies = child.modules_to_save
            child = copies[ACTOR] if ACTOR in copies else child.original_module  # noqa: SIM401 (no dict, has no get)
        elif isinstance(child, BaseTunerLayer):
            if merged or ACTOR not in child.lora_A:
                child = child.base_layer
            else:
                for other in set(child.lora_A) - {ACTOR}:
                    child.delete_adapter(other)
        else:
            _without_wrappers(child, merged)
        module._modules[name] = child
    return module


def _place(weight: _Weight, parameter: nn.Parameter) -> None:
    for part, leaf in weight.places:
        part._parameters[leaf] = parameter


def _chunks(weights: list[_Weight]) -> Iterator[list[_Weight]]:
    chunk, elements = [], 0
    for weight in weights:
        size = zero.elements(weight.source)
        if chunk and elements + size > GATHER_ELEMENTS:
            yield chunk
            chunk, elements = [], 0
        chunk.append(weight)
        elements += size
    if chunk:
        yield chunk
