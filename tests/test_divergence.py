"""Training that diverges stops, or goes back to a good checkpoint: smaller steps, other prompts, and to the byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import checkpoint_store, models
from engine.batch import Experience
from engine.command_line import load_recipe
from engine.ds_config import read_ds_config
from engine.errors import RunError
from engine.prompts import PromptSource, load_prompts
from engine.update import update
from tests import checkpoints, tiny
from tests.launching import launch
from tests.test_optimizer_state import OFFLOAD, ZERO0, ZERO2, ZERO3, engine_of, same, whole_weights
from tests.test_optimizer_state import train as train_on
from tests.test_resume import lines, names, record, run_on_disks_of_their_own, run_with

pytestmark = pytest.mark.dist

# --- in the engine: whatever failed, no trace of its gradients is left


def a_loss_that_is_not_finite(engine, recipe) -> None:
    plain = tiny.experience()
    returns = plain.returns.clone()
    returns[0, 0] = float("nan")
    update(engine, Experience(**{**vars(plain), "returns": returns}), recipe, 2, 0.0, frozenset())


def a_gradient_of_the_critic_that_is_not_finite(engine, recipe) -> None:
    overflowing(engine, lambda policy, value: (policy, value * 1e30 * 1e30))


def a_gradient_of_the_actor_that_is_not_finite(engine, recipe) -> None:
    overflowing(engine, lambda policy, value: (policy * 1e30 * 1e30, value))


def overflowing(engine, losses) -> None:
    """A step on two losses that are 0, whose gradients need not be finite."""
    output = engine.forward(tiny.rollout(), torch.arange(7), values=True)
    means = output.logprobs.float().mean(), output.values.float().mean()
    policy, value = losses(*(mean - mean.detach() for mean in means))
    engine.backward(policy, value, last=True)
    engine.step()


LOSS, OF_CRITIC, OF_ACTOR = (
    a_loss_that_is_not_finite,
    a_gradient_of_the_critic_that_is_not_finite,
    a_gradient_of_the_actor_that_is_not_finite,
)
OWN_CRITIC = {"critic": {"home": "model"}}
SMALLEST_SCALE = {"initial_scale_power": 0, "min_loss_scale": 1, "hysteresis": 1}
FAILURES = [(stage, "float32", {}, LOSS) for stage in (ZERO0, ZERO2, ZERO3, OFFLOAD)]
FAILURES += [(ZERO0, "float32", {}, OF_CRITIC), (ZERO2, "bfloat16", {}, OF_CRITIC), (ZERO3, "float32", {}, OF_CRITIC)]
FAILURES += [(ZERO3, "float32", OWN_CRITIC, OF_ACTOR), (ZERO3, "float16", {}, LOSS), (ZERO3, "float16", {}, OF_CRITIC)]


def gone_back(stage: str, dtype: str, homes: dict, fail) -> dict:
    """Two iterations after a failure in the third and the way back, and those of another engine that knew of none."""
    engine, recipe = engine_of(stage, dtype, homes)
    train_on(engine, recipe, range(2))
    state = engine.capture()
    try:
        fail(engine, recipe)
    except FloatingPointError as error:
        said = str(error)
    else:
        said = "nothing was raised"
    ends = []
    for again in (engine, engine_of(stage, dtype, homes)[0]):
        again.restore(*state)
        again.learning_rate_factor = 0.5
        train_on(again, recipe, range(2, 4))
        ends.append((again.capture(), whole_weights(again)))
        again.close()
    return {"said": said, "same": same(*ends), "learned": not same(state, ends[0][0])}


@pytest.mark.parametrize("stage, dtype, homes, fail", FAILURES, ids=lambda x: getattr(x, "__name__", None))
def test_back_from_a_failure_an_engine_is_as_good_as_new(pool, tmp_path, stage, dtype, homes, fail):
    if dtype == "float16":
        config = {**read_ds_config(stage), "fp16": {"enabled": "auto", **SMALLEST_SCALE}}
        stage = str(tmp_path / "smallest_scale.json")
        Path(stage).write_text(json.dumps(config))
    for found in pool.run(gone_back, stage, dtype, homes, fail):
        assert "not finite" in found["said"] or "smallest loss scale" in found["said"], found["said"]
        assert found["learned"] and found["same"]


# --- whole runs: one prompt of the fourth iteration is worth 1e38, whose square no float32 holds

ITERATIONS, EACH, POISONED = 5, 5, 3
BACK = "000002.0-rolled-back-01"
REWARD = """
def score(prompts, responses, number, **columns):
    return [1e38 if n == {poisoned} else s for n, s in zip(number, plain(prompts, responses))]

