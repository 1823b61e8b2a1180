"""Every combination that is refused, with its message, told from small files alone; neighbours that are not refused."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
import yaml
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import IA3Config, TaskType, get_peft_model
from safetensors import SafetensorError
from transformers import AutoConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from engine import combinations, models
from engine.batch import Experience
from engine.checks import check_files, warnings_of
from engine.command_line import load_recipe
from engine.config import REPOSITORY, Recipe
from engine.errors import RecipeError
from engine.hybrid_engine import HybridEngine
from engine.role_config import ModelConfig
from engine.update import update
from tests import checkpoints, tiny
from tests.test_adapters import save_adapter
from tests.test_homes import weights
from tests.test_phases import sampled

FULL = {"actor.train": "full", "reference.home": "model", "critic.home": "trunk"}
OWN = {"critic.home": "model"}
STAGE2 = {"zero.ds_config": "ds_configs/zero2.json"}
FUNCTION = {"function": "mine.py:f"}
ON_POLICY = {
    "ppo.old_logprobs": "on_policy",
    "ppo.epochs": 1,
    "ppo.minibatch_sequences": 5,
    "kl.placement": "loss",
    "kl.estimator": "full",
}


# Name -> settings that differ from a recipe that runs, and parts of the one message: the rule, the value got, the
# remedy. {} stands for a folder that the message names.
REFUSED = {
    # --- engine/config.py: one section's settings
    "reward of two kinds": (
        {"rewards": [{"model": "reward", "adapter": "reward_adapter"}]},
        ["either a model, an adapter or a function", "model='reward' and adapter='reward_adapter'", "give exactly one"],
    ),
    "reward of no kind": ({"rewards": [{"weight": 2}]}, ["either a model", "got none", "give exactly one"]),
    "offloaded reward function": (
        {"rewards": [{**FUNCTION, "offload_param": "cpu"}]},
        ["rewards[0]: offload_param cpu needs a model of its own", "'mine.py:f'", "leave it out"],
    ),
    "offloaded reward adapter": (
        {"rewards": [{"adapter": "reward_adapter", "offload_param": "cpu"}]},
        ["offload_param cpu needs a model of its own", "'reward_adapter'", "leave it out"],
    ),
    "k1 in the loss": (
        {"kl.placement": "loss"},
        ["k1 has gradient 0 in the loss", "got placement loss with estimator k1", "set kl.estimator to k2 or full"],
    ),
    "a controller that never leaves 0": (
        {"kl.target": 6, "kl.kl_coef": 0},
        ["never leaves 0", "got target 6 with kl_coef 0", "set kl.kl_coef above 0"],
    ),
    "minimum above maximum": (
        {"generation.min_new_tokens": 7},
        ["min_new_tokens may not exceed max_new_tokens", "got 7 > 6", "lower generation.min_new_tokens"],
    ),
    "a compiled step that fetches": (
        {"generation.compile": True, "generation.gather_budget_bytes": 0},
        [
            "needs weights that stay",
            "got generation.gather_budget_bytes 0",
            "set that to auto, or generation.compile to",
        ],
    ),
    # --- engine/combinations.py: sizes
    "offloaded activations": (
        {"zero.offload_activations": True},
        ["what activation checkpointing saves", "with zero.activation_checkpointing false", "set the second to true"],
    ),
    "KL that ends the run below its target": (
        {"failures.kl_abort": 5, "kl.target": 6},
        ["above the KL that the controller steers to", "got 5 with kl.target 6", "raise the first"],
    ),
    "roll-back without checkpoints": (
        {"failures.on_divergence": "roll_back", "checkpoint.every_iterations": 0},
        ["goes back to a checkpoint", "every_iterations 0", "checkpoint.every_minutes 0", "on_divergence to stop"],
    ),
    "roll-back with one checkpoint": (
        {"failures.on_divergence": "roll_back", "checkpoint.keep_last": 1},
        ["needs the checkpoint before the last", "got checkpoint.keep_last 1", "set it to 2 or more"],
    ),
    "minibatch above the iteration": (
        {"ppo.minibatch_sequences": 6},
        ["may not exceed the iteration", "minibatch_sequences 6 > 5", "prompts_per_iteration 5", "lower the first"],
    ),
    "warm-up as long as the run": (
        {"critic.warmup_iterations": 2},
        ["must end within the run", "warmup_iterations 2 >= iterations 2", "lower the first or raise the second"],
    ),
    "a horizon of a few sequences": (
        {"kl.target": 6, "kl.horizon": 1},
        ["kl.horizon must be above a fifth of an iteration's 5 sequences", "got 1.0", "raise it"],
    ),
    "rewards of one name": (
        {"rewards": [{"model": "reward"}, {"model": "other/reward"}]},
        ["distinct names", "got 'reward' 2 times", "give each a name: of its own"],
    ),
    # --- where the old log-probs come from
    "importance weights of the sampler against itself": (
        {"ppo.old_logprobs": "rollout", "ppo.importance_cap": 2},
        ["by recomputed log-probs", "ppo.importance_cap 2 with ppo.old_logprobs rollout", "to recompute, or"],
    ),
    "importance weights on-policy": (
        {**ON_POLICY, "ppo.importance_cap": 2.5},
        ["by recomputed log-probs", "ppo.importance_cap 2.5 with ppo.old_logprobs on_policy", "to recompute, or"],
    ),
    "full KL in the reward without the pass": (
        {"ppo.old_logprobs": "rollout", "kl.estimator": "full"},
        ["needs the policy's whole distribution", "got ppo.old_logprobs rollout", "or kl.estimator to k1"],
    ),
    "full KL in an unused reward without the pass": (
        {**ON_POLICY, "kl.placement": "reward", "kl.estimator": "full", "kl.kl_coef": 0},
        ["needs the policy's whole distribution", "got ppo.old_logprobs on_policy", "or kl.estimator to k1"],
    ),
    "on-policy over two epochs": (
        {**ON_POLICY, "ppo.epochs": 2},
        ["one optimizer step per iteration", "got ppo.epochs 2", "of 5 sequences", "ppo.old_logprobs to rollout"],
    ),
    "on-policy over two minibatches": (
        {**ON_POLICY, "ppo.minibatch_sequences": 3},
        ["one optimizer step per iteration", "minibatch_sequences 3 of 5 sequences", "set them to 1 and 5"],
    ),
    "on-policy with the KL in the reward": (
        {**ON_POLICY, "kl.placement": "reward", "kl.estimator": "k1"},
        ["too late for a KL in the reward", "got kl.kl_coef 0.05", "set kl.placement to loss"],
    ),
    "on-policy with a KL stop": (
        {**ON_POLICY, "ppo.target_kl": 0.1},
        ["none to skip after it", "got ppo.target_kl 0.1", "set it to null"],
    ),
    # --- an actor that trains in full
    "full actor, reference on its base": (
        {**FULL, "reference.home": None},
        ["full moves every weight", "can't be the reference, got reference.home null", "set reference.home to model"],
    ),
    "full actor, reference adapter": (
        {**FULL, "reference.home": "adapter", "reference.path": "sft"},
        ["can't be the reference, got reference.home adapter", "set reference.home to model"],
    ),
    "full actor, critic's adapter on its base": (
        {**FULL, "critic.home": "adapter"},
        ["no critic's adapter can sit on it", "got critic.home adapter", "set critic.home to trunk or model"],
    ),
    "full actor, adapter to start from": (
        {**FULL, "actor.init_adapter": "sft"},
        ["has no adapter", "got actor.init_adapter sft", "merge it into the model, or set actor.train to lora"],
    ),
    "full actor, nf4": (
        {**FULL, "model.quantization": "nf4"},
        ["trains every weight", "got model.quantization nf4", "set model.quantization to none, or actor.train to lora"],
    ),
    "full actor, reward adapter": (
        {**FULL, "rewards": [{"adapter": "reward_adapter"}, FUNCTION]},
        ["no reward adapter can sit on it", "got rewards.adapter reward_adapter", "rewards.model"],
    ),
    # --- settings that need another home
    "detached, without a trunk": (
        {"critic.trunk_detach": True},
        ["critic.trunk_detach needs home trunk", "got critic.home adapter", "set critic.home to trunk"],
    ),
    "critic's path on the base": (
        {"critic.path": "reward"},
        ["critic.path needs home model", "got critic.path reward with critic.home adapter", "or remove critic.path"],
    ),
    "critic in full on the trunk": (
        {"critic.home": "trunk", "critic.train": "full"},
        ["critic.train needs home model", "got critic.train full with critic.home trunk", "or remove critic.train"],
    ),
    "reference's path with the base": (
        {"reference.home": "base", "reference.path": "policy"},
        ["needs a home of its own", "got policy with reference.home base", "or remove reference.path"],
    ),
    "reference's path alone": (
        {"reference.path": "sft"},
        ["reference.path needs a home of its own", "got sft", "set reference.home to adapter or model"],
    ),
    "reference adapter from nowhere": (
        {"reference.home": "adapter"},
        ["reference.home adapter needs a folder", "got neither reference.path nor actor.init_adapter", "set one"],
    ),
    "offloaded base as reference": (
        {"reference.offload_param": "cpu"},
        ["reference.offload_param cpu needs a model of its own", "got reference.home base", "offload_param to none"],
    ),
    "offloaded adapter as reference": (
        {"reference.offload_param": "cpu", "actor.init_adapter": "sft"},
        ["reference.offload_param cpu needs a model of its own", "got reference.home adapter", "home to model"],
    ),
    # --- number formats
    "int8 at stage 3": (
        {"model.quantization": "int8", "zero.ds_config": "ds_configs/zero3.json"},
        ["int8 needs ZeRO stage 0 to 2", "got stage 3", "set model.quantization to nf4, or zero.ds_config"],
    ),
    "int8, reference of its own": (
        {"model.quantization": "int8", "reference.home": "model", **STAGE2},
        ["sharded as at ZeRO stage 3", "got model.quantization int8", "set model.quantization to nf4"],
    ),
    "int8, DoRA": (
        {"model.quantization": "int8", "actor.lora.dora": True, **STAGE2},
        ["actor.lora.dora true replaces the weights", "got model.quantization int8 at stage 2", "to nf4 at ZeRO stage"],
    ),
    "nf4 in shards, DoRA of a critic of its own": (
        {"model.quantization": "nf4", "critic.lora.dora": True, **OWN},
        ["critic.lora.dora true", "got model.quantization nf4 at stage 3", "set zero.ds_config to ds_configs/zero2"],
    ),
    "nf4 in shards, a DoRA to start from": (
        {"model.quantization": "nf4", "actor.init_adapter": "sft_dora"},
        ["actor.init_adapter: sft_dora is a DoRA", "model.quantization nf4 at stage 3", "or use plain LoRA"],
    ),
    "flash attention in float32": (
        {"model.attn_implementation": "flash_attention_2"},
        ["flash_attention_2 computes in 16 bit alone", "got model.dtype float32", "set model.dtype to bfloat16"],
    ),
    # --- what an adapter covers
    "whole and by an update": (
        {"actor.lora.targets": ["q_proj", "lm_head"], "actor.lora.modules_to_save": ["lm_head"]},
        ["actor.lora trains a module whole or by an update, not both", "got lm_head", "remove it from one of them"],
    ),
    "whole and by an update, critic of its own": (
        {"critic.lora.targets": ["q_proj", "norm"], "critic.lora.modules_to_save": ["norm"], **OWN},
        ["critic.lora trains a module whole or by an update", "got norm", "remove it"],
    ),
    "a module to save that isn't there": (
        {"actor.lora.modules_to_save": ["embed_tokns"]},
        ["actor.lora: modules_to_save names embed_tokns", "no such module", "correct or remove it"],
    ),
    "a head to save in a critic that has none": (
        {"critic.lora.modules_to_save": ["lm_head"], **OWN},
        ["critic.lora: modules_to_save names lm_head", "no such module", "correct or remove it"],
    ),
    "an output head that no value passes": (
        {"critic.lora.modules_to_save": ["embed_tokens", "lm_head"]},
        ["critic.lora: modules_to_save names lm_head, the output head", "no value passes", "remove it"],
    ),
    "an update of a head that no value passes": (
        {"critic.lora.targets": ["q_proj", "lm_head"]},
        ["critic.lora.targets names the output head", "no value passes", "remove it"],
    ),
    "packed weights to train whole": (
        {"actor.lora.targets": ["q_proj"], "actor.lora.modules_to_save": ["down_proj"], "model.quantization": "nf4"},
        ["modules_to_save names down_proj", "no gradient, got model.quantization nf4", "model.quantization to none"],
    ),
    "packed weights in a whole layer": (
        {"critic.lora.modules_to_save": ["mlp"], "model.quantization": "int8", **OWN, **STAGE2},
        ["critic.lora: modules_to_save names mlp", "got model.quantization int8", "remove it"],
    ),
    "targets that aren't there": (
        {"actor.lora.targets": ["c_attn"]},
        ["actor.lora: ", "c_attn", "not found in the base model"],
    ),
    "an update of an embedding": (
        {"actor.lora.targets": ["q_proj", "embed_tokens"]},
        ["actor.lora puts an adapter on an embedding", "only linear layers", "modules_to_save"],
    ),
    "a whole layer of layers": (
        {"actor.lora.targets": ["q_proj"], "actor.lora.modules_to_save": ["mlp"]},
        ["actor.lora trains ", "mlp whole, which holds other layers", "modules_to_save takes single layers"],
    ),
    "an update of a router": (
        {"model.path": "mixtral", "actor.lora.targets": ["q_proj", "gate"]},
        [
            "actor.lora: an adapter on ",
            "mlp.gate: experts, their router and Mamba layers take none",
            "set lora.targets to all-linear",
        ],
    ),
    # --- adapters in folders
    "no adapter to start from": (
        {"actor.init_adapter": "reward"},
        ["actor.init_adapter: reward has no adapter_config.json", "name a folder that peft saved"],
    ),
    "no folder to start from": (
        {"actor.init_adapter": "./nowhere"},
        ["actor.init_adapter: ./nowhere can't be read as a peft adapter", "name a folder that peft saved"],
    ),
    "an adapter that isn't LoRA": (
        {"reference.home": "adapter", "reference.path": "ia3"},
        ["reference.path: ia3 is a", "IA3 adapter, and only LoRA works here", "name a LoRA adapter"],
    ),
    "an adapter with biases": (
        {"actor.init_adapter": "biases"},
        ["actor.init_adapter: biases trains biases (bias all)", "train one with bias none"],
    ),
    "an adapter from a changed base": (
        {"actor.init_adapter": "pissa"},
        ["actor.init_adapter: pissa starts from a changed base", "'pissa'", "let peft convert it to plain LoRA"],
    ),
    "an adapter of another formula": (
        {"reference.home": "adapter", "reference.path": "another_formula"},
        ["reference.path: another_formula is a form of LoRA", "has lora_bias True", "train one without"],
    ),
    "a classifier's adapter to start from": (
        {"actor.init_adapter": "reward_adapter"},
        ["actor.init_adapter: reward_adapter is a sequence classifier's adapter", "name it in rewards.adapter"],
    ),
    "an adapter of another base": (
        {"actor.init_adapter": "sft_wide"},
        ["actor.init_adapter: sft_wide doesn't fit the base", "size mismatch", "name an adapter of this base"],
    ),
    "a reference adapter of another base": (
        {"reference.home": "adapter", "reference.path": "sft_wide"},
        ["reference.path: sft_wide doesn't fit the base", "size mismatch", "name an adapter of this base"],
    ),
    "a reward adapter without a head": (
        {"rewards": [{"adapter": "sft"}]},
        ["rewards.adapter: sft needs a score head with one output", "got none", "num_labels=1"],
    ),
    "a reward adapter with two outputs": (
        {"rewards": [{"adapter": "reward_adapter_two"}]},
        ["rewards.adapter: reward_adapter_two needs a score head with one output", "got 2 outputs", "num_labels=1"],
    ),
    "a reward adapter that isn't one": (
        {"rewards": [{"adapter": "policy"}, FUNCTION]},
        ["rewards.adapter: policy has no adapter_config.json", "name a folder that peft saved"],
    ),
    # --- models beside the base
    "critic from nowhere": (
        {**OWN, "critic.path": "./nowhere"},
        ["critic.path: no folder ./nowhere", "correct the path"],
    ),
    "reference from nowhere": (
        {"reference.home": "model", "reference.path": "./nowhere"},
        ["reference.path: no folder ./nowhere", "correct the path"],
    ),
    "reference that is an adapter": (
        {"reference.home": "model", "reference.path": "sft"},
        ["reference.path: sft has no config.json", "name the folder of a Hugging Face checkpoint"],
    ),
    "critic with another tokenizer": (
        {**OWN, "critic.path": "foreign"},
        ["critic.path: foreign has another tokenizer than model.path policy", "name a model with the policy's"],
    ),
    "reference with another tokenizer": (
        {"reference.home": "model", "reference.path": "foreign"},
        ["reference.path: foreign has another tokenizer than model.path policy", "name a model with the policy's"],
    ),
    "critic with fewer embeddings": (
        {**OWN, "critic.path": "smaller"},
        ["critic.path: smaller has a vocabulary of 31", "policy one of 32", "name a model with the policy's tokenizer"],
    ),
    "reference with more logits": (
        {"reference.home": "model", "reference.path": "larger"},
        ["reference.path: larger has a vocabulary of 40", "policy one of 32", "name a model with the policy's"],
    ),
    "critic with too few positions": (
        {**OWN, "critic.path": "shorter"},
        ["critic.path: data.max_prompt_tokens 8", "max_new_tokens 6 = 14", "shorter takes at most 13", "lower one"],
    ),
    "reference with too few positions": (
        {"reference.home": "model", "reference.path": "shorter"},
        ["reference.path: data.max_prompt_tokens 8", "= 14 tokens", "shorter takes at most 13", "lower one"],
    ),
    "policy with too few positions": (
        {"model.path": "shorter"},
        ["model.path: data.max_prompt_tokens 8", "= 14 tokens", "shorter takes at most 13", "lower one"],
    ),
    "reward with too few positions": (
        {"rewards": [{"model": "reward_shorter"}]},
        ["rewards.model: data.max_prompt_tokens 8", "reward_shorter takes at most 13", "lower one"],
    ),
    "critic with two values": (
        {**OWN, "critic.path": "reward_two"},
        ["critic.path: reward_two is a sequence classifier with 2 outputs", "name a reward model with one"],
    ),
    "reward with two scores": (
        {"rewards": [{"model": "reward_two"}]},
        ["rewards.model: reward_two", "with one output, its config.json says 2", "name a reward model"],
    ),
    # --- packing
    "packed by rows": (
        {"ppo.packing": True},
        ["packing true with tokens_per_micro_batch null", "set ppo.tokens_per_micro_batch, or ppo.packing to false"],
    ),
    "a policy that can't be packed": (
        {"model.path": "jamba", "ppo.packing": True, "ppo.tokens_per_micro_batch": 64},
        ["model.path: that sequences of a model of type jamba can lie end to end", "not measured", "set that to false"],
    ),
    # --- families
    "a policy without a cache": (
        {"model.path": "mamba"},
        ["model.path: a model of type mamba can't be the policy", "no key-value cache", "name a model that does"],
    ),
    "a policy that encodes": (
        {"model.path": "bert"},
        ["model.path: a model of type bert", "an encoder, whose tokens see what comes after", "name another model"],
    ),
    "a policy of two halves": (
        {"model.path": "t5"},
        ["model.path: a model of type t5", "encoder-decoder", "name a decoder-only model"],
    ),
    "a policy that sees": (
        {"model.path": "gemma3"},
        ["model.path: a model of type gemma3", "reads more than text", "checkpoint of its language model alone"],
    ),
    "a policy that is no language model": (
        {"model.path": "vit"},
        ["model.path: a model of type vit", "no causal language model of that type", "decoder-only language model"],
    ),
    "a policy of an unknown type": (
        {"model.path": "unknown"},
        ["model.path: the configuration of unknown can't be used", "`nonesuch`"],
    ),
    "alibi added twice": (
        {"model.path": "falcon", "model.attn_implementation": "eager"},
        ["model of type falcon", "eager attention adds its alibi twice", "set model.attn_implementation to sdpa"],
    ),
    "a kernel that nobody knows": (
        {"model.attn_implementation": "sdpaa"},
        ["model.path: the configuration of policy can't be used", "sdpaa"],
    ),
    "a critic that sees ahead": (
        {**OWN, "critic.path": "bert"},
        [
            "critic.path: a model of type bert can't be the critic",
            "an encoder, whose tokens see what comes after",
            "name another model",
        ],
    ),
    "a reference that reads the padding": (
        {"reference.home": "model", "reference.path": "mamba"},
        [
            "reference.path: a model of type mamba can't be the reference",
            "no key-value cache",
            "name a model that does",
        ],
    ),
    "a critic whose family has no classifier": (
        {**OWN, "model.path": "granite"},
        ["critic.home model: transformers has no sequence classifier of type granite", "set critic.home to adapter"],
    ),
    "a critic whose classifier has no score": (
        {**OWN, "critic.path": "ctrl"},
        ["critic.path: the classifier of type ctrl has no linear score head", "set critic.home to adapter or trunk"],
    ),
    "activations that can't be recomputed": (
        {"model.path": "ctrl", "zero.activation_checkpointing": True},
        ["type ctrl can't recompute activations", "got zero.activation_checkpointing true", "set it to false"],
    ),
    "a compiled step with states": (
        {"model.path": "jamba", "generation.compile": True},
        [
            "type jamba can't decode with a cache of one size",
            "got jamba with generation.compile true",
            "set that to false",
        ],
    ),
    # --- checkpoints that are quantized already
    "a packed policy": (
        {"model.path": "packed"},
        ["model.path: packed is quantized already (bitsandbytes)", "name the checkpoint it was made from"],
    ),
    "a packed policy, critic of its own": (
        {"model.path": "packed", **OWN},
        ["model.path: packed is quantized already (bitsandbytes)", "model.quantization nf4 or int8 to quantize it"],
    ),
    "a packed critic": (
        {**OWN, "critic.path": "packed"},
        ["critic.path: packed is quantized already (bitsandbytes)", "name the checkpoint it was made from"],
    ),
    "a packed reference": (
        {"reference.home": "model", "reference.path": "packed"},
        ["reference.path: packed is quantized already (bitsandbytes)", "name the checkpoint it was made from"],
    ),
    "a packed reward": (
        {"rewards": [{"model": "reward_packed"}]},
        ["rewards.model: reward_packed is quantized already (bitsandbytes)", "name the checkpoint it was made from"],
    ),
    # --- tokens, strings, templates
    "an empty stop string": (
        {"generation.stop_strings": ["q", ""]},
        ["generation.stop_strings: an empty string would end every response at once", "remove it"],
    ),
    "a stop string with a special token": (
        {"generation.stop_strings": ["a<eos>"]},
        ["'a<eos>' holds the special token '<eos>'", "name the token in generation.end_tokens"],
    ),
    "an end token that is several": (
        {"generation.end_tokens": ["<|end|>"]},
        ["generation.end_tokens: '<|end|>' is not one token of policy's tokenizer", "correct it"],
    ),
    "tokens beyond the embeddings": (
        {"model.path": "beyond", "rewards": [FUNCTION]},
        ["'<new>' (30) lies beyond the model's 30 embeddings", "model.resize_token_embeddings"],
    ),
    "a reward smaller than the policy's vocabulary": (
        {"rewards": [{"model": "reward_smaller"}]},
        ["rewards.model: reward_smaller has 20 embeddings", "policy policy has token ids up to 29", "save the model"],
    ),
    "chats without a template": (
        {"data.dataset": "chats.jsonl", "data.messages_column": "chat", "rewards": [FUNCTION]},
        ["data.messages_column: the tokenizer of policy has no chat template", "use data.text_column"],
    ),
    "chats for a reward without a template": (
        {
            "data.dataset": "chats.jsonl",
            "data.messages_column": "chat",
            "model.path": "chatting",
            "rewards": [{"model": "reward_foreign"}],
        },
        ["rewards.model: reward_foreign has another tokenizer", "no chat template for data.messages_column chat"]
        + ["give it one (chat_template.jinja), or use data.text_column"],
    ),
    "a limit of no tokens": (
        {"data.max_new_tokens_column": "zero"},
        [
            "prompts.jsonl, line 1: column 'zero'",
            "from 1 to generation.max_new_tokens 6, got 0",
            "mend or remove these rows",
        ],
    ),
    "a limit above everyone's": (
        {"data.max_new_tokens_column": "seven"},
        [
            "prompts.jsonl, line 1: column 'seven'",
            "from 1 to generation.max_new_tokens 6, got 7",
            "mend or remove these rows",
        ],
    ),
    "a limit below the minimum": (
        {"data.max_new_tokens_column": "three", "generation.min_new_tokens": 4},
        [
            "prompts.jsonl, line 1: column 'three'",
            "from generation.min_new_tokens 4 to",
            "got 3",
            "mend or remove these rows",
        ],
    ),
    "a limit that isn't there": (
        {"data.max_new_tokens_column": "limit"},
        ["no column 'limit'", "it has prompt", "set data.max_new_tokens_column to one of them"],
    ),
}

# Name -> settings, and a part of the one warning; None: nothing is said.
ALLOWED = {
    "the recipe itself": ({}, None),
    "roll-back to checkpoints by the clock": (
        {
            "failures.on_divergence": "roll_back",
            "checkpoint.every_iterations": 0,
            "checkpoint.every_minutes": 5,
            "failures.kl_abort": 7,
            "kl.target": 6,
        },
        None,
    ),
    "one checkpoint and no roll-back": ({"checkpoint.keep_last": 1}, None),
    "full actor, trunk": (FULL, None),
    "full actor, critic model in full": ({**FULL, **OWN, "critic.train": "full"}, None),
    "full actor, critic model, reward model": ({**FULL, **OWN, "critic.path": "reward"}, None),
    "critic with more embeddings": ({**OWN, "critic.path": "larger"}, None),
    "adapter to start from": ({"actor.init_adapter": "sft"}, None),
    "adapter to start from, base as reference": (
        {"actor.init_adapter": "sft", "reference.home": "base"},
        "pulls the actor back to the base",
    ),
    "another adapter as reference": ({"reference.home": "adapter", "reference.path": "sft_dora"}, None),
    "reference model, offloaded": ({"reference.home": "model", "reference.offload_param": "cpu"}, None),
    "detached trunk": ({"critic.home": "trunk", "critic.trunk_detach": True}, None),
    "int8 at stage 2": ({"model.quantization": "int8", **STAGE2}, None),
    "int8, critic model": ({"model.quantization": "int8", **OWN, **STAGE2}, None),
    "int8, an adapter as reference": ({"model.quantization": "int8", "actor.init_adapter": "sft", **STAGE2}, None),
    "nf4 at stage 3": ({"model.quantization": "nf4"}, None),
    "nf4, offloaded": ({"model.quantization": "nf4", "zero.ds_config": "ds_configs/zero3_cpu_offload.json"}, None),
    "nf4, models of their own": ({"model.quantization": "nf4", "reference.home": "model", **OWN}, None),
    "nf4 at stage 2, DoRA": ({"model.quantization": "nf4", "actor.lora.dora": True, **STAGE2}, None),
    "nf4, embeddings whole": (
        {"model.quantization": "nf4", "actor.lora.modules_to_save": ["embed_tokens", "lm_head"]},
        None,
    ),
    "DoRA at stage 3": ({"actor.lora.dora": True, "critic.lora.dora": True}, None),
    "reward adapter and function": ({"rewards": [{"adapter": "reward_adapter"}, FUNCTION]}, None),
    "a reward adapter and an adapter to start from": (
        {"rewards": [{"adapter": "reward_adapter"}], "actor.init_adapter": "sft"},
        None,
    ),
    "an update of the output head": ({"actor.lora.targets": ["q_proj", "lm_head"]}, None),
    "DoRA settings that an adapter replaces": (
        {"model.quantization": "nf4", "actor.lora.dora": True, "actor.init_adapter": "sft"},
        "actor.lora has no effect here",
    ),
    "a critic's adapter that a trunk does without": (
        {"critic.home": "trunk", "critic.lora.modules_to_save": ["nowhere"]},
        "critic.lora has no effect here",
    ),
    "experts": ({"model.path": "mixtral"}, None),
    "flash attention's neighbours": ({"model.attn_implementation": "eager"}, None),
    "a minibatch of everything": ({"ppo.minibatch_sequences": 5}, None),
    "on-policy": (ON_POLICY, None),
    "on-policy, k2 with a controller": ({**ON_POLICY, "kl.estimator": "k2", "kl.target": 6}, None),
    "on-policy without a KL": (
        {**ON_POLICY, "kl.placement": "reward", "kl.estimator": "k1", "kl.kl_coef": 0},
        None,
    ),
    "the sampler's log-probs, KL in the reward": ({"ppo.old_logprobs": "rollout", "ppo.target_kl": 0.1}, None),
    "the sampler's log-probs, full KL in the loss": (
        {"ppo.old_logprobs": "rollout", "kl.placement": "loss", "kl.estimator": "full"},
        None,
    ),
    "importance weights": ({"ppo.importance_cap": 2}, None),
    "limits of the prompts' own": ({"data.max_new_tokens_column": "three", "generation.stop_strings": ["q"]}, None),
    "chats": (
        {
            "data.dataset": "chats.jsonl",
            "data.messages_column": "chat",
            "model.path": "chatting",
        },
        None,
    ),
}


def spoil(folder: Path) -> None:
    """Weights that no one can read: whoever tried would say so."""
    (folder / "model.safetensors").write_bytes(b"not to be read")


def save_like(folder: Path, base: Path, **changes) -> None:
    """A checkpoint's small files with another config.json."""
    folder.mkdir(parents=True)
    for file in base.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    spoil(folder)


