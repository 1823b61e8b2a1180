"""What a micro-batch's forward keeps for its backward: run on the meta device, where autograd saves shapes alone.

So every family has its own count, and every optimisation of the engine is in it: the code is that which trains.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from operator import mul

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from engine import adapters, causal, fused_lora, models, pointwise, shapes
from engine.adapter_checks import on_meta
from engine.config import Recipe
from engine.errors import RecipeError
from engine.fetching import decoder_layers
from engine.roles import ACTOR, CRITIC, RolesModel, ValueModel

NEVER_MATTERS = {
    "zero": {"ds_config", "frozen_ds_config", "nvme_path", "keep_gathered_bytes"},
    "generation": {"max_concurrent_sequences", "continuous_batching", "gather_budget_bytes", "compile"},
}
"""What of a recipe activations don't depend on: whoever looks for a plan that fits changes much of it."""


class Uncounted(Exception):
    """A forward on the meta device failed."""


@dataclass
class Saved:
    """Bytes that a forward keeps, by the decoder layer that they are saved in."""

    layers: list[int]
    inputs: list[int]
    """What each layer is given, and is computed from again where activations are checkpointed."""
    rest: int = 0
    """Before the layers and behind them."""
    storages: list = field(default_factory=list, repr=False)
    """Those that were counted: as long as they live, no other can be taken for one of them."""


@dataclass(frozen=True)
class Shape:
    """Of one forward: `rows` of `columns` tokens, end to end in one row where they are packed."""

    rows: int
    columns: int
    packed: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> Shape:
        """The largest micro-batch of an update: as many of the longest sequences as it may hold."""
        columns, budget = recipe.longest_sequence, recipe.ppo.tokens_per_micro_batch
        if budget is None:
            return cls(recipe.ppo.micro_batch_sequences, columns)
        if recipe.ppo.packing:
            return cls(1, max(budget, columns), packed=True)
        return cls(max(1, budget // columns), columns)

    def response_tokens(self, recipe: Recipe) -> int:
        """How many of its tokens can be of responses."""
        if recipe.ppo.tokens_per_micro_batch is None:
            return self.rows * recipe.generation.max_new_tokens
        return self.rows * self.columns - self.rows  # short prompts may have long responses


def of_training(recipe: Recipe, on_cuda: bool) -> dict[str, int]:
    """By home, the most bytes that a micro-batch of the longest sequences keeps for its backward.

    Args:
        on_cuda: the devices are CUDA's.

    Raises:
        RecipeError: a config can't be read, or an adapter doesn't fit.
        Uncounted: the family's layers need numbers, which the meta device has none of.
    """
    try:
        return dict(_of_training(recipe.model_dump_json(exclude=NEVER_MATTERS), on_cuda))
    except RecipeError:
        raise
    except Exception as error:  # whatever a family's own code raises without numbers
        raise Uncounted(f"{type(error).__name__}: {error}") from error


@lru_cache
def _of_training(recipe_text: str, on_cuda: bool) -> dict[str, int]:
    recipe = Recipe.model_validate_json(recipe_text)
    shape, keeps, layers = Shape.of(recipe), Counter(), {}

    def count(home: str, model: PreTrainedModel, repeats: list[int]) -> None:
        saved = of_forward(model, shape, on_cuda)
        keeps[home] += saved.rest
        if recipe.zero.activation_checkpointing:
            keeps[home] += sum(map(mul, saved.inputs, repeats))
            layers[home] = max(layers.get(home, 0), *saved.layers)
        else:
            keeps[home] += sum(map(mul, saved.layers, repeats))

    base, repeats = _few_layers(recipe, recipe.model.path)
    with on_meta():
        roles = RolesModel(base, recipe, _trained_adapters(recipe))
    _as_trained(roles)
    for role in [ACTOR, CRITIC] if recipe.critic.home == "adapter" else [ACTOR]:
        with roles.acting_as(role):
            count(shapes.SHARED, roles.causal, repeats)
    # The hidden states before each response token, for a value head, and slopes with respect to them for log-probs and
    # what else has a gradient (engine/vocabulary_head.py).
    hidden_size = roles.head.copy.get_output_embeddings().in_features
    hidden = shape.response_tokens(recipe) * hidden_size * models.DTYPES[recipe.model.dtype].itemsize
    full_kl = recipe.kl.placement == "loss" and recipe.kl.estimator == "full"
    keeps[shapes.SHARED] += hidden * (1 + full_kl + (recipe.ppo.entropy_coef > 0))
    if recipe.critic.home == "model":
        scorer, repeats = _few_layers(recipe, recipe.critic_path, scores=True)
        with on_meta():
            critic = ValueModel(scorer, recipe.critic)
        _as_trained(critic)
        count(CRITIC, critic.scorer, repeats)
    keeps[CRITIC if recipe.critic.home == "model" else shapes.SHARED] += hidden
    if layers:  # one at a time is computed again
        largest = max(layers, key=layers.get)
        keeps[largest] += layers[largest]
    return dict(keeps)


def _few_layers(recipe: Recipe, path: str, scores: bool = False) -> tuple[PreTrainedModel, list[int]]:
    """A model with one decoder layer of each kind, and how many each stands for: 80 alike would take seconds.

    The first layer is a kind of its own: behind a frozen embedding there is less to save.
    """
    model = shapes.skeleton(path, recipe.model.trust_remote_code, scores, recipe.model.attn_implementation)
    kinds, repeats = [], []
    layers = decoder_layers(model)
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList) and set(layers) <= set(part)]
    for layer in layers:
        kind = [(name, p.shape) for name, p in layer.named_parameters()]
        if len(stacks) != 1 or len(repeats) == 0 or kind not in kinds[1:] or _names_layers(recipe):
            kinds.append(kind)
            repeats.append(1)
        else:
            repeats[kinds.index(kind, 1)] += 1
            del stacks[0][list(stacks[0]).index(layer)]
    return model.to(models.DTYPES[recipe.model.dtype]).requires_grad_(False).train(), repeats


