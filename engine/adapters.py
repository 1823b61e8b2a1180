"""LoRA adapters on one shared base: made from settings or read from a folder, and switched between forwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine import causal
from engine.errors import RecipeError
from engine.role_config import LoraSettings

# What peft calls the containers of an adapter's parameters; the adapter's name is the next part of a parameter's name.
CONTAINERS = {"lora_A", "lora_B", "lora_magnitude_vector", "modules_to_save"}
# How transformers' families call the head of a sequence classifier that ends in one linear layer.
HEADS = ("score", "classifier")
# "all-linear" of a second adapter would reach into an output head of which the first one trains a copy.
INSIDE_COPIES = r".*\.(original_module|modules_to_save)(\..*)?"
# The settings of plain LoRA in its folder; another one that is set changes the base or the formula.
PLAIN_FIELDS = {
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("init_lora_weights", "bias", "fan_in_fan_out"),
}


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as a folder holds it."""

    path: str
    config: LoraConfig
    weights: dict[str, Tensor]  # by peft's names on disk, which leave the adapter's own name out
    head: Tensor | None  # [1, hidden] of a sequence classifier


def read(path: str, reward: bool = False) -> SavedAdapter:
    """Read a folder that peft saved, or one of the hub.

    Args:
        reward: it must be a sequence classifier's with one output; otherwise it must be none.

    Raises:
        RecipeError: it is no LoRA adapter, or one that can't be used here.
    """
    try:
        folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(path, allow_patterns="adapter_*"))
        config = PeftConfig.from_pretrained(str(folder))
        file = folder / "adapter_model.safetensors"
        if not file.is_file():
            raise OSError("no adapter_model.safetensors (a pickled .bin file is not read)")
        weights = load_file(file)
    except Exception as error:  # whatever a broken file makes its parser raise
        raise RecipeError(f"{path} can't be read as a peft adapter: {error}; name a folder that peft saved") from error
    if not isinstance(config, LoraConfig):
        raise RecipeError(f"{path} is a {config.peft_type} adapter, and only LoRA works here; name a LoRA adapter")
    _check_form(path, config)
    heads = [name for name in weights if name.rpartition(".")[0].rpartition(".")[2] in HEADS and ".lora_" not in name]
    head = weights.pop(heads[0]) if heads else None
    _check_head(path, head, reward)
    config.lora_dropout = 0.0  # or the first ratio would not be 1
    config.inference_mode = False
    kept = [name for name in config.modules_to_save or [] if name not in HEADS]
    config.modules_to_save, config.task_type = kept or None, "CAUSAL_LM"
    return SavedAdapter(path, config, weights, head)


def _check_form(path: str, config: LoraConfig) -> None:
    """Only forms of LoRA that leave the base as it is and compute W x + s B A x, or DoRA."""
    if config.bias != "none":
        raise RecipeError(
            f"{path} trains biases (bias {config.bias}), which roles would share; train one with bias none"
        )
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise RecipeError(
            f"{path} starts from a changed base (init_lora_weights {config.init_lora_weights!r}), which other roles "
            "share; let peft convert it to plain LoRA (path_initial_model_for_weight_conversion)"
        )
    plain = vars(LoraConfig())
    other = [name for name, value in vars(config).items() if name not in PLAIN_FIELDS and value != plain.get(name)]
    if other:
        raise RecipeError(
            f"{path} is a form of LoRA that doesn't work here: its adapter_config.json has "
            f"{', '.join(f'{name} {getattr(config, name)!r}' for name in other)}; train one without"
        )


def _check_head(path: str, head: Tensor | None, reward: bool) -> None:
    if not reward and head is not None:
        raise RecipeError(f"{path} is a sequence classifier's adapter; name it in rewards.adapter, and a policy's here")
    if reward and (head is None or head.shape[0] != 1):
        got = "none" if head is None else f"{head.shape[0]} outputs"
        raise RecipeError(
            f"{path} needs a score head with one output beside its LoRA weights, got {got}; name a "
            "sequence-classification adapter trained with num_labels=1"
        )


def lora_config(settings: LoraSettings) -> LoraConfig:
    """peft's configuration of an adapter; no dropout, or the first ratio would not be 1."""
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets,
        lora_dropout=0.0,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        modules_to_save=list(settings.modules_to_save) or None,
    )


