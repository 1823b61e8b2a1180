"""One optimizer, several roles: each role's gradient is clipped by its own norm, and a step can pass without effect."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine import dist


@dataclass
class RoleSteps:
    """Clips each role's gradient by that role's own norm, and can let an optimizer step pass without effect.

    DeepSpeed knows one norm for everything: a young critic's large gradient would throttle the actor. So its
    clipping is off, and this hook works where every ZeRO stage hands the optimizer float32 gradients that are
    averaged over ranks and unscaled: just before `optimizer.step()`. Stages 1 to 3 call that once per group with
    this rank's partition, stage 0 once with everything.
    """

    partitioned: bool
    correction: Callable[[], float] | None = None
    """Factor on every gradient: DeepSpeed may have unscaled it by another scale than the loss had."""
    norms: dict[str, float] = field(default_factory=dict)
    skip: bool = False
    """Nothing is stepped; a norm that is not finite sets it, for that role and those behind it."""
    frozen: frozenset[str] = frozenset()
    _hidden: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    @torch.no_grad()
    def _before(self, optimizer, args, kwargs) -> None:
        for group in optimizer.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters and not self.skip:
                if self.correction is not None:
                    for parameter in parameters:
                        parameter.grad.mul_(self.correction())
                norm = self.norms[group["role"]] = self._clip(parameters, group["gradient_clipping"])
                self.skip = not math.isfinite(norm)
                if group["role"] in self.frozen:
                    for parameter in parameters:
                        parameter.grad.zero_()  # Adam's moments stay 0 (on the trunk the value loss reaches the actor)
        if self.skip:
            # The optimizer passes over a parameter without a gradient: neither weight nor moment moves,
            # and DeepSpeed's own bookkeeping (buffers, micro-step counter) still runs its course.
            for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                self._hidden.append((parameter, parameter.grad))
                parameter.grad = None

    def _after(self, optimizer, args, kwargs) -> None:
        for group in optimizer.param_groups:
            if group["role"] in self.frozen and not self.skip:
                for parameter in group["params"]:
                    # Adam's count starts when the role does: its bias correction would be gone by then.
                    optimizer.state[parameter]["step"] = optimizer.state[parameter]["step"] * 0
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden.clear()

    def _clip(self, parameters: list[Tensor], limit: float) -> float:
        square = sum(p.grad.double().square().sum() for p in parameters)
        if self.partitioned:
            square = dist.all_reduce(square)
        norm = math.sqrt(square.item())
        if limit and norm > limit:
            for parameter in parameters:
                parameter.grad.mul_(limit / norm)
        return norm
