"""Weights that are fetched while decoding: the same numbers at every budget, bounded memory, ranks in step."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import LlamaForCausalLM

from engine import causal, device_memory, dist, models, weight_groups, zero
from engine.batch import Prompts
from engine.config import Recipe
from engine.hybrid_engine import HybridEngine
from engine.replica import Replica
from engine.roles import ACTOR, CRITIC, RolesModel
from engine.rollout import generate
from engine.stopping import Stops
from engine.update import update
from tests import tiny
from tests.test_numbers import loaded, recipe_of

LAYERS = 6

# How the actor is sampled from -> its section of the recipe, the type, and changes to the base.
FORMS = {
    "merged": ({}, torch.float32, {}),
    "bfloat16": ({}, torch.bfloat16, {}),
    "dora": ({"lora": {"dora": True}}, torch.float32, {}),
    "whole modules": ({"lora": {"modules_to_save": ["embed_tokens", "lm_head"]}}, torch.float32, {}),
    "tied": ({}, torch.float32, {"tie_word_embeddings": True}),
    "tied, bfloat16": ({}, torch.bfloat16, {"tie_word_embeddings": True}),
    "tied, adapter on the head": (
        {"lora": {"targets": ["lm_head", "q_proj"]}},
        torch.float32,
        {"tie_word_embeddings": True},
    ),
    "full": ({"train": "full"}, torch.float32, {}),
}


def recipe_for(form: str, stage: str, **sections) -> Recipe:
    actor, dtype, _ = FORMS[form]
    homes = {"critic": {"home": "model"}, "reference": {"home": "model"}} if form == "full" else {}
    named = {kind: name for name, kind in models.DTYPES.items()}[dtype]
    return tiny.recipe(actor=actor, model={"dtype": named}, zero={"ds_config": stage}, **homes, **sections)


def roles_of(form: str, recipe: Recipe) -> RolesModel:
    _, dtype, changes = FORMS[form]
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny.config(num_hidden_layers=LAYERS, **changes)).to(dtype).requires_grad_(False)
    model = RolesModel(base, recipe)
    trained = [p for role in (ACTOR, CRITIC) for p in model.role_parameters(role).values()]
    return tiny.moved(model, [] if form == "full" else trained)


def engine_of(form: str, stage: str) -> HybridEngine:
    recipe = recipe_for(form, stage)
    own = tiny.value_model(recipe) if form == "full" else None
    return HybridEngine(roles_of(form, recipe), recipe, own)


def with_budget(engine: HybridEngine, budget: int | str) -> HybridEngine:
    generation = engine.recipe.generation.model_copy(update={"gather_budget_bytes": budget})
    engine.recipe = engine.recipe.model_copy(update={"generation": generation})
    return engine


def logits_of(module, rows: int) -> torch.Tensor:
    """A prefill without a cache."""
    prompts = tiny.prompts(rows=7)
    return causal.call(module, prompts.prompt_ids[:rows], prompts.prompt_mask[:rows], use_cache=False).logits


def budgets_of(replica: Replica) -> dict[str, int]:
    whole = sum(weight.gathered_bytes for weight in replica.weights)
    return {"unlimited": 10 * whole, "half": whole // 2, "nothing": 0}


# --- one process, where nothing is sharded: the groups and the order they are read in


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_every_budget_computes_the_same(form):
    replica = Replica(roles_of(form, recipe_for(form, "ds_configs/zero0.json")))
    expected = logits_of(replica.fill(), rows=3)
    replica.free()
    for name, budget in budgets_of(replica).items():
        module = replica.fill(budget)
        assert (replica.idle_pass is None) == (name == "unlimited") == (replica.resident_fraction == 1)
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
        assert bool(hooks) == (name != "unlimited")
        for _ in range(2):
            assert torch.equal(logits_of(module, rows=3), expected), name
            replica.idle_pass and replica.idle_pass()
        assert next(module.parameters()).dtype == expected.dtype, "a sampler reads type and device off the first weight"
        replica.free()
        assert all(p.is_meta for p in module.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_the_groups_are_layers_and_what_lies_beside_them():
    replica = Replica(roles_of("tied", recipe_for("tied", "ds_configs/zero0.json")))
    names = {id(module): name for name, module in replica.module.named_modules()}
    units = [names[id(group.unit)] for group in replica.groups]
    assert units == ["model.embed_tokens", *(f"model.layers.{i}" for i in range(LAYERS)), "model.norm", "lm_head"]
    staying, fetched = weight_groups.split(replica.groups, replica.groups[0].gathered_bytes)
    assert [names[id(group.unit)] for group in staying] == ["model.embed_tokens", "lm_head"], "the head takes no bytes"
    assert [names[id(group.unit)] for group in fetched] == units[1:-1]


@torch.no_grad()
def test_a_module_may_read_its_groups_in_another_order():
    """As OPT does, whose final norm is registered before its layers; and some that it never reads."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.first, self.unread = (torch.nn.Linear(3, 3) for _ in range(3))
            self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(3))

        def forward(self, x):
            return self.head(self.layers[2](self.layers[0](self.first(x))))

    model = Model()
    weights = [
        weight_groups.Weight(p, None, [(part, leaf)])
        for part in model.modules()
        for leaf, p in part._parameters.items()
    ]
    x, order = torch.randn(2, 3), []
    expected, groups = model(x), weight_groups.grouped(model, weights)
    visits = weight_groups.Visits(model, groups)
    fetched = {id(weight.source): index for index, group in enumerate(groups) for weight in group.places}
    keep = zero.Fetch.__init__
    try:
        zero.Fetch.__init__ = lambda self, parameters: (
            order.append(fetched[id((batch := list(parameters))[0])]),
            keep(self, batch),
        )[1]
        assert torch.equal(model(x), expected) and torch.equal(model(x), expected)
        visits.idle_pass()
    finally:
        zero.Fetch.__init__ = keep
    assert order == [0, 1, 2, 3, 4, 5] * 3, "every pass fetches every group once, in one order"
    assert not any(p.numel() for p in model.parameters())


