"""Roles on one base in a plain process, against models that know nothing of roles."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from engine.batch import length_mask
from engine.models import without_dropout
from engine.roles import ACTOR, CRITIC, REFERENCE, Layout, lora_config
from tests import tiny
from tests.reference import Reference


def layout() -> Layout:
    sampled = tiny.rollout()
    return Layout(sampled.sequences, sampled.sequence_mask, sampled.response_ids.shape[1])


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
        output = model(layout(), values=True, ref_logprobs=True, full_kl=True)
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
    assert all(layer.active_adapters == [ACTOR] for layer in model._layers)


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
    from engine.roles import RolesModel

    recipe = tiny.recipe()
    model = RolesModel(tiny.llama(), recipe.actor, recipe.critic, 1.0)
    with torch.no_grad():
        output = model(layout(), values=True, ref_logprobs=True)
    assert output.values.eq(0).all()
    assert torch.equal(output.logprobs, output.ref_logprobs), "a new adapter must be the base"


def test_positions_and_masks_ignore_padding():
    found = layout()
    sampled = tiny.rollout()
    for row in range(len(sampled)):
        real = found.mask[row]
        assert found.position_ids[row][real].tolist() == list(range(int(real.sum())))
    assert torch.equal(found.mask[:, -9:], length_mask(sampled.response_lengths, 9))


def test_dropout_goes_from_any_config():
    from transformers import GPT2Config, LlamaConfig

    gpt2, llama = GPT2Config(attn_pdrop=0.1, embd_pdrop=0.2), LlamaConfig(attention_dropout=0.3)
    without_dropout(gpt2), without_dropout(llama)
    assert (gpt2.attn_pdrop, gpt2.embd_pdrop, gpt2.resid_pdrop, llama.attention_dropout) == (0.0, 0.0, 0.0, 0.0)
