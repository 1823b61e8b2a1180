"""Each self-check sees the fault it is named for, and none on a healthy engine; nothing of a run is changed by them."""

from __future__ import annotations

import random
import socket
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from engine import (
    adapters,
    attention,
    dist,
    environment_checks,
    models,
    reward_sources,
    sampling,
    scoring,
    self_checks,
    weight_groups,
    zero,
)
from engine.batch import Rollout
from engine.causal import hidden_states as real_hidden_states
from engine.command_line import load_recipe
from engine.errors import RecipeError
from engine.randomness import generator
from engine.roles import ACTOR, CRITIC, REFERENCE, RolesModel
from engine.trainer import Trainer, train
from tests import checkpoints, tiny
from tests.launching import launch, launch_plain
from tests.test_resume import lines

pytestmark = pytest.mark.dist

DROPOUT = 0.3


def noisy(prompts, responses, **columns) -> list[float]:
    """A reward that draws from the generators that everybody shares."""
    return [random.random() + torch.rand(()).item() for _ in responses]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    """A policy whose config has dropout, which loading takes out; a reward model, and a function that draws."""
    folder = tmp_path_factory.mktemp("self-checks")
    checkpoints.save_policy(folder / "policy", attention_dropout=DROPOUT)
    rewards = [
        {"model": str(checkpoints.save_reward_model(folder / "reward"))},
        {"function": f"{__file__}:noisy"},
    ]
    shared = {"ds_config": tiny.ds_config("zero3"), "keep_gathered_bytes": 0}
    return str(checkpoints.save_recipe(folder, rewards=rewards, zero=shared, kl={"target": 1.0}, self_check=True))


# --- faults: each is real behaviour of the engine, changed


def dropout_stays_on(patch) -> None:
    patch.setattr(models.causal, "without_noise", lambda config: None)


def reference_with_the_adapter(patch) -> None:
    to = adapters.Switch.to
    patch.setattr(adapters.Switch, "to", lambda self, name: to(self, ACTOR if name == REFERENCE else name))


def adapter_never_on(patch) -> None:
    to = adapters.Switch.to
    patch.setattr(adapters.Switch, "to", lambda self, name: to(self, REFERENCE))


def a_layer_looks_at_the_batch(patch) -> None:
    def mixed(*arguments):
        hidden = real_hidden_states(*arguments)
        return hidden + 0.01 * hidden.mean(0)

    patch.setattr("engine.causal.hidden_states", mixed)


def score_at_the_end_of_the_padding(patch) -> None:
    patch.setattr(scoring, "last_positions", lambda mask: torch.full_like(mask[:, 0], mask.shape[1] - 1, dtype=int))


def fetched_weights_are_others(patch) -> None:
    need = weight_groups.Visits._need

    def spoilt(self, index: int) -> None:
        need(self, index)
        for places in self.groups[index].places.values():
            for part, leaf in places:
                weight_groups.put(nn.Parameter(1.3 * part._parameters[leaf].data, requires_grad=False), [(part, leaf)])

    patch.setattr(weight_groups.Visits, "_need", spoilt)


def sampler_of_other_weights(patch) -> None:
    read = weight_groups.Weight.read
    patch.setattr(weight_groups.Weight, "read", lambda self: nn.Parameter(1.01 * read(self).data, requires_grad=False))


def mask_by_ids(patch) -> None:
    by_lengths = Rollout.response_mask.fget
    patch.setattr(Rollout, "response_mask", property(lambda self: by_lengths(self) & (self.response_ids != 1)))


def score_before_the_end(patch) -> None:
    last = scoring.last_positions
    patch.setattr(scoring, "last_positions", lambda mask: last(mask) - 1)


def score_by_ids(patch) -> None:
    """As transformers' own classifiers pool."""
    patch.setattr(
        reward_sources,
        "last_token_scores",
        lambda m, ids, mask, packed: scoring.last_token_scores(m, ids, mask & (ids != 1), packed),
    )


def value_behind_its_token(patch) -> None:
    before = RolesModel._before

    def behind(self, role, layout):
        if role != CRITIC:
            return before(self, role, layout)
        with self.acting_as(role):
            return real_hidden_states(self.causal, layout.sequences, layout.mask)[layout.responses]

    patch.setattr(RolesModel, "_before", behind)


def samples_share_numbers(patch) -> None:
    patch.setattr(sampling, "generator", lambda seed, stream, draw, sample: generator(seed, stream, draw))


def packed_sequences_see_each_other(patch) -> None:
    one_by_one = attention._one_by_one

    def as_one(module, query, key, value, mask, lengths, settings):
        return one_by_one(module, query, key, value, None, [sum(lengths)], settings)

    patch.setattr(attention, "_one_by_one", as_one)


def little_room(patch) -> None:
    patch.setattr(environment_checks, "_free_bytes", lambda place: 10**6)


