"""Roles on one base in a plain process, against models that know nothing of roles."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import LlamaForCausalLM

from engine import causal
from engine.adapters import lora_config
from engine.replica import Replica
from engine.roles import ACTOR, CRITIC, REFERENCE, Layout, ReferenceModel, RolesModel
from tests import tiny
from tests.reference import Reference


def layout() -> Layout:
    return Layout.of(tiny.rollout())


def rows():
    sampled = tiny.rollout()
    for row in range(len(sampled)):
        p, r = int(sampled.prompt_lengths[row]), int(sampled.response_lengths[row])
        yield row, p, r, torch.cat([sampled.prompt_ids[row, -p:], sampled.response_ids[row, :r]])[None]


@pytest.mark.parametrize("home", ["adapter", "trunk"])
def test_every_output_equals_separate_models_without_padding(home):
    recipe = tiny.recipe(critic={"home": home}, generation={"temperature": 0.7})
    model, reference, base = tiny.roles(recipe), Reference(recipe), tiny.llama()
    with torch.no_grad():
        output = model.outputs(layout(), entropy=True, values=True, ref_logprobs=True, full_kl=True)
        for row, p, r, ids in rows():
            logprobs, entropy, values = reference.sequence(tiny.experience(), row)
            wanted = (base(ids).logits[0, p - 1 : p + r - 1].double() / 0.7).log_softmax(-1)
            actor = (reference.actor(ids).logits[0, p - 1 : p + r - 1].double() / 0.7).log_softmax(-1)
            kl = (actor.exp() * (actor - wanted)).sum(-1)
            assert torch.allclose(output.logprobs[row, :r], logprobs, atol=1e-5)
            assert torch.allclose(output.entropy[row, :r], entropy, atol=1e-5)
            assert torch.allclose(output.values[row, :r], values, atol=1e-5)
            chosen = wanted[torch.arange(r), ids[0, p:]].float()
            assert torch.allclose(output.ref_logprobs[row, :r], chosen, atol=1e-5)
            assert torch.allclose(output.full_kl[row, :r], kl.float(), atol=1e-5)


def test_switching_roles_leaves_both_trainable_and_comes_back():
    model = tiny.roles(tiny.recipe())
    for role in (ACTOR, CRITIC):
        assert model.role_parameters(role) and all(p.requires_grad for p in model.role_parameters(role).values())
    with model.acting_as(CRITIC), pytest.raises(RuntimeError), model.acting_as(REFERENCE):
        raise RuntimeError
    assert all(p.requires_grad for role in (ACTOR, CRITIC) for p in model.role_parameters(role).values())
    assert not any(p.requires_grad for p in model.frozen_parameters().values())
    assert all(layer.active_adapters == [ACTOR] for layer in model.switch.layers)


def test_peft_passes_over_an_adapter_that_a_layer_lacks():
    """The reference relies on it: an active name without an adapter computes the plain base, to the bit."""
    base = tiny.llama()
    ids = torch.tensor([[3, 4, 5]])
    expected = base(ids).logits
    wrapped = get_peft_model(base, lora_config(tiny.recipe().actor.lora), adapter_name=ACTOR)
    for module in wrapped.modules():
        if hasattr(module, "lora_A"):
            module._active_adapter = ["nobody"]
    assert torch.equal(wrapped(ids).logits, expected)


def test_a_new_critic_has_no_opinion():
    recipe = tiny.recipe()
    model = RolesModel(tiny.llama(), recipe)
    with torch.no_grad():
        output = model.outputs(layout(), values=True, ref_logprobs=True)
    assert output.values.eq(0).all()
    assert torch.equal(output.logprobs, output.ref_logprobs), "a new adapter must be the base"


@torch.no_grad()
def test_another_reference_is_used():
    model, other, where = tiny.roles(tiny.recipe()), ReferenceModel(tiny.llama(seed=8), temperature=0.7), layout()
    reference = other(where, as_hidden=True), other.head.whole_copy()
    model.temperature = model.head.temperature = 0.7
    output = model.outputs(where, ref_logprobs=True, full_kl=True, reference=reference)
    assert torch.allclose(other(where), output.ref_logprobs, atol=1e-6)
    for row, p, r, ids in rows():
        logp, logq = (
            (m(ids).logits[0, p - 1 : p + r - 1] / 0.7).log_softmax(-1) for m in (model.causal, tiny.llama(seed=8))
        )
        assert torch.allclose(output.ref_logprobs[row, :r], logq[torch.arange(r), ids[0, p:]], atol=1e-5)
        assert torch.allclose(output.full_kl[row, :r], (logp.exp() * (logp - logq)).sum(-1), atol=1e-5)


@pytest.mark.parametrize("critic", ["adapter", "trunk"])
@torch.no_grad()
def test_what_is_not_asked_for_is_not_computed(critic):
    model, seen = tiny.roles(tiny.recipe(critic={"home": critic})), []
    whole = model.outputs(layout(), entropy=True, values=True, ref_logprobs=True)
    model.causal.model.register_forward_hook(lambda *_: seen.append(model._role))
    some = model.outputs(layout(), logprobs=False, values=True, ref_logprobs=True)
    assert seen == [REFERENCE, CRITIC if critic == "adapter" else ACTOR]
    assert some.logprobs is None and some.entropy is None and some.full_kl is None
    assert torch.equal(some.values, whole.values) and torch.equal(some.ref_logprobs, whole.ref_logprobs)
    seen.clear()
    assert model.outputs(layout()).values is None and seen == [ACTOR]


def test_a_trunk_shares_one_forward():
    """Values and log-probs of the actor's hidden states cost one pass, and one backward for both losses."""
    model, seen = tiny.roles(tiny.recipe(critic={"home": "trunk"})), []
    backbone = model.causal.model
    backbone.register_forward_hook(lambda *_: seen.append("forward"))
    backbone.layers[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    output = model.outputs(layout(), values=True)
    (output.logprobs.sum() + output.values.sum()).backward()
    assert seen == ["forward", "backward"]


def test_padding_never_reaches_the_head():
    model, seen = tiny.roles(tiny.recipe()), []
    model.value_head.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    output = model.outputs(layout(), entropy=True, values=True, ref_logprobs=True, full_kl=True)
    tokens = int(tiny.rollout().response_lengths.sum())
    assert seen == [tokens, tokens], "one call of the head for actor and reference"
    padding = ~tiny.rollout().response_mask
    assert all(not value[padding].any() for value in vars(output).values())


@pytest.mark.parametrize("lora", [{"modules_to_save": ["lm_head"]}, {"targets": ["lm_head", "q_proj"]}])
def test_a_head_with_an_adapter_follows_the_role(lora):
    """Values and gradients are those of the model's own forward in that role."""
    model, where = tiny.roles(tiny.recipe(actor={"lora": lora})), layout()
    found = model.outputs(where, entropy=True, entropy_grad=True, ref_logprobs=True, full_kl=True)
    logp = {}
    for role in (ACTOR, REFERENCE):
        with model.acting_as(role):
            logits = causal.call(model.causal, where.sequences, where.mask, use_cache=False).logits
        logp[role] = torch.cat([logits[row, p - 1 : p + r - 1] for row, p, r, _ in rows()]).log_softmax(-1)
    ids, mask = torch.cat([ids[0, p:] for _, p, _, ids in rows()])[:, None], tiny.rollout().response_mask
    p, q = logp[ACTOR], logp[REFERENCE].detach()
    wanted = {
        "logprobs": p.gather(-1, ids)[:, 0],
        "entropy": -(p.exp() * p).sum(-1),
        "ref_logprobs": q.gather(-1, ids)[:, 0],
        "full_kl": (p.exp() * (p - q)).sum(-1),
    }
    own = [p for name, p in model.role_parameters(ACTOR).items() if "lm_head" in name]
    assert own and (logp[ACTOR] - logp[REFERENCE]).abs().max() > 0.1
    gradients = []
    found = {name: value[mask] for name, value in vars(found).items() if value is not None}
    for values in (found, wanted):
        loss = (values["logprobs"] - 2 * values["entropy"] + 3 * values["full_kl"]).sum()
        gradients.append(torch.autograd.grad(loss, list(model.role_parameters(ACTOR).values())))
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in wanted.items())
    assert all(torch.allclose(one, other, atol=1e-4, rtol=1e-4) for one, other in zip(*gradients, strict=True))


