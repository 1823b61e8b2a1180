"""A run that is stopped anywhere goes on to the same numbers and the same bytes; what it can't go on from is named."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine import checkpoint_store, dist, randomness, resume
from engine.checkpoint import Checkpoints
from engine.command_line import load_recipe
from engine.errors import RecipeError, RunError
from engine.trainer import train
from tests import checkpoints, tiny
from tests.distributed import Pool
from tests.launching import launch

pytestmark = pytest.mark.dist

ITERATIONS = 5
OFFLOAD = "ds_configs/zero3_cpu_offload.json"


class Stopped(BaseException):
    """The run was stopped here, on every rank."""


def run(recipe: str, output: str | None, stop_after: str | None = None, **changes) -> bool:
    """`launch/train.py` in this process; whether it came to its end."""
    sections = {"output": output, "resume": "auto", **changes}
    whole = Checkpoints.write

    def write(self, state, name):
        whole(self, state, name)
        if name == stop_after:
            raise Stopped

    Checkpoints.write = write
    try:
        train(load_recipe(recipe, sections))
    except Stopped:
        return False
    finally:
        Checkpoints.write = whole
    return True


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(folder: Path) -> dict:
    """What must be the same: all but clocks, memory, and the traffic of a start (DeepSpeed learns what to prefetch)."""
    clocks = ("time/", "cpu/", "memory/", "comm/")
    metrics = [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in lines(folder / "metrics.jsonl")]
    files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in (folder / "final").rglob("*") if f.is_file()}
    looks = folder / "evaluation.jsonl"
    held_out = (lines(looks), (folder / "before_after.txt").read_text()) if looks.exists() else None
    return {"metrics": metrics, "held out": held_out, "samples": lines(folder / "samples.jsonl"), "final": files}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Everything that has a state: adaptive KL, running normalisation, a warm-up, schedules, held-out prompts."""
    folder = tmp_path_factory.mktemp("resume")
    prompts = str(checkpoints.save_prompts(folder / "prompts.jsonl"))
    return checkpoints.save_recipe(
        folder,
        iterations=ITERATIONS,
        actor={"optimizer": {"learning_rate": 1e-3, "schedule": "cosine"}},
        critic={"warmup_iterations": 1},
        kl={"target": 1.0},
        scores={"normalize": True},
        evaluation={"dataset": prompts, "prompts": 5, "every_iterations": 2},
        checkpoint={"every_iterations": 1, "mid_phase": True},
        zero={"ds_config": tiny.ds_config("zero3")},
    )


@pytest.fixture(scope="module")
def whole(pool, recipe) -> Path:
    """A run that nobody stopped."""
    output = recipe.parent / "whole"
    assert pool.run(run, str(recipe), str(output)) == [True, True]
    return output


MOMENTS = ["000001", "000001.1-generation", "000002.2-inference", "000003.3-training-0002", "000005"]


def test_stopped_anywhere_it_goes_on_bitwise(pool, recipe, whole):
    output = recipe.parent / "stopped"
    for moment in MOMENTS:
        assert pool.run(run, str(recipe), str(output), moment) == [False, False], moment
    assert pool.run(run, str(recipe), str(output)) == [True, True]
    found, wanted = record(output), record(whole)
    assert [row["iteration"] for row in found["metrics"]] == list(range(1, ITERATIONS + 1))
    for name in wanted:
        assert found[name] == wanted[name], name
    assert not (output / "superseded").exists()


@pytest.mark.parametrize("stage", ["ds_configs/zero0.json", "ds_configs/zero2.json", OFFLOAD])
def test_on_every_stage(pool, recipe, stage):
    output, other = (recipe.parent / f"{name}-{Path(stage).stem}" for name in ("stopped", "whole"))
    changes = {"zero": {"ds_config": stage}, "iterations": 3}
    for moment in ("000001", "000001.3-training-0001"):
        assert pool.run(run_with, str(recipe), str(output), moment, changes) == [False, False]
    pool.run(run_with, str(recipe), str(output), None, changes)
    pool.run(run_with, str(recipe), str(other), None, changes)
    assert record(output) == record(other)


def run_with(recipe: str, output: str, stop_after: str | None, changes: dict) -> bool:
    return run(recipe, output, stop_after, **changes)


