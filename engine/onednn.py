"""Linear layers on a CPU that ask oneDNN for their products.

For float32 torch asks MKL, which off Intel's processors is slower: on the machine of docs/performance.md 83 to 92
GFLOP/s against 95 to 102. And where many products read a weight that stands still, it can be packed once into the
blocks of oneDNN's kernels: the 32 rows of a decoding step then take 0.7 of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import Function


class Linear(nn.Linear):
    """What `nn.Linear` computes, gradients included. Its input is kept for the backward if its weight learns alone."""

    packed: Tensor | None = None

    @property
    def operand(self) -> Tensor:
        """What the products read: the packed copy of the weight while there is one."""
        return self.weight if self.packed is None else self.packed

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        if not torch.is_grad_enabled():
            return _linear(x, self.operand, self.bias)
        return _Linear.apply(x, self.operand, self.bias)


def take_over(module: nn.Module) -> list[Linear]:
    """Have the plain linear layers of a module compute here; returns all that do, those from before included."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = Linear
    return [part for part in module.modules() if isinstance(part, Linear)]


@contextmanager
def packed_linears(module: nn.Module) -> Iterator[None]:
    """Inside, linear layers on the CPU read packed copies of their weights. Nothing may change these meanwhile."""
    layers = [layer for layer in take_over(module) if _can_pack(layer.weight)]
    try:
        for layer in layers:
            layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        yield
    finally:
        for layer in layers:
            vars(layer).pop("packed", None)


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not weight.numel() or not torch.backends.mkldnn.is_available():
        return False
    fast_bfloat16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or fast_bfloat16


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`[..., in]` x `[out, in]` -> `[..., out]`: x W^T, no graph. W may be packed, or a view of a transposed matrix."""
    if weight.is_mkldnn or weight.dtype == torch.float32 and _can_pack(weight) and not torch.compiler.is_compiling():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.t()  # in 16 bit that is oneDNN's on a CPU as well


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result = product(x, weight)
    return result if bias is None else result.add_(bias)


class _Linear(Function):
    """x W^T + bias. W is saved as the parameter it is: ZeRO-3 lets its data go and fetches it again."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = upstream.reshape(-1, upstream.shape[-1])
        to_x = product(upstream, weight.t()) if needs_x else None
        to_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None
        return to_x, to_weight, rows.sum(0) if needs_bias else None
