"""Master weights and Adam's moments, whole and by name: out of the flat pieces that DeepSpeed keeps, and back.

DeepSpeed has `safe_get_full_*` and `safe_set_full_*` for this. They know no state that Adam has not made yet, refuse
sizes at stage 3 that the ranks don't divide, and skip stage 0; so the pieces are found here, on its 0.19 optimizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine import dist

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
BUCKET_ELEMENTS = 2**24
"""Of one message: a call for each of an adapter's many small tensors costs more than their bytes do."""
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "last_rescale_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Piece:
    """This rank's part of one parameter: elements `start` to `start + count` of it lie in `flat` from `offset` on."""

    flat: Tensor  # float32 masters of one parameter or of many; the optimizer knows its state by it
    offset: int
    start: int
    count: int

    def of(self, flat: Tensor) -> Tensor:
        """`[count]` view of the part in a tensor that is laid out like `flat`."""
        return flat.detach().view(-1)[self.offset : self.offset + self.count]


def pieces(wrapper, parameters: Mapping[str, nn.Parameter]) -> dict[str, Piece | None]:
    """Where the masters of trained parameters lie on this rank; None where it keeps nothing of one.

    Args:
        wrapper: DeepSpeed's optimizer, of any ZeRO stage.
    """
    masters = _whole_masters(wrapper)
    return {name: _piece(wrapper, parameter, masters) for name, parameter in parameters.items()}


def _whole_masters(wrapper) -> dict[int, Tensor]:
    """Stage 0 in 16 bit: each parameter's own float32 copy."""
    if not hasattr(wrapper, "fp32_groups"):
        return {}
    groups = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
    return {id(p): master for ours, masters in groups for p, master in zip(ours, masters, strict=True)}


def _piece(wrapper, parameter: nn.Parameter, masters: dict[int, Tensor]) -> Piece | None:
    if hasattr(parameter, "ds_id"):  # stage 3: cut into as many equal parts as there are ranks, the last one padded
        group, offset, count = wrapper.grad_position[wrapper.get_param_id(parameter)]
        start = count * wrapper._get_param_partition_rank(parameter)
        count = max(0, min(count, parameter.ds_numel - start))
        return Piece(wrapper.fp32_partitioned_groups_flat[group], offset, start, count) if count else None
    if hasattr(parameter, "_hp_mapping"):  # stages 1 and 2: a range of all parameters in a row
        found = parameter._hp_mapping
        if found is None:
            return None
        flat = wrapper.single_partition_of_fp32_groups[found.param_group_index]
        part, whole = found.hp_fragment_address, found.lp_fragment_address
        return Piece(flat, part.start, whole.start, whole.numel)
    return Piece(masters.get(id(parameter), parameter), 0, 0, parameter.numel())


@contextmanager
def in_memory(wrapper, at: Mapping[str, Piece | None], changed: bool = False) -> Iterator[None]:
    """Inside, masters and moments that DeepSpeed keeps on a disk are in the tensors that stand for them.

    Args:
        wrapper: DeepSpeed's optimizer.
        at: pieces of one role: DeepSpeed's buffers hold one group of the optimizer at a time.
        changed: they go back to the disk at the end, as they are then.
    """
    flats = {id(piece.flat) for piece in at.values() if piece is not None}
    groups = [i for i, flat in enumerate(getattr(wrapper, "fp32_partitioned_groups_flat", ())) if id(flat) in flats]
    groups = [i for i in groups if wrapper._swappable_optimizer_subgroup(i)]
    assert len(groups) <= 1, "more than one group of the optimizer"
    for group in groups:
        wrapper._optimizer_states_and_gradient_swap_in(group)
    try:
        yield
    finally:
        if changed and hasattr(wrapper, "invalidate_secondary_tensor"):
            wrapper.invalidate_secondary_tensor()  # ZeRO++'s second shards are of the weights before
        for group in groups:
            (wrapper._optimizer_states_and_gradient_swap_out if changed else wrapper._release_swap_buffers)(group)


def capture(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], at: Mapping[str, Piece | None]
) -> dict[str, Tensor]:
    """`NAME/master`, `NAME/exp_avg`, `NAME/exp_avg_sq`, float32 in the parameter's shape, on every rank; a collective.

    Moments that Adam has not made yet are 0, as it makes them.
    """
    found = {}
    for bucket in _buckets([(name, kind) for name in parameters for kind in (MASTER, *MOMENTS)], parameters):
        sizes = [_shape(parameters[name]).numel() for name, _ in bucket]
        first = parameters[bucket[0][0]]
        whole = torch.zeros(sum(sizes), dtype=torch.float32, device=first.device)
        for (name, kind), tensor in zip(bucket, whole.split(sizes), strict=True):
            part, piece = _read(optimizer, at[name], kind), at[name]
            if part is not None:
                tensor[piece.start : piece.start + piece.count] = part
        if _is_cut(first):
            # As integers: no other rank has anything there, and adding 0 to them keeps even the sign of -0.0.
            whole = dist.all_reduce(whole.view(torch.int32)).view(torch.float32)
        for (name, kind), tensor in zip(bucket, whole.cpu().split(sizes), strict=True):
            found[f"{name}/{kind}"] = tensor.view(_shape(parameters[name]))
    return found


