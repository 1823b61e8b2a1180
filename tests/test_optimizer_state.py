"""Masters and moments come out of every ZeRO stage whole, and go back bitwise, on another stage or number of ranks."""

from __future__ import annotations

import pytest
import torch

from engine import models, optimizer_state, zero
from engine.config import Recipe
from engine.hybrid_engine import HybridEngine
from engine.update import update
from tests import live_storages, tiny
from tests.test_numbers import allow_float16

pytestmark = pytest.mark.dist

OFFLOAD = "ds_configs/zero3_cpu_offload.json"
STAGES = [tiny.ds_config(name) for name in ("zero0", "zero1", "zero2", "zero3")]
NVME = "ds_configs/zero3_nvme.json"
ADAPTER, MODEL, TRUNK = {}, {"critic": {"home": "model"}}, {"critic": {"home": "trunk", "warmup_iterations": 2}}
FULL = {"actor": {"train": "full"}, "critic": {"home": "model", "train": "full"}, "reference": {"home": "model"}}
ZERO0, ZERO1, ZERO2, ZERO3 = STAGES
OPTIMIZER = "ds_configs/zero3_cpu_optimizer.json"
RUNS = [(stage, "float32", ADAPTER) for stage in (ZERO0, ZERO2, ZERO3, OPTIMIZER, OFFLOAD)]
RUNS += [(stage, "bfloat16", ADAPTER) for stage in (ZERO0, ZERO1, ZERO3)]
RUNS += [(ZERO3, "float16", ADAPTER), (ZERO3, "float32", MODEL), (ZERO2, "float32", TRUNK), (ZERO2, "bfloat16", FULL)]


SWAPPED = [
    (NVME, "float32", tiny.SWAPPED),
    (NVME, "bfloat16", tiny.SWAPPED),
    (NVME, "float32", {**tiny.SWAPPED, "critic": {**tiny.SWAPPED["critic"], "home": "trunk", "warmup_iterations": 2}}),
]


def engine_of(stage: str, dtype: str, homes: dict) -> tuple[HybridEngine, Recipe]:
    allow_float16()
    recipe = tiny.recipe(model={"dtype": dtype}, zero={"ds_config": stage}, iterations=9, **homes)
    return tiny.engine(recipe, models.DTYPES[dtype]), recipe


def train(engine: HybridEngine, recipe: Recipe, iterations: range) -> None:
    for iteration in iterations:
        frozen = frozenset({"actor"}) if iteration < recipe.critic.warmup_iterations else frozenset()
        update(engine, tiny.experience(seed=iteration), recipe, iteration, 0.0, frozen)


def same(one, other) -> bool:
    """Bytes, not numbers: -0.0 is not 0.0."""
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return all(map(same, one, other))
    return one == other


def whole_weights(engine: HybridEngine) -> dict:
    """By role and name, float32, gathered by DeepSpeed."""
    found = {}
    for role in engine.role_steps:
        parameters = engine.role_parameters(role)
        with torch.no_grad(), zero.gathered(parameters.values()):
            found[role] = {name: p.detach().float().cpu().clone() for name, p in parameters.items()}
    return found


def interrupted(stage: str, dtype: str, homes: dict) -> dict:
    """Four iterations at a stretch, and with another engine after the second one."""
    engine, recipe = engine_of(stage, dtype, homes)
    fresh = engine.capture()
    train(engine, recipe, range(2))
    tensors, numbers = engine.capture()
    after_two = whole_weights(engine)
    train(engine, recipe, range(2, 4))
    wanted, wanted_weights = engine.capture(), whole_weights(engine)
    engine.close()
    engine, _ = engine_of(stage, dtype, homes)
    again = engine.capture()
    engine.restore(tensors, numbers)
    loaded, loaded_weights = engine.capture(), whole_weights(engine)
    train(engine, recipe, range(2, 4))
    found, found_weights = engine.capture(), whole_weights(engine)
    engine.close()
    return {
        "fresh moments are 0": all(not t.any() for role in fresh[0].values() for n, t in role.items() if "/exp" in n),
        "starts alike": same(fresh, again),
        "something moved": not same(fresh[0], tensors) and not same(tensors, wanted[0]),
        "put back": same(loaded, (tensors, numbers)) and same(loaded_weights, after_two),
        "goes on alike": same(found, wanted) and same(found_weights, wanted_weights),
        "state": (tensors, numbers),
        "weights": after_two,
    }


