"""Which sequences form a minibatch depends on neither ranks nor cuts, and every sequence is in exactly one."""

from __future__ import annotations

import itertools

import pytest
import torch

from engine import dist
from engine.batch import Evaluation, take_rows
from engine.config import PPOConfig, steps_per_iteration
from engine.minibatches import balanced_shares, deal, micro_batches, minibatch_rows, padded_tokens
from engine.update import update
from tests import tiny
from tests.reference import Reference
from tests.test_hybrid_engine import assert_same, run_update


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


def test_steps_per_iteration_counts_the_short_minibatch():
    recipe = tiny.recipe(
        data={"prompts_per_iteration": 5, "samples_per_prompt": 2}, ppo={"epochs": 3, "minibatch_sequences": 4}
    )
    assert steps_per_iteration(recipe) == 3 * 3  # 10 sequences in minibatches of 4: three of them, three times
    assert steps_per_iteration(recipe) == 3 * len(minibatch_rows(0, 0, 0, 10, 4))


# Dealing and cutting --------------------------------------------------------------------------------------------

LENGTHS = torch.tensor([9, 11, 10, 2, 17, 5, 14, 10, 8, 7])
LONGEST = 17
BUDGETS = [1, LONGEST, 20, 40, 10_000]


def by_tokens(budget: int) -> PPOConfig:
    return PPOConfig(tokens_per_micro_batch=budget)


def packed(budget: int) -> PPOConfig:
    return PPOConfig(tokens_per_micro_batch=budget, packing=True)


def by_rows(rows: int) -> PPOConfig:
    return PPOConfig(micro_batch_sequences=rows)


def laid_out(part, lengths) -> int:
    """A forward's tokens, by its shape: rows times the longest."""
    rows = [int(lengths[row]) for row in part.tolist()]
    return len(rows) * max(rows) if rows else 0


def random_lengths(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 200, (rows,), generator=generator)


@pytest.mark.parametrize("settings", [*map(by_tokens, BUDGETS), *map(packed, BUDGETS), *map(by_rows, (1, 3, 99))])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_a_plan_is_a_partition_with_as_many_forwards_on_every_rank(world_size, count, settings):
    rows = torch.randperm(10, generator=torch.Generator().manual_seed(count))[:count]
    plan = deal(rows, LENGTHS, settings, world_size)
    assert len(plan) == world_size
    assert sorted(row for own in plan for part in own for row in part.tolist()) == sorted(rows.tolist())
    assert len({len(own) for own in plan}) == 1 and len(plan[0]) >= 1, "ZeRO-3 hangs when a rank runs fewer"
    for own in plan:
        if any(len(part) == 0 for part in own):
            assert max(map(len, own)) <= 1, "an empty forward where a larger one could have been split"


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_budget_is_kept_unless_one_sequence_is_longer(budget, world_size):
    for lengths in (LENGTHS, random_lengths(50, seed=budget)):
        for own in deal(torch.arange(len(lengths)), lengths, by_tokens(budget), world_size):
            for part in own:
                assert laid_out(part, lengths) <= budget or len(part) == 1
                assert padded_tokens(part, lengths) == laid_out(part, lengths)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("budget", BUDGETS)
def test_packed_forwards_keep_the_budget_and_are_few(budget, world_size):
    for lengths in (LENGTHS, *(random_lengths(50, seed) for seed in range(4))):
        plan = deal(torch.arange(len(lengths)), lengths, packed(budget), world_size)
        loads = [[int(lengths[part].sum()) for part in own] for own in plan]
        for own, of_rank in zip(plan, loads, strict=True):
            for part, load in zip(own, of_rank, strict=True):
                assert load <= budget or len(part) == 1
                assert padded_tokens(part, lengths, packing=True) == load
        if budget >= 2 * int(lengths.max()):  # then a forward that isn't the last is at least half full
            assert len(plan[0]) <= 2 * max(map(sum, loads)) / budget + 1


def test_packing_by_hand():
    """17 14 11 10 10 9 8 7 5 2 are 93: three forwards of at most 40, the longest first, each to the emptiest."""
    (own,) = deal(torch.arange(10), LENGTHS, packed(40), 1)
    assert [LENGTHS[part].tolist() for part in own] == [[17, 9, 5], [14, 10, 7], [11, 10, 8, 2]]


