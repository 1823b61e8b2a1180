"""What the benchmark runs: models, a tokenizer and prompts that are made up and seeded, and a recipe over them.

What lies on disk then is ordinary: Hugging Face folders, a peft adapter, a jsonl file and a recipe, as a user has them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

VERSION = 1
"""Part of the folder's name: raise it when what is made up changes."""
SPECIAL = ["<pad>", "<eos>", "<unk>"]
PROMPTS = 64
"""Rows of the dataset and prompts of an iteration: every iteration has the same work, in another order."""


@dataclass(frozen=True)
class Sizes:
    """A Llama and what it is called."""

    name: str
    vocabulary: int = 8192
    layers: int = 8
    hidden: int = 512
    heads: int = 8
    inner: int = 1376

    def config(self, **extra) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            intermediate_size=self.inner,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
            **extra,
        )


@dataclass(frozen=True)
class Workload:
    """One row of the published table: sizes, lengths, and where the reward lives."""

    purpose: str
    sizes: Sizes
    prompt_tokens: tuple[int, int] = (64, 64)
    """Shortest and longest prompt."""
    response_tokens: int = 64
    """Longest response."""
    mean_response_tokens: int | None = None
    """Mean of the geometric distribution that each response's own length is drawn from; None: all are the longest."""
    reward_adapter: bool = False
    """The reward is an adapter on the base, and no model."""
    concurrent_sequences: int = 32
    tokens_per_micro_batch: int | None = None


MEDIUM = Sizes("34m")
WORKLOADS = {
    "fixed": Workload("every prompt and every response of 64 tokens", MEDIUM),
    "ragged": Workload(
        "prompts of 16 to 128 tokens, responses of 1 to 256",
        MEDIUM,
        prompt_tokens=(16, 128),
        response_tokens=256,
        mean_response_tokens=64,
        concurrent_sequences=16,
        # As many as 8 sequences of fixed have, and 8 of its own of average length (72 + 64).
        tokens_per_micro_batch=1088,
    ),
    "shared": Workload("fixed with the reward as an adapter on the base", MEDIUM, reward_adapter=True),
    "wide-vocab": Workload(
        "fixed with a vocabulary of 131072 over 2 layers", Sizes("wide", vocabulary=131072, layers=2)
    ),
    "tiny": Workload(
        "a miniature in seconds, to try the benchmark itself",
        Sizes("tiny", vocabulary=256, layers=2, hidden=64, heads=4, inner=128),
        prompt_tokens=(4, 8),
        response_tokens=8,
        mean_response_tokens=4,
        tokens_per_micro_batch=64,
    ),
}


def recipe_of(name: str, assets: Path) -> dict:
    """The recipe of a workload whose files lie under `assets`; all that it leaves out is the schema's default."""
    workload = WORKLOADS[name]
    folder = _folder(workload, assets)
    reward = (
        {"adapter": str(folder / "reward-adapter")} if workload.reward_adapter else {"model": str(folder / "reward")}
    )
    column = {"max_new_tokens_column": "response_tokens"} if workload.mean_response_tokens else {}
    return {
        "iterations": 4,
        "self_check": False,  # its forwards and its memory are none of the benchmark's
        "model": {"path": str(folder / "policy")},
        "actor": {"lora": {"rank": 16, "alpha": 32.0}},
        "critic": {"lora": {"rank": 16, "alpha": 32.0}},
        "rewards": [reward],
        "ppo": {
            "epochs": 1,
            "minibatch_sequences": PROMPTS // 2,
            "micro_batch_sequences": 8,
            "tokens_per_micro_batch": workload.tokens_per_micro_batch,
            "packing": workload.tokens_per_micro_batch is not None,
            "old_logprobs": "rollout",  # as TRL's are
        },
        "data": {
            "dataset": str(folder / f"{name}.jsonl"),
            "max_prompt_tokens": workload.prompt_tokens[1],
            "prompts_per_iteration": PROMPTS,
            **column,
        },
        "generation": {
            "max_new_tokens": workload.response_tokens,
            "max_concurrent_sequences": workload.concurrent_sequences,
        },
        "zero": {"ds_config": "ds_configs/zero3.json"},
    }


def build(name: str, assets: Path) -> None:
    """Make what the workload's recipe names, less what is there already. For one process alone."""
    workload, sizes = WORKLOADS[name], WORKLOADS[name].sizes
    folder = _folder(workload, assets)
    folder.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    _once(folder / "policy", lambda path: _save(path, LlamaForCausalLM, sizes.config(), seed=1))
    if workload.reward_adapter:
        _once(folder / "reward-adapter", lambda path: _save_adapter(path, folder / "policy"))
    else:
        _once(
            folder / "reward",
            lambda path: _save(path, LlamaForSequenceClassification, sizes.config(num_labels=1), seed=3),
        )
    _once(folder / f"{name}.jsonl", lambda path: _save_prompts(path, workload))


def _folder(workload: Workload, assets: Path) -> Path:
    return assets / f"{workload.sizes.name}-v{VERSION}"


def _once(path: Path, make: Callable[[Path], None]) -> None:
    """What is there is whole: it is made beside its place and moved there."""
    if path.exists():
        return
    building = path.with_name(f"{path.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    make(building)
    os.replace(building, path)


def _save(folder: Path, kind: type, config: LlamaConfig, seed: int) -> None:
    torch.manual_seed(seed)
    kind(config).save_pretrained(folder)
    tokenizer(config.vocab_size).save_pretrained(folder)


def _save_adapter(folder: Path, policy: Path) -> None:
    """A sequence-classification adapter on the policy, of the actor's rank, with weights that aren't 0."""
    torch.manual_seed(3)
    base = LlamaForSequenceClassification.from_pretrained(policy, num_labels=1)
    linear = LoraConfig(task_type=TaskType.SEQ_CLS, r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(base, linear)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.02 * torch.randn(parameter.shape))
    model.save_pretrained(folder)


def _save_prompts(path: Path, workload: Workload) -> None:
    """Random words. The lengths are a table in the file: whatever reads it, on whatever side, has the same work."""
    random = np.random.default_rng(0)
    shortest, longest = workload.prompt_tokens
    rows = []
    for _ in range(PROMPTS):
        ids = random.integers(len(SPECIAL), workload.sizes.vocabulary, random.integers(shortest, longest + 1))
        response = workload.response_tokens
        if workload.mean_response_tokens:
            response = min(response, int(random.geometric(1 / workload.mean_response_tokens)))
        rows.append({"prompt": " ".join(f"w{index}" for index in ids), "response_tokens": response})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word per token."""
    words = [*SPECIAL, *(f"w{index}" for index in range(len(SPECIAL), vocabulary))]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
