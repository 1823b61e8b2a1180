"""The generation module: a plain copy of the policy, on every rank, without a single DeepSpeed hook.

DeepSpeed's hooks, not the gathering, are what makes generation through a ZeRO-3 engine slow, so the copy is a module
of its own. In float32 the actor's adapter is merged into the weights; in 16 bit, over quantized weights and with DoRA
it stays apart: merging would round most of a young adapter away (the sampler would be the old policy).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from bitsandbytes.nn import Linear8bitLt
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from engine import adapters, onednn, pointwise
from engine.roles import ACTOR, RolesModel
from engine.weight_groups import Visits, Weight, grouped, put, split


class Replica:
    """Fills and empties the generation module.

    Between phases the module's weights live on the meta device, so nothing but its structure is kept. Make it before
    DeepSpeed takes the roles: the copy then has no hook.
    """

    def __init__(self, roles: RolesModel):
        self.roles = roles
        self.merged = _can_merge(roles)
        self.module, self.weights = _skeleton(roles.causal, self.merged)
        self.groups = grouped(self.module, self.weights)
        self.visits: Visits | None = None
        self.resident_fraction = 1.0  # of the weights' bytes, as last filled

    def fill(self, budget_bytes: int | None = None) -> PreTrainedModel:
        """Gather the weights (a collective) and return the module, ready to sample.

        Args:
            budget_bytes: how many bytes of weights stay; None: all, and the module has no hook. The rest are fetched
                in every forward: at most twice the largest group more, and then each forward is a collective.
        """
        staying, fetched = split(self.groups, budget_bytes)
        resident = sum(group.gathered_bytes for group in staying)
        self.resident_fraction = resident / sum(weight.gathered_bytes for weight in self.weights)
        with torch.no_grad():
            for group in staying:
                group.arrive(group.fetch())
        if fetched:
            self.visits = Visits(self.module, fetched)
        return self.module

    @property
    def largest_group_bytes(self) -> int:
        """What is gathered at once while decoding, at most: twice it with the group that is on its way."""
        return max(group.gathered_bytes for group in self.groups)

    @property
    def idle_pass(self) -> Callable[[], None] | None:
        """Where weights are fetched while decoding: keeps step with another rank's forward, without one."""
        return None if self.visits is None else self.visits.idle_pass

    def free(self) -> None:
        """Drop the weights, in the middle of a forward too."""
        if self.visits is not None:
            self.visits.close()
            self.visits = None
        for weight in self.weights:
            put(nn.Parameter(torch.empty(0, device="meta"), requires_grad=False), weight.places)


def _can_merge(roles: RolesModel) -> bool:
    plain = all(p.dtype == torch.float32 and not hasattr(p, "quant_state") for p in roles.causal.parameters())
    config = getattr(roles.causal, "peft_config", {}).get(ACTOR)
    return plain and not getattr(config, "use_dora", False)


def _skeleton(original: PreTrainedModel, merged: bool) -> tuple[PreTrainedModel, list[Weight]]:
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
    weights: dict[tuple, Weight] = {}
    for part in module.modules():
        for leaf, parameter in part._parameters.items():
            if parameter is not None and id(parameter) in sources:
                merge = merges.get((id(part), leaf))
                # A tied weight with an update on one side only is two weights.
                weight = weights.setdefault((id(parameter), id(merge)), Weight(sources[id(parameter)], merge))
                weight.places.append((part, leaf))
    # In train() mode, as what trains is: bitsandbytes' layers compute differently in eval(), and repack in place.
    module.requires_grad_(False)
    onednn.take_over(module)
    pointwise.take_over(module)
    return module, list(weights.values())


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