def test_packs_that_cannot_be_balanced():
    """Dealt to the emptiest of three, 5 5 4 4 3 3 3 come to 8, 8 and 11; filled up one after the other, to 9 each."""
    lengths = torch.tensor([3, 4, 5, 3, 4, 5, 3])
    (own,) = deal(torch.arange(7), lengths, packed(9), 1)
    assert [lengths[part].tolist() for part in own] == [[5, 4], [5, 4], [3, 3, 3]]


def test_a_budget_by_hand():
    """Within 40 tokens, where a forward costs 2.5 of its own: 9 beside 10 and 10 is padded by 1, 2 beside 5 by 3."""
    (own,) = deal(torch.arange(10), LENGTHS, by_tokens(40), 1)
    assert [LENGTHS[part].tolist() for part in own] == [[17], [14], [11], [10, 10, 9], [8, 7], [5], [2]]


def cheapest_of_all(lengths: list[int], budget: int) -> float:
    """Padded tokens and what forwards cost, by trying every way to cut."""
    costs = []
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        at = [0, *(index + 1 for index, cut in enumerate(cuts) if cut), len(lengths)]
        parts = [lengths[start:end] for start, end in itertools.pairwise(at)]
        if all(len(part) * part[0] <= budget or len(part) == 1 for part in parts):
            costs.append(sum(len(part) * part[0] + budget / 16 for part in parts))
    return min(costs)


@pytest.mark.parametrize("seed", range(12))
def test_no_way_to_cut_is_cheaper(seed):
    lengths, budget = random_lengths(9, seed), 100 + 60 * seed
    (own,) = deal(torch.arange(9), lengths, by_tokens(budget), 1)
    cost = sum(laid_out(part, lengths) + budget / 16 for part in own)
    assert cost == pytest.approx(cheapest_of_all(sorted(lengths.tolist(), reverse=True), budget))


def test_equal_lengths_stay_in_order():
    (own,) = deal(torch.tensor([4, 2, 0, 3]), torch.full((5,), 6), by_tokens(12), 1)
    assert [part.tolist() for part in own] == [[4, 2], [0, 3]]


