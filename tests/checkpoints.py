"""Checkpoints, prompts and recipes on disk, as a user would bring them: random tiny models with a real tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ["<pad>", "<eos>", "<unk>"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *LETTERS, "Ġ"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def config(**changes) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaConfig(
        **{"vocab_size": 32, "max_position_embeddings": 64, "initializer_range": 0.2, **sizes, **ids, **changes}
    )


def save_policy(folder: Path, shard_bytes: int = 10**9, **changes) -> Path:
    """In safetensors files of at most `shard_bytes`."""
    torch.manual_seed(0)
    LlamaForCausalLM(config(**changes)).save_pretrained(folder, max_shard_size=shard_bytes)
    tokenizer().save_pretrained(folder)
    return folder


def save_policy_in_torch_files(folder: Path, files: int = 2) -> Path:
    """As torch wrote models before safetensors: the same weights as `save_policy`, in .bin files with an index."""
    save_policy(folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    weights = LlamaForCausalLM(config()).state_dict()
    names = [f"pytorch_model-{i + 1:05d}-of-{files:05d}.bin" for i in range(files)]
    home = {key: names[i % files] for i, key in enumerate(weights)}
    for name in names:
        torch.save({key: weights[key] for key in weights if home[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    return folder


def save_reward_model(folder: Path) -> Path:
    torch.manual_seed(1)
    LlamaForSequenceClassification(config(num_labels=1)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_prompts(path: Path, count: int = 20) -> Path:
    rows = [{"prompt": (LETTERS * 2)[i : i + 2 + i % 5], "number": i} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_recipe(folder: Path, **sections) -> Path:
    """A complete recipe over a policy (unless there is one), a reward model and prompts that are made beside it."""
    policy = folder / "policy"
    values = {
        "iterations": 2,
        "self_check": False,  # seconds; tests/test_self_checks.py has it on, and so has the quickstart
        "output": str(folder / "run"),
        "model": {"path": str(policy if policy.is_dir() else save_policy(policy))},
        "rewards": [{"model": str(save_reward_model(folder / "reward"))}],
        "data": {
            "dataset": str(save_prompts(folder / "prompts.jsonl")),
            "max_prompt_tokens": 8,
            "prompts_per_iteration": 5,
        },
        "ppo": {"minibatch_sequences": 3, "micro_batch_sequences": 2},
        "generation": {"max_new_tokens": 6},
        **sections,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
