"""Fused LoRA layers against peft's own forward, and where they may stand."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from engine import fused_lora, zero
from engine.adapters import Switch
from engine.hybrid_engine import HybridEngine
from engine.roles import ACTOR, CRITIC, Layout
from tests import families, tiny

IDS = torch.arange(24).view(3, 8) % tiny.VOCABULARY


def adapted(base=None, dtype: torch.dtype = torch.float64, **settings) -> nn.Module:
    """Two adapters with scales of their own, away from their start, on a base whose linear layers may have a bias."""
    torch.manual_seed(0)
    if base is None:
        sizes = {key: getattr(tiny.config(), key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
        base = Qwen2ForCausalLM(Qwen2Config(**sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    config = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"} | settings
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, **config), adapter_name=ACTOR)
    model.add_adapter(CRITIC, LoraConfig(r=3, lora_alpha=9, **config))
    model.to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def gradients(model: nn.Module, role: str, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    Switch(model).to(role)
    inputs = inputs.clone().requires_grad_()
    logits = model(inputs_embeds=inputs).logits
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    return found | {"inputs": inputs.grad, "logits": logits.detach()}


@pytest.mark.parametrize("role", [ACTOR, CRITIC, "nobody"])
def test_outputs_and_gradients_are_those_of_peft(role):
    """In float64, to its last digits: of the adapter that is on, of what comes in, and of no other weight."""
    peft, fused = adapted(), adapted()
    assert fused_lora.fuse(fused) == 2 * 7
    inputs = torch.randn(3, 8, 32, dtype=torch.float64)
    expected, found = gradients(peft, role, inputs), gradients(fused, role, inputs)
    assert found.keys() == expected.keys()
    assert (len(found) > 2) == (role != "nobody")
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-11, atol=1e-11, msg=name)


def test_bfloat16_rounds_no_more_often_than_peft():
    inputs = torch.randn(3, 8, 32)
    exact = gradients(adapted(), ACTOR, inputs.bfloat16().double())["logits"]
    errors = []
    for fuse in (False, True):
        model = adapted(dtype=torch.bfloat16)
        fused_lora.fuse(model, lambda parameter, fuse=fuse: fuse)
        errors.append((gradients(model, ACTOR, inputs.bfloat16())["logits"].double() - exact).abs().mean().item())
    assert 0 < errors[1] < 1.2 * errors[0]


GATED = {"Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma 2", "Gemma 3 (text)", "StableLM", "Cohere", "Cohere 2"}
GATED |= {"OLMo 2", "Granite", "SmolLM 3"}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_gated_feed_forwards_of_every_family(name, tmp_path):
    """Outputs and gradients of the roles are peft's; which families have a feed-forward that we know stands above."""
    model, found = families.roles(families.recipe(families.make(name, tmp_path / "model"))), []
    for fuse in (False, True):
        if fuse:
            fused_lora.fuse(model)
            assert any("forward" in vars(module) for module in model.modules()) == (name in GATED)
        output = model.outputs(Layout.of(tiny.rollout()), values=True)
        (output.logprobs.sum() + output.values.square().sum()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append(gradients | {"logprobs": output.logprobs.detach(), "values": output.values.detach()})
        model.zero_grad()
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-4 * value.abs().max().item(), msg=key)


def test_a_gated_feed_forward_keeps_gate_and_up_alone():
    """Of the tensors that are wider than the rest; the forward of peft keeps four."""
    wide = []
    for fuse in (False, True):
        model = adapted()
        if fuse:
            fused_lora.fuse(model)
        Switch(model).to(ACTOR)
        kept = {}

        def keep(x, kept=kept):
            kept[x.data_ptr()] = x  # one that several operations keep counts once
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(inputs_embeds=torch.randn(3, 8, 32, dtype=torch.float64))
        wide.append(sum(x.shape[-1] == 64 and x.numel() == 3 * 8 * 64 for x in kept.values()))
    assert wide == [2 * 4, 2 * 2]


def test_hooks_on_the_last_layer_see_tensors():
    """Where DeepSpeed hooks it, it is handed what peft would hand it."""
    model, seen = adapted(), []
    for module in model.modules():
        if type(module).__name__ == "Qwen2MLP":
            module.down_proj.base_layer.register_forward_pre_hook(lambda _, inputs: seen.append(type(inputs[0])))
    fused_lora.fuse(model)
    Switch(model).to(ACTOR)
    model(IDS)
    assert seen == [torch.Tensor] * 2


@pytest.mark.parametrize("what", ["dora", "bias", "dropout", "transposed", "trained base", "sharded"])
def test_what_is_not_plain_stays_with_peft(what):
    base, settings = None, {}
    if what == "transposed":
        base = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4))
        settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    settings |= {"dora": {"use_dora": True}, "bias": {"lora_bias": True}, "dropout": {"lora_dropout": 0.1}}.get(
        what, {}
    )
    model = adapted(base, **settings)
    if what == "trained base":
        model.requires_grad_(True)
    assert fused_lora.fuse(model, lambda parameter: what != "sharded") == 0
    assert fused_lora.fuse(model) == (2 * 7 if what == "sharded" else 0)


def test_names_and_weights_stay_and_a_copy_is_its_own():
    model = adapted()
    before = {name: p.clone() for name, p in model.named_parameters()}
    fused_lora.fuse(model)
    twin = copy.deepcopy(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        Switch(model).to(ACTOR)
        Switch(twin).to(ACTOR)
        same = model(IDS).logits
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        assert torch.equal(model(IDS).logits, same) and not torch.equal(twin(IDS).logits, same)


def _fused_layers(ds_config: str) -> tuple[int, int, dict]:
    """How many layers an engine fused, how many adapter matrices its ranks shard, and its gradients' norms."""
    engine = tiny.engine(tiny.recipe(zero={"ds_config": ds_config}))
    try:
        layers = sum(isinstance(m, fused_lora._AdaptedLinear) for m in engine.roles.modules())
        cut = sum(not zero.stays_whole(p) for p in fused_lora.matrices(engine.roles))
        return layers, cut, _norms(engine)
    finally:
        engine.close()


def _norms(engine: HybridEngine) -> dict[str, float]:
    """Two optimizer steps on one minibatch; between them a minibatch that is dropped."""
    rollout = tiny.rollout()
    norms = {}
    for step in range(3):
        output = engine.forward(rollout, torch.arange(2), values=True)
        engine.backward(output.logprobs.square().mean(), output.values.square().mean(), last=True)
        if step == 1:
            engine.discard()
        else:
            norms = engine.step()
    return norms


def test_adapters_that_stay_whole_are_fused_at_every_stage(pool, tmp_path):
    """A and B of rank 4 hold 64 to 256 elements, the base's matrices 512 and more."""
    layers, cut, expected = pool.run(_fused_layers, tiny.ds_config("zero0"))[0]
    assert (layers, cut) == (14, 0)
    raw = json.loads(Path(tiny.ds_config("zero3")).read_text())
    for threshold, fused in ((256, range(14, 15)), (128, range(1, 14)), (0, range(1))):
        raw["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
        file = tmp_path / f"{threshold}.json"
        file.write_text(json.dumps(raw))
        layers, cut, norms = pool.run(_fused_layers, str(file))[0]
        assert layers in fused and (cut == 0) == (layers == 14)
        assert norms == pytest.approx(expected, rel=1e-4)
