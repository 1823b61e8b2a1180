"""How any causal language model of transformers is called, which families can't be used, and what their experts need.

Padding may lie on either side of a row's real tokens: positions are counted from the mask, so it moves nothing.
docs/models.md says what was measured.
"""

from __future__ import annotations

import inspect
from functools import lru_cache

from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from engine.errors import RecipeError

# Families whose positions come from the mask (alibi): they take no position_ids and need none.
_BY_MASK = {"bloom", "mpt"}
# fmt: off
_ENCODERS = {
    "bert", "bert-generation", "big_bird", "camembert", "cpmant", "data2vec-text", "electra", "ernie", "git",
    "megatron-bert", "prophetnet", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
    "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
}
# fmt: on
_REFUSED = dict.fromkeys(_ENCODERS, "it is an encoder, whose tokens see what comes after them") | {
    "gemma3n_text": "while it trains it clamps weights of its base in place, which must never move",
    "minimax": "it decodes with a cache of a class of its own",
    "moshi": "it decodes audio, and its cached logits are not those of the whole sequence",
    "phimoe": "its router draws at random while it trains, so the first ratio would not be 1",
    "recurrent_gemma": "its recurrent layers read the padding on the left",
    "zamba2": "its cached logits are off by 1e-3 from those of the whole sequence",
}
# fmt: off
PACKABLE = {
    "cohere", "cohere2", "dbrx", "deepseek_v3", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_bigcode",
    "gpt_neox", "granite", "llama", "llama4_text", "mistral", "mixtral", "olmo2", "phi", "phi3", "qwen2", "qwen3",
    "qwen3_moe", "smollm3", "stablelm", "starcoder2",
}
# fmt: on
"""Families whose sequences can lie end to end in one row, measured (tests/families.py). Layers that look back by other
means than attention run on from one sequence into the next, and some attention takes a row for one sequence."""
# What peft calls the projections of experts and their router, from the time when each expert was a module: in a
# mixture of experts it takes these names for the fused weights of all experts, shared and dense layers' names too.
_EXPERT_WORDS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def call(model: nn.Module, ids: Tensor, mask: Tensor, **keywords):
    """The model's output on `ids`, with positions counted over real tokens.

    Args:
        model: a backbone, a model with a head, or one with adapters inside.
        ids: `[B, L]`; with a cache only the new tokens.
        mask: `[B, K]` bool, K >= L: True on the real tokens among everything seen so far, `ids` the last of it.
        keywords: handed on. `logits_to_keep` works for every family; one without it computes all and drops the rest.
    """
    takes = _arguments(type(_plain(model)))
    if "position_ids" in takes:
        keywords["position_ids"] = positions(mask)[:, -ids.shape[1] :]
    keep = 0 if "logits_to_keep" in takes else keywords.pop("logits_to_keep", 0)
    output = model(input_ids=ids, attention_mask=mask.long(), **keywords)
    if keep:
        output.logits = output.logits[:, -keep:]
    return output


def hidden_states(model: nn.Module, ids: Tensor, mask: Tensor, packed: bool = False) -> Tensor:
    """`[B, L, H]` what the model's backbone hands to its head.

    Args:
        model, ids, mask: as for `call`, without a cache.
        packed: real tokens alone go through the backbone, sequence behind sequence in one row, each seeing its own:
            where padding was, the result is 0.
    """
    inner = backbone(model)
    if not packed:
        return call(inner, ids, mask, use_cache=False).last_hidden_state
    lengths = mask.sum(1)
    longest, ends = int(lengths.max()), nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    # transformers' names for where sequences lie: flash attention reads them, and engine/attention.py.
    bounds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    places = positions(mask)[mask][None]
    hidden = inner(input_ids=ids[mask][None], position_ids=places, use_cache=False, **bounds).last_hidden_state
    return hidden.new_zeros(*mask.shape, hidden.shape[-1]).index_put((mask,), hidden[0])


def backbone(model: nn.Module) -> nn.Module:
    """The part of a model below its head."""
    plain = _plain(model)
    return plain.model if plain.base_model is plain else plain.base_model  # Llama 4's prefix is of another model