def plain(prompts, responses, **columns):
    return [len(r) - r.count("a") for r in responses]
"""


def prompts_of(recipe: Path, iteration: int):
    """Those that an undisturbed run draws in an iteration, which counts from 0."""
    read = load_recipe(str(recipe))
    tokenizer = models.load_tokenizer(read.model)
    return PromptSource(load_prompts(read.data, read.generation, tokenizer), read.seed, EACH).batch(iteration)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("divergence")
    checkpoints.save_prompts(folder / "prompts.jsonl", count=40)
    prompts = {"dataset": str(folder / "prompts.jsonl"), "max_prompt_tokens": 8, "prompts_per_iteration": EACH}
    settings = {
        "iterations": ITERATIONS,
        "rewards": [{"function": f"{folder / 'reward.py'}:score"}],
        "actor": {"optimizer": {"learning_rate": 1e-3, "schedule": "cosine"}},
        "kl": {"target": 1.0},
        "evaluation": {"dataset": prompts["dataset"], "prompts": 5, "every_iterations": 1},
        "checkpoint": {"every_iterations": 2},
        "failures": {"on_divergence": "roll_back"},
        "zero": {"ds_config": tiny.ds_config("zero3")},
    }
    path = checkpoints.save_recipe(folder, **settings, data=prompts)
    checkpoints.save_prompts(folder / "prompts.jsonl", count=40)
    (folder / "reward.py").write_text(REWARD.format(poisoned=prompts_of(path, POISONED).columns[0]["number"]))
    return path


@pytest.fixture(scope="module")
def whole(pool, recipe) -> Path:
    """A run that went back once and that nobody stopped."""
    output = recipe.parent / "whole"
    assert pool.run(run_with, str(recipe), str(output), None, {}) == [True, True]
    return output


def test_a_run_goes_back_and_on_with_other_prompts_and_smaller_steps(recipe, whole):
    (event,) = lines(whole / "events.jsonl")
    assert event.pop("time") and "iteration 4, minibatch" in event.pop("reason")
    assert event == {
        "kind": "roll_back",
        "iteration": POISONED + 1,
        "checkpoint": "000002",
        "roll_backs": 1,
        "prompts_skipped": 2 * EACH,
        "first_draw": 2 * EACH,
        "last_draw": 4 * EACH - 1,
        "learning_rate_factor": 0.5,
    }
    rows = lines(whole / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(1, ITERATIONS + 1))
    assert [row["failures/roll_backs"] for row in rows] == [0, 0, 1, 1, 1]
    drawn = {}
    for row in lines(whole / "samples.jsonl"):
        drawn.setdefault((row["kind"], row["iteration"]), []).append(row["prompt"])
    for iteration, draw in zip(range(ITERATIONS), [0, 1, 4, 5, 6], strict=True):
        wanted = prompts_of(recipe, draw).texts
        assert tuple(drawn["training", iteration + 1]) == wanted[: len(drawn["training", iteration + 1])]
    assert [row["iteration"] for row in lines(whole / "evaluation.jsonl")] == list(range(ITERATIONS + 1))
    assert names(whole) == ["000005", "000004"]


def test_what_was_left_behind_is_kept(recipe, whole):
    """The third iteration had been learned from, and its line been written."""
    (aside,) = (whole / "superseded").iterdir()
    assert aside.name.endswith("-rolled-back-01")
    before, now = lines(aside / "metrics.jsonl"), lines(whole / "metrics.jsonl")
    assert [row["iteration"] for row in before] == [1, 2, 3] and before[:2] == now[:2]
    assert now[2]["lr/actor"] == before[2]["lr/actor"] / 2 and now[2]["lr/critic"] == before[2]["lr/critic"] / 2
    assert now[2]["kl_coef"] == before[2]["kl_coef"], "the controller went back, too"
    events = EventAccumulator(str(whole / "tensorboard")).Reload().Scalars("score/mean")
    assert [event.step for event in events] == list(range(1, ITERATIONS + 1))
    assert [event.value for event in events] == pytest.approx([row["score/mean"] for row in now], rel=1e-6)


def test_killed_right_after_it_went_back_it_goes_on_bitwise(pool, recipe, whole):
    """SIGKILL to rank 0 when the state after the roll-back is on the disk; other processes go on."""
    output = recipe.parent / "killed"
    died = launch(recipe, "--output", output, script="tests/dying_train.py", DIES_AFTER=BACK)
    assert died.returncode != 0 and names(output)[:2] == [BACK, "000002"], died.stderr
    earlier = shutil.copytree(output, recipe.parent / "killed earlier")
    shutil.rmtree(earlier / "checkpoints" / BACK)  # as if it had died before that was written
    assert pool.run(run_with, str(recipe), str(earlier), None, {}) == [True, True]
    assert len(lines(earlier / "events.jsonl")) == 1
    assert record(earlier) == record(whole)
    state = checkpoint_store.read_state(output / "checkpoints" / BACK)
    assert (state["iteration"], state["roll_backs"], state["prompt_shift"]) == (2, 1, 2)
    assert pool.run(run_with, str(recipe), str(output), None, {}) == [True, True]
    assert len(lines(output / "events.jsonl")) == 1
    assert record(output) == record(whole)


def test_from_the_inside_of_an_iteration(pool, recipe):
    """With a checkpoint after every phase the newest good one is that of the failed iteration itself."""
    ends = []
    for name, stop_after in (("inside", None), ("inside, stopped", "000003.0-rolled-back-01")):
        output = recipe.parent / name
        changes = {"checkpoint": {"every_iterations": 2, "mid_phase": True}, "zero": {"ds_config": ZERO2}}
        finished = [stop_after is None] * 2
        assert pool.run(run_with, str(recipe), str(output), stop_after, changes) == finished
        if stop_after is not None:
            assert names(output)[0] == stop_after and "000003.2-inference" not in names(output)
            pool.run(run_with, str(recipe), str(output), None, changes)
        (event,) = lines(output / "events.jsonl")
        assert event["checkpoint"] == "000003.2-inference" and event["prompts_skipped"] == EACH
        ends.append(record(output))
    assert ends[0] == ends[1]
    assert [row["iteration"] for row in ends[0]["metrics"]] == list(range(1, ITERATIONS + 1))


def end_of(recipe: str, output: str, changes: dict) -> str:
    """What a run said when it stopped; every rank says the same."""
    try:
        run_with(recipe, output, None, changes)
    except (FloatingPointError, RunError) as error:
        return str(error)
    return "came to its end"


def test_by_default_it_stops(pool, recipe):
    output = str(recipe.parent / "stopped")
    first, second = pool.run(end_of, str(recipe), output, {"failures": {"on_divergence": "stop"}})
    assert first == second and "iteration 4, minibatch" in first and "not finite, and nothing was stepped" in first
    assert not (Path(output) / "events.jsonl").exists() and names(Path(output)) == ["000002"]


def fast(recipe: Path, **failures) -> dict:
    """Large steps, nothing that holds the policy, and no prompt that is worth too much."""
    return {
        "rewards": [{"function": f"{recipe.parent / 'reward.py'}:plain"}],
        "actor": {"optimizer": {"learning_rate": 3e-2}},
        "kl": {"kl_coef": 0.0, "target": None},
        "scores": {"normalize": True},
        "checkpoint": {"every_iterations": 1},
        "failures": failures,
    }


def test_a_kl_beyond_its_bound_goes_back_so_often_and_no_oftener(pool, recipe):
    output = recipe.parent / "kl"
    changes = fast(recipe, on_divergence="roll_back", kl_abort=0.01)
    first, second = pool.run(end_of, str(recipe), str(output), changes)
    assert first == second and "KL to the reference may not pass failures.kl_abort 0.01 nats per response" in first
    assert "gone back failures.max_roll_backs 2 times" in first and str(output / "events.jsonl") in first
    events = lines(output / "events.jsonl")
    assert [event["learning_rate_factor"] for event in events] == [0.5, 0.25]
    # The weights that were found too far away are not gone back to, though their checkpoint is whole.
    assert [(e["iteration"], e["checkpoint"]) for e in events] == [(2, "000000")] * 2
    assert [(e["first_draw"], e["last_draw"]) for e in events] == [(0, 2 * EACH - 1), (0, 4 * EACH - 1)]
    state = checkpoint_store.read_state(output / "checkpoints" / "000001")
    assert (state["roll_backs"], state["prompt_shift"]) == (2, 4)
    assert state["moments"][0]["count"] == EACH, "the statistics of scores went back, too"
    asides = sorted((output / "superseded").iterdir())
    assert all({"000001", "metrics.jsonl"} <= {path.name for path in aside.iterdir()} for aside in asides)


def test_a_kl_beyond_its_bound_can_stop_the_run(pool, recipe):
    output = recipe.parent / "kl stopped"
    first, second = pool.run(end_of, str(recipe), str(output), fast(recipe, on_divergence="stop", kl_abort=0.01))
    assert first == second and first.startswith("iteration 2: the KL to the reference may not pass")
    assert "raise kl.kl_coef or failures.kl_abort" in first and len(lines(output / "metrics.jsonl")) == 1


def test_weights_that_an_update_ruined_are_not_gone_back_to(pool, recipe):
    """A step of 1e36, after which the sampler knows no number; the next is smaller by 1e-39."""
    output = recipe.parent / "ruined"
    changes = {
        **fast(recipe, on_divergence="roll_back", learning_rate_factor=1e-39),
        "iterations": 2,
        "actor": {"optimizer": {"learning_rate": 1e36}},
        "critic": {"optimizer": {"learning_rate": 1e36}},
        "ppo": {"epochs": 1, "minibatch_sequences": EACH},
        "evaluation": {"dataset": None},
    }
    assert pool.run(run_with, str(recipe), str(output), None, changes) == [True, True]
    (event,) = lines(output / "events.jsonl")
    assert "iteration 2: log-probs of sampled tokens are not finite" in event["reason"]
    assert (event["checkpoint"], event["prompts_skipped"]) == ("000000", 2 * EACH)
    (aside,) = (output / "superseded").iterdir()
    assert (aside / "000001").is_dir() and len(lines(output / "metrics.jsonl")) == 2


TEARS = """
from pathlib import Path
scores, calls = [1.0, 0.0, 2.0, 1e38, 0.5, 0.25, 0.125], []
def score(prompts, responses, **columns):
    calls.append(len(responses))
    if scores[len(calls) - 1] == 1e38:
        for path in Path({checkpoints!r}).glob({pattern!r}):
            (path / "actor.safetensors").write_bytes(b"torn")
    return [scores[len(calls) - 1]] * len(responses)
