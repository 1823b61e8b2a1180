"""Adapters that others saved, on a shared base, against plain peft models that hold one adapter each."""

from __future__ import annotations

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file

from engine import adapters
from engine.errors import RecipeError
from engine.roles import ACTOR, CRITIC, REFERENCE, RolesModel, reward_role
from tests import tiny

FORMS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "few targets": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 4, "use_rslora": True},
    "dora": {"r": 4, "use_dora": True},
    "embeddings": {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]},
    "patterns": {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 32}},
    "dropout": {"r": 4, "lora_dropout": 0.5},
}


def save_adapter(folder, model, seed: int = 3, **settings) -> PeftModel:
    """Train-like: every weight of the adapter is away from its start. Returns the plain peft model."""
    torch.manual_seed(seed)
    wanted = {"task_type": TaskType.CAUSAL_LM, "target_modules": "all-linear", **settings}
    plain = get_peft_model(model, LoraConfig(**wanted))
    for parameter in plain.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    plain.save_pretrained(str(folder))
    return plain.eval()


def save_reward(folder, seed: int = 5, labels: int = 1) -> PeftModel:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(tiny.config(num_labels=labels))
    model.model.load_state_dict(tiny.llama().model.state_dict())
    return save_adapter(folder, model, seed, task_type=TaskType.SEQ_CLS, r=4)


def roles(**sections) -> RolesModel:
    return RolesModel(tiny.llama(), tiny.recipe(**sections))


def logits(model: RolesModel, role: str, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), model.acting_as(role):
        return model.causal(ids).logits


IDS = torch.tensor([[5, 9, 2, 40, 33], [1, 1, 7, 30, 4]])


@pytest.mark.parametrize("form", FORMS)
def test_an_actor_starts_where_its_adapter_left_off(form, tmp_path):
    plain = save_adapter(tmp_path / "sft", tiny.llama(), **FORMS[form])
    model = roles(actor={"init_adapter": str(tmp_path / "sft")})
    expected = plain(IDS).logits
    assert (expected - tiny.llama()(IDS).logits).abs().max() > 0.05, "an adapter without effect tests nothing"
    assert torch.allclose(logits(model, ACTOR, IDS), expected, atol=1e-5)
    # The reference is a copy of it by default, and stands still; the critic's start is the base.
    assert torch.allclose(logits(model, REFERENCE, IDS), expected, atol=1e-5)
    assert torch.allclose(logits(model, CRITIC, IDS), tiny.llama()(IDS).logits, atol=1e-6)
    assert not any(p.requires_grad for n, p in model.named_parameters() if adapters.owner(n) == REFERENCE)
    trained = {n for n, p in model.policy.named_parameters() if adapters.owner(n) == ACTOR}
    assert trained == set(model.role_parameters(ACTOR)) and all(
        p.requires_grad for p in model.role_parameters(ACTOR).values()
    )


def test_the_reference_can_be_the_base_or_another_adapter(tmp_path):
    save_adapter(tmp_path / "sft", tiny.llama(), r=4)
    other = save_adapter(tmp_path / "other", tiny.llama(), seed=9, r=2)
    start = {"init_adapter": str(tmp_path / "sft")}
    base = roles(actor=start, reference={"home": "base"})
    assert torch.allclose(logits(base, REFERENCE, IDS), tiny.llama()(IDS).logits, atol=1e-6)
    model = roles(actor=start, reference={"home": "adapter", "path": str(tmp_path / "other")})
    assert torch.allclose(logits(model, REFERENCE, IDS), other(IDS).logits, atol=1e-5)


def test_a_reward_adapter_scores_as_its_own_classifier_would(tmp_path):
    plain = save_reward(tmp_path / "reward")
    model = roles(rewards=[{"function": "tests/tiny.py:length_reward"}, {"adapter": str(tmp_path / "reward")}])
    sampled = tiny.rollout()
    with torch.no_grad():
        found = model(model.scores, reward_role(1), sampled.sequences, sampled.sequence_mask)
        for row in range(len(sampled)):
            ids = sampled.sequences[row][sampled.sequence_mask[row]][None]
            # One row without padding: there transformers' own pooling reads the last position too.
            assert plain(ids).logits.item() == pytest.approx(found[row].item(), abs=1e-5)
    assert model._role == ACTOR and not any(p.requires_grad for p in model.reward_heads.parameters())
    assert logits(model, REFERENCE, IDS).equal(logits(roles(), REFERENCE, IDS)), "the base is the base still"


