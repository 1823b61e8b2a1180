"""Exported weights compute in plain transformers + peft what they computed in the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from engine.export import export_final
from engine.hybrid_engine import HybridEngine
from engine.roles import ReferenceModel, RolesModel
from tests import checkpoints, tiny

pytestmark = pytest.mark.dist

FULL = {"actor": {"train": "full"}, "reference": {"home": "model"}}
HOMES = {
    "adapter": {},
    "trunk": {"critic": {"home": "trunk"}},
    "embeddings": {"actor": {"lora": {"modules_to_save": ["embed_tokens", "lm_head"]}}},
    "dora": {"actor": {"lora": {"dora": True}}},
    "full": {**FULL, "critic": {"home": "trunk"}},
    "critic model": {"critic": {"home": "model"}},
    "full critic": {**FULL, "critic": {"home": "model", "train": "full"}},
}


def export(stage: str, home: str, folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Export the tiny roles, then the engine's own log-probs and values of the tiny rollout."""
    recipe = tiny.recipe(zero={"ds_config": tiny.ds_config(stage)}, **HOMES[home])
    engine = tiny.engine(recipe)
    export_final(engine, Path(folder), recipe, checkpoints.tokenizer())
    with engine.inference():
        output = engine.forward(tiny.rollout(), torch.arange(7), values=True)
    engine.close()
    return output.logprobs, output.values


def exported(folder: Path, home: str):
    """Actor, the critic's backbone and its head, as a user of plain libraries loads them."""
    if "full" in home:
        actor = AutoModelForCausalLM.from_pretrained(folder / "actor")
        assert AutoTokenizer.from_pretrained(folder / "actor").eos_token == "<eos>"
    else:
        actor = PeftModel.from_pretrained(tiny.llama(), str(folder / "actor")).get_base_model()
    if home == "full critic":
        critic = AutoModelForSequenceClassification.from_pretrained(folder / "critic")
        return actor, critic.model, critic.score
    if home == "critic model":
        critic = PeftModel.from_pretrained(tiny.scorer(), str(folder / "critic")).get_base_model()
        return actor, critic.model, critic.score
    head = torch.nn.Linear(32, 1, bias=False)
    head.weight.data = load_file(folder / "critic" / "value_head.safetensors")["weight"]
    if home in ("trunk", "full"):
        return actor, actor.model, head
    return actor, PeftModel.from_pretrained(tiny.llama(), str(folder / "critic")).get_base_model().model, head


def alone(rollout, row: int) -> tuple[torch.Tensor, int, int]:
    """`[1, L]` prompt and response of a row without padding, and the tokens of each."""
    p, r = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
    return torch.cat([rollout.prompt_ids[row, -p:], rollout.response_ids[row, :r]])[None], p, r


def plain_logprobs(model, ids: torch.Tensor, p: int, r: int) -> torch.Tensor:
    """`[r]` of the response's tokens, by the plain model."""
    return model(ids).logits[0, p - 1 : p + r - 1].log_softmax(-1)[torch.arange(r), ids[0, p:]]


@pytest.mark.parametrize(("stage", "home"), [("zero0", "adapter"), *(("zero3", home) for home in HOMES)])
def test_export_computes_the_same_in_plain_libraries(pool, tmp_path, stage, home):
    logprobs, values = pool.run(export, stage, home, str(tmp_path / "final"))[0]
    actor, critic, head = exported(tmp_path / "final", home)
    rollout = tiny.rollout()
    for row in range(7):
        ids, p, r = alone(rollout, row)
        with torch.no_grad():
            plain = plain_logprobs(actor, ids, p, r)
            hidden = critic(ids).last_hidden_state[0, p - 1 : p + r - 1]
            assert torch.allclose(plain, logprobs[row, :r], atol=1e-5)
            assert torch.allclose(head(hidden)[:, 0], values[row, :r], atol=1e-5)


def export_tied(stage: str, folder: str) -> torch.Tensor:
    """As `export`, of a full actor whose output head is its embedding."""
    recipe = tiny.recipe(zero={"ds_config": tiny.ds_config(stage)}, **HOMES["full"])
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny.config(tie_word_embeddings=True)).requires_grad_(False)
    engine = HybridEngine(RolesModel(base, recipe), recipe, None, ReferenceModel(tiny.llama(), 1.0))
    export_final(engine, Path(folder), recipe, checkpoints.tokenizer())
    with engine.inference():
        logprobs = engine.forward(tiny.rollout(), torch.arange(7)).logprobs
    engine.close()
    return logprobs


@pytest.mark.parametrize("stage", ["zero0", "zero3"])
def test_a_full_actor_with_tied_weights_is_exported_whole(pool, tmp_path, stage):
    logprobs = pool.run(export_tied, stage, str(tmp_path / "final"))[0]
    actor = AutoModelForCausalLM.from_pretrained(tmp_path / "final" / "actor")
    assert "lm_head.weight" not in load_file(tmp_path / "final" / "actor" / "model.safetensors")
    rollout = tiny.rollout()
    for row in range(7):
        ids, p, r = alone(rollout, row)
        with torch.no_grad():
            plain = plain_logprobs(actor, ids, p, r)
        assert torch.allclose(plain, logprobs[row, :r], atol=1e-5)
