"""The families of causal models that are measured: a tiny random model of each, and what is asked of it.

`python -m tests.families` runs every check and prints the table of docs/models.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine import causal, dist, models, zero
from engine.advantages import ScoreCombiner, make_experience
from engine.batch import length_mask
from engine.config import Recipe
from engine.hybrid_engine import HybridEngine
from engine.replica import Replica
from engine.roles import ACTOR, CRITIC, Layout, RolesModel
from engine.rollout import generate
from engine.stopping import Stops
from engine.update import update
from tests import tiny


@dataclass(frozen=True)
class Family:
    """A model type of transformers and a tiny config of it with everything switched on that it has."""

    model_type: str
    on: str
    """What is switched on, for the table."""
    settings: dict = field(default_factory=dict)
    """The config's own keys: beside, or instead of, those of `_SIZES`."""
    bare: bool = False
    """The config names its sizes in words of its own, all in `settings`."""


_SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    attention_dropout=0.3,
)
_COMMON = dict(vocab_size=tiny.VOCABULARY, initializer_range=0.2, bos_token_id=1, eos_token_id=7, pad_token_id=7)
_GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
_WINDOW = ["sliding_attention", "full_attention"]
_EXPERTS = dict(num_experts_per_tok=2, output_router_logits=False)

FAMILIES = {
    "Llama": Family(
        "llama", "biases, tied weights", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    ),
    "Qwen2": Family(
        "qwen2",
        "window 5 in one layer, tied weights",
        dict(use_sliding_window=True, sliding_window=5, layer_types=_WINDOW, tie_word_embeddings=True),
    ),
    "Qwen3": Family(
        "qwen3",
        "q/k norms, biases, window 5 in one layer, tied weights",
        dict(
            head_dim=8,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=5,
            layer_types=_WINDOW,
            tie_word_embeddings=True,
        ),
    ),
    "Mistral": Family(
        "mistral", "window 5 in every layer, tied weights", dict(sliding_window=5, tie_word_embeddings=True)
    ),
    "Gemma": Family("gemma", "scaled embeddings, biases, tied weights", dict(head_dim=8, attention_bias=True)),
    "Gemma 2": Family(
        "gemma2",
        "capped logits and attention, window 5 in one layer, biases, tied weights",
        dict(
            head_dim=8,
            query_pre_attn_scalar=8,
            attention_bias=True,
            sliding_window=5,
            layer_types=_WINDOW,
            final_logit_softcapping=2.0,
            attn_logit_softcapping=1.0,
        ),
    ),
    "Gemma 3 (text)": Family(
        "gemma3_text",
        "capped logits, q/k norms, window 5 in one layer, biases, tied weights",
        dict(
            head_dim=8,
            query_pre_attn_scalar=8,
            attention_bias=True,
            sliding_window=5,
            layer_types=_WINDOW,
            final_logit_softcapping=2.0,
        ),
    ),
    "Phi-3": Family(
        "phi3",
        "three dropouts, window 5, tied weights",
        dict(resid_pdrop=0.3, embd_pdrop=0.3, sliding_window=5, tie_word_embeddings=True),
    ),
    "GPT-2": Family(
        "gpt2",
        "three dropouts, biases, learned positions, tied weights",
        {**_GPT, "scale_attn_by_inverse_layer_idx": True},
        bare=True,
    ),
    "OPT": Family(
        "opt",
        "dropouts, layerdrop, biases, learned positions, projected embeddings, tied weights",
        dict(
            ffn_dim=64,
            hidden_size=32,
            word_embed_proj_dim=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            init_std=0.2,
            dropout=0.3,
            attention_dropout=0.3,
            layerdrop=0.5,
        ),
        bare=True,
    ),
    "GPT-NeoX": Family(
        "gpt_neox", "two dropouts, biases, tied weights", dict(hidden_dropout=0.3, tie_word_embeddings=True)
    ),
    "GPT-J": Family("gptj", "three dropouts, biases, biased head", {**_GPT, "rotary_dim": 4}, bare=True),
    "GPT-Neo": Family(
        "gpt_neo",
        "three dropouts, window 5 in one layer, learned positions, tied weights",
        dict(
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=5,
            max_position_embeddings=64,
            resid_dropout=0.3,
            embed_dropout=0.3,
            attention_dropout=0.3,
        ),
        bare=True,
    ),
    "BLOOM": Family(
        "bloom",
        "alibi, two dropouts, biases, tied weights",
        dict(hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.3, attention_dropout=0.3),
        bare=True,
    ),
    "MPT": Family(
        "mpt",
        "alibi, dropout, clipped qkv, tied weights",
        dict(
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            resid_pdrop=0.3,
            emb_pdrop=0.3,
            attn_config=dict(attn_pdrop=1, clip_qkv=1.0),
        ),
        bare=True,
    ),
    "Falcon": Family(
        "falcon",
        "one key head, two dropouts, biases, tied weights",
        dict(hidden_dropout=0.3, bias=True, multi_query=True),
    ),
    "Falcon (alibi)": Family(
        "falcon",
        "alibi, two dropouts, biases, tied weights",
        dict(hidden_dropout=0.3, bias=True, alibi=True, multi_query=False, parallel_attn=False),
    ),
    "Phi": Family(
        "phi",
        "three dropouts, q/k norms, biases, biased head",
        dict(resid_pdrop=0.3, embd_pdrop=0.3, qk_layernorm=True),
    ),
    "StableLM": Family(
        "stablelm",
        "two dropouts, q/k norms, biases, tied weights",
        dict(hidden_dropout=0.3, use_qkv_bias=True, qk_layernorm=True, tie_word_embeddings=True),
    ),
    "Cohere": Family(
        "cohere",
        "scaled logits, q/k norms, biases, tied weights",
        dict(attention_bias=True, use_qk_norm=True, logit_scale=0.3),
    ),
    "Cohere 2": Family(
        "cohere2",
        "scaled logits, window 5 in one layer, biases, tied weights",
        dict(attention_bias=True, logit_scale=0.3, sliding_window=5, layer_types=_WINDOW),
    ),
    "OLMo 2": Family(
        "olmo2", "q/k norms, norms after, biases, tied weights", dict(attention_bias=True, tie_word_embeddings=True)
    ),
    "Granite": Family(
        "granite",
        "four multipliers, biases, tied weights",
        dict(
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            embedding_multiplier=2.0,
            logits_scaling=0.5,
            residual_multiplier=0.7,
            attention_multiplier=0.5,
        ),
    ),
    "StarCoder 2": Family(
        "starcoder2",
        "three dropouts, window 5, biases, tied weights",
        dict(residual_dropout=0.3, embedding_dropout=0.3, sliding_window=5, use_bias=True),
    ),
    "GPT-BigCode": Family(
        "gpt_bigcode", "three dropouts, one key head, biases, learned positions, tied weights", _GPT, bare=True
    ),
    "SmolLM 3": Family(
        "smollm3",
        "a layer without positions, biases, tied weights",
        dict(attention_bias=True, mlp_bias=True, no_rope_layers=[1, 0], layer_types=["full_attention"] * 2),
    ),
    "GLM-4": Family(
        "glm4", "half rotary, biases, tied weights", dict(head_dim=8, attention_bias=True, tie_word_embeddings=True)
    ),
    "Mixtral": Family(
        "mixtral",
        "4 experts, router jitter, window 5, tied weights",
        dict(num_local_experts=4, router_jitter_noise=0.3, sliding_window=5, tie_word_embeddings=True, **_EXPERTS),
    ),
    "DBRX": Family(
        "dbrx",
        "4 experts called one by one, router jitter, clipped qkv, dropouts",
        dict(
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            emb_pdrop=0.3,
            resid_pdrop=0.3,
            attn_config=dict(attn_pdrop=0.3, kv_n_heads=2, rope_theta=1e4, clip_qkv=1.0),
            ffn_config=dict(ffn_hidden_size=16, moe_num_experts=4, moe_top_k=2, moe_jitter_eps=0.3),
            output_router_logits=False,
        ),
        bare=True,
    ),
    "Qwen3-MoE": Family(
        "qwen3_moe",
        "4 experts in one layer, q/k norms, biases, tied weights",
        dict(
            head_dim=8,
            num_experts=4,
            moe_intermediate_size=16,
            mlp_only_layers=[0],
            norm_topk_prob=True,
            attention_bias=True,
            tie_word_embeddings=True,
            **_EXPERTS,
        ),
    ),
    "DeepSeek-V3": Family(
        "deepseek_v3",
        "latent attention, 4 experts of 2 groups beside a shared one in one layer, biases, tied weights",
        dict(
            num_key_value_heads=4,
            moe_intermediate_size=16,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
            attention_bias=True,
            tie_word_embeddings=True,
            **_EXPERTS,
        ),
    ),
    "gpt-oss": Family(
        "gpt_oss",
        "attention sinks, 4 experts with biases, window 5 in one layer, tied weights",
        dict(
            head_dim=8, num_local_experts=4, sliding_window=5, layer_types=_WINDOW, tie_word_embeddings=True, **_EXPERTS
        ),
    ),
    "Llama 4 (text)": Family(
        "llama4_text",
        "4 experts beside a shared one in one layer, a layer without positions, tied weights",
        dict(
            head_dim=8,
            intermediate_size_mlp=64,
            intermediate_size=16,
            num_local_experts=4,
            num_experts_per_tok=1,
            moe_layers=[1],
            no_rope_layers=[1, 0],
            attention_bias=True,
            tie_word_embeddings=True,
            output_router_logits=False,
        ),
    ),
    "Jamba": Family(
        "jamba",
        "Mamba and attention layers, 4 experts, tied weights",
        dict(
            num_hidden_layers=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            num_experts_per_tok=2,
            mamba_d_state=8,
            mamba_dt_rank=4,
            output_router_logits=False,
            tie_word_embeddings=True,
        ),
    ),
    "Falcon-H1": Family(
        "falcon_h1",
        "Mamba 2 beside attention in each layer, multipliers, biases, tied weights",
        dict(
            head_dim=8,
            mamba_d_ssm=64,
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_d_state=8,
            mamba_n_groups=1,
            mamba_chunk_size=8,
            attention_bias=True,
            mlp_bias=True,
            lm_head_multiplier=0.5,
            tie_word_embeddings=True,
        ),
    ),
    "LFM2": Family(
        "lfm2",
        "short convolutions and attention, tied weights",
        dict(
            num_hidden_layers=4,
            layer_types=["conv", "full_attention"] * 2,
            tie_word_embeddings=True,
            initializer_range=0.1,
        ),
    ),
    "Qwen3-Next": Family(
        "qwen3_next",
        "gated delta rule and attention, 4 experts beside a shared one, tied weights",
        dict(
            num_hidden_layers=4,
            layer_types=["linear_attention", "full_attention"] * 2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            output_router_logits=False,
            tie_word_embeddings=True,
            initializer_range=0.1,
        ),
    ),
}


