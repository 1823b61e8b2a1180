"""Attention on a CPU: in 16 bit computed in float32, and of a single token as two plain products; packed on any device.

torch's own kernel for bfloat16 takes 1.7 times as long as casting, computing and casting back: on the machine of
docs/performance.md 31 against 18 ms, forward and backward, for 8 sequences of 127 tokens and 8 heads of 64. A decoding
step of 32 sequences with 128 tokens behind them takes torch's kernel 1.65 ms, two products 1.2 ms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SPECIAL = ("position_bias", "softcap", "cache")
"""What transformers' function does, or refuses, beside attention."""


def take_over() -> None:
    """From now on every model in this process whose attention is `sdpa` computes it here, on a CPU."""
    AttentionInterface.register("sdpa", _sdpa)


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings
) -> tuple[Tensor, None]:
    """What transformers calls for `sdpa`: `[B, heads, L, width]` -> `[B, L, heads, width]`."""
    ends = settings.get("cu_seq_lens_q")
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        if ends is not None:
            return _one_by_one(module, query, key, value, attention_mask, ends.diff().tolist(), settings), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    tensors = [_wide(x) for x in (query, key, value, attention_mask)]
    settings = {name: _wide(x) for name, x in settings.items()}
    plain = not settings.get("dropout") and all(settings.get(name) is None for name in SPECIAL)
    if query.shape[2] == 1 and plain:
        return _of_one_token(*tensors, settings.get("scaling")).to(query.dtype), None
    if ends is not None:
        return _one_by_one(module, *tensors, ends.diff().tolist(), settings).to(query.dtype), None
    output, weights = sdpa_attention_forward(module, *tensors, **settings)
    return output.to(query.dtype), weights


def _one_by_one(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: list[int],
    settings: dict[str, Any],
) -> Tensor:
    """`[1, heads, N, width]` -> `[1, N, heads, width]` of sequences that lie end to end: no pair of two is computed."""
    parts, found, start = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True), [], 0
    for part, length in zip(parts, lengths, strict=True):
        own = None if mask is None else mask[..., start : start + length, start : start + length]
        if own is not None and own.dtype == torch.bool and bool((own == own.new_ones(own.shape).tril()).all()):
            own = None  # plainly causal, which the kernel knows by itself
        found.append(sdpa_attention_forward(module, *part, own, **settings)[0])
        start += length
    return torch.cat(found, dim=1)


def _of_one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """`[B, heads, 1, width]` -> `[B, 1, heads, width]`: the heads that share keys are one product's rows."""
    rows, heads, _, width = query.shape
    groups = (rows * key.shape[1], heads // key.shape[1])  # products, and heads in each
    scores = torch.bmm(query.reshape(*groups, width), key.reshape(groups[0], -1, width).transpose(1, 2))
    scores = scores.view(rows, heads, 1, -1).mul_(width**-0.5 if scaling is None else scaling)
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores += mask
    weights = scores.softmax(-1).view(*groups, -1)
    return torch.bmm(weights, value.reshape(groups[0], -1, value.shape[3])).view(rows, 1, heads, -1)


def _wide(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
