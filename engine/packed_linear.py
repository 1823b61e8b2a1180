"""Linear layers on a CPU with their weights in the blocked layout of oneDNN's kernels.

torch's own product copies a weight into such blocks at every call, which for the few rows of a decoding step is much of
the work. Packed once, on the machine of docs/performance.md, 32 rows take 0.7 of the time and 2048 rows 0.85.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def packed_linears(module: nn.Module) -> Iterator[None]:
    """Inside, plain linear layers on the CPU compute with a packed copy of their weights. Nothing may change these."""
    layers = [layer for layer in module.modules() if type(layer) is nn.Linear and _can_pack(layer)]
    try:
        for layer in layers:
            layer.forward = partial(_linear, torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach()), layer.bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _can_pack(layer: nn.Linear) -> bool:
    weight, own_forward = layer.weight, "forward" not in vars(layer)
    if weight.device.type != "cpu" or not weight.numel() or not own_forward or not torch.backends.mkldnn.is_available():
        return False
    fast_bfloat16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or fast_bfloat16


def _linear(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
