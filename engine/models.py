"""Loads base, tokenizer and reward models: weights from safetensors, no code from strangers, no dropout."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from engine.config import ModelConfig
from engine.errors import RecipeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(settings: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; one without an end token is refused, one without padding pads with its end token.

    Raises:
        RecipeError: the tokenizer has no end token.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        settings.path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
    )
    if tokenizer.eos_token_id is None:
        raise RecipeError(f"the tokenizer of {settings.path} has no eos_token: a response could never end; set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: masks come from lengths, never from ids
    return tokenizer


def load_causal(settings: ModelConfig) -> PreTrainedModel:
    """The base model, frozen, in the recipe's dtype, in train() mode with every dropout at 0."""
    model = _load(AutoModelForCausalLM, settings.path, settings.dtype, settings)
    return model.requires_grad_(False)


def load_scorer(path: str, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """A sequence-classification model with one output, frozen."""
    settings = ModelConfig(path=path, dtype=dtype, trust_remote_code=trust_remote_code)
    return _load(AutoModelForSequenceClassification, path, dtype, settings).requires_grad_(False)


def _load(factory, path: str, dtype: str, settings: ModelConfig) -> PreTrainedModel:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    extra = {"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}
    config = AutoConfig.from_pretrained(
        path, revision=settings.revision, trust_remote_code=settings.trust_remote_code, **extra
    )
    without_dropout(config)
    try:
        model, found = factory.from_pretrained(
            path,
            config=config,
            revision=settings.revision,
            dtype=DTYPES[dtype],
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=None,  # safetensors if there are any; transformers reads .bin with weights_only=True
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError) as error:  # no weights, another architecture, a missing attention kernel
        raise RecipeError(f"{path} can't be loaded: {error}") from error
    if found["missing_keys"]:  # transformers would start them at random and say so in a warning at most
        raise RecipeError(
            f"{path} has no weights for {', '.join(sorted(found['missing_keys'])[:5])}, which a "
            f"{type(model).__name__} needs; name a checkpoint of that kind"
        )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    # train(): eval() would switch transformers' activation checkpointing off; without dropout they compute the same.
    return model.train()


def without_dropout(config) -> None:
    """Set every dropout probability of a transformers config to 0: sampled and trained policy must be one function."""
    for name, value in list(vars(config).items()):
        if ("drop" in name) and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, 0.0)


def end_token_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, extra: list[str]) -> tuple[int, ...]:
    """The set of tokens that end a response: the tokenizer's, the generation config's and the recipe's.

    Args:
        model: its `generation_config` was read from the checkpoint, or made from the model's own config.

    Raises:
        RecipeError: a token named in the recipe is not one token of the tokenizer.
    """
    configured = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    for token in extra:
        token_id = tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == tokenizer.unk_token_id:
            raise RecipeError(f"generation.end_tokens: {token!r} is not one token of the tokenizer")
        ids.add(token_id)
    return tuple(sorted(ids))
