"""Weights that stay gathered for a phase: fetched once, the same results, and given back at its end."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from engine import device_memory, dist, reward_sources, traffic, zero
from engine.hybrid_engine import HybridEngine
from engine.roles import ACTOR, CRITIC, RolesModel, ValueModel
from engine.update import update
from tests import tiny

pytestmark = pytest.mark.dist

STEPS = 4
"""Of one update: 2 epochs of 7 sequences by 4."""


FROZEN = {"home": "adapter"}
TRAINED = {"home": "model", "train": "full"}


def engine_of(
    keep: int | str, vocabulary: int = tiny.VOCABULARY, stage: str = "zero3", critic: dict = FROZEN
) -> HybridEngine:
    recipe = tiny.recipe(zero={"ds_config": tiny.ds_config(stage), "keep_gathered_bytes": keep}, critic=critic)
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny.config(vocab_size=vocabulary)).requires_grad_(False)
    own = None
    if critic == TRAINED:
        own = ValueModel(
            LlamaForSequenceClassification(tiny.config(vocab_size=vocabulary, num_labels=1)), recipe.critic
        )
    return HybridEngine(RolesModel(base, recipe), recipe, own)


def gathered(engine: HybridEngine) -> int:
    """How many weights are whole that aren't at all times."""
    engines = {engine.engine, engine.critic_engine}
    always = {id(p) for one in engines for p in one._kept_whole}
    cut = [p for one in engines for p in one.module.parameters() if hasattr(p, "ds_id") and id(p) not in always]
    return sum(map(zero.is_gathered, cut))


def phases(keep: int, vocabulary: int = tiny.VOCABULARY, stage: str = "zero3", critic: dict = FROZEN) -> dict:
    """What a rank fetches and computes in inference and in an update, twice in turn."""
    engine, found = engine_of(keep, vocabulary, stage, critic), {"bytes": [], "left": [], "results": []}
    for iteration in range(2):
        start = traffic.received["gathered"]
        rollout, evaluation = tiny.evaluated(engine, engine.recipe, tiny.rollout(rows=4 - dist.rank()))
        middle, left = traffic.received["gathered"], gathered(engine)
        update(engine, tiny.experience(), engine.recipe, iteration, 0.0, frozenset())
        found["bytes"].append((middle - start, traffic.received["gathered"] - middle))
        found["left"] += [left, gathered(engine)]
        found["results"] += [evaluation.old_logprobs, evaluation.old_values, evaluation.ref_logprobs]
    for role in (ACTOR, CRITIC):
        parameters = list(engine.role_parameters(role).values())
        with torch.no_grad(), zero.gathered(parameters):
            found["results"] += [p.detach().clone() for p in parameters]
    engine.close()
    return found


@pytest.mark.parametrize("critic", [FROZEN, TRAINED], ids=lambda critic: critic["home"])
@pytest.mark.parametrize("stage", ["zero3", "zero2"])
def test_results_are_the_same_bitwise_and_no_weight_is_left(pool, stage, critic):
    kept, cut = (pool.run(phases, keep, tiny.VOCABULARY, stage, critic)[0] for keep in (10**9, 0))
    assert all(torch.equal(a, b) for a, b in zip(kept["results"], cut["results"], strict=True))
    assert kept["left"] == [0] * 4


@pytest.mark.parametrize(("critic", "matrices"), [(FROZEN, 2), (TRAINED, 3)], ids=["frozen", "trained"])
def test_a_matrix_is_fetched_once_in_inference_and_once_for_each_step(pool, critic, matrices):
    """By two vocabularies: embeddings and head grow, and a rank of two lacks half of each.

    From the second iteration on: in a first forward DeepSpeed learns the order, and drops all at its end.
    """
    small, large = (pool.run(phases, 10**9, vocabulary, "zero3", critic)[0]["bytes"] for vocabulary in (50, 1050))
    grown = matrices * 1000 * tiny.config().hidden_size * 4 / 2
    growth = [(b - a) / grown for a, b in zip(small[1], large[1], strict=True)]
    assert growth == [1, STEPS]


def rewarded(folder: str, offload: str) -> tuple[list[float], int, int, int]:
    """What a reward model fetches when it scores twice, its bytes, its forwards, and what is whole afterwards."""
    recipe = tiny.recipe(
        rewards=[{"model": folder, "offload_param": offload}],
        model={"path": folder},
        zero={"ds_config": tiny.ds_config("zero3"), "keep_gathered_bytes": "auto"},
    )
    (source,) = reward_sources.build(recipe, None, None)
    forwards, fetched = [], []
    source.engine.module.register_forward_hook(lambda *_: forwards.append(1))
    for _ in range(2):
        start = traffic.received["gathered"]
        source.score(tiny.rollout(rows=4), tiny.texts(4))
        fetched.append(traffic.received["gathered"] - start)
    parameters = list(source.engine.module.parameters())
    whole = sum(p.ds_numel * p.element_size() for p in parameters)
    left = sum(map(zero.is_gathered, parameters))
    source.close()
    return fetched, whole, len(forwards), left


@pytest.mark.parametrize(("offload", "times"), [("none", 1), ("cpu", 2)])
def test_a_reward_model_is_fetched_once_unless_its_shards_are_offloaded(pool, tmp_path, offload, times):
    tiny.scorer().save_pretrained(tmp_path)
    for fetched, whole, forwards, left in pool.run(rewarded, str(tmp_path), offload):
        assert forwards == 4, "two micro-batches of two, twice"
        assert round(fetched[1] / (whole / 2)) == times
        assert left == 0


def kept_where(free: int, keep: int | str, offloaded: bool) -> list[bool]:
    """Of frozen weights and of trained ones, whether they are kept."""
    whole = device_memory.free_bytes
    device_memory.free_bytes = lambda *_: free
    try:
        engine = engine_of(0)
        found = zero.phase_weights(engine.roles, keep, engine.device, offloaded)
        engine.close()
    finally:
        device_memory.free_bytes = whole
    return [any(p.requires_grad == trained for p in found.parameters) for trained in (False, True)]


def test_auto_keeps_what_a_tenth_of_the_free_memory_holds(pool):
    frozen = sum(p.nbytes for p in LlamaForCausalLM(tiny.config()).parameters())
    enough = 10 * frozen
    asked = [(enough, "auto", False), (enough - 10, "auto", False), (enough, "auto", True)]
    asked += [(0, frozen, True), (enough, frozen - 1, False), (0, 2 * frozen, False)]
    kept = [pool.run(kept_where, *one)[0] for one in asked]
    nothing, first, both = [False, False], [True, False], [True, True]
    assert kept == [first, nothing, nothing, first, nothing, both]