"""


@pytest.mark.parametrize("pattern", ["000003", "0*"])
def test_a_torn_checkpoint_is_not_gone_back_to(pool, recipe, pattern):
    """Nor is the best one named that the course that is left has replaced."""
    folder = recipe.parent / ("torn" if pattern == "000003" else "all torn")
    folder.mkdir()
    output = folder / "run"
    (folder / "reward.py").write_text(TEARS.format(checkpoints=str(output / "checkpoints"), pattern=pattern))
    changes = {
        "rewards": [{"function": f"{folder / 'reward.py'}:score"}],
        "evaluation": {"dataset": None, "every_iterations": 0},
        "checkpoint": {"every_iterations": 1, "keep_last": 2, "keep_best": "score/mean"},
    }
    if pattern == "0*":
        first, second = pool.run(end_of, str(recipe), str(output), changes)
        assert first == second and "There is no good checkpoint to go back to" in first
        return
    assert pool.run(run_with, str(recipe), str(output), None, changes) == [True, True]
    (event,) = lines(output / "events.jsonl")
    assert event["checkpoint"] == "000002" and names(output) == ["000005", "000004", "000003"]
    best = checkpoint_store.read_state(output / "checkpoints" / "000005")["best"]
    assert (best["checkpoint"], best["value"]) == ("000003", 0.5)


LOSES_ITS_DISK = """
import os, shutil
def score(prompts, responses, number, **columns):
    poisoned = [n == {poisoned} for n in number]
    if any(poisoned):  # this node's disk is lost
        shutil.rmtree("run/checkpoints")
        os.mkdir("run/checkpoints")
    return [1e38 if bad else len(r) - r.count("a") for bad, r in zip(poisoned, responses)]
"""


def test_on_disks_of_their_own_the_node_that_has_a_checkpoint_reads_it_for_all(pool, recipe, whole):
    """The node of rank 0, which had drawn the prompt, loses its checkpoints just before."""
    reward, folder = recipe.parent / "reward.py", recipe.parent / "disks"
    poisoned = prompts_of(recipe, POISONED).columns[0]["number"]
    before = reward.read_text()
    reward.write_text(LOSES_ITS_DISK.format(poisoned=poisoned))
    try:
        results = pool.run(run_on_disks_of_their_own, str(recipe), str(folder), None)
    finally:
        reward.write_text(before)
    assert results == [(True, ["000005", "000004"])] * 2
    assert record(folder / "disk-0" / "run") == record(whole)
