"""Which weights a recipe's roles have, how large each is and who trains it: from configs alone, none is loaded.

Models are built on the meta device, so every family of transformers has its own. Adapters and heads are counted from
the layers that they sit on, as `engine/roles.py` would make them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from engine import causal, models
from engine.config import Recipe
from engine.errors import RecipeError
from engine.fetching import decoder_layers
from engine.role_config import LoraSettings

BASE, ACTOR, CRITIC, REFERENCE = "base", "actor", "critic", "reference"
SHARED = "shared base"
OF_MODELS = {"iterations", "model", "actor", "critic", "reference", "rewards"}
"""What of a recipe shapes depend on, and what these sections must agree with."""


@dataclass
class Bytes:
    """Of one rank: on its device, in host memory and on a disk, by part."""

    device: Counter = field(default_factory=Counter)
    host: Counter = field(default_factory=Counter)
    disk: Counter = field(default_factory=Counter)

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.device + other.device, self.host + other.host, self.disk + other.disk)


@dataclass(frozen=True)
class Weight:
    """One parameter, whole."""

    name: str
    elements: int
    itemsize: int
    role: str = BASE
    """Whose it is: the base's, an adapter's, a head's."""
    trains: bool = False
    layer: int | None = None
    """The decoder layer that it belongs to, counted from 0; None: embedding, last norm or head."""
    constants: int = 0
    """Bytes of what bitsandbytes multiplies a quantized one with: no parameter, whole on every rank."""

    @property
    def nbytes(self) -> int:
        return self.elements * self.itemsize


@dataclass(frozen=True)
class Home:
    """One module under one DeepSpeed engine, and the roles that live in it."""

    name: str
    model: PreTrainedModel
    """On the meta device, without adapters."""
    weights: tuple[Weight, ...]
    frozen_engine: bool = False
    """Inference alone: always ZeRO-3, whatever the trained engines are."""
    offloaded: bool = False
    """Its shards live in host memory."""

    def trained(self) -> dict[str, list[Weight]]:
        """What each role trains here: one group of the optimizer each."""
        groups: dict[str, list[Weight]] = {}
        for weight in self.weights:
            if weight.trains:
                groups.setdefault(weight.role, []).append(weight)
        return groups


def homes(recipe: Recipe) -> list[Home]:
    """Every model of a recipe, the shared one first.

    Raises:
        RecipeError: a config can't be read, or asks for what can't be counted.
    """
    return list(_homes(recipe.model_dump_json(include=OF_MODELS)))


@lru_cache(maxsize=4)  # of the same models much is asked, one thing after the other
def _homes(recipe_text: str) -> tuple[Home, ...]:
    recipe = Recipe.model_validate_json(recipe_text)
    found = [_shared(recipe)]
    if recipe.critic.home == "model":
        found.append(_critic(recipe))
    offload = recipe.reference.offload_param == "cpu"
    if recipe.reference_home == "model":
        found.append(_frozen(REFERENCE, recipe, recipe.reference_path, offload, quantized=True))
    for reward in recipe.rewards:
        if reward.model:
            found.append(_frozen(reward.label, recipe, reward.model, reward.offload_param == "cpu", scores=True))
    return tuple(found)


def skeleton(
    path: str, trust_remote_code: bool = False, scores: bool = False, attention: str | None = None
) -> PreTrainedModel:
    """A model on the meta device: every shape, no number.

    Args:
        path: a folder with a config.json, or a hub name.
        scores: a sequence classifier with one output.
        attention: model.attn_implementation of the recipe. Flash attention, which may not be installed here, keeps
            what sdpa keeps.

    Raises:
        RecipeError: the config can't be read.
    """
    changes = {"num_labels": 1} if scores else {}
    if attention is not None:
        changes["attn_implementation"] = "eager" if attention == "eager" else "sdpa"
    factory = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **changes)
        with torch.device("meta"), no_init_weights():
            return factory.from_config(config, trust_remote_code=trust_remote_code)
    except models.UNLOADABLE as error:
        raise RecipeError(
            f"{path} has no config that a model can be made of: {error}; name a folder with one"
        ) from error


def _shared(recipe: Recipe) -> Home:
    model = skeleton(recipe.model.path, recipe.model.trust_remote_code)
    itemsize, full = models.DTYPES[recipe.model.dtype].itemsize, recipe.actor.train == "full"
    weights = list(_of_model(model, recipe, ACTOR if full else BASE, full, recipe.model.quantization))
    hidden = model.get_output_embeddings().in_features
    if not full:
        start = recipe.actor.init_adapter
        lora = _saved(start) if start else recipe.actor.lora
        weights += _adapter(model, lora, itemsize, ACTOR, trains=True)
    if recipe.critic.home == "adapter":
        weights += _adapter(model, recipe.critic.lora, itemsize, CRITIC, trains=True)
    if recipe.critic.home != "model":
        weights.append(Weight("value_head.weight", hidden, itemsize, CRITIC, trains=True))
    if recipe.reference_home == "adapter":
        weights += _adapter(model, _saved(recipe.reference_path), itemsize, REFERENCE, trains=False)
    for reward in recipe.rewards:
        if reward.adapter:
            weights += _adapter(model, _saved(reward.adapter), itemsize, reward.label, trains=False)
            weights.append(Weight("score.weight", hidden, itemsize, reward.label))
    return Home(SHARED, model, tuple(weights))