def another_seed_on_rank_1(patch) -> None:
    if dist.rank() == 1:
        patch.setattr(sampling, "generator", lambda seed, *key: generator(seed + 1, *key))


def others_weights_on_rank_1(patch) -> None:
    if dist.rank() == 1:
        sampler_of_other_weights(patch)


FAULTS = {
    # These two move whatever is computed twice; every other fault is told from all others.
    dropout_stays_on: {"first ratio is 1", "adapters off is base", "batched is alone", "gathered is sharded"},
    reference_with_the_adapter: {"adapters off is base"},
    adapter_never_on: {"adapters off is base"},
    a_layer_looks_at_the_batch: {"first ratio is 1", "batched is alone"},
    score_at_the_end_of_the_padding: {"batched is alone", "end token counts"},
    fetched_weights_are_others: {"gathered is sharded"},
    sampler_of_other_weights: {"gathered is sharded"},
    mask_by_ids: {"end token counts"},
    score_before_the_end: {"end token counts"},
    score_by_ids: {"end token counts"},
    value_behind_its_token: {"end token counts"},
    samples_share_numbers: {"random numbers"},
    little_room: {"disk space"},
}


def built(recipe: str, **sections) -> Trainer:
    output = dist.broadcast_object(tempfile.mkdtemp(dir=Path(recipe).parent))
    torch.manual_seed(0)
    return Trainer(load_recipe(recipe, {"self_check": False, "output": output, **sections}))


def checked(recipe: str, *faults, sections: dict | None = None) -> list[dict]:
    """What the checks of a start find in an engine that is loaded and looked at with the faults."""
    with pytest.MonkeyPatch.context() as patch:
        for fault in faults:
            fault(patch)
        trainer = built(recipe, **(sections or {}))
        try:
            found = trainer.self_check(self_checks.AT_START, Path(recipe).parent)
        finally:
            trainer.close()
    return [vars(finding) for finding in found]


def failed(found: list[dict]) -> dict[str, str]:
    return {one["name"]: one["problem"] for one in found if one["problem"] is not None}


def deviations(found: list[dict]) -> list[float]:
    return [float(one["measured"].partition(" of ")[0]) for one in found if " of 1e-04" in one["measured"]]


@pytest.mark.parametrize("ranks", ["single", "pool"])
def test_a_healthy_engine_passes(request, ranks, recipe):
    for found in request.getfixturevalue(ranks).run(checked, recipe):
        assert failed(found) == {} and [one["name"] for one in found] == list(self_checks.CHECKS)
        assert len(deviations(found)) == 3 and max(deviations(found)) < 1e-5
        measured = {one["name"]: one["measured"] for one in found}
        assert "100% and 0% gathered" in measured["gathered is sharded"]


def checked_with(recipe: str, sections: dict) -> list[dict]:
    return checked(recipe, sections=sections)


OTHERWISE = {
    "shipped zero3": {"zero": {"ds_config": "ds_configs/zero3.json", "keep_gathered_bytes": "auto"}},
    "offload": {"zero": {"ds_config": "ds_configs/zero3_cpu_offload.json", "keep_gathered_bytes": "auto"}},
    "zero2": {"zero": {"ds_config": "ds_configs/zero2.json"}, "critic": {"home": "trunk"}},
    "zero0": {"zero": {"ds_config": "ds_configs/zero0.json"}, "generation": {"temperature": 0.7, "top_p": 0.9}},
    "a critic of its own": {"critic": {"home": "model", "train": "full"}},
    "a reference of its own": {"reference": {"home": "model"}, "kl": {"estimator": "full"}},
    "packed": {"ppo": {"tokens_per_micro_batch": 64, "packing": True}, "zero": {"ds_config": "ds_configs/zero2.json"}},
    "everything in full": {
        "actor": {"train": "full"},
        "critic": {"home": "model"},
        "reference": {"home": "model"},
        "generation": {"temperature": 0.0, "gather_budget_bytes": 0},
    },
}


@pytest.mark.parametrize("form", OTHERWISE)
def test_every_home_and_stage_passes(pool, recipe, form):
    """Where weights stay whole, or gathered for a phase, those of a moment before must not be left in place."""
    for found in pool.run(checked_with, recipe, OTHERWISE[form]):
        assert failed(found) == {}
        assert max(deviations(found)) < 1e-5


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_seen_by_name(single, recipe, fault):
    (found,) = single.run(checked, recipe, fault)
    assert set(failed(found)) >= FAULTS[fault]
    if fault not in (dropout_stays_on, a_layer_looks_at_the_batch):
        assert set(failed(found)) == FAULTS[fault], failed(found)


def test_sequences_that_are_not_kept_apart_are_seen(single, recipe):
    (found,) = single.run(checked_packed, recipe)
    assert {"batched is alone", "gathered is sharded"} <= set(failed(found)), found