def config_of(name: str) -> PretrainedConfig:
    family = FAMILIES[name]
    sizes = {} if family.bare else _SIZES
    return AutoConfig.for_model(family.model_type, **{**_COMMON, **sizes, **family.settings})


def make(name: str, folder: Path) -> Path:
    """A checkpoint of the family: weights large enough for the logits to differ, no bias at 0, no norm at 1."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name))
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.std():
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


def recipe(folder: Path, **sections) -> Recipe:
    """One epoch, LoRA on all linear layers, as by default."""
    return tiny.recipe(model={"path": str(folder)}, ppo={"epochs": 1}, **sections)


def roles(settings: Recipe) -> RolesModel:
    """Loaded as a run loads it; adapters and value head away from their start."""
    model = RolesModel(models.load_causal(settings.model), settings)
    generator = torch.Generator().manual_seed(2)
    for role in (ACTOR, CRITIC):
        for parameter in model.role_parameters(role).values():
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def plain(folder: Path, source: RolesModel | None = None, role: str = "") -> PreTrainedModel:
    """The model as transformers alone runs it, attention written out; a role's adapter added to its weights by hand."""
    config = AutoConfig.from_pretrained(folder)
    # Falcon's own eager attention adds its alibi twice: engine/causal.py refuses it.
    kernel = "sdpa" if getattr(config, "alibi", False) else "eager"
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kernel, dtype=torch.float32).eval()
    if source is not None:
        for name, layer in source.causal.named_modules():
            if hasattr(layer, "lora_A"):
                update = layer.scaling[role] * layer.lora_B[role].weight @ layer.lora_A[role].weight
                transposed = isinstance(layer.base_layer, Conv1D)
                model.get_submodule(name).weight.data += update.T if transposed else update
    return model