def _critic(recipe: Recipe) -> Home:
    model = skeleton(recipe.critic_path, recipe.model.trust_remote_code, scores=True)
    full = recipe.critic.train == "full"
    quantization = "none" if full else recipe.model.quantization
    weights = list(_of_model(model, recipe, CRITIC if full else BASE, full, quantization))
    if not full:
        itemsize = models.DTYPES[recipe.model.dtype].itemsize
        weights += _adapter(model, recipe.critic.lora, itemsize, CRITIC, trains=True, saved=["score"])
    return Home(CRITIC, model, tuple(weights))


def _frozen(
    name: str, recipe: Recipe, path: str, offloaded: bool, scores: bool = False, quantized: bool = False
) -> Home:
    model = skeleton(path, recipe.model.trust_remote_code, scores)
    quantization = recipe.model.quantization if quantized else "none"
    weights = tuple(_of_model(model, recipe, name, False, quantization))
    return Home(name, model, weights, frozen_engine=True, offloaded=offloaded)


def _of_model(model: PreTrainedModel, recipe: Recipe, role: str, trains: bool, quantization: str) -> Iterator[Weight]:
    """A model's own parameters; a tied one counts once."""
    itemsize, layer_of = models.DTYPES[recipe.model.dtype].itemsize, _layer_of(model)
    quantized = {id(layer.weight) for layer in _linears(model).values()} if quantization != "none" else set()
    for name, parameter in model.named_parameters():
        elements, size, constants = parameter.numel(), itemsize, 0
        if id(parameter) in quantized and quantization == "int8":
            size, constants = 1, 4 * parameter.shape[0]  # a float32 for each row
        elif id(parameter) in quantized:  # two numbers a byte, kept as numbers of the base's type
            constants = _nf4_constants(elements)
            elements = -(-elements // 2 // itemsize)
        yield Weight(name, elements, size, role, trains, layer_of(name), constants)


def _nf4_constants(elements: int) -> int:
    """Of each 64 numbers a scale, in 8 bit; of each 256 scales one, in 32; two tables of values, and an offset."""
    scales = -(-elements // 64)
    return scales + 4 * -(-scales // 256) + 4 * (16 + 256 + 1)


def _layer_of(model: PreTrainedModel) -> Callable[[str], int | None]:
    """The decoder layer that something of a name lies in."""
    layers = {id(part) for part in decoder_layers(model)}
    prefixes = [f"{name}." for name, module in model.named_modules() if id(module) in layers]
    return lambda name: next((index for index, prefix in enumerate(prefixes) if name.startswith(prefix)), None)


def _linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Linear layers by name, the head of the model apart."""
    heads = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    kinds = nn.Linear | Conv1D
    return {name: part for name, part in model.named_modules() if isinstance(part, kinds) and id(part) not in heads}


def _adapter(
    model: PreTrainedModel, lora: LoraSettings, itemsize: int, role: str, trains: bool, saved: list[str] | None = None
) -> Iterator[Weight]:
    """A and B of every layer that is adapted, DoRA's magnitudes, and copies of modules that are trained whole."""
    targets, layer_of = causal.adapter_targets(model, lora.targets), _layer_of(model)
    adapted = (
        set(_linears(model)) if targets == "all-linear" else {n for n, _ in model.named_modules() if _hit(n, targets)}
    )
    unknown = [name for name in sorted(adapted) if not isinstance(model.get_submodule(name), nn.Linear | Conv1D)]
    if unknown or not adapted:
        raise RecipeError(
            f"{role}.lora.targets: {', '.join(unknown[:3]) or lora.targets} "
            f"{'is no linear layer' if unknown else 'names no layer of the model'}, and only those can be planned for"
        )
    kept = [*lora.modules_to_save, *(saved or [])]
    for name, module in model.named_modules():  # in the order of the optimizer's groups, which stages 1 and 2 cut
        if name in adapted:
            layer = layer_of(name)
            outputs, inputs = module.weight.shape if isinstance(module, nn.Linear) else reversed(module.weight.shape)
            yield Weight(f"{name}.lora_A.{role}.weight", lora.rank * inputs, itemsize, role, trains, layer)
            yield Weight(f"{name}.lora_B.{role}.weight", outputs * lora.rank, itemsize, role, trains, layer)
            if lora.dora:
                yield Weight(f"{name}.lora_magnitude_vector.{role}.weight", outputs, itemsize, role, trains, layer)
        elif _hit(name, kept):
            for leaf, parameter in module.named_parameters():
                yield Weight(f"{name}.modules_to_save.{role}.{leaf}", parameter.numel(), itemsize, role, trains)


def _hit(name: str, targets: str | list[str]) -> bool:
    """peft's rule: a word is a regular expression for the whole name, a list holds names or their last parts."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _saved(path: str) -> LoraSettings:
    """What an adapter's folder says of its sizes."""
    try:
        config = PeftConfig.from_pretrained(str(Path(path)))
    except Exception as error:  # whatever a broken file makes its parser raise
        raise RecipeError(f"{path} can't be read as a peft adapter: {error}; name a folder that peft saved") from error
    uneven = [name for name in ("rank_pattern", "layers_to_transform", "exclude_modules") if getattr(config, name)]
    if uneven:
        raise RecipeError(f"{path} sets {', '.join(uneven)}, which a plan can't count; plan without it, with its rank")
    targets = config.target_modules
    return LoraSettings(
        rank=config.r,
        alpha=config.lora_alpha,
        targets=targets if isinstance(targets, str) else sorted(targets),
        dora=config.use_dora,
        modules_to_save=[name for name in config.modules_to_save or [] if name not in ("score", "classifier")],
    )