def save_family(folder: Path, kind: str, **sizes) -> None:
    """A config.json of some family beside the policy's tokenizer."""
    AutoConfig.for_model(
        kind, vocab_size=32, pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes
    ).save_pretrained(folder)
    checkpoints.tokenizer().save_pretrained(folder)
    spoil(folder)


def save_adapters(world: Path) -> None:
    def classifier(labels: int):
        return LlamaForSequenceClassification(checkpoints.config(num_labels=labels))

    save_adapter(world / "sft", LlamaForCausalLM(checkpoints.config()), r=4)
    save_adapter(world / "sft_dora", LlamaForCausalLM(checkpoints.config()), r=4, use_dora=True)
    save_adapter(world / "sft_wide", LlamaForCausalLM(checkpoints.config(hidden_size=64)), r=4)
    save_adapter(world / "biases", LlamaForCausalLM(checkpoints.config(attention_bias=True)), r=4, bias="all")
    save_adapter(world / "reward_adapter", classifier(1), task_type=TaskType.SEQ_CLS, r=4)
    save_adapter(world / "reward_adapter_two", classifier(2), task_type=TaskType.SEQ_CLS, r=4)
    for name, change in (("pissa", {"init_lora_weights": "pissa"}), ("another_formula", {"lora_bias": True})):
        save_adapter(world / name, LlamaForCausalLM(checkpoints.config()), r=4)
        file = world / name / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    ia3 = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(LlamaForCausalLM(checkpoints.config()), ia3).save_pretrained(str(world / "ia3"))


