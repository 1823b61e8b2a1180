"""The price of four roles: measured by walking live storages, the table of docs/models.md."""

from __future__ import annotations

import pytest

from tests import role_bytes

pytestmark = pytest.mark.dist


def test_four_roles_on_one_base_cost_a_lora_run_and_their_adapters(pool, tmp_path):
    found = role_bytes.measure(pool, tmp_path)
    assert found["together"] <= 1.05 * found["sft and adapters"]
    separate = sum(found[role] for role in ("actor", "critic", "reference", "reward"))
    assert separate > 2.8 * found["together"]
    assert found["reference"] == pytest.approx(sum(p.nbytes for p in role_bytes.base().parameters()) / 2, rel=1e-3)
