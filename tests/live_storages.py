"""What a trained engine holds, found by walking unique live storages. Knows nothing of the planner."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint


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
    parts["quantization"] = list(_constants(module))
    seen: set[int] = set()
    return {part: fresh_bytes(tensors, seen) for part, tensors in parts.items()}


def _constants(module: nn.Module) -> Iterable[Tensor]:
    """What bitsandbytes keeps beside weights: nf4's states, and those that scale their scales; int8's rows."""
    states = [p.quant_state for p in module.parameters() if getattr(p, "quant_state", None) is not None]
    for state in (*states, *(state.state2 for state in states if state.nested)):
        yield from (x for x in (state.absmax, state.code, state.offset) if torch.is_tensor(x))
    for part in module.modules():  # from the first forward on
        rows = getattr(getattr(part, "state", None), "SCB", None)
        yield from [] if rows is None else [rows]


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


@contextmanager
def in_backwards(engines: list) -> Iterator[dict]:
    """Inside, at each backward's end, where they hold the most: by `zero.TrainedEngine`, its `held` and `on_disk`."""
    found: dict = {trained: [] for trained in engines}

    def look(trained) -> None:
        found[trained].append((held(trained), on_disk(trained)))

    def watched(trained, *arguments) -> None:
        backward(trained, *arguments)
        look(trained)

    kind = type(engines[0])
    backward = kind.backward
    with ExitStack() as stack:
        stack.enter_context(patch.object(kind, "backward", watched))
        for trained in engines:
            optimizer = trained.engine.optimizer
            if hasattr(optimizer, "_release_ipg_buffers"):  # of stages 1 and 2: within the backward's end

                def release(trained=trained, original=optimizer._release_ipg_buffers) -> None:
                    look(trained)
                    original()

                stack.enter_context(patch.object(optimizer, "_release_ipg_buffers", release))
        yield found


def most(looks: list[tuple[dict[str, int], dict[str, int]]]) -> tuple[dict[str, int], dict[str, int]]:
    """The most bytes of each part in memory and on the disk."""
    memory, disk = ({part: max(one[part] for one in of) for part in of[0]} for of in zip(*looks, strict=True))
    return memory, disk


class _Box:
    """Around a saved tensor: it lives as long as a graph needs that."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


@contextmanager
def kept_for_backward(modules: list[nn.Module]) -> Iterator[list[int]]:
    """Inside, at each tensor that autograd saves: the bytes of all that graphs hold then. Weights are none of it.

    A checkpointed layer saves nothing that autograd shows, and holds its input.
    """
    boxes, inputs, again, samples = weakref.WeakSet(), [], [], []

    def weights() -> set[int]:
        return {p.data.untyped_storage().data_ptr() for module in modules for p in module.parameters()}

    def sample() -> None:
        alive = [found for given in inputs if (found := given()) is not None]
        samples.append(fresh_bytes([*(box.tensor for box in boxes), *alive, *again], set()))

    def pack(tensor: Tensor) -> _Box | Tensor:
        if tensor.untyped_storage().data_ptr() in weights():
            return tensor
        box = _Box(tensor)
        boxes.add(box)
        sample()
        return box

    def enter(_, given: tuple, named: dict) -> None:
        inputs.append(weakref.ref(given[0] if given else named["hidden_states"]))

    class Recomputed(checkpoint._recomputation_hook):
        """What a layer saves when it is computed again, until the next one is."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            own = self.pack_hook
            again.clear()

            def noted(tensor: Tensor):
                if tensor.untyped_storage().data_ptr() not in weights():
                    again.append(tensor.detach())
                    sample()
                return own(tensor)

            self.pack_hook = noted

    layers = [part for module in modules for part in module.modules() if type(part).__name__.endswith("DecoderLayer")]
    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    try:
        with (
            patch.object(checkpoint, "_recomputation_hook", Recomputed),
            saved_tensors_hooks(pack, lambda box: box.tensor if isinstance(box, _Box) else box),
        ):
            yield samples
    finally:
        for hook in hooks:
            hook.remove()