def save_tokenizers(world: Path) -> None:
    chatting = checkpoints.tokenizer()
    chatting.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chatting.save_pretrained(world / "chatting")
    for name in ("foreign", "reward_foreign"):
        foreign = checkpoints.tokenizer()
        foreign.add_tokens(["th"])
        foreign.save_pretrained(world / name)
    beyond = checkpoints.tokenizer()
    beyond.add_special_tokens({"pad_token": "<new>"})
    beyond.save_pretrained(world / "beyond")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Everything that the recipes name; no model's weights can be read."""
    world = tmp_path_factory.mktemp("world")
    policy, reward = checkpoints.save_policy(world / "policy"), checkpoints.save_reward_model(world / "reward")
    spoil(policy)
    spoil(reward)
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for name, base, changes in (
        ("chatting", policy, {}),
        ("foreign", policy, {}),
        ("smaller", policy, {"vocab_size": 31}),
        ("larger", policy, {"vocab_size": 40}),
        ("beyond", policy, {"vocab_size": 30}),
        ("shorter", policy, {"max_position_embeddings": 13}),
        ("packed", policy, {"quantization_config": packed}),
        ("unknown", policy, {"model_type": "nonesuch"}),
        ("other/reward", reward, {}),
        ("reward_foreign", reward, {}),
        ("reward_smaller", reward, {"vocab_size": 20}),
        ("reward_shorter", reward, {"max_position_embeddings": 13}),
        ("reward_two", reward, {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}),
        ("reward_packed", reward, {"quantization_config": packed}),
    ):
        save_like(world / name, base, **changes)
    for kind in ("mamba", "bert", "t5"):
        save_family(world / kind, kind)
    for kind in ("gemma3", "vit"):
        AutoConfig.for_model(kind).save_pretrained(world / kind)
        checkpoints.tokenizer().save_pretrained(world / kind)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    save_family(world / "granite", "granite", **sizes)
    save_family(world / "mixtral", "mixtral", num_key_value_heads=2, **sizes)
    save_family(world / "falcon", "falcon", alibi=True, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    save_family(world / "ctrl", "ctrl", n_embd=32, dff=64, n_layer=1, n_head=4)
    save_family(world / "jamba", "jamba", num_key_value_heads=2, **{**sizes, "num_hidden_layers": 5})
    save_adapters(world)
    save_tokenizers(world)
    rows = [{"prompt": "ab", "zero": 0, "three": 3, "seven": 7}] * 5
    (world / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (world / "chats.jsonl").write_text(json.dumps({"chat": [{"role": "user", "content": "ab"}]}) + "\n")
    (world / "mine.py").write_text("def f(prompts, responses, **columns):\n    return [0.0 for _ in responses]\n")
    return world


RECIPE = {
    "iterations": 2,
    "model.path": "policy",
    "rewards": [{"model": "reward"}],
    "data.dataset": "prompts.jsonl",
    "data.max_prompt_tokens": 8,
    "data.prompts_per_iteration": 5,
    "ppo.minibatch_sequences": 3,
    "ppo.micro_batch_sequences": 2,
    "generation.max_new_tokens": 6,
}


def nested(settings: dict) -> dict:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    values: dict = {}
    for key, value in settings.items():
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    return values


def checked(settings: dict, folder: Path) -> Recipe:
    """A recipe's file, read and checked as a run does."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(nested({**RECIPE, "output": str(folder / "run"), **settings})))
    recipe = load_recipe(file)
    check_files(recipe)
    return recipe


@pytest.fixture
def at_home(world, monkeypatch):
    """The world as working directory, in which loading a model is a failure."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model is loaded")

    monkeypatch.chdir(world)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(refuse))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(at_home, tmp_path, name):
    settings, parts = REFUSED[name]
    with pytest.raises(RecipeError) as caught:
        checked(settings, tmp_path)
    (said,) = caught.value.problems
    assert all(part in said for part in parts), said
    assert ": Traceback" not in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(at_home, tmp_path, name):
    settings, warning = ALLOWED[name]
    said = warnings_of(checked(settings, tmp_path))
    assert len(said) == (warning is not None) and all(warning in text for text in said), said