def _buckets(
    wanted: Iterable[tuple[str, str]], parameters: Mapping[str, nn.Parameter]
) -> Iterator[list[tuple[str, str]]]:
    """What travels in one message each: parameters of one engine are all cut, or none is."""
    bucket, elements = [], 0
    for name, kind in wanted:
        more = _shape(parameters[name]).numel()
        if bucket and elements + more > BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
        bucket.append((name, kind))
        elements += more
    if bucket:
        yield bucket


def _read(optimizer: torch.optim.Optimizer, piece: Piece | None, kind: str) -> Tensor | None:
    """`[count]`, None where there is nothing (yet)."""
    if piece is None:
        return None
    flat = piece.flat if kind == MASTER else optimizer.state.get(piece.flat, {}).get(kind)
    return None if flat is None else piece.of(flat)


def steps(optimizer: torch.optim.Optimizer, at: Mapping[str, Piece | None]) -> int:
    """How many steps Adam has counted for these parameters; a collective."""
    counts = [float(optimizer.state.get(piece.flat, {}).get("step", 0)) for piece in at.values() if piece is not None]
    return int(dist.all_reduce(torch.tensor(max(counts, default=0.0), dtype=torch.float64), "max"))


@torch.no_grad()
def restore(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    at: Mapping[str, Piece | None],
    tensors: Mapping[str, Tensor],
    step: int,
) -> None:
    """Put back what `capture` and `steps` gave, on as many ranks as there are now; the model's weights follow.

    Args:
        tensors: whole, the same on every rank.
    """
    for flat in {id(piece.flat): piece.flat for piece in at.values() if piece is not None}.values():
        # Those there are stay the same tensors: DeepSpeed's swapping to a disk knows them.
        held = optimizer.state.get(flat, {})
        state = {kind: held.get(kind, torch.zeros_like(flat, requires_grad=False)).zero_() for kind in MOMENTS}
        # torch's Adam counts in a tensor, DeepSpeed's for the CPU in a number.
        counted = torch.tensor(float(step)) if isinstance(optimizer, torch.optim.Adam) else step
        optimizer.state[flat] = {"step": counted, **state}
    for name, parameter in parameters.items():
        piece, master = at[name], tensors[f"{name}/{MASTER}"]
        if piece is not None:
            for kind in (MASTER, *MOMENTS):
                part = tensors[f"{name}/{kind}"].reshape(-1)[piece.start : piece.start + piece.count]
                _read(optimizer, piece, kind).copy_(part)
            if hasattr(parameter, "ds_id"):
                shard = master.reshape(-1)[piece.start : piece.start + piece.count]
                parameter.ds_tensor.data.view(-1)[: piece.count].copy_(shard)
        if parameter.data.shape == master.shape:  # below stage 3, and small ones that stay whole there
            parameter.data.copy_(master)


def loss_scale(wrapper) -> dict[str, float]:
    """The numbers of float16's loss scaling, which moves by what it has seen; {} in other types."""
    scaler = _scaler(wrapper)
    return {name: getattr(scaler, name) for name in LOSS_SCALE if hasattr(scaler, name)}


def restore_loss_scale(wrapper, numbers: Mapping[str, float]) -> None:
    """Put back what `loss_scale` gave."""
    for name, number in numbers.items():
        setattr(_scaler(wrapper), name, number)


@contextmanager
def any_overflow(wrapper) -> Iterator[None]:
    """Inside, DeepSpeed drops gradients that overflow at the smallest loss scale, too, where it would raise first."""
    scaler = _scaler(wrapper)
    raises = getattr(scaler, "raise_error_at_min_scale", None)
    if raises:
        scaler.raise_error_at_min_scale = False
    try:
        yield
    finally:
        if raises:
            scaler.raise_error_at_min_scale = True


def _scaler(wrapper):
    return getattr(wrapper, "loss_scaler", None) or getattr(wrapper, "loss_scale_config", None)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _is_cut(parameter: nn.Parameter) -> bool:
    """Whether ranks hold different parts of it: the same answer on every rank, unlike that about its pieces."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
