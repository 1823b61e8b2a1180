"""RMS norms and rotary positions in fewer passes over the numbers than autograd's own.

Number by number there is little to compute, and memory is what takes the time. Known are those of Llama, to the letter,
which are those of its many heirs in transformers, too; any others are left as they are.
"""

from __future__ import annotations

import inspect
import sys
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd import Function

RMS_NORM = """
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)
"""
ROTARY = """
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed
"""
ROTATE_HALF = """
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)
"""


def take_over(model: nn.Module) -> None:
    """Have the norms of a model compute here, and the rotary positions of all models of its family in this process."""
    for module in model.modules():
        if _is_known_norm(module):
            module.forward = partial(_norm, module)
        file = sys.modules[type(module).__module__]
        if _has_known_rotary(file):
            file.apply_rotary_pos_emb = partial(rotary, file.apply_rotary_pos_emb)


def _is_known_norm(module: nn.Module) -> bool:
    if not (hasattr(module, "variance_epsilon") and isinstance(getattr(module, "weight", None), nn.Parameter)):
        return False
    return inspect.getsource(type(module).forward).endswith(RMS_NORM)


def _has_known_rotary(file: ModuleType) -> bool:
    functions = getattr(file, "apply_rotary_pos_emb", None), getattr(file, "rotate_half", None)
    if not all(map(inspect.isfunction, functions)):  # it has none, or it is replaced already
        return False
    return all(inspect.getsource(f).endswith(text) for f, text in zip(functions, (ROTARY, ROTATE_HALF), strict=True))


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # the compiler joins passes itself
        return type(module).forward(module, x)
    if not torch.is_grad_enabled():
        return _normed(x, module.weight, module.variance_epsilon)[0]
    return _RMSNorm.apply(x, module.weight, module.variance_epsilon)


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm, and what each row is multiplied by."""
    wide = x.float()
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    scale = mean_square.add_(epsilon).rsqrt_()
    normed = (wide * scale).to(x.dtype)
    return (normed.mul_(weight) if weight.dtype == normed.dtype else normed * weight), scale


class _RMSNorm(Function):
    """w x / sqrt(mean(x^2) + eps), the fraction in float32 and rounded to the type of x (arXiv:1910.07467, equation 4).

    Keeps x alone. w is saved as the parameter it is: ZeRO-3 lets its data go and fetches it again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        result, scale = _normed(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return result

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        wide, to_x, to_weight = x.float(), None, None
        if needs_weight:
            normed = (wide * scale).to(x.dtype)
            to_weight = (upstream * normed).reshape(-1, x.shape[-1]).sum(0)
        if needs_x:
            to_normed = (upstream * weight).to(x.dtype).float()
            slope = torch.linalg.vecdot(to_normed, wide)[..., None].mul_(scale.square()).div_(x.shape[-1])
            to_x = to_normed.addcmul_(wide, slope, value=-1).mul_(scale).to(x.dtype)
        return to_x, to_weight, None


def rotary(original, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions (arXiv:2104.09864, equation 34, on halves instead of pairs).

    Args:
        original: transformers' own, for what this one doesn't take.
        q: `[B, heads, L, width]`; `k` with heads of its own.
        cos: `[B, L, width]`, as `sin`.
        unsqueeze_dim: where the heads are.
    """
    if torch.compiler.is_compiling() or cos.shape[-1] != q.shape[-1] or cos.dtype != q.dtype:
        return original(q, k, cos, sin, unsqueeze_dim)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    if not torch.is_grad_enabled():
        return _rotated(q, cos, *sin.chunk(2, -1)), _rotated(k, cos, *sin.chunk(2, -1))
    return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)


class _Rotation(Function):
    """x cos + (-b, a) sin, of the halves a and b of x. Its transpose is a rotation, too, and needs no x."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, *sin.chunk(2, -1))

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        of_a, of_b = sin.neg().chunk(2, -1)
        return _rotated(upstream, cos, of_b, of_a), None, None


def _rotated(x: Tensor, cos: Tensor, of_a: Tensor, of_b: Tensor) -> Tensor:
    """(a, b) cos + (-b of_a, a of_b), in memory that is laid out like x."""
    result = torch.empty_like(x)
    (a, b), (to_a, to_b), (cos_a, cos_b) = (tensor.chunk(2, -1) for tensor in (x, result, cos))
    torch.mul(a, cos_a, out=to_a).addcmul_(b, of_a, value=-1)
    torch.mul(b, cos_b, out=to_b).addcmul_(a, of_b)
    return result