def test_all_at_once(at_home, tmp_path):
    settings = {
        "model.path": "packed",
        "actor.init_adapter": "ia3",
        "reference.home": "model",
        "reference.path": "mamba",
        "rewards": [{"model": "reward_two"}, {"adapter": "sft"}],
        "generation.stop_strings": [""],
        **OWN,
        "critic.path": "shorter",
    }
    with pytest.raises(RecipeError) as caught:
        checked(settings, tmp_path)
    assert len(caught.value.problems) == 7, caught.value.problems


def test_the_weights_are_unreadable(world):
    """Or the tests above would not show that nobody reads them."""
    with pytest.raises((SafetensorError, RecipeError)):
        models.load_causal(ModelConfig(path=str(world / "policy")))


def messages_of(source: str) -> set[str]:
    """The longest constant piece of every text in a module that is long enough to be part of a message."""
    tree = ast.parse(source)
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
        else:
            plain = isinstance(node, ast.Constant) and isinstance(node.value, str)
            parts = [node.value] if plain and id(node) not in docs | inner else []
        longest = max(parts, key=len, default="")
        if len(longest) > 20:
            found.add(longest)
    return found


def test_every_rule_has_a_row(world, monkeypatch):
    """Whoever adds a rule to combinations.py adds a row here."""
    monkeypatch.chdir(world)
    said = []
    for settings, _ in REFUSED.values():
        try:
            recipe = Recipe.model_validate(nested({**RECIPE, **settings}))
            for stage in (2, 3):
                said += combinations.problems_at_stage(recipe, stage)
        except ValueError as error:
            said.append(str(error))
    messages = messages_of((REPOSITORY / "engine" / "combinations.py").read_text())
    assert len(messages) > 20
    assert [message for message in messages if not any(message in text for text in said)] == []


