"""Predicted bytes against those of real engines on two ranks, found by walking live storages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import models, planner, shapes, zero
from engine.ds_config import read_ds_config
from engine.hybrid_engine import HybridEngine
from engine.roles import ReferenceModel, RolesModel, ValueModel
from engine.update import update
from tests import live_storages, tiny

pytestmark = pytest.mark.dist

ODD = {"vocab_size": 51, "hidden_size": 40, "intermediate_size": 65}
"""Nothing of it divides by two ranks, nor by what DeepSpeed aligns to."""
HOMES = {
    "adapter": {},
    "trunk": {"critic": {"home": "trunk"}},
    "critic, adapter": {"critic": {"home": "model"}},
    "critic, full": {"critic": {"home": "model", "train": "full"}},
    "actor, full": {"actor": {"train": "full"}, "critic": {"home": "trunk"}, "reference": {"home": "model"}},
    "dora": {"actor": {"lora": {"dora": True}}},
    "embeddings": {"actor": {"lora": {"modules_to_save": ["embed_tokens", "lm_head"]}}},
}
STAGES = ["zero0", "zero1", "zero2", "zero3", "all sharded", "zero3_cpu_optimizer", "zero3_cpu_offload"]


def folder_of(path: Path, kind: str = "policy") -> str:
    torch.manual_seed(0)
    made = tiny.LlamaForCausalLM if kind == "policy" else tiny.LlamaForSequenceClassification
    made(tiny.config(**ODD, **({} if kind == "policy" else {"num_labels": 1}))).save_pretrained(path / kind)
    return str(path / kind)


def recipe_of(path: Path, stage: str, dtype: str, rank: int, changes: dict):
    of_tests = {"all sharded": "tests/zero3_all_sharded.json", "second shards": tiny.SECOND_SHARDS}
    ds_config = of_tests.get(stage, f"ds_configs/{stage}.json")
    lora = {"lora": {"rank": rank}}
    sections = {
        "model": {"path": folder_of(path), "dtype": dtype},
        "zero": {"ds_config": ds_config},
        "actor": lora,
        "critic": lora,
        "ppo": {"minibatch_sequences": 7, "micro_batch_sequences": 2},
    }
    for name, section in changes.items():
        sections[name] = tiny._merge(sections.get(name, {}), section)
    return tiny.recipe(**sections)


def engine_of(path: str, stage: str, dtype: str, rank: int, changes: dict):
    settings, kind = recipe_of(Path(path), stage, dtype, rank, changes), models.DTYPES[dtype]

    def made(model, seed):
        torch.manual_seed(seed)
        return model.to(kind).requires_grad_(False)

    base = made(tiny.LlamaForCausalLM(tiny.config(**ODD)), 0)
    own = reference = None
    if settings.critic.home == "model":
        own = ValueModel(
            made(tiny.LlamaForSequenceClassification(tiny.config(**ODD, num_labels=1)), 1), settings.critic
        )
    if settings.reference_home == "model":
        reference = ReferenceModel(made(tiny.LlamaForCausalLM(tiny.config(**ODD)), 2), 1.0)
    return HybridEngine(RolesModel(base, settings), settings, own, reference), settings


def measured(path: str, stage: str, dtype: str, rank: int, changes: dict) -> list[dict]:
    """By engine, the most that each part holds in the backwards of an update."""
    engine, settings = engine_of(path, stage, dtype, rank, changes)

    engines = list(dict.fromkeys([engine.engine, engine.critic_engine]))
    found: dict[zero.TrainedEngine, list] = {trained: [] for trained in engines}
    backward = zero.TrainedEngine.backward

    def watched(trained, *arguments):
        backward(trained, *arguments)
        found[trained].append(live_storages.held(trained))

    zero.TrainedEngine.backward = watched
    for trained in engines:
        optimizer = trained.engine.optimizer
        if hasattr(optimizer, "_release_ipg_buffers"):  # of stages 1 and 2, at a backward's end: the most there is

            def release(trained=trained, original=optimizer._release_ipg_buffers):
                found[trained].append(live_storages.held(trained))
                original()

            optimizer._release_ipg_buffers = release
    try:
        update(engine, tiny.experience(), settings, 0, 0.0, frozenset())
    finally:
        zero.TrainedEngine.backward = backward
    held = [{part: max(one[part] for one in found[trained]) for part in found[trained][0]} for trained in engines]
    if engine.reference is not None:
        held.append({"weights": sum(zero.local_shard(p).nbytes for p in engine.reference.module.parameters())})
    engine.close()
    return held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("home", HOMES)
def test_model_state_to_the_byte(pool, tmp_path, home, stage, dtype):
    rank, changes = 3, HOMES[home]
    settings = recipe_of(tmp_path, stage, dtype, rank, changes)
    raw = read_ds_config(settings.zero.ds_config)
    predicted = [planner.state(one, settings, raw, 2, on_cuda=False) for one in shapes.homes(settings)]
    ranks = pool.run(measured, str(tmp_path), stage, dtype, rank, changes)
    for one, *reals in zip(predicted, *ranks, strict=True):
        expected, parts = one.device + one.host, reals[0]
        assert {part: expected[part] for part in parts} == {part: max(real[part] for real in reals) for part in parts}


def measured_with_second_shards(*arguments) -> list[dict]:
    with tiny.second_shards():
        return measured(*arguments)


@pytest.mark.parametrize("home", ["adapter", "actor, full"])
def test_second_shards_to_the_byte(pool, tmp_path, home):
    settings = recipe_of(tmp_path, "second shards", "bfloat16", 3, HOMES[home])
    first, *_ = shapes.homes(settings)
    predicted = planner.state(first, settings, read_ds_config(settings.zero.ds_config), 2, on_cuda=False)
    ranks = pool.run(measured_with_second_shards, str(tmp_path), "second shards", "bfloat16", 3, HOMES[home])
    parts = ranks[0][0]
    assert {part: predicted.device[part] for part in parts} == {part: max(r[0][part] for r in ranks) for part in parts}


def swapped(path: str, dtype: str, rank: int) -> tuple[dict, dict]:
    """The most that each part holds in the backwards of an update, in memory and on the disk."""
    engine, settings = engine_of(path, "zero3_nvme", dtype, rank, {})
    found, backward = [], zero.TrainedEngine.backward

    def watched(trained, *arguments):
        backward(trained, *arguments)
        found.append((live_storages.held(trained), live_storages.on_disk(trained)))

    zero.TrainedEngine.backward = watched
    try:
        update(engine, tiny.experience(), settings, 0, 0.0, frozenset())
    finally:
        zero.TrainedEngine.backward = backward
    engine.close()
    return tuple({part: max(one[part] for one in held) for part in held[0]} for held in zip(*found, strict=True))


@pytest.mark.parametrize(("dtype", "rank"), [("float32", 3), ("float32", 500), ("bfloat16", 500), ("float32", 9000)])
def test_what_goes_to_nvme_to_the_byte(pool, nvme, tmp_path, dtype, rank):
    """Ranks of adapters: nothing is large enough, the states are, some gradients are too."""
    settings = recipe_of(tmp_path, "zero3_nvme", dtype, rank, {})
    (home,) = shapes.homes(settings)
    predicted = planner.state(home, settings, read_ds_config(settings.zero.ds_config), 2, on_cuda=False)
    in_memory = predicted.device + predicted.host
    ranks = pool.run(swapped, str(tmp_path), dtype, rank)
    for place, expected in (0, in_memory), (1, predicted.disk):
        parts = ranks[0][place]
        assert {part: expected[part] for part in parts} == {part: max(r[place][part] for r in ranks) for part in parts}
    assert bool(predicted.disk["masters"]) == (rank > 3) and bool(predicted.disk["gradients"]) == (rank > 500)


def copied(path: str, stage: str, dtype: str, changes: dict) -> int:
    """Bytes of the sampler's weights that are not the engine's too."""
    engine, settings = engine_of(path, stage, dtype, 3, changes)
    update(engine, tiny.experience(), settings, 0, 0.0, frozenset())  # small weights are whole from the first pass on
    with engine.generation() as module:
        own = {x.untyped_storage().data_ptr() for p in engine.roles.parameters() for x in (p.data, zero.local_shard(p))}
        found = live_storages.fresh_bytes((p.data for p in module.parameters()), own)
    engine.close()
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3", "all sharded"])
@pytest.mark.parametrize("home", ["adapter", "dora", "embeddings", "actor, full"])
def test_the_samplers_copy_to_the_byte(pool, tmp_path, home, stage, dtype):
    settings = recipe_of(tmp_path, stage, dtype, 3, HOMES[home])
    shared, *_ = shapes.homes(settings)
    config = planner.resolve(shared, settings, read_ds_config(settings.zero.ds_config), 2, on_cuda=False)
    predicted, _ = planner.copy_bytes(shared, settings, config)
    assert pool.run(copied, str(tmp_path), stage, dtype, HOMES[home]) == [predicted] * 2
