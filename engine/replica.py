"""The generation module: a plain copy of the policy, whole on every rank, without a single DeepSpeed hook.

DeepSpeed's hooks, not the gathering, are what makes generation through a ZeRO-3 engine slow, so the copy is a module
of its own. In float32 the actor's adapter is merged into the weights; in 16 bit it stays apart, because merging
rounds most of a young adapter away (the sampler would be the old policy).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine import zero
from engine.roles import ACTOR, RolesModel

GATHER_ELEMENTS = 50_000_000
"""Most elements gathered at once on the way into the replica."""


class Replica:
    """Fills and empties the generation module.

    Between phases the module's weights live on the meta device, so nothing but its structure is kept.
    """

    def __init__(self, roles: RolesModel):
        self.roles = roles
        self.merged = next(roles.causal.parameters()).dtype == torch.float32
        self.module = self._skeleton()

    def fill(self) -> PreTrainedModel:
        """Gather the weights (a collective) and return the module, ready to sample."""
        sources = self._sources()
        weights: dict[str, Tensor] = {}
        for names in _chunks(sources):
            parameters = [p for name in names for p in sources[name].parameters]
            with torch.no_grad(), zero.gathered(parameters):
                weights.update((name, sources[name].read()) for name in names)
        self.module.load_state_dict(weights, assign=True)
        return self.module

    def free(self) -> None:
        """Drop the weights."""
        empty = {name: tensor.to("meta") for name, tensor in self.module.state_dict().items()}
        self.module.load_state_dict(empty, assign=True)

    def _skeleton(self) -> PreTrainedModel:
        causal = self.roles.causal
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(
                copy.deepcopy(causal.config),
                dtype=next(causal.parameters()).dtype,
                attn_implementation=causal.config._attn_implementation,
            )
            if not self.merged:
                from peft import inject_adapter_in_model

                inject_adapter_in_model(self.roles.policy.peft_config[ACTOR], module, adapter_name=ACTOR)
        for name, buffer in causal.named_buffers():
            path, _, leaf = name.rpartition(".")
            if path.rpartition(".")[2] != "base_layer":
                module.get_submodule(path)._buffers[leaf] = buffer
        return module.requires_grad_(False).eval()

    def _sources(self) -> dict[str, _Source]:
        """Where each entry of the module's state dict comes from."""
        found = {}
        for name in self.module.state_dict():
            path, _, leaf = name.rpartition(".")
            layer = self.roles.causal.get_submodule(path)
            if self.merged and hasattr(layer, "base_layer"):
                found[name] = _Source(layer, leaf, merge=leaf == "weight" and ACTOR in layer.lora_A)
            else:
                found[name] = _Source(layer, leaf, merge=False)
        return found


class _Source:
    """One tensor of the replica: a parameter or buffer of a layer, the adapter's update added where asked."""

    def __init__(self, layer: nn.Module, leaf: str, merge: bool):
        self.layer, self.merge = layer, merge
        self.tensor = getattr(getattr(layer, "base_layer", layer), leaf)
        self.parameters = [self.tensor] if isinstance(self.tensor, nn.Parameter) else []
        if merge:
            self.parameters += [layer.lora_A[ACTOR].weight, layer.lora_B[ACTOR].weight]

    def read(self) -> Tensor:
        if self.merge:
            return self.tensor.data + self.layer.get_delta_weight(ACTOR)
        return self.tensor.data.clone()


def _chunks(sources: dict[str, _Source]) -> list[list[str]]:
    chunks, elements = [[]], 0
    for name, source in sources.items():
        size = getattr(source.tensor, "ds_numel", source.tensor.numel())
        if chunks[-1] and elements + size > GATHER_ELEMENTS:
            chunks.append([])
            elements = 0
        chunks[-1].append(name)
        elements += size
    return chunks
