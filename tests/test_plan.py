"""launch/plan.py as a person runs it: from configs alone, for people and for machines."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from transformers import LlamaConfig

from engine.config import REPOSITORY

LARGE = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
"""Llama 3 70B: 70,553,706,496 weights."""
ADAPTER = 80 * 64 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672))


@pytest.fixture
def plan(tmp_path):
    LlamaConfig(**LARGE).save_pretrained(tmp_path)  # a config.json and nothing else
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {tmp_path}, dtype: bfloat16}}\n"
        "actor: {lora: {rank: 64}}\ncritic: {lora: {rank: 64}}\n"
        "rewards: [{function: 'tests/tiny.py:length_reward'}]\n"
    )

    def run(*options):
        command = [sys.executable, str(REPOSITORY / "launch/plan.py"), str(recipe), *options]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    return run


def test_seventy_billion_on_eight_devices(plan, tmp_path):
    found = plan("--gpus", "8", "--gpu-memory", "80GB", "--json", "plan.json")
    assert found.returncode == 0, found.stderr
    parts = json.loads((tmp_path / "plan.json").read_text())
    training = parts["training"]["shared base"]["device"]
    trained = 2 * ADAPTER + 8192  # both adapters and the value head: everything divides by 8
    assert training["masters"] == 4 * trained / 8 and training["gradients"] == 2 * trained / 8
    assert training["moments"] == 8 * trained / 8 + 2 * 4
    whole = 2 * trained + 2 * 161 * 8192  # adapters and norms, small enough to be whole on every rank beside the shards
    assert training["weights"] == (2 * 70_553_706_496 + 2 * trained) / 8 + whole
    generation = parts["generation"]["shared base"]["device"]
    assert 2 * 2 * 856e6 < generation["sampler's copy"] < 80e9 - training["weights"]
    assert sum(generation.values()) < 80e9, "the rest is fetched while decoding"
    assert "left for activations" in found.stdout and "Not counted: activations" in found.stdout


def test_what_does_not_fit_is_said(plan):
    found = plan("--gpus", "8", "--gpu-memory", "24GB")
    assert found.returncode == 2
    assert "error: this plan can't start" in found.stderr and "--gpu-memory is 24.0 GB" in found.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpus", "0"], "--gpus: must be a whole number above 0, got '0'"),
        (["--gpus", "8", "--gpu-memory", "plenty"], "--gpu-memory: must be a size such as 80GB or 24GiB, got 'plenty'"),
        (["--gpus", "8", "--model.path", "nowhere"], "nowhere has no config that a model can be made of"),
        (["--gpus", "8", "--actor.lora.targets", "nothing"], "actor.lora.targets: "),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_a_message(plan, options, said):
    found = plan(*options)
    assert found.returncode == 2 and said in found.stderr, found.stderr