def _names_layers(recipe: Recipe) -> bool:
    """Whether adapters may go into some layers and not into others."""
    targets = recipe.actor.lora.targets, recipe.critic.lora.targets
    return recipe.actor.init_adapter is not None or any(
        of != "all-linear" and (isinstance(of, str) or any("." in name for name in of)) for of in targets
    )


def _trained_adapters(recipe: Recipe) -> dict[str, LoraConfig]:
    wanted, start = {}, recipe.actor.init_adapter
    if recipe.actor.train == "lora":
        wanted[ACTOR] = adapters.read(start).config if start else adapters.lora_config(recipe.actor.lora)
    if recipe.critic.home == "adapter":
        wanted[CRITIC] = adapters.lora_config(recipe.critic.lora)
    return wanted


def _as_trained(module: nn.Module) -> None:
    """What the trained engine does to a module's layers."""
    fused_lora.fuse(module)
    pointwise.take_over(module)


def of_forward(model: nn.Module, shape: Shape, on_cuda: bool) -> Saved:
    """What a backbone keeps.

    Args:
        model: a transformers model on the meta device, its adapters injected and that of the role switched on.
        on_cuda: the devices are CUDA's: attention stays in 16 bit there.
    """
    inner, layers = causal.backbone(model), decoder_layers(model)
    found = Saved([0] * len(layers), [0] * len(layers))
    ids = torch.zeros(shape.rows, shape.columns, dtype=torch.int64, device="meta")
    # Of four dimensions, as transformers makes it for rows of different lengths: such a one it leaves as it is.
    mask = torch.ones(shape.rows, 1, shape.columns, shape.columns, dtype=torch.bool, device="meta")
    places = {}
    if "position_ids" in inspect.signature(type(inner).forward).parameters:
        places["position_ids"] = torch.zeros(shape.rows, shape.columns, dtype=torch.int64, device="meta")
    with _counted(model, layers, found), _FlashAttention(on_cuda, masked=not shape.packed):
        inner(input_ids=ids, attention_mask=mask, use_cache=False, **places)
    return found


@contextmanager
def _counted(model: nn.Module, layers: list[nn.Module], found: Saved) -> Iterator[None]:
    """Inside, whatever autograd saves is added to `found`, each storage once; weights are none of it."""
    seen = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    inside: list[int] = []

    def saved(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            found.storages.append(storage)
            if inside:
                found.layers[inside[-1]] += storage.nbytes()
            else:
                found.rest += storage.nbytes()
        return tensor

    def enter(index: int, given: tuple, named: dict) -> None:
        inside.append(index)
        found.inputs[index] = (given[0] if given else named["hidden_states"]).nbytes

    def leave(*ignored) -> None:
        inside.pop()

    hooks = []
    for index, layer in enumerate(layers):
        hooks.append(
            layer.register_forward_pre_hook(lambda _, given, named, at=index: enter(at, given, named), with_kwargs=True)
        )
        hooks.append(layer.register_forward_hook(leave))
    try:
        with saved_tensors_hooks(saved, lambda tensor: tensor):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _FlashAttention(TorchFunctionMode):
    """On the meta device torch takes its plain attention, which saves every pair; devices have flash attention."""

    def __init__(self, on_cuda: bool, masked: bool):
        super().__init__()
        self.on_cuda, self.masked = on_cuda, masked

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is not scaled_dot_product_attention:
            return function(*arguments, **(named or {}))
        return self._flash(*arguments, **(named or {}))

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **settings) -> Tensor:
        if not self.masked:  # each sequence for itself
            attn_mask, settings["is_causal"] = None, True
        dtype = query.dtype if self.on_cuda else torch.float32  # engine/attention.py computes in it on a CPU
        width = value.shape[-1]
        if width < query.shape[-1]:  # the meta device takes heads of one width alone
            value = nn.functional.pad(value, (0, query.shape[-1] - width))
        tensors = [x.to(dtype) for x in (query, key, value)]
        mask = None if attn_mask is None else attn_mask.to(dtype)  # what torch makes of a boolean one, in each layer
        output, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *tensors, 0.0, settings.get("is_causal", False), attn_mask=mask, scale=settings.get("scale")
        )
        return output[..., :width].to(query.dtype)
