"""Prompts -> Rollout: the actor samples responses, each token a function of seed and draw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from engine import causal
from engine.batch import Prompts, Rollout
from engine.config import GenerationConfig
from engine.randomness import Stream, generator
from engine.stopping import Stops


def generate(
    module: PreTrainedModel,
    prompts: Prompts,
    settings: GenerationConfig,
    stops: Stops,
    seed: int,
    stream: Stream = Stream.TRAINING,
) -> Rollout:
    """Sample one response for each prompt, with no collective: ranks decode freely.

    Args:
        module: a plain causal model, whole on this rank.
        prompts: this rank's rows; none is fine.
        stops: what ends a response before its limit.
    """
    width = settings.max_new_tokens
    sampled = _Responses.empty(len(prompts), width)
    for rows in torch.arange(len(prompts)).split(settings.batch_sequences):
        if len(rows):
            uniforms = token_uniforms(seed, stream, prompts.draws[rows], prompts.samples[rows], width)
            _decode(module, prompts, rows, uniforms, settings, stops, sampled)
    return Rollout(
        prompt_ids=prompts.prompt_ids,
        prompt_lengths=prompts.prompt_lengths,
        response_ids=sampled.ids,
        response_lengths=sampled.lengths,
        ended=sampled.ended,
        sampler_logprobs=sampled.logprobs,
        draws=prompts.draws,
        samples=prompts.samples,
    )


def token_uniforms(seed: int, stream: Stream, draws: Tensor, samples: Tensor, count: int) -> Tensor:
    """`[B, count]` float64 in [0, 1): column t belongs to response position t, whatever is decoded beside it."""
    rows = [generator(seed, stream, int(d), int(s)).random(count) for d, s in zip(draws, samples, strict=True)]
    return torch.from_numpy(np.stack(rows))


@dataclass(frozen=True)
class _Responses:
    """Responses as they grow, padded on the right with 0."""

    ids: Tensor  # [B, R] int64
    logprobs: Tensor  # [B, R] float32
    lengths: Tensor  # [B] int64
    ended: Tensor  # [B] bool

    @classmethod
    def empty(cls, rows: int, width: int) -> _Responses:
        return cls(
            ids=torch.zeros(rows, width, dtype=torch.int64),
            logprobs=torch.zeros(rows, width),
            lengths=torch.zeros(rows, dtype=torch.int64),
            ended=torch.zeros(rows, dtype=torch.bool),
        )

    def add(self, rows: Tensor, position: int, ids: Tensor, logprobs: Tensor) -> None:
        self.ids[rows, position] = ids
        self.logprobs[rows, position] = logprobs
        self.lengths[rows] = position + 1


def _decode(
    module: PreTrainedModel,
    prompts: Prompts,
    rows: Tensor,
    uniforms: Tensor,
    settings: GenerationConfig,
    stops: Stops,
    sampled: _Responses,
) -> None:
    """Decode some rows together with a KV cache until each has ended or reached its limit."""
    device = next(module.parameters()).device
    longest = int(prompts.prompt_lengths[rows].max())
    ids = prompts.prompt_ids[rows][:, -longest:].to(device)
    mask = prompts.prompt_mask[rows][:, -longest:].to(device)
    limits = prompts.max_new_tokens[rows].clamp(max=settings.max_new_tokens)
    least = settings.min_new_tokens
    cache = DynamicCache(config=module.config)
    alive = torch.ones(len(rows), dtype=torch.bool)
    for step in range(int(limits.max())):
        output = causal.call(module, ids, mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1].float().cpu()
        banned = stops.banned(logits.shape[-1], early=step < least)
        tokens, logprobs = sample(logits, uniforms[:, step], settings, banned)
        growing = rows[alive]
        sampled.add(growing, step, tokens[alive], logprobs[alive])
        if step >= least:
            checked = step if step > least else 0  # a stop string that came too early ends the response now
            sampled.ended[growing] = stops.reached(sampled.ids[growing, : step + 1], checked)
        alive &= ~sampled.ended[rows] & (step + 1 < limits)
        if not alive.any():
            break
        # A finished row goes on with whatever it drew: no other row sees it, and it is written nowhere.
        ids = tokens[:, None].to(device)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)


def sample(
    logits: Tensor, uniforms: Tensor, settings: GenerationConfig, banned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    Token = first i with cdf[i] > u * cdf[last], the cdf in float64 over the kept tokens in vocabulary order.
    Restrictions (banned, top-k, top-p) shape the draw only: log-probs are those of the temperature-scaled full softmax.

    Args:
        logits: `[B, V]` float32, raw.
        uniforms: `[B]` float64 in [0, 1).
        banned: ids that may not be drawn.

    Returns:
        tokens `[B]` int64 and their log-probs `[B]` float32.
    """
    scaled = logits / (settings.temperature or 1.0)
    logprobs = scaled.log_softmax(-1)
    allowed = scaled
    if banned is not None:
        allowed = scaled.index_fill(-1, banned, -torch.inf)
    if settings.temperature == 0:
        tokens = allowed.argmax(-1)
    else:
        weights = _keep(allowed, settings.top_k, settings.top_p)
        cdf = weights.cumsum(-1)
        tokens = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).squeeze(-1)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def _keep(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """`[B, V]` float64 probabilities, 0 for tokens outside the top k or the nucleus (Holtzman et al. 2020).

    Ties go to the lower id; the likeliest token always stays.
    """
    probabilities = logits.double().softmax(-1)
    if not top_k and top_p >= 1.0:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if top_k:
        keep[:, top_k:] = False
        ordered = ordered * keep
    if top_p < 1.0:
        before = ordered.cumsum(-1) - ordered
        keep &= before < top_p * ordered.sum(-1, keepdim=True)
    return probabilities * torch.zeros_like(keep).scatter(-1, order, keep)