def attach(base: PreTrainedModel, wanted: dict[str, LoraConfig | SavedAdapter]) -> PeftModel | PreTrainedModel:
    """The base with an adapter of each name injected and nothing else changed; without any, the base itself.

    Raises:
        RecipeError: an adapter doesn't fit the base.
    """
    for source in wanted.values():  # before the first adapter: its own linear layers are no targets
        if not isinstance(source, SavedAdapter):
            source.target_modules = causal.adapter_targets(base, source.target_modules)
    policy = base
    for name, source in wanted.items():
        config = source.config if isinstance(source, SavedAdapter) else source
        where = source.path if isinstance(source, SavedAdapter) else f"{name}.lora"
        around_copies = config.target_modules == "all-linear" and config.exclude_modules is None
        config.exclude_modules = INSIDE_COPIES if around_copies else config.exclude_modules
        try:
            if policy is base:
                policy = get_peft_model(base, config, adapter_name=name, autocast_adapter_dtype=False)
            else:
                policy.add_adapter(name, config)
        except (ValueError, TypeError, KeyError) as error:  # peft: no module has such a name, or it is of another kind
            raise RecipeError(f"{where}: {error}") from error
        if around_copies:
            config.exclude_modules = None
        _check(policy, where)
        if isinstance(source, SavedAdapter):
            _load(policy, name, source)
    return policy


def _check(policy: PeftModel, where: str) -> None:
    if any("lora_embedding" in name for name, _ in policy.named_parameters()):
        raise RecipeError(
            f"{where} puts an adapter on an embedding, and only linear layers take one here; leave it out of the "
            "targets, or train the embedding whole with modules_to_save"
        )
    for name, module in policy.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and any(True for _ in module.original_module.children()):
            raise RecipeError(
                f"{where} trains {name} whole, which holds other layers; modules_to_save takes single layers, such as "
                "embed_tokens, lm_head or norms"
            )
    causal.check_adapters(policy)


def _load(policy: PeftModel, name: str, source: SavedAdapter) -> None:
    weights = {key: w for key, w in source.weights.items() if not _is_base(policy, key, w, source)}
    try:
        found = set_peft_model_state_dict(policy, weights, adapter_name=name)
    except (RuntimeError, KeyError) as error:  # another shape; a module to save that isn't in the file
        reason = str(error).strip().splitlines()[-1].strip()
        raise RecipeError(f"{source.path} doesn't fit the base: {reason}; name an adapter of this base") from error
    absent = [key for key in found.missing_keys if owner(key) == name]
    wrong = absent or found.unexpected_keys
    if wrong:
        what = "has no weights for" if absent else "has weights for unknown"
        raise RecipeError(f"{source.path} {what} {', '.join(wrong[:3])}; name an adapter of this base")


def _is_base(policy: PeftModel, key: str, weight: Tensor, source: SavedAdapter) -> bool:
    """Whether a saved weight is one of the base (peft saves embeddings and adapted heads along); a collective.

    Raises:
        RecipeError: it is another than the base's: loaded, it would change the base under every role.
    """
    kept = source.config.modules_to_save or []
    if CONTAINERS & set(key.split(".")) or key.rpartition(".")[0].rpartition(".")[2] in kept:
        return False
    try:
        mine = policy.get_parameter(key)
    except AttributeError:
        return False  # refused as unknown
    from engine import zero  # here: DeepSpeed takes a while to import, and a plan has no use for it

    with zero.gathered([mine]):
        same = mine.is_meta or (mine.shape == weight.shape and torch.equal(mine.data, weight.to(mine)))
    if not same:
        raise RecipeError(
            f"{source.path} carries a {key} of its own, and the base is shared by all roles; save the model that it "
            "was trained on (after resize_token_embeddings) as model.path, or train that layer with modules_to_save"
        )
    return True


def owner(name: str) -> str | None:
    """Which adapter a parameter of that name belongs to; None: the base."""
    parts = name.split(".")
    return next((after for part, after in zip(parts, parts[1:], strict=False) if part in CONTAINERS), None)


class Switch:
    """Chooses the adapter that shapes a model's forwards.

    Done by hand: peft's `set_adapter` would also flip `requires_grad` and so take a role out of the optimizer.

    Args:
        models: they are switched together.
    """

    def __init__(self, *models: nn.Module):
        modules = [m for model in models for m in model.modules()]
        self.layers = [m for m in modules if isinstance(m, BaseTunerLayer)]
        self.wrappers = [m for m in modules if isinstance(m, AuxiliaryTrainingWrapper)]

    def to(self, name: str) -> None:
        """From now on `name`; a layer without such an adapter computes as the base does."""
        for layer in self.layers:
            layer._active_adapter = [name]
        for wrapper in self.wrappers:
            wrapper._active_adapter = [name]
            # Or its attributes (an embedding's weight, say) could not be read at all.
            wrapper._disable_adapters = name not in wrapper._adapters


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Adapters in the base's dtype: ZeRO-3 wants one for everything."""
    for name, parameter in model.named_parameters():
        if owner(name) is not None:
            parameter.data = parameter.data.to(dtype)