class Head:
    """What a plain model's head is given and gives."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        model.get_output_embeddings().register_forward_pre_hook(self._keep)

    def _keep(self, module, inputs) -> None:
        self.hidden = inputs[0]

    def __call__(self, ids: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
        """Log-probs `[R]` of the tokens after the prompt of one unpadded sequence; hidden states before each."""
        logits = self.model(ids).logits[0, prompt - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(-1, ids[0, prompt:, None])[:, 0]
        return logprobs, self.hidden[0, prompt - 1 : -1]


def sequences(rollout):
    """Each row's number, prompt length, response length and real tokens `[1, p + r]`."""
    for row in range(len(rollout)):
        p, r = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
        yield row, p, r, torch.cat([rollout.prompt_ids[row, -p:], rollout.response_ids[row, :r]])[None]


def _worst(pairs) -> float:
    return max((one - other).abs().max().item() for one, other in pairs)


def _layout(rollout, left: int = 0, right: int = 0) -> Layout:
    ids, mask = rollout.sequences, rollout.sequence_mask
    pad = torch.nn.functional.pad
    return Layout(pad(ids, (left, right), value=3), pad(mask, (left, right)), rollout.response_lengths)


@torch.no_grad()
def against_plain(folder: Path, model: RolesModel) -> float:
    """Log-probs, reference log-probs and values of the roles against plain models."""
    rollout, pairs = tiny.rollout(), []
    base, actor, critic = (Head(plain(folder, model if role else None, role)) for role in ("", ACTOR, CRITIC))
    found = model.outputs(_layout(rollout), values=True, ref_logprobs=True)
    for row, p, r, ids in sequences(rollout):
        pairs.append((found.ref_logprobs[row, :r], base(ids, p)[0]))
        pairs.append((found.logprobs[row, :r], actor(ids, p)[0]))
        pairs.append((found.values[row, :r], model.value_head(critic(ids, p)[1])[:, 0]))
    return _worst(pairs)


