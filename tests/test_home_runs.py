"""Whole runs with roles away from their default homes, from the command line to adapters and models that load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, TaskType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForSequenceClassification

from engine.config import Recipe
from engine.hybrid_engine import HybridEngine
from tests import checkpoints, tiny
from tests.launching import launch
from tests.test_adapters import save_adapter

pytestmark = pytest.mark.dist

LORA = {"lora": {"rank": 4}, "optimizer": {"learning_rate": 1e-3}}


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def frozen_stood_still(folder: Path) -> bool:
    found = json.loads((folder / "run" / "base_shards.json").read_text())
    return found["sha256_by_rank_before"] == found["sha256_by_rank_after"]


def test_from_an_sft_adapter_with_a_reward_adapter_on_a_4_bit_base(tmp_path):
    """Four roles and a frozen copy on one nf4 base under ZeRO-3, its weights in several files."""
    checkpoints.save_policy(tmp_path / "policy", shard_bytes=20_000, hidden_size=64)
    assert (tmp_path / "policy" / "model.safetensors.index.json").is_file()
    sft = save_adapter(tmp_path / "sft", AutoModelForCausalLM.from_pretrained(tmp_path / "policy"), r=4)
    classifier = LlamaForSequenceClassification(checkpoints.config(num_labels=1, hidden_size=64))
    save_adapter(tmp_path / "reward_adapter", classifier, task_type=TaskType.SEQ_CLS, r=4)
    recipe = checkpoints.save_recipe(
        tmp_path,
        model={"path": str(tmp_path / "policy"), "dtype": "bfloat16", "quantization": "nf4"},
        actor={"init_adapter": str(tmp_path / "sft")},
        critic=LORA,
        rewards=[{"adapter": str(tmp_path / "reward_adapter")}],
        generation={"max_new_tokens": 6, "stop_strings": ["ab", "z"]},
        zero={"ds_config": "tests/zero3_all_sharded.json", "activation_checkpointing": True},
    )
    done = launch(recipe)
    assert done.returncode == 0, done.stderr
    found = metrics(tmp_path)
    assert len(found) == 2 and all(row["rollout/train_kl"] < 1e-3 for row in found)
    assert found[0]["score/reward_adapter/std"] > 0
    assert abs(found[0]["kl/k1_sequence_mean"]) < 1e-4, "the reference is the adapter that PPO starts from"
    assert frozen_stood_still(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    actor = PeftModel.from_pretrained(base, str(tmp_path / "run" / "final" / "actor"))
    start = {n.replace(".default", ""): p for n, p in sft.named_parameters() if "lora_" in n}
    now = {n.replace(".default", ""): p for n, p in actor.named_parameters() if "lora_" in n}
    assert start.keys() == now.keys() and any(not torch.equal(start[n], now[n]) for n in start)


def test_full_models_with_a_critic_from_a_reward_model(tmp_path):
    recipe = checkpoints.save_recipe(
        tmp_path,
        actor={"train": "full", "optimizer": {"learning_rate": 1e-3}},
        critic={"home": "model", "train": "full", "path": str(tmp_path / "reward")},
        reference={"home": "model", "offload_param": "cpu"},
        zero={"ds_config": "tests/zero3_all_sharded.json"},
    )
    done = launch(recipe)
    assert done.returncode == 0, done.stderr
    assert "offload_param cpu frees nothing here" in done.stderr
    found = metrics(tmp_path)
    assert all(row["policy/first_ratio_deviation"] < 1e-5 and row["rollout/train_kl"] < 1e-6 for row in found)
    assert abs(found[0]["kl/k1_sequence_mean"]) < 1e-4 < abs(found[1]["kl/k1_sequence_mean"])
    assert found[0]["value/mean"] != 0, "a reward model has an opinion from the start"
    assert frozen_stood_still(tmp_path)
    final = tmp_path / "run" / "final"
    actor = AutoModelForCausalLM.from_pretrained(final / "actor")
    critic, loading = AutoModelForSequenceClassification.from_pretrained(final / "critic", output_loading_info=True)
    assert not loading["missing_keys"]
    before = load_file(tmp_path / "policy" / "model.safetensors")
    moved = {name: not torch.equal(before[name], weight) for name, weight in actor.state_dict().items()}
    assert all(moved.values()), "every weight of the actor trains"
    assert not torch.equal(critic.score.weight, load_file(tmp_path / "reward" / "model.safetensors")["score.weight"])


def loaded_values(values: dict) -> torch.Tensor:
    recipe = Recipe.model_validate(values)
    engine = HybridEngine.load(recipe)
    with engine.inference():
        output = engine.forward(tiny.rollout(), torch.arange(7), values=True)
    engine.close()
    return output.values


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_critic_starts_from_a_reward_model_or_without_opinion(pool, tmp_path, train):
    checkpoints.save_policy(tmp_path / "policy", vocab_size=tiny.VOCABULARY)
    torch.manual_seed(4)
    reward = LlamaForSequenceClassification(checkpoints.config(num_labels=1, vocab_size=tiny.VOCABULARY))
    reward.save_pretrained(tmp_path / "reward")
    values = {
        "model": {"path": str(tmp_path / "policy")},
        "critic": {"home": "model", "train": train, "path": str(tmp_path / "reward")},
        "zero": {"ds_config": "tests/zero3_all_sharded.json"},
        "rewards": [{"function": "tests/tiny.py:length_reward"}],
    }
    rollout = tiny.rollout()
    for found in pool.run(loaded_values, values):
        for row in range(7):
            p, r = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
            ids = torch.cat([rollout.prompt_ids[row, -p:], rollout.response_ids[row, :r]])[None]
            with torch.no_grad():
                expected = reward.score(reward.model(ids).last_hidden_state)[0, p - 1 : p + r - 1, 0]
            assert torch.allclose(found[row, :r], expected, atol=1e-5)
    values["critic"]["path"] = None
    assert all(found.eq(0).all() for found in pool.run(loaded_values, values))
