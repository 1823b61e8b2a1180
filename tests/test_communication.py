"""What travels between ranks: rows in one exchange, and bytes counted as a hand counts them."""

from __future__ import annotations

import pytest
import torch

from engine import dist, traffic, zero
from engine.batch import map_rows, take_rows
from tests import tiny

pytestmark = pytest.mark.dist


def tensors(rows: int) -> list[torch.Tensor]:
    """One of each kind that records hold; a byte of one row alone would misalign the next column."""
    generator = torch.Generator().manual_seed(rows)
    numbers = torch.randn(rows, 3, generator=generator)
    return [numbers[:, 0] > 0, numbers.double(), numbers, (1000 * numbers[:, 1]).long(), numbers.bfloat16()[:, :, None]]


def gathered_rows(counts: tuple[int, ...]) -> tuple[list[torch.Tensor], float]:
    before = traffic.received["gathered"]
    return dist.all_gather_rows(tensors(counts[dist.rank()])), traffic.received["gathered"] - before


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (1, 1), (0, 0)])
def test_rows_of_any_type_are_joined_in_rank_order_in_one_exchange(pool, counts):
    expected = [torch.cat(parts) for parts in zip(*map(tensors, counts), strict=True)]
    row_bytes = 1 + 24 + 12 + 8 + 6
    for joined, received in pool.run(gathered_rows, counts):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(joined, expected, strict=True))
        assert received == 8 + max(counts) * row_bytes, "from one other rank: a count of 8 bytes and its padded rows"


def gathered_record(counts: tuple[int, int]):
    mine = torch.arange(counts[0]) if dist.rank() == 0 else torch.arange(counts[0], sum(counts))
    return map_rows(take_rows(tiny.rollout(), mine), dist.all_gather_rows)


@pytest.mark.parametrize("counts", [(4, 3), (7, 0)])
def test_a_record_comes_back_whole(pool, counts):
    for record in pool.run(gathered_record, counts):
        assert all(torch.equal(value, getattr(tiny.rollout(), name)) for name, value in vars(record).items())


def objects() -> tuple[list, str]:
    return dist.all_gather_objects("x" * dist.rank()), dist.broadcast_object(f"of {dist.rank()}", source=1)


def test_objects_of_any_length(pool):
    assert pool.run(objects) == [(["", "x"], "of 1")] * 2


def received_by(collective, *arguments, **named) -> tuple[float, float]:
    before = dict(traffic.received)
    collective(*arguments, **named)
    return tuple(traffic.received[kind] - before[kind] for kind in ("gathered", "reduced"))


def one_of_each() -> dict[str, tuple[float, float]]:
    import deepspeed.comm as theirs

    whole, part = torch.ones(6), torch.ones(6 // dist.world_size())
    parts = [torch.empty_like(part) for _ in range(dist.world_size())]
    return {
        "gather": received_by(theirs.all_gather_into_tensor, whole, part),
        "gather by name": received_by(theirs.all_gather_into_tensor, output_tensor=whole, tensor=part),
        "gather a list": received_by(theirs.all_gather, parts, part),
        "broadcast": received_by(theirs.broadcast, whole, 0),
        "reduce and scatter": received_by(theirs.reduce_scatter_tensor, part, whole),
        "reduce to one": received_by(theirs.reduce, whole, 0),
        "reduce": received_by(theirs.all_reduce, whole),
        "reduce in a group": received_by(theirs.all_reduce, whole, group=theirs.get_world_group()),
        "our reduce": received_by(dist.all_reduce, whole),
    }


def test_every_collective_is_counted_once(pool, single):
    """Six float32 over two ranks: half of 24 bytes comes from the other one; sums also have to come back."""
    expected = {
        **dict.fromkeys(("gather", "gather by name", "gather a list", "broadcast"), (12, 0)),
        **dict.fromkeys(("reduce and scatter", "reduce to one"), (0, 12)),
        **dict.fromkeys(("reduce", "reduce in a group", "our reduce"), (0, 24)),
    }
    assert pool.run(one_of_each) == [expected] * 2
    assert single.run(one_of_each) == [dict.fromkeys(expected, (0, 0))]


def iterations(home: str) -> tuple[list[dict], int, int]:
    """Traffic of the forwards and backwards of a few small iterations; elements in the model, and trained ones."""
    engine = tiny.engine(tiny.recipe(zero={"ds_config": tiny.ds_config("zero3")}, critic={"home": home}))
    rollout, rows, found = tiny.rollout(rows=2), torch.arange(2), []

    def inference() -> None:
        with engine.inference():
            engine.forward(rollout, rows, values=True, ref_logprobs=True)

    def training() -> None:
        output = engine.forward(rollout, rows, values=True)
        engine.backward(output.logprobs.sum(), output.values.sum(), last=True)

    for _ in range(3):
        found.append({"inference": received_by(inference), "training": received_by(training)})
        engine.step()
    everything = sum(zero.elements(p) for p in engine.roles.parameters())
    trained = sum(zero.elements(p) for role in ("actor", "critic") for p in engine.role_parameters(role).values())
    left = [name for name, p in engine.roles.named_parameters() if zero.is_gathered(p)]
    engine.close()
    assert not left, "weights that stayed whole"
    return found, everything, trained


@pytest.mark.parametrize("home", ["adapter", "trunk"])
def test_a_weight_is_gathered_once_for_all_roles_forwards_and_backwards(pool, home):
    """Inference and training in turns: from their third forward on, DeepSpeed knows what each of them needs next.

    The model is small enough to stay whole from a forward to its backward (stage3_max_reuse_distance).
    """
    for found, everything, trained in pool.run(iterations, home):
        half = 4 * everything / 2
        assert found[-1]["inference"] == (half, 0)
        assert found[-1]["training"] == (half, 4 * trained / 2)
        assert found[0]["training"][0] > 1.5 * half, "without an order weights come again and again"