@torch.no_grad()
def trunk(folder: Path, model: RolesModel) -> float:
    """Values read from the actor's own hidden states (critic.home trunk) against what a plain model's head is given."""
    rollout, pairs = tiny.rollout(), []
    actor = Head(plain(folder, model, ACTOR))
    found = model.outputs(_layout(rollout), values=True)
    for row, p, r, ids in sequences(rollout):
        pairs.append((found.values[row, :r], model.value_head(actor(ids, p)[1])[:, 0]))
    return _worst(pairs)


@torch.no_grad()
def _alone_and(model: RolesModel, layouts: list[Layout]) -> float:
    """Every output of a row alone against those of all rows of `tiny.rollout()`, laid out in each of some ways."""
    wanted, pairs = dict.fromkeys(("entropy", "values", "ref_logprobs", "full_kl"), True), []
    together = [model.outputs(layout, **wanted) for layout in layouts]
    for row, _, r, ids in sequences(tiny.rollout()):
        alone = model.outputs(Layout(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([r])), **wanted)
        for other in together:
            pairs += [(getattr(other, name)[row, :r], value[0]) for name, value in vars(alone).items()]
    return _worst(pairs)


def padding(model: RolesModel) -> float:
    """A row alone, among others, and padded on the left and on the right."""
    return _alone_and(model, [_layout(tiny.rollout(), left, right) for left, right in ((0, 0), (5, 0), (0, 6))])


def packed(model: RolesModel) -> float:
    """A row alone, and all of them end to end."""
    return _alone_and(model, [Layout.of(tiny.rollout(), packed=True)])


@torch.no_grad()
def cached(module: PreTrainedModel) -> float:
    """Logits decoded with a cache, prompts padded on the left, against those of each whole sequence without one."""
    rollout, steps, pairs = tiny.rollout(), [], []
    prompts, cache = rollout.prompt_ids.shape[1], DynamicCache(config=module.config)
    both = torch.cat([rollout.prompt_ids, rollout.response_ids], 1)
    mask = torch.cat([length_mask(rollout.prompt_lengths, prompts).flip(1), rollout.response_mask], 1)
    for end in range(prompts, mask.shape[1]):
        ids = both[:, :end] if end == prompts else both[:, end - 1 : end]
        output = causal.call(module, ids, mask[:, :end], past_key_values=cache, use_cache=True, logits_to_keep=1)
        steps.append(output.logits[:, -1])
    decoded = torch.stack(steps, 1)
    for row, p, r, ids in sequences(rollout):
        pairs.append((decoded[row, :r], module(ids, use_cache=False).logits[0, p - 1 : p + r - 1]))
    return _worst(pairs)


@torch.no_grad()
def merged(module: PreTrainedModel, model: RolesModel) -> float:
    """Logits of the replica, the actor's adapter in its weights, against those with the adapter beside them."""
    pairs = []
    for _, _, _, ids in sequences(tiny.rollout()):
        apart = causal.call(model.causal, ids, torch.ones_like(ids, dtype=torch.bool), use_cache=False)
        pairs.append((module(ids, use_cache=False).logits, apart.logits))
    return _worst(pairs)


def check_alone(folder: Path) -> dict[str, float]:
    """The checks that need one process: largest deviations by name."""
    model = roles(recipe(folder))
    found = {"own logits": against_plain(folder, model), "padding": padding(model)}
    if model.causal.config.model_type in causal.PACKABLE:
        found["packed"] = packed(model)
    replica = Replica(model)
    module = replica.fill()
    found |= {"cache": cached(module), "merged": merged(module, model)}
    replica.free()
    on_trunk = roles(recipe(folder, critic={"home": "trunk"}))
    return found | {"trunk": trunk(folder, on_trunk)}


