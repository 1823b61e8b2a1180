"""Every family of tests/families.py passes every check of it, and docs/models.md says so."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from engine import causal
from engine.config import REPOSITORY
from engine.replica import Replica
from tests import families, tiny
from tests.families import FAMILIES

TOLERANCE = 1e-5
"""Log-probs, logits and values of size 1 to 10 in float32."""

SWITCHES = {
    "sliding_window": 64,
    "window_size": 64,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "logit_scale": 1.0,
    "alibi": False,
    "residual_multiplier": 1.0,
}
"""What changes the function itself, and the value that switches it off."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A family's checkpoint, made once for all tests of this file."""
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = families.make(name, tmp_path_factory.mktemp("family"))
        return made[name]

    return get


@pytest.mark.parametrize("name", FAMILIES)
def test_one_process(name, checkpoint):
    found = families.check_alone(checkpoint(name))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if family.model_type in causal.PACKABLE])
def test_packed_without_the_engines_attention(name, attention, checkpoint, monkeypatch):
    """As on a device where transformers' own runs: its masks keep sequences apart."""
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint(name), attn_implementation=attention).eval()
    except ValueError as error:  # not every family has it
        pytest.skip(str(error)[:100])
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)
    rollout = tiny.rollout()
    ids, mask = rollout.sequences, rollout.sequence_mask
    with torch.no_grad():
        padded, packed = (causal.hidden_states(model, ids, mask, way) for way in (False, True))
    assert (padded - packed)[mask].abs().max() < TOLERANCE


@pytest.mark.dist
@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks(name, checkpoint, pool):
    found = families.check_ranks(pool, checkpoint(name))
    assert max(found.values()) < TOLERANCE, found


def logits(folder, **changed) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **changed).eval()
    with torch.no_grad():
        return model(torch.arange(12)[None] + 20).logits


@pytest.mark.parametrize(
    ("name", "switch"), [(n, s) for n, family in FAMILIES.items() for s in SWITCHES if s in family.settings]
)
def test_what_is_switched_on_is_felt(name, switch, checkpoint):
    """Or the table would claim what no check could see."""
    folder = checkpoint(name)
    assert (logits(folder) - logits(folder, **{switch: SWITCHES[switch]})).abs().max() > 1e-2


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "LFM2"])  # it has no dropout
def test_noise_is_on_in_the_checkpoint(name, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name))
    ids = torch.arange(12)[None] + 20
    with torch.no_grad():
        assert (model.train()(ids).logits - model.eval()(ids).logits).abs().max() > 1e-2


def test_the_table_has_a_row_for_each_family():
    rows = [line for line in (REPOSITORY / "docs" / "models.md").read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]
    table = {row[0]: row for row in cells if len(row) == len(families.COLUMNS) + 4}
    header = table.pop("family")
    assert header[3:-1] == list(families.COLUMNS)
    assert {name: row[1:3] for name, row in table.items()} == {n: [f.model_type, f.on] for n, f in FAMILIES.items()}
    assert all(float(row[-1]) < TOLERANCE for row in table.values())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_weights_that_visit_for_one_layer_compute_the_same(name, checkpoint):
    """Every family reads its weights where the sampler expects it, with a cache too."""
    replica = Replica(families.roles(families.recipe(checkpoint(name))))
    ids, found = tiny.rollout().prompt_ids, []
    mask = torch.ones_like(ids, dtype=torch.bool)
    for budget in (None, 0):
        module = replica.fill(budget)
        cache = DynamicCache(config=module.config)
        first = causal.call(module, ids[:, :-1], mask[:, :-1], past_key_values=cache, use_cache=True)
        then = causal.call(module, ids[:, -1:], mask, past_key_values=cache, use_cache=True)
        found.append(torch.cat([first.logits, then.logits], 1))
        assert (replica.resident_fraction == 0) == (budget == 0), "a weight that belongs to no group"
        replica.free()
    assert torch.equal(*found)
