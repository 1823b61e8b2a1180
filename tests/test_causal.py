"""How models are called, which are refused, and what experts need; tests/test_families.py holds every family to it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from engine import causal
from engine.ds_config import frozen_ds_config
from engine.errors import RecipeError
from tests import families, tiny

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
IDS = torch.tensor([[9, 9, 3, 4, 5], [3, 4, 5, 9, 9]])


class Fake(nn.Module):
    """Keeps what it was called with; its logits are the ids."""

    def respond(self, input_ids, **keywords):
        self.called = {"input_ids": input_ids, **keywords}
        return SimpleNamespace(logits=input_ids[..., None].float())


class Modern(Fake):
    def forward(self, input_ids, attention_mask=None, position_ids=None, logits_to_keep=0):
        self.respond(input_ids, attention_mask=attention_mask, position_ids=position_ids)
        return SimpleNamespace(logits=input_ids[:, -logits_to_keep:, None].float())


class Alibi(Fake):
    def forward(self, input_ids, attention_mask=None, **keywords):
        return self.respond(input_ids, attention_mask=attention_mask, **keywords)


def test_positions_are_counted_over_real_tokens():
    assert causal.positions(MASK).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
    model = Modern()
    causal.call(model, IDS, MASK)
    assert model.called["position_ids"].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
    assert model.called["attention_mask"].dtype == torch.int64, "some families add masks up"


def test_with_a_cache_the_positions_are_those_of_the_new_tokens():
    model = Modern()
    causal.call(model, IDS[:1, -2:], MASK[:1])
    assert model.called["position_ids"].tolist() == [[1, 2]]
    assert model.called["attention_mask"].shape == (1, 5)


def test_a_family_without_position_ids_or_logits_to_keep_gets_neither():
    model = Alibi()
    output = causal.call(model, IDS, MASK, logits_to_keep=2, use_cache=False)
    assert set(model.called) == {"input_ids", "attention_mask", "use_cache"}
    assert torch.equal(output.logits, IDS[:, -2:, None].float())
    assert torch.equal(causal.call(model, IDS, MASK).logits, IDS[..., None].float())


def llama_scorer() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(**{**tiny.llama().config.to_dict(), "num_labels": 1, "pad_token_id": 0})
    return LlamaForSequenceClassification(config)


@pytest.mark.parametrize("build", [tiny.llama, llama_scorer])
@pytest.mark.parametrize("wrapped", [False, True])
@torch.no_grad()
def test_backbones_heads_and_adapters_are_called_alike(build, wrapped):
    """Row 0 is row 1 with its padding on the other side."""
    model = build()
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    hidden = causal.call(causal.backbone(model), IDS, MASK, use_cache=False).last_hidden_state
    assert torch.allclose(hidden[0, 2:], hidden[1, :3], atol=1e-5)
    if build is tiny.llama:
        logits = causal.call(model, IDS, MASK, logits_to_keep=2).logits
        assert torch.allclose(logits, model.get_output_embeddings()(hidden[:, -2:]), atol=1e-6)


def test_noise_goes_from_any_config():
    opt = AutoConfig.for_model("opt", dropout=0.1, attention_dropout=0.2, layerdrop=0.3)
    mpt = AutoConfig.for_model("mpt", emb_pdrop=0.1, attn_config={"attn_pdrop": 1})
    mixtral = AutoConfig.for_model("mixtral", router_jitter_noise=0.1, attention_dropout=0.1)
    starcoder = AutoConfig.for_model("starcoder2", residual_dropout=0.1, embedding_dropout=0.1)
    for config in (opt, mpt, mixtral, starcoder):
        causal.without_noise(config)
    assert (opt.dropout, opt.attention_dropout, opt.layerdrop) == (0, 0, 0)
    assert (mpt.emb_pdrop, mpt.attn_config.attn_pdrop) == (0, 0)
    assert (mixtral.router_jitter_noise, mixtral.attention_dropout) == (0, 0)
    assert (starcoder.residual_dropout, starcoder.embedding_dropout) == (0, 0)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_measured_families_are_accepted(name):
    causal.check_causal(families.config_of(name))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mamba", "keeps no key-value cache"),
        ("mamba2", "keeps no key-value cache"),
        ("falcon_mamba", "keeps no key-value cache"),
        ("rwkv", "keeps no key-value cache"),
        ("openai-gpt", "keeps no key-value cache"),
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("whisper", "encoder-decoder"),
        ("trocr", "takes no position_ids"),
        ("bert", "an encoder"),
        ("roberta", "an encoder"),
        ("xlnet", "an encoder"),
        ("gemma3", "reads more than text"),
        ("llama4", "reads more than text"),
        ("vit", "no causal language model of that type"),
        ("gemma3n_text", "clamps weights of its base"),
        ("minimax", "a cache of a class of its own"),
        ("phimoe", "draws at random"),
        ("recurrent_gemma", "read the padding"),
        ("zamba2", "cached logits are off"),
    ],
)
def test_families_that_cannot_work_are_refused_by_name(kind, reason):
    with pytest.raises(RecipeError, match=f"type {kind} can't be the policy: .*{reason}.*; "):
        causal.check_causal(AutoConfig.for_model(kind))


def test_falcons_eager_alibi_is_refused_and_still_wrong():
    config = families.config_of("Falcon (alibi)")
    config._attn_implementation = "eager"
    with pytest.raises(RecipeError, match="attn_implementation to sdpa"):
        causal.check_causal(config)
    found = []
    for kernel in ("eager", "sdpa"):
        torch.manual_seed(0)
        config = families.config_of("Falcon (alibi)")
        model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel).eval()
        with torch.no_grad():
            found.append(model(IDS).logits)
    assert (found[0] - found[1]).abs().max() > 0.01, "transformers may have mended it: drop the refusal"


def test_code_of_the_checkpoints_own_is_not_judged():
    config = AutoConfig.for_model("mamba", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    causal.check_causal(config)


def adapted(name: str, targets="all-linear") -> nn.Module:
    """A family's model with an adapter that is not at its start."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(families.config_of(name)).eval()
    targets = causal.adapter_targets(model, targets)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False))


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("Llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("Mixtral", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("DBRX", {"Wqkv", "out_proj"}),
        ("Qwen3-MoE", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("DeepSeek-V3", {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
        ("Llama 4 (text)", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("Qwen3-Next", {"q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "out_proj"}
         | {"shared_expert_gate"}),
        ("Jamba", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("Falcon-H1", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)  # fmt: skip
def test_adapters_go_where_every_token_passes(name, taken):
    model = adapted(name)
    causal.check_adapters(model)
    found = {n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert found == taken


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("Mixtral", ["q_proj", "w1", "w2", "w3"]),
        ("Qwen3-MoE", ["q_proj", "gate"]),
        ("Jamba", ["q_proj", "in_proj"]),
    ],
)
def test_adapters_in_experts_or_mamba_layers_are_refused(name, targets):
    with pytest.raises(RecipeError, match="experts, their router and Mamba layers take none"):
        causal.check_adapters(adapted(name, targets))


@torch.no_grad()
def test_an_adapter_beside_experts_loads_in_plain_peft(tmp_path):
    """peft takes some names of dense layers for those of experts: the targets as saved must not have one."""
    model = adapted("DeepSeek-V3")
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(families.config_of("DeepSeek-V3")).eval()
    before = base(IDS).logits
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-6)
    assert (before - model(IDS).logits).abs().max() > 1e-2


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x):
        return self.up(x)


class OldMixture(nn.Module):
    """Experts in a list, as in transformers before version 5 and in many a checkpoint's own code."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(4))

    def forward(self, x, expert: int):
        return self.experts[expert](x)


class OldBlock(nn.Module):
    """What trains lies before the frozen experts: its gradient comes through them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 8)
        self.adapter = nn.Linear(8, 8)
        self.mixture = OldMixture()

    def forward(self, expert: int):
        return self.mixture(self.adapter(self.embed(torch.tensor([expert]))), expert)


def test_modules_that_zero3_must_fetch_whole():
    block = OldBlock()
    assert causal.expert_modules(block) == [block.mixture]
    dbrx = AutoModelForCausalLM.from_config(families.config_of("DBRX"))
    assert [type(m).__name__ for m in causal.expert_modules(dbrx)] == ["DbrxExperts"] * 2
    for name in ("Llama", "Mixtral", "Qwen3-MoE", "gpt-oss", "Llama 4 (text)", "Jamba"):
        assert causal.expert_modules(AutoModelForCausalLM.from_config(families.config_of(name))) == []


def trained_engine(model: OldBlock):
    """Under ZeRO-3, the adapter training."""
    from engine import dist, zero
    from engine.ds_config import read_ds_config, resolve_ds_config
    from engine.role_config import OptimizerSettings

    trained = list(model.adapter.requires_grad_(True).parameters())
    config = resolve_ds_config(
        read_ds_config("tests/zero3_all_sharded.json"),
        dtype="float32",
        world_size=dist.world_size(),
        micro_batch=1,
        trainable_parameters=72,
    )
    settings = OptimizerSettings(learning_rate=0.1)
    return zero.TrainedEngine(model, [zero.ParameterGroup("actor", trained, settings)], config)


def rank_takes_its_own_expert() -> float:
    """A step of a mixture under ZeRO-3 in which each rank's token goes to another expert."""
    from engine import dist

    torch.manual_seed(0)
    engine = trained_engine(OldBlock().requires_grad_(False))
    engine.backward(engine(dist.rank()).sum(), last=True)
    norm = engine.step({"actor": 0.1})["actor"]
    engine.close()
    return norm


@pytest.mark.dist
def test_ranks_that_route_to_different_experts_fetch_what_they_compute_with(pool):
    """Without leaf modules both fetch an expert at once, half of one and half of the other: a wrong gradient, or NCCL
    waiting for ever where the experts differ in size. Measured here: norm 3.86."""
    torch.manual_seed(0)
    model = OldBlock().requires_grad_(False)
    model.adapter.requires_grad_(True)
    (sum(model(rank).sum() for rank in range(2)) / 2).backward()
    expected = torch.cat([p.grad.flatten() for p in model.adapter.parameters()]).norm().item()
    assert pool.run(rank_takes_its_own_expert) == pytest.approx([expected] * 2, rel=1e-5)


def test_engines_fetch_experts_together(alone):
    from deepspeed.utils import z3_leaf_module

    from engine import zero

    frozen, trained = OldBlock(), OldBlock().requires_grad_(False)
    engines = [zero.FrozenEngine(frozen, frozen_ds_config(tiny.recipe(), "none")), trained_engine(trained)]
    for model, engine in zip((frozen, trained), engines, strict=True):
        assert z3_leaf_module(model.mixture) and not z3_leaf_module(model.adapter)
        engine.close()
