"""Logits -> tokens: each draw a function of its key and the logits alone (DESIGN.md, invariant 5)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.config import GenerationConfig
from engine.randomness import Stream, generator


def token_uniforms(seed: int, stream: Stream, draws: Tensor, samples: Tensor, count: int) -> Tensor:
    """`[B, count]` float64 in [0, 1): column t belongs to response position t, whatever is decoded beside it."""
    uniforms = np.empty((len(draws), count))
    for row, (draw, index) in enumerate(zip(draws.tolist(), samples.tolist(), strict=True)):
        uniforms[row] = generator(seed, stream, draw, index).random(count)
    return torch.from_numpy(uniforms)


def sample(
    logits: Tensor, uniforms: Tensor, settings: GenerationConfig, banned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    Token = first i with cdf[i] > u * cdf[last], the cdf in float64 over the kept tokens in vocabulary order.
    Restrictions (banned, top-k, top-p) shape the draw only: log-probs are those of the temperature-scaled full softmax.

    Args:
        logits: `[B, V]` float32, raw.
        uniforms: `[B]` float64 in [0, 1).
        banned: `[B, V]` bool, True where a token may not be drawn.

    Returns:
        tokens `[B]` int64 and their log-probs `[B]` float32.
    """
    scaled = logits / (settings.temperature or 1.0)
    normaliser = scaled.logsumexp(-1)
    if banned is not None:
        scaled.masked_fill_(banned, -torch.inf)  # of what is drawn, the log-prob stays as it was
    if settings.temperature == 0:
        tokens = scaled.argmax(-1)
    else:
        cdf = _weights(scaled, settings.top_k, settings.top_p).cumsum(-1)
        tokens = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).squeeze(-1)
        tokens.clamp_(max=cdf.shape[-1] - 1)  # nan points behind the last one: found by its log-prob, not by a crash
    return tokens, scaled.gather(-1, tokens[:, None]).squeeze(-1) - normaliser


def boundary_distance(logits: Tensor, uniforms: Tensor, temperature: float, banned: Tensor | None = None) -> Tensor:
    """`[B]` how near each draw of `sample` was to falling on another token: nearer than rounding, it may do so.

    For draws among all tokens (no top-k, no top-p); shapes as in `sample`.
    """
    scaled = logits / (temperature or 1.0)
    if banned is not None:
        scaled = scaled.masked_fill(banned, -torch.inf)
    probabilities = scaled.double().softmax(-1)
    if temperature == 0:
        first, second = probabilities.topk(2).values.unbind(-1)
        return first - second
    cdf = probabilities.cumsum(-1)
    return (cdf / cdf[:, -1:] - uniforms[:, None]).abs().amin(-1)


def _weights(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """`[B, V]` float64 probabilities, 0 for tokens outside the top k or, among those, the nucleus."""
    probabilities = logits.double().softmax(-1)
    if 0 < top_k < logits.shape[-1]:
        probabilities = _top_k(probabilities, top_k)
    if top_p < 1.0:
        probabilities = _nucleus(probabilities, top_p)
    return probabilities


def _top_k(probabilities: Tensor, k: int) -> Tensor:
    """The k likeliest of each row, 0 elsewhere; of tokens as likely as the last of them the lower ids stay."""
    least = probabilities.topk(k).values[:, -1:]
    above, tied = probabilities > least, probabilities == least
    places = k - above.sum(-1, keepdim=True)
    return probabilities * (above | tied & (tied.cumsum(-1) <= places))


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The likeliest of each row that together reach `top_p` of its sum (Holtzman et al. 2020), 0 elsewhere.

    Ties go to the lower id; the likeliest token always stays.
    """
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    keep = before < top_p * ordered.sum(-1, keepdim=True)
    return probabilities * torch.zeros_like(keep).scatter(-1, order, keep)
