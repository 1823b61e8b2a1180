"""Number formats: first ratio, padding and sampler in float32, bfloat16, float16, nf4 and int8; loss scaling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from engine import dist, models, ppo, zero
from engine.config import Recipe
from engine.ds_config import read_ds_config
from engine.hybrid_engine import HybridEngine
from engine.roles import ACTOR, CRITIC, RolesModel
from engine.sharded_loading import sharded_loading
from engine.update import update
from tests import tiny
from tests.test_homes import weights
from tests.test_phases import sampled

pytestmark = pytest.mark.dist

ALL_SHARDED = "tests/zero3_all_sharded.json"
STAGES = ["ds_configs/zero0.json", "ds_configs/zero1.json", "ds_configs/zero2.json", ALL_SHARDED]

# Format -> (model section, largest |ratio - 1|, largest |sampler - old log-prob|, largest effect of padding on a
# log-prob or value), on models whose logits are of size 4. Measured: float32 2e-6, 4e-6, 3e-6; bfloat16 0.035, 0.033,
# 0; float16 0.010, 0.012, 0.0005; nf4 in bfloat16 0.020, 0.039, 0; int8 0.017, 0.032, 0.
FORMATS = {
    "float32": ({"dtype": "float32"}, 1e-5, 1e-5, 1e-5),
    "bfloat16": ({"dtype": "bfloat16"}, 0.07, 0.07, 0.02),
    "float16": ({"dtype": "float16"}, 0.02, 0.025, 0.002),
    "nf4, float32": ({"dtype": "float32", "quantization": "nf4"}, 1e-5, 1e-5, 1e-5),
    "nf4, bfloat16": ({"dtype": "bfloat16", "quantization": "nf4"}, 0.07, 0.07, 0.02),
    "int8, bfloat16": ({"dtype": "bfloat16", "quantization": "int8"}, 0.07, 0.07, 0.02),
}


def allow_float16() -> None:
    """DeepSpeed refuses float16 on this processor for its speed; it computes the same."""
    zero.get_accelerator().is_fp16_supported = lambda: True


def loaded(recipe: Recipe) -> HybridEngine:
    """As a run loads it, adapters away from their start."""
    allow_float16()
    raw = read_ds_config(recipe.zero.ds_config)
    with sharded_loading(raw, models.DTYPES[recipe.model.dtype]):
        roles = RolesModel(models.load_causal(recipe.model), recipe)
    trained = [p for role in (ACTOR, CRITIC) for p in roles.role_parameters(role).values()]
    return HybridEngine(tiny.moved(roles, trained), recipe)


def recipe_of(folder: str, form: str, stage: str, **sections) -> Recipe:
    return tiny.recipe(model={"path": folder, **FORMATS[form][0]}, zero={"ds_config": stage}, **sections)


@torch.no_grad()
def padding_effect(engine: HybridEngine) -> float:
    """Largest change of a log-prob or value between a row alone and the same row among others."""
    rollout = tiny.rollout()
    together = engine.forward(rollout, torch.arange(len(rollout)), values=True)
    worst = 0.0
    for row in range(len(rollout)):
        alone, length = engine.forward(rollout, torch.tensor([row]), values=True), rollout.response_lengths[row]
        for name in ("logprobs", "values"):
            change = getattr(alone, name)[0, :length] - getattr(together, name)[row, :length]
            worst = max(worst, change.abs().max().item())
    return worst


def invariants(folder: str, form: str, stage: str) -> dict:
    recipe = recipe_of(folder, form, stage)
    engine = loaded(recipe)
    before, start = engine.frozen_hash(), weights(engine)
    padding = padding_effect(engine)
    rollout, evaluation = tiny.evaluated(engine, recipe, sampled(engine, recipe))
    mask = rollout.response_mask
    ones = torch.where(mask, 1.0, 0.0)
    record = type(tiny.experience())
    experience = record(rollout, evaluation, torch.zeros(len(rollout)), torch.zeros(mask.shape), ones, ones)
    stats = update(engine, experience, recipe, 0, 0.0, frozenset())
    now = weights(engine)
    result = {
        "ratio": stats.first_ratio_deviation,
        "sampler": (evaluation.old_logprobs - rollout.sampler_logprobs)[mask].abs().max().item(),
        "padding": padding,
        "frozen": engine.frozen_hash() == before,
        "moved": all(not torch.equal(now[role], start[role]) for role in (ACTOR, CRITIC)),
        "overflows": stats.overflows,
    }
    engine.close()
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A base wide enough for 4-bit blocks of 64."""
    path = tmp_path_factory.mktemp("numbers") / "policy"
    torch.manual_seed(0)
    LlamaForCausalLM(tiny.config(hidden_size=64, intermediate_size=128)).save_pretrained(path)
    return str(path)