def test_a_budget_of_everything_is_one_forward():
    assert [len(own) for own in deal(torch.arange(10), LENGTHS, by_tokens(1700), 1)] == [1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_no_rank_has_more_than_the_mean_and_one_sequence(world_size, seed):
    lengths = random_lengths(30, seed)
    plan = deal(torch.arange(30), lengths, by_tokens(500), world_size)
    loads = [sum(lengths[row].item() for part in own for row in part) for own in plan]
    assert max(loads) <= lengths.sum().item() / world_size + lengths.max().item()
    assert max(loads) - min(loads) <= lengths.max().item()


def test_longest_first_by_hand():
    """9 8 7 6 5 to two ranks: 9 | 8, then 7 to 8, 6 to 9 and 5 to one of 15 and 15, the first."""
    first, second = balanced_shares(torch.tensor([10, 11, 12, 13, 14]), torch.tensor([5, 6, 7, 8, 9]), 2)
    assert first.tolist() == [14, 11, 10] and second.tolist() == [13, 12]


@pytest.mark.parametrize("count", [0, 1, 5, 9])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_without_a_budget_ranks_take_rows_in_order(count, world_size):
    rows = torch.randperm(10)[:count]
    plan = deal(rows, LENGTHS, by_rows(2), world_size)
    assert [row for own in plan for part in own for row in part.tolist()] == rows.tolist()
    sizes = [sum(map(len, own)) for own in plan]
    assert max(sizes) - min(sizes) <= 1
    assert all(len(part) <= 2 for own in plan for part in own)


def test_a_rank_with_fewer_forwards_splits_its_largest():
    """Nine rows, two at a time: rank 0 has five of them and makes three forwards, rank 1 four and would make two."""
    lengths = torch.tensor([2] * 7 + [17, 2])
    first, second = deal(torch.arange(9), lengths, by_rows(2), 2)
    assert [part.tolist() for part in first] == [[0, 1], [2, 3], [4]]
    assert [part.tolist() for part in second] == [[5, 6], [7], [8]]


def test_only_single_rows_leave_a_rank_an_empty_forward():
    first, second = deal(torch.arange(3), LENGTHS, by_rows(1), 2)
    assert [part.tolist() for part in first] == [[0], [1]]
    assert [part.tolist() for part in second] == [[2], []]
    assert padded_tokens(second[1], LENGTHS) == 0


CASES = [([0, 1, 2, 3, 4], []), ([0], [1, 2, 3]), ([], [])]


def own_rows_cut() -> list[list[list[int]]]:
    """On a rank: its cuts in each case, by rows and by tokens."""
    found = []
    for both in CASES:
        mine = LENGTHS[torch.tensor(both[dist.rank()], dtype=torch.int64)]
        for settings in (by_rows(2), by_tokens(26)):
            found.append([part.tolist() for part in micro_batches(mine, settings)])
    return found


@pytest.mark.dist
def test_ranks_agree_on_how_often_to_cut_what_each_brings(pool):
    """Indices count from 0 on each rank; the lengths are those of LENGTHS."""
    first, second = pool.run(own_rows_cut)
    assert list(zip(first, second, strict=True)) == [
        ([[0, 1], [2, 3], [4]], [[], [], []]),
        ([[4], [1], [2, 0], [3]], [[], [], [], []]),
        ([[0], []], [[0, 1], [2]]),
        ([[0], []], [[0, 1], [2]]),
        ([[]], [[]]),
        ([[]], [[]]),
    ]


# What it changes: nothing ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_update():
    reference = Reference(tiny.recipe(ppo={"entropy_coef": 0.01, "value_coef": 0.5}))
    return reference.update(tiny.experience()), reference.weights()


def budgeted(stage: str, budget: int, **ppo) -> dict:
    return {
        "zero": {"ds_config": tiny.ds_config(stage)},
        "ppo": {"tokens_per_micro_batch": budget, "entropy_coef": 0.01, "value_coef": 0.5, **ppo},
    }


# One row at a time, a few, everything; the rows of tiny.rollout have 6 to 12 tokens.
@pytest.mark.dist
@pytest.mark.parametrize("stage, budget", [("zero3", 1), ("zero3", 24), ("zero3", 10_000), ("zero0", 24)])
def test_two_ranks_make_the_plain_update_with_any_budget(pool, plain_update, stage, budget):
    for result in pool.run(run_update, budgeted(stage, budget)):
        assert_same(result, *plain_update)


@pytest.mark.dist
@pytest.mark.parametrize("stage, budget", [("zero3", 1), ("zero0", 24)])
def test_one_rank_makes_it_too(single, plain_update, stage, budget):
    (result,) = single.run(run_update, budgeted(stage, budget))
    assert_same(result, *plain_update)


@pytest.mark.dist
@pytest.mark.parametrize("stage, budget", [("zero3", 1), ("zero3", 24), ("zero2", 10_000)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packing_makes_the_plain_update(pool, plain_update, stage, budget, checkpointing):
    sections = budgeted(stage, budget, packing=True)
    sections["zero"]["activation_checkpointing"] = checkpointing
    for result in pool.run(run_update, sections):
        assert_same(result, *plain_update)


@pytest.mark.dist
def test_packing_makes_the_plain_update_of_models_of_their_own(pool):
    homes = {
        "actor": {"train": "full"},
        "critic": {"home": "model", "train": "full"},
        "reference": {"home": "model"},
    }
    reference = Reference(tiny.recipe(**homes))
    norms = reference.update(tiny.experience())
    ppo = {"tokens_per_micro_batch": 24, "packing": True}
    for result in pool.run(run_update, {**homes, "ppo": ppo, "zero": {"ds_config": tiny.ds_config("zero3")}}):
        assert_same(result, norms, reference.weights(), tolerance=5e-6)


INFERENCE = [None, 1, 24, 10_000]


def inference() -> list[Evaluation]:
    """On a rank: the same rollout evaluated with each budget; rank 0 sampled six of its seven rows, or all."""
    engine, found = tiny.engine(tiny.recipe()), []
    mine = torch.arange(7).split([6, 1])[dist.rank()] if dist.world_size() == 2 else torch.arange(7)
    for budget in INFERENCE:
        recipe = tiny.recipe(ppo={"tokens_per_micro_batch": budget, "micro_batch_sequences": 3})
        found.append(tiny.evaluated(engine, recipe, take_rows(tiny.rollout(), mine))[1])
    engine.close()
    recipe = tiny.recipe(ppo={"tokens_per_micro_batch": 24, "packing": True})
    engine = tiny.engine(recipe)
    found.append(tiny.evaluated(engine, recipe, take_rows(tiny.rollout(), mine))[1])
    engine.close()
    return found


@pytest.mark.dist
def test_ranks_and_budgets_do_not_change_what_inference_finds(pool, single):
    (alone,) = single.run(inference)
    for evaluations in (alone, *pool.run(inference)):
        for budget, evaluation in zip([*INFERENCE, "packed"], evaluations, strict=True):
            for name, value in vars(evaluation).items():
                if name != "padded_lengths":
                    assert torch.allclose(value, getattr(alone[0], name), atol=1e-5), (budget, name)
    # Prompts 3 5 5 3 5 4 4, responses 9 2 2 3 2 3 6; one rank in threes, two ranks in (0 1 2)(3) and (4 5)(6).
    assert alone[0].padded_lengths.tolist() == [12, 12, 12, 7, 7, 7, 10]
    assert alone[1].padded_lengths.tolist() == [12, 7, 7, 6, 7, 7, 10]
    assert alone[3].padded_lengths.tolist() == [12] * 7
    first, second = pool.run(inference)
    assert first[0].padded_lengths.tolist() == second[0].padded_lengths.tolist() == [12, 12, 12, 6, 7, 7, 10]
    assert first[1].padded_lengths.tolist() == [12, 7, 7, 6, 7, 7, 10]
    assert first[4].padded_lengths.tolist() == tiny.rollout().sequence_lengths.tolist()


@pytest.mark.parametrize(
    "sizes, widths",
    [
        ({"micro_batch_sequences": 2}, [12] * 7),  # eight at a time
        ({"tokens_per_micro_batch": 14}, [12, 7, 7, 7, 7, 7, 12]),  # 56: 2 x 12, 5 x 7
    ],
)
def test_inference_takes_more_at_once(alone, sizes, widths):
    """Rows of 12 7 7 6 7 7 10 tokens; in training the factor changes nothing."""
    recipe = tiny.recipe(ppo={**sizes, "inference_factor": 4})
    engine, trained = tiny.engine(recipe), []
    assert tiny.evaluated(engine, recipe, tiny.rollout())[1].padded_lengths.tolist() == widths
    for factor in (1, 4):
        recipe = tiny.recipe(ppo={**sizes, "inference_factor": factor})
        trained.append(update(engine, tiny.experience(), recipe, 0, 0.0, frozenset()).padded_tokens)
    engine.close()
    assert trained[0] == trained[1]


def counted(budget: int, packing: bool = False) -> tuple[int, int]:
    """On a rank: real and padded tokens of an update."""
    recipe = tiny.recipe(ppo={"tokens_per_micro_batch": budget, "packing": packing})
    engine = tiny.engine(recipe)
    stats = update(engine, tiny.experience(), recipe, 0, 0.0, frozenset())
    engine.close()
    return stats.real_tokens, stats.padded_tokens


@pytest.mark.dist
def test_the_update_counts_its_padding(pool, single):
    """Two epochs of 56 tokens; alone in its forward no row is padded; together each minibatch is one rectangle."""
    assert pool.run(counted, 1) == pool.run(counted, 10_000, True) == [(112, 112)] * 2
    lengths = tiny.rollout().sequence_lengths
    minibatches = [rows for epoch in (0, 1) for rows in minibatch_rows(0, 0, epoch, 7, 4)]
    assert single.run(counted, 10_000) == [(112, sum(laid_out(rows, lengths) for rows in minibatches))]