def test_killed_ranks_of_a_launch_go_on_bitwise(pool, recipe, whole):
    """SIGKILL to rank 0 just when a checkpoint is on the disk; the launcher ends the other rank."""
    output = recipe.parent / "killed"
    arguments, moment = (recipe, "--output", output, "--resume", "auto"), "000003.3-training-0001"
    died = launch(*arguments, script="tests/dying_train.py", DIES_AFTER=moment)
    assert died.returncode != 0
    assert checkpoint_store.finished(output / "checkpoints")[0].name == moment
    done = launch(*arguments)
    assert done.returncode == 0, done.stderr
    assert record(output) == record(whole)


@pytest.fixture(scope="module")
def three():
    workers = Pool(world_size=3)
    yield workers
    workers.close()


@pytest.mark.parametrize("ranks", [1, 3])
def test_another_number_of_ranks_goes_on(pool, single, three, recipe, whole, ranks):
    """From the inside of an iteration, which starts again; then the same but for rounding."""
    output = recipe.parent / f"on-{ranks}"
    pool.run(run, str(recipe), str(output), "000001.3-training-0002")
    workers = {1: single, 3: three}[ranks]
    assert all(workers.run(run, str(recipe), str(output)))
    found, wanted = record(output), record(whole)
    assert len(found["metrics"]) == ITERATIONS
    for mine, other in zip(found["metrics"][:3], wanted["metrics"][:3], strict=True):
        for name in mine.keys() - {"padding/fraction", "policy/first_ratio_deviation", "rollout/train_kl"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
    texts = [(row["iteration"], row["prompt"]) for row in found["samples"] if row["kind"] == "training"]
    assert {prompt for at, prompt in texts if at == 1} and all(at <= ITERATIONS for at, _ in texts)


def run_on_disks_of_their_own(recipe: str, folder: str, stop_after: str | None) -> tuple[bool, list[str]]:
    """Each rank as the only one of a node, in a working folder that the other doesn't see."""
    before, local = Path.cwd(), os.environ["LOCAL_RANK"]
    disk = Path(folder) / f"disk-{dist.rank()}"
    disk.mkdir(parents=True, exist_ok=True)
    os.chdir(disk)
    os.environ["LOCAL_RANK"] = "0"
    try:
        return run(recipe, "run", stop_after), names(disk / "run")
    finally:
        os.chdir(before)
        os.environ["LOCAL_RANK"] = local


def test_on_disks_of_their_own_each_node_keeps_checkpoints(pool, recipe, whole):
    """One node's disk is lost; the run goes on from the other's."""
    folder = str(recipe.parent / "disks")
    for _, kept in pool.run(run_on_disks_of_their_own, str(recipe), folder, "000003.2-inference"):
        assert kept == ["000003.2-inference", "000003", "000002"]
    lost = recipe.parent / "disks" / "disk-0" / "run" / "checkpoints"
    shutil.rmtree(lost)
    assert pool.run(run_on_disks_of_their_own, str(recipe), folder, None) == [(True, ["000005", "000004"])] * 2
    assert record(lost.parent) == record(whole)


# --- what can't be gone on from, and what is passed over; in one process, before any model loads


@pytest.fixture
def stopped(recipe, whole, tmp_path) -> Path:
    """A copy of the finished run without its end."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    return output


def find(recipe: Path, output: Path, spec: str = "auto", **changes):
    """As two ranks would find it, but for asking each other."""
    sections = {"output": str(output) if spec == "auto" else None, "resume": spec, **changes}
    return resume.find(load_recipe(str(recipe), sections))


CHANGES = {
    "seed": ({"seed": 7}, "the seed changed since the checkpoint: was 0, is 7"),
    "batch": ({"data": {"prompts_per_iteration": 6}}, "the batch sizes changed"),
    "minibatch": ({"ppo": {"minibatch_sequences": 5}}, "ppo.minibatch_sequences was 3, is 5"),
    "adapter": ({"actor": {"lora": {"rank": 2}}}, "the adapter shapes changed since the checkpoint: actor.rank was 16"),
    "roles": ({"critic": {"home": "trunk"}}, "the roles changed"),
    "data": (
        {"data": {"max_prompt_tokens": 7}},
        "the data changed since the checkpoint: max_prompt_tokens was 8",
    ),
    "version": ({"model": {"quantization": "nf4"}}, "the base changed since the checkpoint: quantization was none"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_another_run_is_refused(recipe, stopped, kind):
    changes, said = CHANGES[kind]
    with pytest.raises(RecipeError) as error:
        find(recipe, stopped, **changes)
    assert said in str(error.value) and "start a new run" in str(error.value)


def altered(folder: Path, name: str) -> None:
    """One byte of a file of the base, in a copy."""
    file = folder / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "name, said", [("model.safetensors", "the base changed"), ("tokenizer.json", "the tokenizer changed")]
)
def test_another_base_or_tokenizer_is_refused(recipe, stopped, tmp_path, name, said):
    policy = tmp_path / "policy"
    shutil.copytree(recipe.parent / "policy", policy)
    assert find(recipe, stopped, model={"path": str(policy)}).checkpoint.name == "000005", "a copy is the same base"
    altered(policy, name)
    with pytest.raises(RecipeError, match=said):
        find(recipe, stopped, model={"path": str(policy)})


def test_other_prompts_are_refused(recipe, stopped, tmp_path):
    prompts = tmp_path / "others.jsonl"
    checkpoints.save_prompts(prompts, count=21)
    with pytest.raises(RecipeError, match="the data changed since the checkpoint: prompts was"):
        find(recipe, stopped, data={"dataset": str(prompts)})


DAMAGE = {
    "cut off": lambda path: (path / "actor.safetensors").write_bytes((path / "actor.safetensors").read_bytes()[:-1]),
    "a flipped bit": lambda path: altered(path, "critic.safetensors"),
    "a missing file": lambda path: (path / "critic.safetensors").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_torn_checkpoint_is_passed_over(recipe, stopped, caplog, kind):
    newest = stopped / "checkpoints" / "000005"
    DAMAGE[kind](newest)
    found = find(recipe, stopped)
    assert found.checkpoint.name == "000004" and found.iteration == 4
    assert "passed over a torn checkpoint" in caplog.text and str(newest) in caplog.text
    if kind != "no manifest":
        with pytest.raises(RecipeError, match="000005"):
            find(recipe, stopped, str(newest))
    DAMAGE[kind](newest.with_name("000004"))
    found = find(recipe, stopped)
    assert found.checkpoint is None and found.iteration == -1, "it begins again in its folder"


def test_what_may_change_is_said(recipe, stopped, caplog):
    changes = {"iterations": 9, "actor": {"optimizer": {"learning_rate": 1e-4}}, "zero": {"ds_config": OFFLOAD}}
    found = find(recipe, stopped, **changes)
    assert found.checkpoint.name == "000005" and not found.same_course
    for said in ("iterations was 5, is 9", "actor.optimizer.learning_rate was 0.001, is 0.0001", "zero.ds_config was"):
        assert said in caplog.text
    assert "the number of ranks was 2, is 1" in caplog.text


def test_where_auto_looks(recipe, tmp_path, monkeypatch, stopped):
    assert find(recipe, tmp_path / "nothing") is None
    monkeypatch.chdir(tmp_path)
    assert resume.find(load_recipe(str(recipe), {"output": None, "resume": "auto"})) is None
    for name in ("recipe-20260101-000000", "recipe-20260102-000000", "other-20270101-000000"):
        shutil.copytree(stopped, tmp_path / "runs" / name)
    found = resume.find(load_recipe(str(recipe), {"output": None, "resume": "auto"}))
    assert found.run == Path("runs/recipe-20260102-000000")


def test_what_is_no_run_is_refused(recipe, stopped, tmp_path):
    with pytest.raises(RecipeError, match="is no run's folder and no checkpoint"):
        find(recipe, tmp_path, str(tmp_path))
    with pytest.raises(RecipeError, match="a run goes on in its own folder"):
        resume.find(load_recipe(str(recipe), {"output": str(tmp_path / "another"), "resume": str(stopped)}))


def test_an_older_checkpoint_leaves_nothing_lost(pool, recipe, stopped):
    """Named by hand: what came after it moves aside, and the run comes to the same end."""
    before = record(stopped)
    older = stopped / "checkpoints" / "000004"
    changes = {"resume": str(older)}
    assert pool.run(run_with, str(recipe), None, None, changes) == [True, True]
    aside = next((stopped / "superseded").iterdir())
    assert {"000005", "final", "metrics.jsonl", "samples.jsonl"} <= {path.name for path in aside.iterdir()}
    assert len(lines(aside / "metrics.jsonl")) == ITERATIONS
    assert record(stopped) == before


def test_a_checkpoint_is_small(recipe, whole):
    """12 bytes for each number that is trained: master and two moments. The rest is a fifth of a tiny model's."""
    path = whole / "checkpoints" / "000005"
    trained = sum(t.numel() for f in (whole / "final").rglob("*.safetensors") for t in load_file(f).values())
    size = sum(file.stat().st_size for file in path.iterdir())
    assert 12 * trained < size < 1.2 * 12 * trained


# --- which checkpoints there are, and a disk that is full


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint_store.finished(folder / "checkpoints")]


