"""Whether the adapters that a recipe asks for or names fit their models, tried on models without weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from engine import combinations
from engine.config import Recipe
from engine.ds_checks import stage_of
from engine.ds_config import read_ds_config
from engine.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def problems_of(recipe: Recipe, due: Callable[[str], bool], base: PreTrainedModel | None) -> list[str]:
    """The adapters on the shared base: whether they can be read and, each for itself, whether they fit."""
    from engine import adapters  # here: it imports torch and peft

    named = [("actor.init_adapter", recipe.actor.init_adapter)]
    if recipe.reference_home == "adapter" and recipe.reference.path:
        named.append(("reference.path", recipe.reference.path))
    named += [("rewards.adapter", reward.adapter) for reward in recipe.rewards]
    problems, wanted = [], []
    for setting, path in named:
        if path and due(path):
            try:
                if Path(path).is_dir() and not (Path(path) / "adapter_config.json").is_file():  # peft would ask the hub
                    raise RecipeError(f"{path} has no adapter_config.json; name a folder that peft saved")
                wanted.append((setting, adapters.read(path, reward=setting == "rewards.adapter")))
            except RecipeError as error:
                problems += [f"{setting}: {problem}" for problem in error.problems]
    if recipe.actor.train == "lora" and recipe.actor.init_adapter is None:
        wanted.append(("actor.lora", adapters.lora_config(recipe.actor.lora)))
    if recipe.critic.home == "adapter":
        wanted.append(("critic.lora", adapters.lora_config(recipe.critic.lora)))
    if base is None:
        return problems
    return problems + [p for setting, source in wanted for p in _problems_of_one(recipe, setting, source, base)]


def problems_of_critic(recipe: Recipe, scorer: PreTrainedModel) -> list[str]:
    """Whether the adapter of a critic of its own fits that, `scorer`, a model without weights."""
    from engine import adapters

    config = adapters.lora_config(recipe.critic.lora)
    config.task_type = "SEQ_CLS"  # as in roles.ValueModel, but for the score head, which is there
    return _problems_of_one(recipe, "critic.lora", config, scorer)


def _problems_of_one(recipe: Recipe, setting: str, source, model: PreTrainedModel) -> list[str]:
    """Whether an adapter, from settings or from a folder, fits a model; tried on a copy of `model`, without weights."""
    from engine import adapters

    saved = isinstance(source, adapters.SavedAdapter)
    config, quantization = source.config if saved else source, recipe.model.quantization
    problems = _check_copies(setting, config.modules_to_save or [], model, quantization)
    if saved and config.use_dora:
        problems += combinations.dora_problems(f"{setting}: {source.path} is a DoRA and", quantization, _stage(recipe))
    if problems:
        return problems
    role = setting.partition(".")[0]
    try:
        with on_meta():
            fitted = adapters.attach(copy.deepcopy(model), {role: source})
    except RecipeError as error:
        return [p if p.startswith(setting) else f"{setting}: {p}" for p in error.problems]
    head = fitted.get_base_model().get_output_embeddings()
    if setting == "critic.lora" and hasattr(head, "lora_A"):
        return ["critic.lora.targets names the output head, which no value passes; remove it from the targets"]
    return []


def _check_copies(setting: str, names: list[str], model: PreTrainedModel, quantization: str) -> list[str]:
    """Whether modules to train whole are there, of use, and have weights that can train."""
    head, problems = model.get_output_embeddings() or model.score, []
    for name in names:
        found = [module for path, module in model.named_modules() if path.endswith(name)]  # as peft looks for them
        said = f"{setting}: modules_to_save names {name}"
        if not found:
            problems.append(f"{said}, and the model has no such module, so nothing would train; correct or remove it")
        elif setting == "critic.lora" and model.get_output_embeddings() in found:
            problems.append(f"{said}, the output head, which no value passes; remove it")
        elif quantization != "none" and any(_packs(part, head) for module in found for part in module.modules()):
            problems.append(
                f"{said}, whose weights have no gradient, got model.quantization {quantization}; remove it, or set "
                "model.quantization to none"
            )
    return problems


def _packs(module, head) -> bool:
    """Whether quantization packs a layer's weights: every linear one but the output head."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D) and module is not head


def _stage(recipe: Recipe) -> int:
    try:
        return stage_of(read_ds_config(recipe.zero.ds_config))
    except RecipeError:
        return 0  # told by checks.py


@contextmanager
def on_meta() -> Iterator[None]:
    """Inside, what torch makes has a shape and no storage."""
    import torch

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # that copying into such a tensor does nothing
        yield