class _Length:
    """A reward: the response's length."""

    name = "length"

    def score(self, rollout, texts) -> Tensor:
        return rollout.response_lengths.float()


def iteration(folder: str, stage: str) -> dict:
    """A whole PPO iteration under DeepSpeed: what it sampled, what it read, the weights after it. Runs on each rank."""
    settings = recipe(folder, zero={"ds_config": tiny.ds_config(stage)})
    engine = HybridEngine(roles(settings), settings)
    frozen, everything = engine.frozen_hash(), tiny.prompts()
    mine = torch.arange(len(everything)).tensor_split(dist.world_size())[dist.rank()]
    tensors = {n: value[mine] for n, value in vars(everything).items() if isinstance(value, Tensor)}
    prompts = type(everything)(**tensors, texts=("p",) * len(mine), columns=({},) * len(mine))
    with engine.generation() as actor:
        rollout = generate(actor, prompts, settings.generation, Stops((7, 11)), seed=9)
    rollout, evaluation = tiny.evaluated(engine, settings, rollout, [_Length()])
    experience = make_experience(rollout, evaluation, settings, ScoreCombiner(settings), kl_coef=0.1)
    before = _trained(engine)
    stats = update(engine, experience, settings, 0, 0.1, frozenset())
    after = _trained(engine)
    found = {
        "tokens": rollout.response_ids,
        "numbers": torch.cat([evaluation.old_logprobs, evaluation.ref_logprobs, evaluation.old_values]),
        "weights": torch.cat(list(after.values())),
        "moved": all(bool((before[role] != after[role]).any()) for role in before),
        "first ratio": stats.first_ratio_deviation,
        "sampler": (evaluation.old_logprobs - rollout.sampler_logprobs)[rollout.response_mask].abs().max().item(),
        "base stands": engine.frozen_hash() == frozen,
    }
    engine.close()
    return found


def _trained(engine: HybridEngine) -> dict[str, Tensor]:
    """What each role trains, flat and whole (a collective)."""
    found = {}
    for role in (ACTOR, CRITIC):
        parameters = list(engine.role_parameters(role).values())
        with torch.no_grad(), zero.gathered(parameters):
            found[role] = torch.cat([p.detach().flatten().clone() for p in parameters])
    return found


def check_ranks(pool, folder: Path) -> dict[str, float]:
    """The checks that need two ranks: largest deviations by name. An iteration at stage 0 and one at stage 3.

    Raises:
        AssertionError: a role did not learn, the base moved, or other tokens were sampled.
    """
    runs = {stage: pool.run(iteration, str(folder), stage) for stage in ("zero0", "zero3")}
    one = runs["zero0"][0]
    found = {"first ratio": 0.0, "sampler": 0.0, "stages": 0.0}
    for run in (run for ranks in runs.values() for run in ranks):
        assert run["moved"], "a role has learned nothing"
        assert run["base stands"], "the base has moved"
        assert torch.equal(run["tokens"], one["tokens"]), "stages sample different tokens"
        found["first ratio"] = max(found["first ratio"], run["first ratio"])
        found["sampler"] = max(found["sampler"], run["sampler"])
        worst = _worst((run[name], one[name]) for name in ("numbers", "weights"))
        found["stages"] = max(found["stages"], worst)
    return found


COLUMNS = ("own logits", "trunk", "padding", "packed", "cache", "merged", "sampler", "first ratio", "stages")


def row(name: str, found: dict[str, float]) -> str:
    """A family's line of the table."""
    numbers = " | ".join(f"{found[column]:.0e}" if column in found else "refused" for column in COLUMNS)
    return f"| {name} | {FAMILIES[name].model_type} | {FAMILIES[name].on} | {numbers} | {max(found.values()):.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure families of causal models; prints a markdown table.")
    parser.add_argument("--only", nargs="*", default=list(FAMILIES), choices=FAMILIES, metavar="NAME")
    names = parser.parse_args().only
    from tests.distributed import Pool

    torch.set_num_threads(1)
    print(f"| family | model_type | switched on | {' | '.join(COLUMNS)} | largest |")
    print("|---|---|---|" + "---|" * (len(COLUMNS) + 1))
    pool = Pool(world_size=2)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            checkpoint = make(name, Path(folder) / FAMILIES[name].model_type)
            print(row(name, check_alone(checkpoint) | check_ranks(pool, checkpoint)), flush=True)
    pool.close()


if __name__ == "__main__":
    main()
