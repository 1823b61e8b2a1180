"""launch/plan.py as a person runs it: from configs alone, for people and for machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from engine.config import REPOSITORY
from tests.plan_table import MODELS

OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}
"""A name that is no folder would be looked for on the hub, again and again."""
ADAPTER = 80 * 64 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672))


@pytest.fixture
def plan(tmp_path):
    MODELS["70B"].save_pretrained(tmp_path)  # a config.json and nothing else; 70,553,706,496 weights
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {tmp_path}, dtype: bfloat16}}\n"
        "actor: {lora: {rank: 64}}\ncritic: {lora: {rank: 64}}\n"
        "rewards: [{function: 'tests/tiny.py:length_reward'}]\n"
        "zero: {activation_checkpointing: true}\n"
    )

    def run(*options):
        command = [sys.executable, str(REPOSITORY / "launch/plan.py"), str(recipe), *options]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=OFFLINE)

    return run


def test_seventy_billion_on_eight_devices(plan, tmp_path):
    found = plan("--gpus", "8", "--gpu-memory", "80GB", "--json", "plan.json")
    assert found.returncode == 0, found.stderr
    plan_made = json.loads((tmp_path / "plan.json").read_text())
    parts, moved = plan_made["held"], plan_made["received"]
    training = parts["training"]["shared base"]["device"]
    trained = 2 * ADAPTER + 8192  # both adapters and the value head: everything divides by 8
    assert training["masters"] == 4 * trained / 8 and training["gradients"] == 2 * trained / 8
    assert training["moments"] == 8 * trained / 8 + 2 * 4
    whole = 2 * trained + 2 * 161 * 8192  # adapters and norms, small enough to be whole on every rank beside the shards
    assert training["weights"] == (2 * 70_553_706_496 + 2 * trained) / 8 + whole
    generation = parts["generation"]["shared base"]["device"]
    assert 2 * 2 * 856e6 < generation["sampler's copy"] < 80e9 - training["weights"]
    assert sum(generation.values()) < 80e9, "the rest is fetched while decoding"
    assert "Not counted: what a layer needs while it computes" in found.stdout
    # Seven of eight parts come from others; 64 prompts, minibatches of 32, two epochs: 4 steps of one backward each.
    assert moved["training"]["reduced"] == 7 / 8 * 2 * trained * 4 and plan_made["seconds"] is None


def test_seconds_where_rates_are_given(plan, tmp_path):
    found = plan(
        "--gpus", "8", "--flops", "4e14", "--network", "25e9", "--memory-speed", "2e12", "--json", "timed.json"
    )
    assert "computes, seconds" in found.stdout, found.stderr
    timed = json.loads((tmp_path / "timed.json").read_text())
    training, moved = timed["seconds"]["training"], timed["received"]["training"]
    assert training["network"] == (moved["gathered"] + moved["reduced"]) / 25e9
    # 64 sequences of 112 tokens, two epochs: two roles, forward, backward and forward again, 2 FLOPs a weight at least.
    assert 0.9 < training["computing"] / (2 * 64 * 112 * 2 * 3 * 2 * 69.5e9 / 8 / 4e14) < 1.1


def test_what_does_not_fit_is_said_with_the_nearest_change(plan, tmp_path):
    options = ["--gpus", "8", "--gpu-memory", "80GB", "--zero.activation_checkpointing", "false"]
    found = plan(*options, "--png", "plan.png")
    assert found.returncode == 2 and "error: this plan can't start" in found.stderr
    assert "in training a rank needs" in found.stderr and "--gpu-memory is 80.0 GB" in found.stderr
    assert "it fits with --zero.activation_checkpointing true" in found.stderr
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_what_one_change_does_not_mend(plan):
    """21 GB of shards leave 24 GB little: each of the settings that are told is needed, together they are enough."""
    options = ["--gpus", "8", "--gpu-memory", "24GB", "--zero.activation_checkpointing", "false"]
    found = plan(*options)
    assert found.returncode == 2 and "in training a rank needs" in found.stderr
    told = found.stderr.split("it fits with ")[1].split(" or on ")[0].split()
    assert len(told) == 4, found.stderr
    assert plan(*options, *told).returncode == 0
    for fewer in (told[:2], told[2:]):
        assert plan(*options, *fewer).returncode == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpus", "0"], "--gpus: must be a whole number above 0, got '0'"),
        (["--gpus", "8", "--gpu-memory", "plenty"], "--gpu-memory: must be a size such as 80GB or 24GiB, got 'plenty'"),
        (["--gpus", "8", "--png", "nowhere/plan.png"], "nowhere/plan.png can't be written (No such file or directory)"),
        (["--gpus", "8", "--model.path", "nowhere"], "nowhere has no config that a model can be made of"),
        (["--gpus", "8", "--actor.lora.targets", "nothing"], "actor.lora.targets: "),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_a_message(plan, options, said):
    found = plan(*options)
    assert found.returncode == 2 and said in found.stderr, found.stderr


def test_a_host_has_an_end_too(plan):
    """Offloaded shards of 141 GB and their masters lie in the memory of one host, or of two."""
    options = ["--gpus", "8", "--gpu-memory", "80GB", "--zero.ds_config", "ds_configs/zero3_cpu_offload.json"]
    found = plan(*options, "--cpu-memory", "180GB")
    assert found.returncode == 0, found.stderr
    found = plan(*options, "--cpu-memory", "90GB")
    assert found.returncode == 2
    assert "in host memory a rank needs" in found.stderr and "its share of --cpu-memory is 11.2 GB" in found.stderr
    found = plan(*options, "--cpu-memory", "90GB", "--nodes", "2")
    assert found.returncode == 0, found.stderr
    assert "must divide the 8 of --gpus" in plan(*options, "--nodes", "3").stderr
