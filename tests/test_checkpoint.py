"""Exported adapters and value head compute in plain transformers + peft what they computed in the engine."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from engine.checkpoint import export_final
from tests import tiny

pytestmark = pytest.mark.dist


def export(stage: str, home: str, folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Export the tiny roles, then the engine's own log-probs and values of the tiny rollout."""
    recipe = tiny.recipe(zero={"ds_config": f"ds_configs/{stage}.json"}, critic={"home": home})
    engine = tiny.engine(recipe)
    from pathlib import Path

    export_final(engine.roles, Path(folder), "tiny")
    with engine.inference():
        output = engine.forward(tiny.rollout(), torch.arange(7), values=True)
    engine.close()
    return output.logprobs, output.values


@pytest.mark.parametrize(("stage", "home"), [("zero0", "adapter"), ("zero3", "adapter"), ("zero3", "trunk")])
def test_export_computes_the_same_in_plain_peft(pool, tmp_path, stage, home):
    logprobs, values = pool.run(export, stage, home, str(tmp_path / "final"))[0]
    actor = PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "final" / "actor"))
    critic = actor
    if home == "adapter":
        critic = PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "final" / "critic"))
    head = load_file(tmp_path / "final" / "critic" / "value_head.safetensors")["weight"]
    rollout = tiny.rollout()
    for row in range(7):
        p, r = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
        ids = torch.cat([rollout.prompt_ids[row, -p:], rollout.response_ids[row, :r]])[None]
        with torch.no_grad():
            plain = actor(ids).logits[0, p - 1 : p + r - 1].log_softmax(-1)[torch.arange(r), ids[0, p:]]
            hidden = critic.get_base_model().model(ids).last_hidden_state[0, p - 1 : p + r - 1]
        assert torch.allclose(plain, logprobs[row, :r], atol=1e-5)
        assert torch.allclose((hidden @ head.T)[:, 0], values[row, :r], atol=1e-5)
