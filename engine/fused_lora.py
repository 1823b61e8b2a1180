"""LoRA layers that compute W x + s B (A x) as one product, where every matrix of the adapter is at hand.

peft computes the base's product, A's and B's, scales and adds, each a tensor of its own: at rank 16 that traffic costs
more than A and B themselves. And under ZeRO-3 DeepSpeed's hooks run around each of peft's modules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd import Function


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
    return len(found)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapter."""
    return [p for layer in model.modules() if isinstance(layer, LoraLayer) for p in _adapters(layer)]


def _adapters(layer: LoraLayer) -> list[nn.Parameter]:
    return [*layer.lora_A.parameters(), *layer.lora_B.parameters()]


def _plain(layer: LoraLinear) -> bool:
    return (
        type(layer.base_layer) is nn.Linear
        and not layer.base_layer.weight.requires_grad
        and not layer.fan_in_fan_out
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
    )


def _active(layer: LoraLinear) -> tuple[Tensor, Tensor, float] | None:
    """A, B and s of the adapter that shapes the forward; None: the base computes alone."""
    for name in layer.active_adapters:
        if name in layer.lora_A:
            return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    return None


class _Through(LoraLinear):
    """A LoRA layer that leaves its work to the base layer, around which DeepSpeed's hooks fetch W."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


class _AdaptedLinear(nn.Linear):
    """A frozen linear layer that adds an adapter's update to its own product."""

    update: Callable[[], tuple[Tensor, Tensor, float] | None]

    def forward(self, x: Tensor) -> Tensor:
        update = self.update()
        if update is None:
            return super().forward(x)
        return _AdaptedProduct.apply(x, self.weight, self.bias, *update)


class _AdaptedProduct(Function):
    """x W^T + bias + s (x A^T) B^T, with the update added in place by the matrix product itself.

    W and the bias are frozen. W is saved as the parameter it is: ZeRO-3 lets its data go and fetches it again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.t()
        result = rows @ weight.t()
        if bias is not None:
            result += bias
        result.addmm_(low, b.t(), alpha=scaling)
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.scaling = scaling
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, low = ctx.saved_tensors
        needs_x, *_, needs_a, needs_b, _ = ctx.needs_input_grad
        into = upstream.reshape(-1, upstream.shape[-1])
        to_low = (into @ b).mul_(ctx.scaling)
        to_x = None
        if needs_x:
            to_x = (into @ weight).addmm_(to_low, a).view(*upstream.shape[:-1], -1)
        to_a = to_low.t() @ rows if needs_a else None
        to_b = (into.t() @ low).mul_(ctx.scaling) if needs_b else None
        return to_x, None, None, to_a, to_b, None