def test_the_last_and_the_best_are_kept(pool, recipe, whole):
    output = recipe.parent / "kept"
    settings = {"every_iterations": 1, "keep_last": 1, "keep_best": "-score/mean"}
    pool.run(run_with, str(recipe), str(output), None, {"checkpoint": settings})
    scores = [row["score/mean"] for row in lines(output / "metrics.jsonl")]
    worst = scores.index(min(scores)) + 1
    assert worst != ITERATIONS and names(output) == [f"{ITERATIONS:06d}", f"{worst:06d}"]
    state = checkpoint_store.read_state(output / "checkpoints" / f"{ITERATIONS:06d}")
    assert state["best"] == {"metric": "-score/mean", "value": min(scores), "checkpoint": f"{worst:06d}"}


def test_checkpoints_by_the_clock(pool, recipe, whole):
    output = recipe.parent / "clock"
    settings = {"every_iterations": 0, "every_minutes": 1e-6, "keep_last": 9, "mid_phase": False}
    pool.run(run_with, str(recipe), str(output), None, {"checkpoint": settings, "iterations": 2})
    assert names(output) == ["000002", "000001"]
    output, settings = recipe.parent / "no clock", {"every_iterations": 0, "mid_phase": False}
    pool.run(run_with, str(recipe), str(output), None, {"checkpoint": settings, "iterations": 2})
    assert names(output) == []