def test_the_head_adds_no_name():
    model = tiny.roles(tiny.recipe())
    assert not [name for name, _ in model.named_parameters() if name.startswith("head.")]
    assert not [name for name in model.state_dict() if name.startswith("head.")]
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("detached", [False, True])
def test_a_detached_trunk_learns_nothing_from_values(detached):
    model = tiny.roles(tiny.recipe(critic={"home": "trunk", "trunk_detach": detached}))
    model.outputs(layout(), values=True).values.sum().backward()
    assert model.value_head.weight.grad.abs().sum() > 0
    assert all((p.grad is None) == detached for n, p in model.role_parameters(ACTOR).items() if "o_proj" in n)


SAMPLERS = {
    "merged": ({}, torch.float32),
    "rslora": ({"rslora": True}, torch.float32),
    "bfloat16": ({}, torch.bfloat16),
    "dora": ({"dora": True}, torch.float32),
    "whole modules": ({"modules_to_save": ["embed_tokens", "lm_head"]}, torch.float32),
    "tied head": ({"targets": ["lm_head", "q_proj"]}, torch.float32),
}


@pytest.mark.parametrize("form", SAMPLERS)
@torch.no_grad()
def test_the_replica_computes_what_the_actor_does(form):
    """But for rounding: merged weights round once more, and the replica's products are oneDNN's."""
    lora, dtype = SAMPLERS[form]
    recipe = tiny.recipe(actor={"lora": lora})
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny.config(tie_word_embeddings=form == "tied head")).to(dtype).requires_grad_(False)
    model = RolesModel(base, recipe)
    tiny.moved(model, [p for role in (ACTOR, CRITIC) for p in model.role_parameters(role).values()])
    ids, replica = tiny.rollout().sequences, Replica(model)
    expected, module = model.causal(ids).logits, replica.fill()
    assert (expected - module(ids).logits).abs().max() < (1e-4 if replica.merged else 5e-6)
    plain = [m for m in module.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    assert bool(plain) == (not replica.merged)
    replica.free()
    assert all(p.is_meta for p in module.parameters())
    assert torch.equal(model.causal(ids).logits, expected), "freeing it takes nothing from the roles"


@pytest.mark.parametrize("home", ["adapter", "trunk"])
def test_each_role_trains_its_whole_adapter(home):
    model = tiny.roles(tiny.recipe(critic={"home": home}))
    for role in (ACTOR, CRITIC):
        own = {name for name, _ in model.policy.named_parameters() if f".{role}." in name}
        assert bool(own) == (role == ACTOR or home == "adapter")
        assert set(model.role_parameters(role)) == own | ({"value_head.weight"} if role == CRITIC else set())