# --- under ZeRO-3


@contextlib.contextmanager
def watched(engine: HybridEngine):
    """The most bytes that lived at once, looked at wherever weights begin to come, have come, are placed or go."""
    peak, originals = [0], (zero.Fetch.__init__, zero.Fetch.wait, zero.Fetch.release, weight_groups.put)
    sources = [p for p in engine.roles.parameters() if hasattr(p, "ds_id")]

    shards = {p.ds_tensor.untyped_storage().data_ptr() for p in sources}  # there all the time, and joined in one

    def size(tensor):
        storage = tensor.untyped_storage()
        return tensor.nbytes if storage.data_ptr() in shards else storage.nbytes()

    def look():
        tensors = [p.data for p in (*engine.replica.module.parameters(), *sources) if not p.is_meta]
        storages = {t.data_ptr(): size(t) for t in tensors}
        flying = [p for p in sources if p.ds_status.name == "INFLIGHT"]
        flying_bytes = sum(p.ds_numel * p.element_size() for p in flying if not p.numel())
        peak[0] = max(peak[0], sum(storages.values()) + flying_bytes)

    def looking(function):
        def wrapped(*args, **kwargs):
            look()
            result = function(*args, **kwargs)
            look()
            return result

        return wrapped

    zero.Fetch.__init__, zero.Fetch.wait, zero.Fetch.release, weight_groups.put = map(looking, originals)
    try:
        yield peak
    finally:
        zero.Fetch.__init__, zero.Fetch.wait, zero.Fetch.release, weight_groups.put = originals


def my_prompts(rows: list[int]) -> Prompts:
    """As many rows as this rank has, with limits of their own: ranks decode differently long."""
    mine = torch.arange(sum(rows)).split(rows)[dist.rank()]
    everything = tiny.prompts(rows=sum(rows))
    tensors = {n: value[mine] for n, value in vars(everything).items() if isinstance(value, torch.Tensor)}
    tensors["max_new_tokens"] = 1 + 3 * mine
    return Prompts(**tensors, texts=("p",) * len(mine), columns=({},) * len(mine))


def at_budget(engine: HybridEngine, budget: int, rows: list[int]) -> dict:
    """What a rank computes and holds at a budget; two forwards by hand, of the first rank alone."""
    before = zero.shards_hash(engine.roles.named_parameters())
    computes = dist.rank() == 0  # the other one keeps step
    logits = None
    with contextlib.ExitStack() as watching:
        peak = watching.enter_context(watched(engine))
        with with_budget(engine, budget).generation() as actor:
            idle, fraction = engine.idle_pass, engine.replica.resident_fraction
            for _ in range(2):
                if computes or idle is None:
                    logits = logits_of(actor, rows=2 + dist.rank())
                else:
                    idle()
            watching.close()  # so much looking takes longer than the sampling
            stops = Stops((7, 11))
            rollout = generate(actor, my_prompts(rows), engine.recipe.generation, stops, seed=9, idle=idle)
    sources = [p for p in engine.roles.parameters() if hasattr(p, "ds_id") and not p.ds_persist]
    return {
        "logits": None if logits is None else logits.clone(),
        "tokens": rollout.response_ids.clone(),
        "logprobs": rollout.sampler_logprobs.clone(),
        "peak": peak[0],
        "fraction": fraction,
        "idles": idle is not None,
        "shards stand": zero.shards_hash(engine.roles.named_parameters()) == before,
        "left": sum(p.numel() for p in engine.replica.module.parameters() if not p.is_meta)
        + sum(zero.is_gathered(p) for p in sources),
    }