@pytest.mark.parametrize("stage, dtype, homes", SWAPPED)
def test_another_engine_goes_on_bitwise_from_nvme(pool, nvme, stage, dtype, homes):
    test_another_engine_goes_on_bitwise(pool, stage, dtype, homes)


def gone_back(stage: str, homes: dict) -> dict:
    """An engine that is set back to what it had, and goes on from there."""
    with tiny.second_shards():
        engine, recipe = engine_of(stage, "float32", homes)
        train(engine, recipe, range(1))
        early, weights = engine.capture(), whole_weights(engine)
        train(engine, recipe, range(1, 2))
        late, moved = engine.capture(), not same(whole_weights(engine), weights)
        memory = live_storages.held(engine.engine)["moments"]
        engine.restore(*early)
        back = engine.capture(), whole_weights(engine)
        train(engine, recipe, range(1, 2))
        again = engine.capture()
        kept = live_storages.held(engine.engine)["moments"] == memory
        engine.close()
    return {"no bytes more": kept, "back": same(back, (early, weights)), "again": same(again, late), "moved": moved}


def test_the_same_engine_goes_back_on_nvme(pool, nvme):
    """As a roll-back does: its swap files are there already."""
    for found in pool.run(gone_back, NVME, tiny.SWAPPED):
        assert all(found.values()), found


def test_the_same_engine_goes_back_with_second_shards(pool):
    """Gathering reads those: they must not be of the weights before."""
    for found in pool.run(gone_back, tiny.SECOND_SHARDS, ADAPTER):
        assert all(found.values()), found


@pytest.mark.parametrize("stage, dtype, homes", RUNS, ids=lambda x: str(x).removeprefix("ds_configs/"))
def test_another_engine_goes_on_bitwise(pool, stage, dtype, homes):
    for result in pool.run(interrupted, stage, dtype, homes):
        state, held = result.pop("state"), result.pop("weights")
        assert all(result.values()), [name for name, true in result.items() if not true]
        for role, of_role in held.items():
            for name, weight in of_role.items():
                master = state[0][role][f"{name}/master"]
                assert torch.equal(master.to(models.DTYPES[dtype]).float(), weight), f"{name}: not the master, rounded"
        assert state[1]["critic"]["schedule"] > 0 and state[1]["critic"]["step"] > 0
        waiting = "warmup_iterations" in homes.get("critic", {})  # the actor's
        assert (state[1]["actor"]["schedule"] == 0) == waiting and (state[1]["actor"]["step"] == 0) == waiting


def loaded(stage: str, dtype: str, homes: dict, state: tuple) -> tuple:
    engine, _ = engine_of(stage, dtype, homes)
    engine.restore(*state)
    found = engine.capture(), whole_weights(engine)
    engine.close()
    return found


def test_any_stage_and_number_of_ranks_takes_it(pool, single):
    result = pool.run(interrupted, ZERO2, "bfloat16", ADAPTER)[0]
    for workers, stages in ((single, [ZERO0, ZERO1, OFFLOAD]), (pool, [ZERO0, ZERO3])):
        for stage in stages:
            for found, held in workers.run(loaded, stage, "bfloat16", ADAPTER, result["state"]):
                assert same(found, result["state"]) and same(held, result["weights"]), (stage, workers.world_size)


def in_messages_of(elements: int, stage: str) -> tuple:
    engine, recipe = engine_of(stage, "float32", ADAPTER)
    train(engine, recipe, range(1))
    optimizer_state.BUCKET_ELEMENTS, before = elements, optimizer_state.BUCKET_ELEMENTS
    try:
        found = engine.capture()
    finally:
        optimizer_state.BUCKET_ELEMENTS = before
        engine.close()
    return found


@pytest.mark.parametrize("stage", [ZERO2, ZERO3])
def test_it_is_the_same_in_many_messages(pool, stage):
    """Also where a single tensor is larger than a message."""
    whole = pool.run(in_messages_of, 2**24, stage)[0]
    for found in pool.run(in_messages_of, 100, stage):
        assert same(found, whole)
