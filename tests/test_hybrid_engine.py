"""One engine, many layouts, one result: compared with a plain PyTorch update that shares none of the engine's code."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from engine import dist, zero
from engine.roles import ACTOR, CRITIC
from engine.update import update
from tests import tiny
from tests.reference import Reference

pytestmark = pytest.mark.dist


def run_update(settings: dict) -> dict:
    """On a rank: one iteration's update from the tiny start; what came of it."""
    recipe = tiny.recipe(**settings)
    engine = tiny.engine(recipe)
    base = engine.frozen_hash()
    stats = update(engine, tiny.experience(), recipe, iteration=0, kl_coef=recipe.kl.kl_coef, frozen=frozenset())
    weights = trained_weights(engine)
    moved = engine.frozen_hash() != base
    engine.close()
    return {"weights": weights, "norms": stats.grad_norms, "sums": dict(stats.sums), "base_moved": moved}


def trained_weights(engine) -> dict[str, torch.Tensor]:
    parameters = {f"{role} {n}": p for role in (ACTOR, CRITIC) for n, p in engine.role_parameters(role).items()}
    with zero.gathered(parameters.values()):
        return {name: p.detach().clone() for name, p in parameters.items()}


def assert_same(result: dict, norms: list[dict[str, float]], weights: dict[str, torch.Tensor], tolerance=2e-6) -> None:
    for role in (ACTOR, CRITIC):
        assert result["norms"][role] == pytest.approx([n[role] for n in norms], rel=1e-4)
    assert result["weights"].keys() == weights.keys()
    for name, expected in weights.items():
        difference = (result["weights"][name] - expected).abs().max().item()
        assert difference < tolerance, f"{name} differs by {difference:.1e}"
    assert not result["base_moved"]


@pytest.fixture(scope="module")
def expected():
    """The plain update for each critic home, computed once."""
    found = {}
    for home in ("adapter", "trunk"):
        recipe = tiny.recipe(critic={"home": home}, ppo={"entropy_coef": 0.01, "value_coef": 0.5})
        reference = Reference(recipe)
        norms = reference.update(tiny.experience())
        found[home] = (norms, reference.weights())
    return found


STAGES = ["zero0", "zero1", "zero2", "zero3", "zero3_cpu_optimizer", "zero3_cpu_offload"]