def run_on_a_full_disk(recipe: str, output: str, on_full_disk: str) -> str:
    """No second checkpoint fits; what became of the run."""
    whole_save, saved = checkpoint_store.save_file, []

    def save_file(tensors, file):
        saved.append(file)
        if len(saved) > 2:  # one per role
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole_save(tensors, file)

    checkpoint_store.save_file = save_file
    settings = {"every_iterations": 1, "mid_phase": False, "on_full_disk": on_full_disk}
    try:
        run(recipe, output, checkpoint=settings, iterations=3)
    except RunError as error:
        return str(error)
    finally:
        checkpoint_store.save_file = whole_save
    return "came to its end"


def test_a_full_disk_stops_a_run_or_does_not(pool, recipe, whole):
    ends = {}
    for choice in ("continue", "stop"):
        output = recipe.parent / f"full-{choice}"
        ends[choice] = pool.run(run_on_a_full_disk, str(recipe), str(output), choice)
        assert names(output) == ["000001"]
        assert checkpoint_store.problem_of(output / "checkpoints" / "000001") is None
        assert not list((output / "checkpoints").glob(".0*"))
    assert ends["continue"] == ["came to its end"] * 2
    assert len(lines(recipe.parent / "full-continue" / "metrics.jsonl")) == 3
    for said in ends["stop"]:
        assert "000002 could not be written" in said and "No space left" in said and "--resume" in said


def test_the_generators_of_other_people_go_on():
    """A reward function may draw from them."""

    def draws() -> tuple:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random(), random.gauss(0, 1)]

    draws()
    state = json.loads(json.dumps(randomness.global_state()))
    wanted = draws()
    assert draws() != wanted
    randomness.restore_global_state(state)
    assert draws() == wanted