def broken(tmp_path, what: str) -> str:
    folder = tmp_path / "adapter"
    if what == "another method":
        get_peft_model(
            tiny.llama(),
            IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        ).save_pretrained(str(folder))
        return str(folder)
    if what == "no adapter":
        return str(tmp_path)
    save_adapter(folder, tiny.llama(), r=4)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    config = json.loads((folder / "adapter_config.json").read_text())
    if what == "a pickle":
        file.rename(folder / "adapter_model.bin")
    if what == "missing weights":
        save_file(dict(list(weights.items())[2:]), file)
    if what == "unknown weights":
        save_file({**weights, "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 32)}, file)
    if what == "other sizes":
        save_file({name: torch.cat([w, w], 1) for name, w in weights.items()}, file)
    if what == "biases":
        (folder / "adapter_config.json").write_text(json.dumps({**config, "bias": "all"}))
    if what == "a changed base":
        (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    if what == "another formula":
        (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_bias": True}))
    if what == "another base":
        embeddings = {"base_model.model.model.embed_tokens.weight": torch.zeros(tiny.VOCABULARY, 32)}
        save_file({**weights, **embeddings}, file)
    if what == "a classifier":
        save_reward(folder)
    if what == "other names":
        (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["c_attn"]}))
    return str(folder)


@pytest.mark.parametrize(
    "what, said",
    [
        ("no adapter", "can't be read as a peft adapter"),
        ("a pickle", "no adapter_model.safetensors (a pickled .bin file is not read)"),
        ("another method", "only LoRA works here"),
        ("biases", "trains biases (bias all)"),
        ("missing weights", "has no weights for"),
        ("unknown weights", "has weights for unknown"),
        ("other sizes", "doesn't fit the base"),
        ("other names", "c_attn"),
        ("a changed base", "init_lora_weights 'pissa'"),
        ("another formula", "lora_bias True"),
        ("another base", "carries a base_model.model.model.embed_tokens.weight of its own"),
        ("a classifier", "name it in rewards.adapter"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(what, said, tmp_path):
    path = broken(tmp_path, what)
    with pytest.raises(RecipeError, match=r".") as caught:
        roles(actor={"init_adapter": path})
    assert said in str(caught.value) and path in str(caught.value)


@pytest.mark.parametrize("home", ["base", "adapter"])
def test_what_peft_saves_of_the_base_stays_in_the_file(home, tmp_path):
    """It saves an adapted head's own weight, and embeddings after a resize: loaded, they'd be everyone's."""
    plain = save_adapter(tmp_path / "sft", tiny.llama(), r=4, target_modules=["q_proj", "lm_head"])
    assert any("lm_head.base_layer" in name for name in load_file(tmp_path / "sft" / "adapter_model.safetensors"))
    model = roles(actor={"init_adapter": str(tmp_path / "sft")}, reference={"home": home})
    assert torch.allclose(logits(model, ACTOR, IDS), plain(IDS).logits, atol=1e-5)
    assert torch.equal(model.causal.lm_head.base_layer.weight, tiny.llama().lm_head.weight)


def test_a_second_adapter_keeps_its_own_exclusions(tmp_path):
    plain = save_adapter(
        tmp_path / "sft", tiny.llama(), r=4, exclude_modules=["gate_proj"], modules_to_save=["embed_tokens"]
    )
    model = roles(actor={"init_adapter": str(tmp_path / "sft")})
    assert torch.allclose(logits(model, REFERENCE, IDS), plain(IDS).logits, atol=1e-5)


def test_only_single_layers_are_trained_whole():
    with pytest.raises(RecipeError, match="modules_to_save takes single layers"):
        roles(actor={"lora": {"modules_to_save": ["mlp"]}})


@pytest.mark.parametrize("labels, said", [(2, "got 2 outputs"), (None, "got none")])
def test_a_reward_adapter_needs_one_score(labels, said, tmp_path):
    if labels:
        save_reward(tmp_path / "reward", labels=labels)
    else:
        save_adapter(tmp_path / "reward", tiny.llama(), r=4)
    with pytest.raises(RecipeError) as caught:
        roles(rewards=[{"adapter": str(tmp_path / "reward")}])
    assert said in str(caught.value)


def test_an_adapter_on_an_embedding_is_refused():
    with pytest.raises(RecipeError, match="modules_to_save"):
        roles(actor={"lora": {"targets": ["embed_tokens", "q_proj"]}})


def test_a_copy_stands_still_while_the_actor_moves(tmp_path):
    """Embeddings and head that each of the two has to itself."""
    save_adapter(tmp_path / "sft", tiny.llama(), **FORMS["embeddings"])
    model = roles(actor={"init_adapter": str(tmp_path / "sft")})
    start = logits(model, ACTOR, IDS)
    for parameter in model.role_parameters(ACTOR).values():
        parameter.data.add_(0.1)
    assert torch.equal(logits(model, REFERENCE, IDS), start)
    assert (logits(model, ACTOR, IDS) - start).abs().max() > 0.1


def test_attributes_of_a_copied_module_are_those_of_the_role():
    """Some families read their embedding's weight instead of calling it."""
    model = roles(actor={"lora": {"modules_to_save": ["embed_tokens", "lm_head"]}})
    for parameter in model.role_parameters(ACTOR).values():
        parameter.data.add_(1.0)
    base = tiny.llama().lm_head.weight
    for role, moved in ((ACTOR, 1.0), (CRITIC, 0.0), (REFERENCE, 0.0)):
        with model.acting_as(role):
            assert torch.equal(model.causal.get_output_embeddings().weight, base + moved)
