"""An actor's adapter merged into its base: one plain model, and how much of what training changed is left in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from engine import models
from engine.config import Recipe


@dataclass(frozen=True)
class Merged:
    """Log-probs `[T]` of each sequence, all in float32 arithmetic."""

    apart: list[Tensor]
    """With the adapter beside the base."""
    lost: float
    """Of what the adapter changes in them, the share that the merged weights' rounding took (root mean squares)."""


def merge(recipe: Recipe, adapter: Path, folder: Path, dtype: str, sequences: list[Tensor]) -> Merged:
    """Merge in float32, round once to `dtype`, write a plain transformers folder without its tokenizer.

    A quantized base is unpacked first: the weights that the adapter was trained on are those.

    Args:
        sequences: ids `[L]` to try it on.
    """
    model = PeftModel.from_pretrained(_base(recipe), str(adapter))
    temperature = recipe.generation.temperature or 1.0

    def measured() -> list[Tensor]:
        return [_logprobs(model, ids, temperature) for ids in sequences]

    apart = measured()
    with model.disable_adapter():
        without = measured()
    model = model.merge_and_unload()
    for parameter in model.parameters():  # and not model.to: buffers that are computed stay exact
        parameter.data = parameter.data.to(models.DTYPES[dtype]).float()
    changed, rounded = (_distance(apart, other) for other in (without, measured()))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(models.DTYPES[dtype])
    _untie_if_apart(model)
    model.save_pretrained(folder)
    return Merged(apart, rounded / changed if changed else 0.0)


def _base(recipe: Recipe) -> PreTrainedModel:
    base = models.load_plain(recipe.model)
    return (base if recipe.model.quantization == "none" else base.dequantize()).float()


@torch.no_grad()
def _logprobs(model: torch.nn.Module, ids: Tensor, temperature: float) -> Tensor:
    logits = model(ids[None]).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    return (torch.cat(one) - torch.cat(other)).square().mean().sqrt().item()


def _untie_if_apart(model: PreTrainedModel) -> None:
    """An update of the head or of the embeddings alone makes two weights of one: a reader must not tie them again."""
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False


def generation_config(recipe: Recipe, end_ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """How the run sampled, for `generate` of a whole model."""
    settings = recipe.generation
    draws = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    return GenerationConfig(
        do_sample=settings.temperature > 0,
        eos_token_id=list(end_ids),
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=settings.max_new_tokens,
        **(draws if settings.temperature > 0 else {}),
    )