# int8 at stage 3 is refused: tests/test_combinations.py.
RUNS = [(form, stage) for form in FORMATS for stage in STAGES if not (form.startswith("int8") and stage == ALL_SHARDED)]


@pytest.mark.parametrize("form, stage", RUNS)
def test_invariants_1_and_3(pool, folder, form, stage):
    _, ratio, sampler, padding = FORMATS[form]
    for result in pool.run(invariants, folder, form, stage):
        assert result["ratio"] < ratio and result["sampler"] < sampler and result["padding"] < padding
        assert result["frozen"] and result["moved"]


def train_kl(folder: str, form: str, stage: str) -> list[float]:
    """rollout/train_kl before and after each of three iterations of small steps."""
    small = {"optimizer": {"learning_rate": 1e-4}}
    recipe = recipe_of(folder, form, stage, actor=small, critic=small)
    engine = loaded(recipe)
    found = []
    for iteration in range(3):
        rollout, evaluation = tiny.evaluated(engine, recipe, sampled(engine, recipe))
        mask = rollout.response_mask
        k3 = ppo.kl_estimate(rollout.sampler_logprobs, evaluation.old_logprobs, "k3")
        found.append(ppo.masked_mean(k3, mask).item())
        update(engine, tiny.experience(), recipe, iteration, 0.0, frozenset())
    engine.close()
    return found


@pytest.mark.parametrize("form, bound", [("float32", 1e-9), ("bfloat16", 3e-4), ("nf4, bfloat16", 3e-4)])
def test_the_sampler_stays_the_policy_that_trains(pool, folder, form, bound):
    for found in pool.run(train_kl, folder, form, ALL_SHARDED):
        assert max(found) < bound


def scaled_norms(folder: str, stage: str, form: str, fp16: dict, scratch: str) -> dict:
    """Gradient norms of an update in which the loss scale changes, and what the overflows left behind."""
    raw = json.loads(Path(stage).read_text())
    file = f"{scratch}/{dist.rank()}.json"
    with open(file, "w") as out:
        json.dump({**raw, "fp16": {"enabled": "auto", **fp16}} if form == "float16" else raw, out)
    recipe = recipe_of(folder, form, file, ppo={"epochs": 3})
    engine = loaded(recipe)
    start = weights(engine)
    stats = update(engine, tiny.experience(), recipe, 0, 0.0, frozenset())
    now = weights(engine)
    result = {
        "norms": stats.grad_norms,
        "overflows": stats.overflows,
        "steps": stats.steps,
        "role_steps": dict(engine.role_steps),
        "moved": {role: (now[role].float() - start[role].float()).abs().max().item() for role in (ACTOR, CRITIC)},
    }
    engine.close()
    return result


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_scale_that_grows_changes_no_gradient(pool, folder, stage, tmp_path):
    """Window 1: the scale doubles after every clean step, while the gradients stay those of float32."""
    expected = pool.run(scaled_norms, folder, stage, "float32", {}, str(tmp_path))[0]
    for found in pool.run(
        scaled_norms, folder, stage, "float16", {"initial_scale_power": 4, "loss_scale_window": 1}, str(tmp_path)
    ):
        assert found["overflows"] == 0
        for role in (ACTOR, CRITIC):
            assert found["norms"][role] == pytest.approx(expected["norms"][role], rel=0.05)
            assert found["moved"][role] == pytest.approx(expected["moved"][role], rel=0.1)


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_skips_the_step_and_is_counted(pool, folder, stage, tmp_path):
    for found in pool.run(
        scaled_norms, folder, stage, "float16", {"initial_scale_power": 32, "hysteresis": 1}, str(tmp_path)
    ):
        assert found["steps"] == 6 == found["overflows"]
        assert found["role_steps"] == {ACTOR: 0, CRITIC: 0} and found["norms"] == {}
        assert found["moved"] == {ACTOR: 0.0, CRITIC: 0.0}
