"""Whole runs from the command line: what they leave behind, and how they stop when something is wrong."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests import checkpoints
from tests.launching import launch, launch_plain

pytestmark = pytest.mark.dist

REWARDS = """
import os

def number(prompts, responses, number, **columns):
    return [float(n) + len(r) for n, r in zip(number, responses)]

def breaks_on_rank_1(prompts, responses, **columns):
    if os.environ["RANK"] == "1":
        raise KeyError("no such thing")
    return [0.0] * len(prompts)

def dies_on_rank_1(prompts, responses, **columns):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    return [0.0] * len(prompts)

def huge(prompts, responses, **columns):
    return [3e38] * len(prompts)

def judge(prompts, responses):
    return {"letters": sum(map(len, responses))}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run on two ranks: two reward sources, an adaptive KL, held-out prompts with a judge."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "rewards.py").write_text(REWARDS)
    recipe = checkpoints.save_recipe(
        folder,
        rewards=[
            {"model": str(checkpoints.save_reward_model(folder / "reward")), "offload_param": "cpu"},
            {"function": f"{folder}/rewards.py:number", "weight": 0.1},
        ],
        kl={"target": 1.0},
        evaluation={
            "dataset": str(checkpoints.save_prompts(folder / "prompts.jsonl")),
            "prompts": 7,
            "every_iterations": 1,
            "judge": f"{folder}/rewards.py:judge",
        },
    )
    done = launch(recipe, "--iterations", "3")
    assert done.returncode == 0, done.stderr
    (folder / "stderr.txt").write_text(done.stderr)
    return folder / "run"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_its_record_behind(run):
    metrics = lines(run / "metrics.jsonl")
    assert [row["iteration"] for row in metrics] == [1, 2, 3]
    for row in metrics:
        assert row["policy/first_ratio_deviation"] < 1e-5
        assert row["rollout/train_kl"] < 1e-6
        assert row["score/reward/std"] > 0 and row["score/number/mean"] > 0
        total = row["score/reward/mean"] + 0.1 * row["score/number/mean"]
        assert row["score/mean"] == pytest.approx(total, rel=1e-5)
        assert row["update/steps"] == 4  # 2 epochs of 5 sequences in minibatches of 3
    assert metrics[0]["kl_coef"] != metrics[1]["kl_coef"], "the adaptive controller never moved"
    looks = lines(run / "evaluation.jsonl")
    assert [look["iteration"] for look in looks] == [0, 1, 2, 3]
    assert looks[0]["eval/letters"] > 0
    samples = lines(run / "samples.jsonl")
    assert {sample["kind"] for sample in samples} == {"training", "heldout"}
    assert list((run / "tensorboard").glob("events*"))
    assert (run / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["iterations"] == 3 and recipe["kl"]["target"] == 1.0
    config = json.loads((run / "ds_config.json").read_text())
    assert config["gradient_clipping"] == 0.0 and config["zero_optimization"]["stage"] == 3


def test_people_get_a_line_per_iteration_and_no_chatter(run):
    text = (run.parent / "stderr.txt").read_text()
    assert sum("iteration " in line and "score" in line for line in text.splitlines()) == 3
    assert "before" in text and "frozen shards unchanged" in text
    for chatter in ("Warning", "Using client Optimizer", "gemm_4bit"):
        assert chatter not in text, text


def test_the_actor_loads_in_plain_peft(run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(run.parent / "policy")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        before = base(ids).logits.clone()
        after = PeftModel.from_pretrained(base, str(run / "final" / "actor"))(ids).logits
    assert (after - before).abs().max() > 1e-4
    weights = load_file(run / "final" / "critic" / "value_head.safetensors")["weight"]
    assert weights.shape == (1, 32) and weights.abs().max() > 0


def test_an_output_folder_with_a_run_is_refused_and_left_alone(run):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    refused = launch_plain(run.parent / "recipe.yaml")
    assert refused.returncode == 2
    assert "--output" in refused.stderr and "Traceback" not in refused.stderr
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_run_that_came_in_between_is_not_overwritten(tmp_path):
    """The folder is claimed by creating recipe.yaml: of two runs that start together one wins."""
    from engine.command_line import load_recipe
    from engine.errors import RunError
    from engine.run_folder import RunFolder

    recipe = load_recipe(checkpoints.save_recipe(tmp_path))
    folder = RunFolder.claim(recipe, {})
    (folder.path / "metrics.jsonl").write_text("mine")
    with pytest.raises(RunError, match="another process runs in"):
        RunFolder.claim(recipe, {})
    folder.lock.close()
    with pytest.raises(RunError, match="already holds a run"):
        RunFolder.claim(recipe, {})
    assert (folder.path / "metrics.jsonl").read_text() == "mine"


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    """transformers would start the head at random: a classifier is no policy, a policy is no reward model."""
    recipe = checkpoints.save_recipe(tmp_path)
    for option, folder, missing in (
        ("--model.path", "reward", "lm_head.weight"),
        ("--rewards", "policy", "score.weight"),
    ):
        path = tmp_path / folder
        config = json.loads((path / "config.json").read_text()) | {"num_labels": 1}
        (path / "config.json").write_text(json.dumps(config))
        value = path if option == "--model.path" else json.dumps([{"model": str(path)}])
        failed = launch_plain(recipe, option, value, "--zero.ds_config", "ds_configs/zero0.json")
        assert failed.returncode == 2 and missing in failed.stderr and "Traceback" not in failed.stderr
    assert not (tmp_path / "run").exists()


def test_a_judge_that_fails_is_named(tmp_path):
    (tmp_path / "judge.py").write_text("def judge(prompts, responses):\n    return {'x': float('nan')}\n")
    evaluation = {"dataset": str(tmp_path / "prompts.jsonl"), "judge": f"{tmp_path}/judge.py:judge"}
    failed = launch(checkpoints.save_recipe(tmp_path, evaluation=evaluation))
    assert failed.returncode != 0
    assert "judge's numbers must be finite" in failed.stderr and "Traceback" not in failed.stderr


def test_one_process_without_a_launcher(tmp_path):
    recipe = checkpoints.save_recipe(tmp_path)
    done = launch_plain(recipe, "--zero.ds_config", "ds_configs/zero2.json", "--critic.home", "trunk")
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 2


def with_function(folder: Path, name: str) -> Path:
    (folder / "rewards.py").write_text(REWARDS)
    return checkpoints.save_recipe(folder, rewards=[{"function": f"{folder}/rewards.py:{name}"}])


def test_a_reward_function_that_raises_on_one_rank_stops_all_with_its_name(tmp_path):
    started = time.monotonic()
    failed = launch(with_function(tmp_path, "breaks_on_rank_1"))
    assert failed.returncode != 0
    assert "rank 1: reward function" in failed.stderr and "breaks_on_rank_1 raised KeyError" in failed.stderr
    assert "(line 9)" in failed.stderr and "Traceback" not in failed.stderr
    assert time.monotonic() - started < 120  # start-up included


def test_a_rank_that_is_killed_takes_the_others_along(tmp_path):
    started = time.monotonic()
    failed = launch(with_function(tmp_path, "dies_on_rank_1"))
    assert failed.returncode != 0
    assert time.monotonic() - started < 120
    assert not (tmp_path / "run" / "final").exists()


def test_a_loss_that_overflows_stops_with_the_iteration(tmp_path):
    recipe = with_function(tmp_path, "huge")
    failed = launch_plain(recipe, "--ppo.whiten_advantages", "false")
    assert failed.returncode != 0
    assert "not finite" in failed.stderr and "iteration 1" in failed.stderr
    assert not (tmp_path / "run" / "final").exists()