@pytest.mark.parametrize("home", ["adapter", "trunk"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_at_every_stage_make_the_plain_update(pool, expected, stage, home):
    results = pool.run(run_update, settings(stage, home))
    for result in results:
        assert_same(result, *expected[home])


def run_update_with_second_shards(settings: dict) -> dict:
    with tiny.second_shards():
        return run_update(settings)


def test_second_shards_make_the_plain_update(pool, expected):
    """ZeRO++'s hpZ, which a CPU can run; what it gathers from is another copy of the weights."""
    chosen = settings("zero3", "adapter")
    chosen["zero"]["ds_config"] = tiny.SECOND_SHARDS
    for result in pool.run(run_update_with_second_shards, chosen):
        assert_same(result, *expected["adapter"])


def run_swapped_update(settings: dict) -> tuple[dict, set[str], list[Path]]:
    """As `run_update`; also what lay on the disk after a step, and what is left of it at the end."""
    parent, written = Path(settings["zero"]["nvme_path"]), set()
    step = zero.TrainedEngine.step

    def watched(self, *arguments):
        norms = step(self, *arguments)
        written.update(file.name for file in parent.rglob("*.swp") if file.stat().st_size)
        return norms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero.TrainedEngine, "step", watched)
        result = run_update(settings)
    dist.barrier()
    return result, written, list(parent.iterdir())


def test_states_on_nvme_make_the_plain_update(pool, nvme, tmp_path):
    """Both roles' masters and moments, by the same swap files; small gradients stay in memory, large ones go too."""
    chosen = {**settings("zero3_nvme", "adapter"), "actor": tiny.SWAPPED["actor"]}
    chosen["critic"] |= tiny.SWAPPED["critic"]
    chosen["zero"]["nvme_path"] = str(tmp_path)
    plain = Reference(tiny.recipe(**chosen))
    norms = plain.update(tiny.experience())
    for result, written, left in pool.run(run_swapped_update, chosen):
        assert_same(result, norms, plain.weights(), tolerance=5e-6)
        kinds = [name.partition("-")[0] for name in written if name.startswith("exp_avg")]
        assert sorted(kinds) == ["exp_avg"] * 2 + ["exp_avg_sq"] * 2, written
        assert left == []


OWN_MODELS = {
    "full actor, trunk": {"actor": {"train": "full"}, "critic": {"home": "trunk"}, "reference": {"home": "model"}},
    "critic LoRA model": {"critic": {"home": "model"}},
    "both full": {
        "actor": {"train": "full"},
        "critic": {"home": "model", "train": "full"},
        "reference": {"home": "model"},
    },
}


@pytest.mark.parametrize("homes", OWN_MODELS)
def test_models_of_their_own_make_the_plain_update_too(pool, homes):
    chosen = OWN_MODELS[homes]
    common = settings("zero0", chosen["critic"]["home"])
    plain = Reference(tiny.recipe(**{**common, **chosen}))
    norms = plain.update(tiny.experience())
    for stage in ("zero0", "zero2", "zero3", "zero3_cpu_optimizer", "zero3_cpu_offload"):
        common = settings(stage, chosen["critic"]["home"], checkpointing=stage == "zero3")
        for result in pool.run(run_update, {**common, **chosen}):
            assert_same(result, norms, plain.weights(), tolerance=5e-6)


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_cutting_and_recomputing_change_nothing(pool, expected, stage, checkpointing, micro):
    results = pool.run(run_update, settings(stage, "adapter", micro, checkpointing))
    for result in results:
        assert_same(result, *expected["adapter"])


def run_offloaded_update(settings: dict) -> tuple[dict, list[tuple]]:
    """As `run_update`; also the shapes of the tensors that went to host memory."""
    shapes = []

    class Watched(torch.autograd.graph.save_on_cpu):
        def __init__(self, pin_memory: bool):
            super().__init__(pin_memory)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: (shapes.append(tuple(tensor.shape)), pack(tensor))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.graph, "save_on_cpu", Watched)
        return run_update(settings), shapes


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_inputs_of_layers_can_wait_in_host_memory(pool, expected, stage):
    chosen = settings(stage, "adapter", micro=4, checkpointing=True)
    chosen["zero"]["offload_activations"] = True
    sizes = tiny.config()
    for result, shapes in pool.run(run_offloaded_update, chosen):
        assert_same(result, *expected["adapter"])
        inputs = [shape for shape in shapes if len(shape) == 3 and shape[-1] == sizes.hidden_size]
        forwards = 2 * 2 * 2  # epochs, minibatches (each one micro-batch), roles
        assert len(inputs) >= forwards * sizes.num_hidden_layers
        assert not any(shape[-1] == sizes.intermediate_size for shape in shapes if len(shape) == 3), (
            "recomputed instead"
        )


@pytest.mark.parametrize("stage", ["zero0", "zero3"])
def test_one_rank_makes_the_same_update(single, expected, stage):
    (result,) = single.run(run_update, settings(stage, "adapter"))
    assert_same(result, *expected["adapter"])


def settings(stage: str, home: str, micro: int = 2, checkpointing: bool = False) -> dict:
    return {
        "zero": {"ds_config": tiny.ds_config(stage), "activation_checkpointing": checkpointing},
        "critic": {"home": home},
        "ppo": {"micro_batch_sequences": micro, "entropy_coef": 0.01, "value_coef": 0.5},
    }


def outlive(settings: dict) -> list[str]:
    """Kinds of modules that are alive after two updates and the engine's end."""
    recipe = tiny.recipe(**settings)
    engine, experience = tiny.engine(recipe), tiny.experience()
    for step in range(2):  # in the second one DeepSpeed knows the order of its forwards, and remembers modules by it
        update(engine, experience, recipe, step, 0.0, frozenset())
    modules = [engine.roles, engine.critic, engine.reference and engine.reference.module]
    watched = [weakref.ref(module) for module in modules if module is not None]
    engine.close()
    del engine, modules
    gc.collect()
    return [type(module()).__name__ for module in watched if module() is not None]


@pytest.mark.parametrize("homes", [{}, {"critic": {"home": "model"}, "reference": {"home": "model"}}])
def test_a_closed_engine_leaves_nothing(pool, homes):
    assert pool.run(outlive, homes) == [[], []]
