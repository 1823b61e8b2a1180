"""What a trained engine holds, found by walking unique live storages. Knows nothing of the planner."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def on_disk(engine) -> dict[str, int]:
    """Bytes by part of what this rank of a `zero.TrainedEngine` has on NVMe now."""
    found = {"masters": 0, "moments": 0, "gradients": 0}
    if engine.swap_folder is not None:
        for file in engine.swap_folder.path.rglob("*.swp"):
            gradient = "gradients" if "_gradient_" in file.name else "masters"
            found["moments" if file.name.startswith("exp_avg") else gradient] += file.stat().st_size
    return found


def held(engine) -> dict[str, int]:
    """Bytes by part of a `zero.TrainedEngine`; a storage that serves as several counts as the first of them."""
    optimizer, module = engine.engine.optimizer, engine.module
    parameters = list(module.parameters())
    cut = [p for p in parameters if hasattr(p, "ds_tensor")]
    second = [p.ds_secondary_tensor for p in cut if p.ds_secondary_tensor is not None]
    parts = {
        "weights": [*(p.data for p in parameters), *(p.ds_tensor.data for p in cut), *second],
        "masters": _masters(engine),
        "moments": [x for state in engine.optimizer.state.values() for x in state.values() if torch.is_tensor(x)],
        "buckets": list(_buckets(optimizer)),  # gradients can be views of them
        "gradients": [*_gradients(parameters, optimizer), *(p.grad for p in _masters(engine) if p.grad is not None)],
    }
    seen: set[int] = set()
    return {part: fresh_bytes(tensors, seen) for part, tensors in parts.items()}


def _masters(engine) -> list[Tensor]:
    """Stage 3 hands them to the optimizer for the step alone."""
    optimizer = engine.engine.optimizer
    return [
        *(p for group in engine.optimizer.param_groups for p in group["params"]),
        *getattr(optimizer, "fp32_partitioned_groups_flat", ()),
        *getattr(optimizer, "single_partition_of_fp32_groups", ()),
    ]


def _gradients(parameters: list[Tensor], optimizer) -> Iterable[Tensor]:
    yield from (p.grad for p in parameters if p.grad is not None)
    yield from (p.grad_accum for p in parameters if getattr(p, "grad_accum", None) is not None)
    for held_by in (getattr(optimizer, "averaged_gradients", {}), getattr(optimizer, "all_grad_tensors", {})):
        for tensors in held_by.values():
            yield from (x for x in tensors or () if torch.is_tensor(x))
    if getattr(optimizer, "grad_partitions_flat_buffer", None) is not None:
        yield optimizer.grad_partitions_flat_buffer
    if getattr(optimizer, "optimizer_swapper", None) is not None:  # too small for a disk
        for info in optimizer.optimizer_swapper.swap_params_info.values():
            yield from info.unswapped_gradients.values()


def _buckets(optimizer) -> Iterable[Tensor]:
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        buffer = getattr(bucket, "buffer", None)
        yield from ([buffer] if torch.is_tensor(buffer) else buffer or ())
    yield from getattr(optimizer, "param_buffer_of_bit16_for_cpu_offload_groups", ())
    if getattr(optimizer, "optimizer_swapper", None) is not None:
        yield from optimizer.optimizer_swapper.swap_buffer_manager.all_buffers


def fresh_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the storages behind some tensors that were not seen before; they are from now on."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
