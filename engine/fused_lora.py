"""LoRA layers that compute W x + s B (A x) as one product, where every matrix of the adapter is at hand.

peft computes the base's product, A's and B's, scales and adds, each a tensor of its own: at rank 16 that traffic costs
more than A and B themselves. And under ZeRO-3 DeepSpeed's hooks run around each of peft's modules.

What comes in is kept for A's gradient. Of a gated feed-forward, that is act(gate) * up, as wide as a layer gets and
cheap to compute again: gate and up alone are kept, which autograd would keep beside it, and act(gate) too.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd import Function

from engine import onednn

GATED = re.compile(r"self\.down_proj\(self\.act_fn\(self\.gate_proj\((\w+)\)\) \* self\.up_proj\(\1\)\)")
"""What the forward of Llama's feed-forward says, and of those of its many heirs in transformers."""


def fuse(model: nn.Module, whole: Callable[[nn.Parameter], bool] = lambda parameter: True) -> int:
    """Replace the forward of plain LoRA layers; weights, names and the choice of the adapter stay as they are.

    Left to peft: DoRA, quantized layers, GPT-2's transposed ones, and adapters that ZeRO-3 shards.

    Args:
        whole: whether a parameter is never sharded, so that no hook needs to fetch it.

    Returns:
        how many layers were replaced.
    """
    found = [m for m in model.modules() if type(m) is LoraLinear and _plain(m) and all(map(whole, _adapters(m)))]
    for layer in found:
        layer.base_layer.update = partial(_active, layer)
        layer.base_layer.__class__ = _AdaptedLinear
        layer.__class__ = _Through
    for module in model.modules():
        if _gated(module):
            module.forward = partial(_gated_forward, module)
    return len(found)


def is_fused(model: nn.Module) -> bool:
    """Whether `fuse` replaced any layer."""
    return any(type(module) is _Through for module in model.modules())


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapter."""
    return [p for layer in model.modules() if isinstance(layer, LoraLayer) for p in _adapters(layer)]


def _adapters(layer: LoraLayer) -> list[nn.Parameter]:
    return [*layer.lora_A.parameters(), *layer.lora_B.parameters()]


def _plain(layer: LoraLinear) -> bool:
    return (
        type(layer.base_layer) in (nn.Linear, onednn.Linear)
        and not layer.base_layer.weight.requires_grad
        and not layer.fan_in_fan_out
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
    )


def _gated(module: nn.Module) -> bool:
    """Whether a module is a gated feed-forward, to the letter, whose last layer is fused and takes what we hand it."""
    if type(getattr(module, "down_proj", None)) is not _Through:
        return False
    parts = (module.down_proj, module.down_proj.base_layer)
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in parts)  # they would look for a tensor
    return not hooked and GATED.search(inspect.getsource(type(module).forward)) is not None


def _gated_forward(module: nn.Module, x: Tensor) -> Tensor:
    return module.down_proj(_Product(module.act_fn, module.gate_proj(x), module.up_proj(x)))


@dataclass(frozen=True)
class _Product:
    """act(gate) * up, not computed yet."""

    act: Callable[[Tensor], Tensor]
    gate: Tensor
    up: Tensor

    def compute(self) -> Tensor:
        active = self.act(self.gate)
        if torch.is_grad_enabled() or active is self.gate:
            return active * self.up
        return active.mul_(self.up)


def _active(layer: LoraLinear) -> tuple[Tensor, Tensor, float] | None:
    """A, B and s of the adapter that shapes the forward; None: the base computes alone."""
    for name in layer.active_adapters:
        if name in layer.lora_A:
            return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    return None


class _Through(LoraLinear):
    """A LoRA layer that leaves its work to the base layer, around which DeepSpeed's hooks fetch W."""

    def forward(self, x: Tensor | _Product) -> Tensor:
        return self.base_layer(x)


class _AdaptedLinear(onednn.Linear):
    """A frozen linear layer that adds an adapter's update to its own product."""

    update: Callable[[], tuple[Tensor, Tensor, float] | None]

    def forward(self, x: Tensor | _Product) -> Tensor:
        update = self.update()
        if update is None:
            return super().forward(x.compute() if isinstance(x, _Product) else x)
        if isinstance(x, _Product):
            return _AdaptedProduct.apply(self.operand, self.bias, *update, x.act, x.gate, x.up)
        return _AdaptedProduct.apply(self.operand, self.bias, *update, None, x)


class _AdaptedProduct(Function):
    """x W^T + bias + s (x A^T) B^T, with the update added in place by the matrix product itself.

    x is the one input, or act(gate) * up. W and the bias are frozen. W is saved as the parameter it is: ZeRO-3 lets its
    data go and fetches it again.
    """

    @staticmethod
    def forward(
        ctx,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        act: Callable[[Tensor], Tensor] | None,
        *inputs: Tensor,
    ) -> Tensor:
        x = inputs[0] if act is None else _Product(act, *inputs).compute()
        rows = x.reshape(-1, x.shape[-1])
        low = onednn.product(rows, a)
        result = onednn.product(rows, weight)
        if bias is not None:
            result += bias
        result.addmm_(low, b.t(), alpha=scaling)
        ctx.save_for_backward(weight, a, b, low, *inputs)
        ctx.scaling, ctx.act = scaling, act
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b, low, *inputs = ctx.saved_tensors
        _, _, needs_a, needs_b, _, _, *needs_inputs = ctx.needs_input_grad
        into = upstream.reshape(-1, upstream.shape[-1])
        to_low = onednn.product(into, b.t()).mul_(ctx.scaling)
        to_b = (low.t() @ into).t() * ctx.scaling if needs_b else None  # half the time of the plain order
        to_x = None
        if any(needs_inputs):
            to_x = onednn.product(into, weight.t()).addmm_(to_low, a).view(*upstream.shape[:-1], -1)
        x, to_inputs = inputs[0], [to_x]
        if ctx.act is not None:
            x, to_inputs = _again(ctx.act, inputs, to_x)
        to_a = to_low.t() @ x.reshape(-1, x.shape[-1]) if needs_a else None
        return None, None, to_a, to_b, None, None, *to_inputs


def _again(
    act: Callable[[Tensor], Tensor], inputs: list[Tensor], upstream: Tensor | None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """act(gate) * up once more, and from its gradient those of gate and up."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        product = _Product(act, *leaves).compute()
    return product.detach(), (None, None) if upstream is None else torch.autograd.grad(product, leaves, upstream)
