"""Attention on a CPU in 16 bit, computed in float32.

torch's own kernel for bfloat16 takes 1.7 times as long as casting, computing and casting back: on the machine of
docs/performance.md 31 against 18 ms, forward and backward, for 8 sequences of 127 tokens and 8 heads of 64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def widen_on_cpu() -> None:
    """From now on every model in this process whose attention is `sdpa` computes it so."""
    AttentionInterface.register("sdpa", _sdpa)


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings
) -> tuple[Tensor, None]:
    """What transformers calls for `sdpa`: `[B, heads, L, width]` -> `[B, L, heads, width]`."""
    dtype = query.dtype
    if query.device.type != "cpu" or dtype == torch.float32 or not dtype.is_floating_point:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    tensors = [_wide(x) for x in (query, key, value, attention_mask)]
    output, weights = sdpa_attention_forward(module, *tensors, **{name: _wide(x) for name, x in settings.items()})
    return output.to(dtype), weights


def _wide(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
