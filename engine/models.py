"""Loads base, tokenizer and reward models: weights from safetensors, no code from strangers, no dropout."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from engine import attention, causal
from engine.errors import RecipeError
from engine.role_config import ModelConfig

# No weights or broken ones, another architecture, other sizes, a kernel that isn't installed.
UNLOADABLE = (OSError, ValueError, ImportError, RuntimeError, SafetensorError)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    """The base model, frozen, in the recipe's dtype, in train() mode with every dropout at 0.

    Inside `sharded_loading` it comes out in shards, and every rank must call it; a quantized one comes out whole.

    Raises:
        RecipeError: the checkpoint can't be read or is of another kind.
    """
    return _load(AutoModelForCausalLM, settings).requires_grad_(False)


def load_scorer(path: str, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """A sequence-classification model with one output, frozen; otherwise as `load_causal`, and never quantized."""
    settings = ModelConfig(path=path, dtype=dtype, trust_remote_code=trust_remote_code)
    return _load(AutoModelForSequenceClassification, settings).requires_grad_(False)


def load_critic(settings: ModelConfig) -> PreTrainedModel:
    """A critic of its own: a sequence classifier with one output, read from a reward model or from a causal one.

    The second has no score head: a new one starts at 0, without an opinion.
    """
    model = _load(AutoModelForSequenceClassification, settings, may_lack={"score.weight"}, num_labels=1)
    return model.requires_grad_(False)


def _load(factory, settings: ModelConfig, may_lack: frozenset | set = frozenset(), **config_changes) -> PreTrainedModel:
    transformers.utils.logging.set_verbosity_error()
    attention.take_over()
    transformers.utils.logging.disable_progress_bar()
    source = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    extra = {"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}
    try:
        config = AutoConfig.from_pretrained(settings.path, **source, **extra, **config_changes)
        if factory is AutoModelForCausalLM:
            causal.check_causal(config)
        causal.without_noise(config)
        with _freed_at_once():
            model, found = factory.from_pretrained(
                settings.path,
                config=config,
                dtype=DTYPES[settings.dtype],
                quantization_config=quantization_config(settings),
                use_safetensors=None,  # safetensors if there are any; transformers reads .bin with weights_only=True
                ignore_mismatched_sizes=True,  # told below; transformers' error would point at a report we silence
                output_loading_info=True,
                **source,
            )
    except RecipeError:
        raise
    except UNLOADABLE as error:
        raise RecipeError(f"{settings.path} can't be loaded: {error}") from error
    wrong = [f"{name} is {list(here)}, not {list(wanted)}" for name, here, wanted in sorted(found["mismatched_keys"])]
    if wrong:
        raise RecipeError(
            f"{settings.path} doesn't fit its own config.json: {'; '.join(wrong[:3])}; mend the checkpoint"
        )
    missing = set(found["missing_keys"])
    if missing - may_lack:  # transformers would start them at random and say so in a warning at most
        raise RecipeError(
            f"{settings.path} has no weights for {', '.join(sorted(missing - may_lack)[:5])}, which a "
            f"{type(model).__name__} needs; name a checkpoint of that kind"
        )
    if missing:
        model.score = nn.Linear(model.score.in_features, 1, bias=False, dtype=DTYPES[settings.dtype])
        nn.init.zeros_(model.score.weight)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    # train(): eval() would switch transformers' activation checkpointing off; without dropout they compute the same.
    return model.train()


@contextmanager
def _freed_at_once() -> Iterator[None]:
    """Inside, blocks of a weight's size go back to the system when freed.

    glibc keeps blocks below a threshold that rises with use, up to 32 MB: whole weights, read and cut up, would stay
    behind between the shards (measured: 492 MiB for a rank's half of 423 MiB, against 276).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if mallopt is None:
        yield
        return
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt(mmap_threshold, 1 << 18)
    try:
        yield
    finally:
        mallopt(mmap_threshold, 32 << 20)  # where glibc's own ends up in a process that frees large blocks
        # What one forward frees the next one takes. Given back and asked for again, it cost a fifth of the training
        # phase on ragged rows (5 microseconds a page).
        mallopt(trim_threshold, 2**31 - 1)


def load_plain(settings: ModelConfig) -> PreTrainedModel:
    """The base as anybody loads it, for a process without roles and ranks."""
    return AutoModelForCausalLM.from_pretrained(
        settings.path,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        dtype=DTYPES[settings.dtype],
        quantization_config=quantization_config(settings),
    )


def quantization_config(settings: ModelConfig) -> BitsAndBytesConfig | None:
    """bitsandbytes' settings of a quantized base; the output head and the embeddings stay as they are."""
    if settings.quantization == "nf4":
        dtype = DTYPES[settings.dtype]
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,  # packed bytes in the base's dtype: what ZeRO-3 partitions is of one dtype
        )
    if settings.quantization == "int8":
        # A threshold would pick outlier columns over all rows of a batch: a row would depend on its company.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return None


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
