"""Which sequences form a minibatch depends on neither ranks nor cuts, and every sequence is in exactly one."""

from __future__ import annotations

import pytest
import torch

from engine import dist
from engine.config import steps_per_iteration
from engine.minibatches import micro_batches, minibatch_rows, rows_of_rank
from tests import tiny


def whole(minibatches) -> list[int]:
    return torch.cat(minibatches).tolist()


@pytest.mark.parametrize("rows, size, sizes", [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 3, [3])])
def test_an_epoch_is_a_permutation(rows, size, sizes):
    found = minibatch_rows(0, 0, 0, rows, size)
    assert [len(m) for m in found] == sizes
    assert sorted(whole(found)) == list(range(rows))


def test_seed_iteration_and_epoch_each_give_another_order():
    orders = {
        (seed, iteration, epoch): tuple(whole(minibatch_rows(seed, iteration, epoch, 50, 7)))
        for seed in (0, 1)
        for iteration in (0, 1, 2)
        for epoch in (0, 1, 2)
    }
    assert len(set(orders.values())) == len(orders)


def test_the_same_arguments_give_the_same_order():
    assert whole(minibatch_rows(5, 6, 7, 30, 4)) == whole(minibatch_rows(5, 6, 7, 30, 4))


def test_the_minibatch_size_does_not_change_the_order():
    assert whole(minibatch_rows(5, 6, 7, 30, 4)) == whole(minibatch_rows(5, 6, 7, 30, 9))


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_out_a_minibatch(rows, world_size):
    minibatch = torch.randperm(rows)
    parts = [rows_of_rank(minibatch, rank, world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat(parts), minibatch)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_steps_per_iteration_counts_the_short_minibatch():
    recipe = tiny.recipe(
        data={"prompts_per_iteration": 5, "samples_per_prompt": 2}, ppo={"epochs": 3, "minibatch_sequences": 4}
    )
    assert steps_per_iteration(recipe) == 3 * 3  # 10 sequences in minibatches of 4: three of them, three times
    assert steps_per_iteration(recipe) == 3 * len(minibatch_rows(0, 0, 0, 10, 4))


def test_micro_batches_of_one_process():
    parts = micro_batches(torch.tensor([4, 1, 9, 0, 2]), 2)
    assert [part.tolist() for part in parts] == [[4, 1], [9, 0], [2]]
    assert [part.tolist() for part in micro_batches(torch.arange(0), 2)] == [[]], "no rows are one empty forward"


CASES = [(5, 2), (1, 4), (7, 3), (8, 1), (0, 2)]


def minibatches_and_cuts() -> list[tuple[list[int], list[list[int]]]]:
    """On a rank: the minibatch of each case, and this rank's cuts of its part."""
    found = []
    for rows, size in CASES:
        minibatch = torch.cat(minibatch_rows(0, 3, 1, rows, 4)) if rows else torch.arange(0)
        mine = rows_of_rank(minibatch, dist.rank(), dist.world_size())
        found.append((minibatch.tolist(), [part.tolist() for part in micro_batches(mine, size)]))
    return found


@pytest.mark.dist
def test_two_ranks_cut_equally_often_and_cover_every_row_once(pool, single):
    (alone,) = single.run(minibatches_and_cuts)
    first, second = pool.run(minibatches_and_cuts)
    for (rows, size), one, (minibatch, left), (same, right) in zip(CASES, alone, first, second, strict=True):
        assert minibatch == same == one[0], "the minibatch depends on the world size"
        assert len(left) == len(right) >= 1, "ZeRO-3 hangs when a rank runs fewer forwards"
        assert all(len(part) <= size for part in left + right)
        assert sorted(row for part in left + right for row in part) == list(range(rows))


def lopsided() -> list[list[int]]:
    rows = torch.arange(5) if dist.rank() == 0 else torch.arange(0)
    return [part.tolist() for part in micro_batches(rows, 2)]


@pytest.mark.dist
def test_a_rank_without_rows_gets_empty_ones(pool):
    assert pool.run(lopsided) == [[[0, 1], [2, 3], [4]], [[], [], []]]
