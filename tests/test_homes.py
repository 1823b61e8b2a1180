"""Every home of a role, every form of adapter: what is sampled is what trains, and what is frozen stands still."""

from __future__ import annotations

import pytest
import torch

from engine import zero
from engine.roles import ACTOR, CRITIC
from engine.update import update
from tests import tiny
from tests.test_adapters import save_adapter, save_reward
from tests.test_phases import sampled

pytestmark = pytest.mark.dist

FULL = {"actor": {"train": "full"}, "reference": {"home": "model"}}
HOMES = {
    "rslora": {"actor": {"lora": {"rslora": True}}},
    "dora": {"actor": {"lora": {"dora": True}}, "critic": {"lora": {"dora": True}}},
    "embeddings": {"actor": {"lora": {"modules_to_save": ["embed_tokens", "lm_head"]}}},
    "few targets": {"actor": {"lora": {"targets": ["q_proj"]}}, "critic": {"lora": {"targets": ["up_proj"]}}},
    "trunk": {"critic": {"home": "trunk"}},
    "critic model": {"critic": {"home": "model"}},
    "critic model, full": {"critic": {"home": "model", "train": "full"}},
    "full actor, trunk": {**FULL, "critic": {"home": "trunk"}},
    "full actor, critic model": {**FULL, "critic": {"home": "model", "train": "full"}},
    "reference model": {"reference": {"home": "model"}},
    "reference model, offloaded": {"reference": {"home": "model", "offload_param": "cpu"}},
    "init adapter": {"actor": {"init_adapter": "SFT"}},
    "init adapter, base": {"actor": {"init_adapter": "SFT"}, "reference": {"home": "base"}},
    "reward adapter": {"rewards": [{"adapter": "REWARD"}, {"function": "tests/tiny.py:length_reward"}]},
    "everything": {
        "actor": {"init_adapter": "SFT"},
        "critic": {"home": "model"},
        "reference": {"home": "model"},
        "rewards": [{"adapter": "REWARD"}],
    },
}
STAGES = {"zero0": "ds_configs/zero0.json", "zero3": "tests/zero3_all_sharded.json"}


def one_iteration(settings: dict) -> dict:
    """On a rank: sampling, inference, update; what must agree, and what must not have moved."""
    recipe = tiny.recipe(**settings, kl={"estimator": "full", "placement": "loss"})
    engine = tiny.engine(recipe)
    before, start = engine.frozen_hash(), weights(engine)
    rollout, evaluation = tiny.evaluated(engine, recipe, sampled(engine, recipe))
    mask = rollout.response_mask
    ones = torch.where(mask, 1.0, 0.0)
    experience = type(tiny.experience())(
        rollout, evaluation, torch.zeros(len(rollout)), torch.zeros(mask.shape), ones, ones
    )
    stats = update(engine, experience, recipe, 0, 0.1, frozenset())
    now = weights(engine)
    gathered = engine.reference is not None and any(zero.is_gathered(p) for p in engine.reference.module.parameters())
    result = {
        "ratio": stats.first_ratio_deviation,
        "sampler": (evaluation.old_logprobs - rollout.sampler_logprobs)[mask].abs().max().item(),
        "kl": (evaluation.old_logprobs - evaluation.ref_logprobs)[mask].abs().max().item(),
        "scores": evaluation.source_scores,
        "tokens": rollout.response_ids[mask],
        "frozen": engine.frozen_hash() == before,
        "moved": {role: not torch.equal(now[role], start[role]) for role in (ACTOR, CRITIC)},
        "weights": now,
        "reference_gathered": gathered,
    }
    engine.close()
    return result


def weights(engine) -> dict[str, torch.Tensor]:
    found = {}
    for role in (ACTOR, CRITIC):
        parameters = list(engine.role_parameters(role).values())
        with torch.no_grad(), zero.gathered(parameters):
            found[role] = torch.cat([p.detach().flatten().clone() for p in parameters])
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    save_adapter(folder / "SFT", tiny.llama(), r=4)
    save_reward(folder / "REWARD")
    return folder


def resolved(settings, folder):
    """The settings with the folders' names filled in."""
    if isinstance(settings, dict):
        return {key: resolved(value, folder) for key, value in settings.items()}
    if isinstance(settings, list):
        return [resolved(value, folder) for value in settings]
    return str(folder / settings) if settings in ("SFT", "REWARD") else settings


@pytest.mark.parametrize("home", HOMES)
def test_what_is_sampled_is_what_trains(pool, folders, home):
    results = {}
    for stage, path in STAGES.items():
        settings = {**resolved(HOMES[home], folders), "zero": {"ds_config": path}}
        for result in pool.run(one_iteration, settings):
            assert result["ratio"] < 1e-5
            assert result["sampler"] < 1e-4, "the sampler is another policy than the one that trains"
            assert result["frozen"] and all(result["moved"].values())
            assert not result["reference_gathered"], "a frozen engine holds a whole parameter outside its forward"
            results[stage] = result
    first, second = results["zero0"], results["zero3"]
    assert torch.equal(first["tokens"], second["tokens"])
    assert torch.allclose(first["scores"], second["scores"], atol=1e-4)
    assert first["kl"] == pytest.approx(second["kl"], abs=1e-4)
    for role in (ACTOR, CRITIC):
        assert torch.allclose(first["weights"][role], second["weights"][role], atol=5e-6)


def test_a_reference_moves_the_kl(pool, folders):
    """Adapters off, a copy of the start, a model of its own: three different distances."""
    kl = {}
    for home in ("init adapter", "init adapter, base", "reference model"):
        settings = {**resolved(HOMES[home], folders), "zero": {"ds_config": STAGES["zero0"]}}
        kl[home] = pool.run(one_iteration, settings)[0]["kl"]
    assert len({round(value, 3) for value in kl.values()}) == 3


def kl_stopped(settings: dict) -> tuple[bool, float]:
    """Whether a stop at the first minibatch moved anything, and what its gradients did to the update after it.

    That one takes other minibatches first: twice the same gradient would be clipped to the same step.
    """
    stopping, free = tiny.recipe(**settings, ppo={"target_kl": 1e-9}), tiny.recipe(**settings)
    engine, found = tiny.engine(stopping), []
    start = weights(engine)
    update(engine, tiny.experience(), stopping, 0, 0.0, frozenset())
    stopped = weights(engine)
    other = tiny.engine(free)
    for each in (engine, other):
        update(each, tiny.experience(), free, 1, 0.0, frozenset())
        found.append(weights(each))
        each.close()
    moved = any(not torch.equal(start[role], stopped[role]) for role in start)
    return moved, max((found[0][role] - found[1][role]).abs().max().item() for role in start)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("home", ["adapter", "model"])
def test_a_kl_stop_leaves_no_gradient_behind(pool, home, stage):
    for moved, leak in pool.run(kl_stopped, {"critic": {"home": home}, "zero": {"ds_config": STAGES[stage]}}):
        assert not moved and leak < 1e-7