def checked_packed(recipe: str) -> list[dict]:
    return checked(recipe, packed_sequences_see_each_other, sections=OTHERWISE["packed"])


@pytest.mark.parametrize("fault", [another_seed_on_rank_1, others_weights_on_rank_1], ids=lambda fault: fault.__name__)
def test_a_fault_of_one_rank_is_told_to_all(pool, recipe, fault):
    one, other = (failed(found) for found in pool.run(checked, recipe, fault))
    assert one == other and "random numbers" in one
    assert "rank" in one["random numbers"]


# --- it changes nothing


def state(trainer: Trainer) -> dict:
    """Everything that a self-check could leave behind."""
    engine = trainer.engine
    scorer = trainer.sources[0].engine
    parameters = [*engine.roles.named_parameters(), *scorer.module.named_parameters()]
    return {
        "bytes": zero.shards_hash(parameters),
        "gathered": [name for name, p in parameters if hasattr(p, "ds_id") and zero.is_gathered(p)],
        "orders": [
            len(engine.engine.fetch_orders.coordinators),
            id(engine.engine.fetch_orders.offload.param_coordinator),
        ],
        "scorer's": id(scorer.engine.optimizer.param_coordinator),
        "draws": [random.getstate(), torch.get_rng_state().tolist()],
        "sampler": sum(p.numel() for p in engine.replica.module.parameters()),
    }


def before_and_after(recipe: str, sections: dict) -> tuple[dict, dict]:
    trainer = built(recipe, **sections)
    try:
        before = state(trainer)
        trainer.self_check(self_checks.AT_START, Path(recipe).parent)
        return before, state(trainer)
    finally:
        trainer.close()


STAYING = {"all cut": {}, "some stay whole": OTHERWISE["shipped zero3"]}


@pytest.mark.parametrize("staying", STAYING)
def test_it_leaves_no_trace(pool, recipe, staying):
    for before, after in pool.run(before_and_after, recipe, STAYING[staying]):
        assert before["sampler"] == 0 and before["orders"][0] == 0
        for name in before:
            assert after[name] == before[name], name


def run(recipe: str, output: str, self_check: bool, sections: dict) -> None:
    random.seed(0)
    train(load_recipe(recipe, {"output": output, "self_check": self_check, **sections}))


@pytest.mark.parametrize("staying", STAYING)
def test_a_run_with_it_is_bitwise_one_without(pool, recipe, staying, tmp_path):
    outputs = [tmp_path / name for name in ("with", "without")]
    for output in outputs:
        pool.run(run, recipe, str(output), output.name == "with", STAYING[staying])
    one, other = (
        {
            "metrics": [
                {key: value for key, value in row.items() if not key.startswith(("time/", "cpu/", "memory/"))}
                for row in lines(folder / "metrics.jsonl")
            ],
            "final": {file.name: file.read_bytes() for file in (folder / "final").rglob("*.safetensors")},
        }
        for folder in outputs
    )
    assert any(key.startswith("comm/") for key in one["metrics"][0]) and one["final"]
    assert one == other


def refused(recipe: str, output: str) -> list[str]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RecipeError) as error:
        reference_with_the_adapter(patch)
        little_room(patch)
        train(load_recipe(recipe, {"output": output}))
    return list(error.value.problems)


def test_a_start_that_fails_names_all_and_makes_no_folder(single, recipe):
    output = Path(recipe).parent / "refused"
    (problems,) = single.run(refused, recipe, str(output))
    assert [problem.partition(": ")[0] for problem in problems] == [
        "self-check, adapters off is base",
        "self-check, disk space",
    ]
    assert not output.exists()


def test_number_formats_pass(single, recipe, tmp_path):
    """bfloat16 rounds: its bounds hold, and faults are still seen."""
    values = yaml.safe_load(Path(recipe).read_text())
    values["model"]["dtype"] = "bfloat16"
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    assert [failed(found) for found in single.run(checked, str(file))] == [{}]
    (found,) = single.run(checked, str(file), reference_with_the_adapter)
    assert set(failed(found)) == {"adapters off is base"}
    (found,) = single.run(checked, str(file), value_behind_its_token)
    assert "end token counts" in failed(found)


# --- the command


def test_the_command_on_two_ranks(recipe, tmp_path):
    done = launch(recipe, "--output", tmp_path / "run", script="launch/doctor.py")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if " ok " in line]
    assert [row[:21].strip() for row in rows[-len(self_checks.CHECKS) :]] == list(self_checks.CHECKS)
    assert len(rows) == len(self_checks.CHECKS) + 9 and not (tmp_path / "run").exists()


def test_a_taken_port_is_told_before_anybody_waits(recipe):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        group = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = launch_plain(recipe, script="launch/doctor.py", **group)
    assert done.returncode == 2
    assert "self-check, master port: ranks meet at port " + port in done.stderr