def positions(mask: Tensor) -> Tensor:
    """`[B, K]` places counted from each row's first real token."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _plain(model: nn.Module) -> nn.Module:
    """The transformers model inside peft's wrapper or torch.compile's, whose own forwards take anything."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@lru_cache
def _arguments(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def without_noise(config: PretrainedConfig) -> None:
    """Set whatever draws at random while training to 0, dropout and router jitter: the policy must be one function."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            without_noise(value)
        elif ("drop" in name or "jitter" in name) and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, name, type(value)(0))  # some configs insist on the type


def check_causal(config: PretrainedConfig) -> None:
    """Refuse a family that would be trained wrongly or not at all, before its weights are loaded.

    Raises:
        RecipeError: why this one, and what to do.
    """
    problem = _problem(config)
    if problem:
        raise RecipeError(f"a model of type {config.model_type} can't be the policy: {problem} (docs/models.md)")


def _problem(config: PretrainedConfig) -> str | None:
    kind = config.model_type
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return None  # code of its own: it can't be judged from here
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder; name a decoder-only model"
    if config.get_text_config() is not config:
        return "it reads more than text; name the checkpoint of its language model alone"
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "transformers has no causal language model of that type; name a decoder-only language model"
    if kind in _REFUSED:
        return f"{_REFUSED[kind]}; name another model"
    if kind == "falcon" and config.alibi and config._attn_implementation == "eager":
        return "transformers' eager attention adds its alibi twice; set model.attn_implementation to sdpa"
    takes = _arguments(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    if "past_key_values" not in takes:
        return "it keeps no key-value cache, which sampling needs; name a model that does"
    if "position_ids" not in takes and kind not in _BY_MASK:
        return "it takes no position_ids, so padding on the left would shift it; name another model"
    return None


def adapter_targets(model: PreTrainedModel, targets: str | list[str]) -> str | list[str]:
    """What `all-linear` comes to on this model; other targets are taken as they are.

    Experts and their router take no adapter: a token that goes elsewhere leaves an expert without a gradient, and of
    fused experts peft would rewrite the weights in every forward, which ZeRO-3 can't follow. Neither do Mamba layers,
    whose kernels read the weights and pass over the layers that hold them.
    """
    closed = _closed(model)
    if targets != "all-linear" or not closed:
        return targets
    head, inside = model.get_output_embeddings(), tuple(f"{name}." for name in closed)
    words = _EXPERT_WORDS if _experts(model) else set()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and not name.startswith(inside)
        and not {"router", *words} & set(name.split("."))
    ]


def check_adapters(model: nn.Module) -> None:
    """Refuse adapters where `adapter_targets` puts none, asked for by name or read from a folder.

    Args:
        model: with its adapters injected.

    Raises:
        RecipeError: names the first one.
    """
    inside = tuple(f"{name}." for name in _closed(model))
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and (isinstance(layer, ParamWrapper) or name.startswith(inside)):
            raise RecipeError(
                f"an adapter on {name}: experts, their router and Mamba layers take none (docs/models.md); set "
                "lora.targets to all-linear, which leaves them out"
            )


def _closed(model: nn.Module) -> list[str]:
    """The names of modules that no adapter may go into."""
    return [*_experts(model), *(n for n, m in model.named_modules() if _is_mamba(n, m))]


def _is_mamba(name: str, module: nn.Module) -> bool:
    return name.rpartition(".")[2] == "mamba" or "MambaMixer" in type(module).__name__.replace("Mamba2", "Mamba")


def expert_modules(model: nn.Module) -> list[nn.Module]:
    """Modules whose whole inside ZeRO-3 must fetch at once (its leaf modules).

    Which experts run differs between ranks, and fetching weights is a collective: fetched one expert at a time, ranks
    would wait for each other for ever. Experts fused into parameters of one module, as most families have them by now,
    are fetched together anyway.
    """
    found = []
    for name, module in _experts(model).items():
        if any(list(child.parameters()) for child in module.children()):
            callee = name.rpartition(".")[0] if isinstance(module, nn.ModuleList) else name  # a list is never called
            found.append(model.get_submodule(callee))
    return found


def _experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold routed experts, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts" or type(module).__name__.endswith("ParallelExperts")
    }