def every_budget(engine: HybridEngine, rows: list[int]) -> dict:
    budgets = budgets_of(engine.replica)
    found = {name: at_budget(engine, budget, rows) for name, budget in budgets.items()}
    found["sizes"] = (budgets["unlimited"] // 10, engine.replica.largest_group_bytes)
    engine.close()
    return found


def by_form(form: str, rows: list[int], stage: str, stepped: bool) -> dict:
    engine = engine_of(form, stage)
    if stepped:  # afterwards DeepSpeed keeps small parameters whole
        update(engine, tiny.experience(), engine.recipe, 0, 0.0, frozenset())
    return every_budget(engine, rows)


def quantized(folder: str, rows: list[int]) -> dict:
    return every_budget(loaded(recipe_of(folder, "nf4, float32", tiny.ds_config("zero3"))), rows)


def same_and_bounded(found: dict) -> None:
    whole, largest = found["sizes"]
    expected = found["unlimited"]
    assert not expected["idles"] and expected["fraction"] == 1 and expected["logits"] is not None
    for name, budget in {"unlimited": whole, "half": whole // 2, "nothing": 0}.items():
        one = found[name]
        if one["logits"] is not None:
            assert torch.equal(one["logits"], expected["logits"]), name
        assert torch.equal(one["tokens"], expected["tokens"]), name
        # Not to the bit: the sampler packs weights that all stay (onednn.py), and then rounds in another order.
        assert torch.allclose(one["logprobs"], expected["logprobs"], atol=1e-5), name
        assert one["shards stand"] and one["left"] == 0, name
        assert 0 < one["peak"] <= budget + 2 * largest, (name, one["peak"], budget, largest)
        if name != "unlimited":
            assert one["idles"] and (one["fraction"] > 0) == (name == "half")
            assert one["fraction"] <= budget / whole
    assert found["nothing"]["peak"] < found["half"]["peak"] < expected["peak"]


ALL_SHARDED, SMALL_ONES_STAY = tiny.ds_config("zero3"), "ds_configs/zero3.json"


RUNS = [(form, [5, 2]) for form in FORMS] + [("merged", [4, 0])]


@pytest.mark.dist
@pytest.mark.parametrize("form, rows", RUNS)
def test_two_ranks_sample_the_same_at_every_budget(pool, form, rows):
    for found in pool.run(by_form, form, rows, ALL_SHARDED, False):
        same_and_bounded(found)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> str:
    """A base wide enough for 4-bit blocks of 64."""
    path = tmp_path_factory.mktemp("replica") / "policy"
    torch.manual_seed(0)
    sizes = tiny.config(hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS)
    LlamaForCausalLM(sizes).save_pretrained(path)
    return str(path)


@pytest.mark.dist
def test_weights_in_4_bit_are_unpacked_where_they_arrive(pool, wide):
    for found in pool.run(quantized, wide, [5, 2]):
        same_and_bounded(found)


@pytest.mark.dist
@pytest.mark.parametrize("form", ["merged", "bfloat16", "full"])
def test_a_rank_alone_leaves_its_shards_as_they_were(single, form):
    """Its gathered weights are its shards, not a copy of them."""
    same_and_bounded(single.run(by_form, form, [5], ALL_SHARDED, False)[0])


@pytest.mark.dist
def test_weights_that_deepspeed_keeps_whole_stay_as_they_are(pool):
    """Small ones, as shipped: after a step they are whole, and are neither gathered nor written to."""
    for found in pool.run(by_form, "merged", [5, 2], SMALL_ONES_STAY, True):
        for name in ("half", "nothing"):
            assert torch.equal(found[name]["tokens"], found["unlimited"]["tokens"])
            assert torch.allclose(found[name]["logprobs"], found["unlimited"]["logprobs"], atol=1e-5)
            if found[name]["logits"] is not None:
                assert torch.equal(found[name]["logits"], found["unlimited"]["logits"])
            assert found[name]["shards stand"]


def collectives(form: str) -> list[list[str]]:
    """The names of the weights of each gather: in a forward on one rank, in an idle pass on the other."""
    engine = with_budget(engine_of(form, ALL_SHARDED), 20_000)
    names, order, keep = {id(p): n for n, p in engine.roles.named_parameters()}, [], zero.Fetch.__init__
    with engine.generation() as actor:

        def noting(self, parameters):
            batch = list(parameters)
            order.append([names[id(p)] for p in batch])
            keep(self, batch)

        zero.Fetch.__init__ = noting
        try:
            for _ in range(2):
                logits_of(actor, rows=2) if dist.rank() == 0 else engine.idle_pass()
        finally:
            zero.Fetch.__init__ = keep
    engine.close()
    return order


@pytest.mark.dist
def test_an_idle_pass_fetches_what_a_forward_does(pool):
    computing, idling = pool.run(collectives, "tied, adapter on the head")
    assert computing == idling
    once = computing[: len(computing) // 2]
    assert computing == once * 2 and 1 < len(once) < LAYERS + 3
    assert "lora_A.actor" in " ".join(once[-1]), "the head, and what is merged into it"


def interrupted() -> dict:
    """A body that raises between two layers, with a gather in flight; then another phase as if nothing had been."""
    engine = with_budget(engine_of("merged", ALL_SHARDED), 0)
    with engine.generation() as actor:
        expected = logits_of(actor, rows=2)

    def fail(*_):
        raise KeyboardInterrupt("in the middle")

    with pytest.raises(KeyboardInterrupt), engine.generation() as actor:
        broken = actor.model.layers[2].mlp.register_forward_hook(fail)
        logits_of(actor, rows=2)
    broken.remove()
    sources = [p for p in engine.roles.parameters() if hasattr(p, "ds_id")]
    left = {
        "weights": sum(not p.is_meta for p in engine.replica.module.parameters()),
        "gathered": sum(p.ds_status.name != "NOT_AVAILABLE" for p in sources),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.replica.module.modules()),
        "idles": engine.idle_pass is not None,
    }
    with engine.generation() as actor:
        same = torch.equal(logits_of(actor, rows=2), expected)
    engine.close()
    return {**left, "same": same}


@pytest.mark.dist
def test_nothing_stays_when_sampling_fails_in_the_middle(pool):
    for found in pool.run(interrupted):
        assert found == {"weights": 0, "gathered": 0, "hooks": 0, "idles": False, "same": True}


def automatic(free_of_rank: list[int]) -> tuple[int | None, float, int, int]:
    """The budget, what stays, a KV cache's bytes by hand, the largest group's."""
    engine = with_budget(engine_of("merged", ALL_SHARDED), "auto")
    keep = device_memory.free_bytes
    device_memory.free_bytes = lambda device, ranks: free_of_rank[dist.rank()]
    try:
        budget = engine._gather_budget_bytes()
        with engine.generation():
            fraction = engine.replica.resident_fraction
    finally:
        device_memory.free_bytes = keep
    # 6 layers, key and value, 64 rows, 64 + 9 columns, 2 heads of width 8, 4 bytes.
    cache, largest = 6 * 2 * 64 * (64 + 9) * 2 * 8 * 4, engine.replica.largest_group_bytes
    engine.close()
    return budget, fraction, cache, largest


@pytest.mark.dist
def test_auto_keeps_what_the_fullest_rank_holds(pool):
    for budget, fraction, cache, largest in pool.run(automatic, [10_000_000, 4_200_000]):
        assert budget == (4_200_000 * 9 // 10 - cache - 2 * largest) // 2 and 0 < fraction < 1
    for budget, fraction, _, _ in pool.run(automatic, [2**40, 2**40]):
        assert budget > 2**38 and fraction == 1
    for budget, fraction, _, _ in pool.run(automatic, [2**40, 1000]):
        assert budget == 0 and fraction == 0


def whole_weights(stage: str) -> bool:
    engine = with_budget(engine_of("merged", tiny.ds_config(stage)), 0)
    with engine.generation():
        free = engine.idle_pass is None and engine.replica.resident_fraction == 1
    engine.close()
    return free


@pytest.mark.dist
@pytest.mark.parametrize("stage", ["zero0", "zero2"])
def test_where_weights_are_whole_the_budget_is_ignored(pool, stage):
    assert pool.run(whole_weights, stage) == [True, True]
