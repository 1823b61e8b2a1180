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
from engine.verify_export import deviation, use_training_kernels


@dataclass(frozen=True)
class Merged:
    """Log-probs of all sequences' tokens, `[N]`, in float32 arithmetic, and what became of them."""

    apart: Tensor
    """With the adapter beside the base."""
    rounding: float
    """Largest deviation from `apart` where plain peft computes in the run's own type: what the type alone does."""
    merging: float
    """Largest deviation from `apart` when merged, in float32."""
    lost_by_merging: float
    """Of what the adapter changes, the share that this is (root mean squares)."""
    rounded: Tensor
    """Of the merged weights, rounded to the type that they are written in."""
    lost: float
    """Of what the adapter changes, the share that merging and this rounding took."""


def merge(recipe: Recipe, adapter: Path, folder: Path, dtype: str, rows: list[dict]) -> Merged:
    """Merge in float32, round once to `dtype`, write a plain transformers folder without its tokenizer.

    A quantized base is unpacked first: the weights that the adapter was trained on are those.

    Args:
        rows: `ids` of a sequence to try it on, and `at` which tokens.
    """
    temperature = recipe.generation.temperature or 1.0
    in_own_type = None
    if recipe.model.dtype != "float32" or recipe.model.quantization == "int8":
        model = PeftModel.from_pretrained(models.load_plain(recipe.model), str(adapter))
        use_training_kernels(model)
        in_own_type = _logprobs(model, rows, temperature)
        del model
    base = _base(recipe)
    was_tied = _untie(base)
    model = PeftModel.from_pretrained(base, str(adapter))
    apart = _logprobs(model, rows, temperature)
    with model.disable_adapter():
        without = _logprobs(model, rows, temperature)
    model = model.merge_and_unload()
    whole = _logprobs(model, rows, temperature)
    for parameter in model.parameters():  # and not model.to: buffers that are computed stay exact
        parameter.data = parameter.data.to(models.DTYPES[dtype]).float()
    rounded = _logprobs(model, rows, temperature)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(models.DTYPES[dtype])
    if was_tied:
        _tie_if_alike(model)
    model.save_pretrained(folder)
    changed = _distance(apart, without)
    return Merged(
        apart=apart,
        rounding=0.0 if in_own_type is None else deviation(in_own_type, apart),
        merging=deviation(whole, apart),
        lost_by_merging=_distance(apart, whole) / changed if changed else 0.0,
        rounded=rounded,
        lost=_distance(apart, rounded) / changed if changed else 0.0,
    )


def _base(recipe: Recipe) -> PreTrainedModel:
    base = models.load_plain(recipe.model)
    return (base if recipe.model.quantization == "none" else base.dequantize()).float()


@torch.no_grad()
def _logprobs(model: torch.nn.Module, rows: list[dict], temperature: float) -> Tensor:
    found = []
    for row in rows:
        ids = torch.tensor(row["ids"])
        logits = model(ids[None]).logits[0, :-1].float() / temperature
        found.append(logits.log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)[row["at"]])
    return torch.cat(found).double()


def _distance(one: Tensor, other: Tensor) -> float:
    return (one - other).square().mean().sqrt().item()


def _untie(model: PreTrainedModel) -> bool:
    """Give it a head of its own, or an adapter on the head alone would be merged into the embeddings, too.

    Returns:
        Whether it had one weight for both.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embeddings.weight:
        return False
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return True


def _tie_if_alike(model: PreTrainedModel) -> None:
    """One weight again where training moved neither; otherwise a reader must not tie them."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    alike = torch.equal(head.weight, embeddings.weight)
    if alike:
        head.weight = embeddings.weight
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = alike


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