PACKED = {
    "nf4 in shards, reference of its own": ({"quantization": "nf4"}, {"reference": {"home": "model"}}, "zero3"),
    "nf4 whole, reference of its own": ({"quantization": "nf4"}, {"reference": {"home": "model"}}, "zero2"),
    "nf4 in shards, critic of its own": ({"quantization": "nf4"}, {"critic": {"home": "model"}}, "zero3"),
    "int8, critic of its own": ({"quantization": "int8"}, {"critic": {"home": "model"}}, "zero2"),
    "nf4, DoRA": (
        {"quantization": "nf4"},
        {"actor": {"lora": {"dora": True}}, "critic": {"lora": {"dora": True}}},
        "zero2",
    ),
    "nf4, offloaded": ({"quantization": "nf4"}, {}, "zero3_cpu_offload"),
}


def packed_update(folder: str, model: dict, sections: dict, stage: str) -> dict:
    """On a rank: every model as a run loads it, sampling, inference and an update."""
    recipe = tiny.recipe(model={"path": folder, **model}, zero={"ds_config": tiny.ds_config(stage)}, **sections)
    engine = HybridEngine.load(recipe)
    homes = [home for home in (engine.roles, engine.critic, engine.reference and engine.reference.module) if home]
    layers = [[type(m) for m in home.modules() if isinstance(m, Linear4bit | Linear8bitLt)] for home in homes]
    head = engine.critic.scorer.score.original_module if engine.critic else None
    before, start = engine.frozen_hash(), weights(engine)
    rollout, evaluation = tiny.evaluated(engine, recipe, sampled(engine, recipe))
    mask = rollout.response_mask
    ones = torch.where(mask, 1.0, 0.0)
    experience = Experience(rollout, evaluation, torch.zeros(len(rollout)), torch.zeros(mask.shape), ones, ones)
    stats = update(engine, experience, recipe, 0, 0.1, frozenset())
    now = weights(engine)
    result = {
        "layers": [len(found) for found in layers],
        "head": type(head).__name__,
        "ratio": stats.first_ratio_deviation,
        "sampler": (evaluation.old_logprobs - rollout.sampler_logprobs)[mask].abs().max().item(),
        "kl": (evaluation.old_logprobs - evaluation.ref_logprobs)[mask].abs().max().item(),
        "frozen": engine.frozen_hash() == before,
        "moved": all(not torch.equal(now[role], start[role]) for role in now),
    }
    engine.close()
    return result


@pytest.mark.dist
@pytest.mark.parametrize("name", PACKED)
def test_quantization_goes_with_every_home_that_is_allowed(pool, tmp_path_factory, name):
    """A young actor is its reference, to the bit of the packing: a reference of its own is packed as the base is."""
    folder = tmp_path_factory.mktemp("packed") / "policy"
    torch.manual_seed(0)
    LlamaForCausalLM(tiny.config(hidden_size=64, intermediate_size=128)).save_pretrained(folder)
    model, sections, stage = PACKED[name]
    for found in pool.run(packed_update, str(folder), model, sections, stage):
        assert found["ratio"] < 1e-5 and found["sampler"] < 1e-4 and found["kl"] < 1e-5, found
        assert found["frozen"] and found["moved"]
        homes = 1 + sum(section.get("home") == "model" for section in sections.values())
        assert found["layers"] == [14] * homes, "a model of its own is packed too"
        assert found["head"] == ("Linear" if sections.get("critic", {}).get("home") else "NoneType"), "no packed head"
