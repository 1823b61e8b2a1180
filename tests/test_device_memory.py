"""What is free, and what a KV cache takes, against caches that were filled and control groups made of files."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from engine import device_memory
from tests import families, tiny


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Falcon", "MPT", "DeepSeek-V3", "Phi-3"])
@torch.no_grad()
def test_a_kv_cache_takes_what_was_estimated(name, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(families.make(name, tmp_path / "model"), dtype=torch.float32)
    cache = DynamicCache()  # without the config it keeps all columns, windows or not
    model(torch.randint(0, tiny.VOCABULARY, (3, 11)), past_key_values=cache, use_cache=True)
    taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    estimate = device_memory.kv_cache_bytes(model.config, rows=3, columns=11, dtype=torch.float32)
    # Falcon has one head for keys and values, by a switch of its own: the estimate is a bound.
    assert estimate == taken if name != "Falcon" else estimate >= taken


def test_the_ranks_of_a_host_share_its_memory():
    alone, shared = (device_memory.free_bytes(torch.device("cpu"), ranks) for ranks in (1, 4))
    assert 0 < shared < alone / 2


MEMORY = {
    "two": ("0::/a/b", "", "memory.max", "memory.current", "inactive_file"),
    "one": (
        "3:cpuset:/\n4:cpu,memory:/a/b",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive",
    ),
}


@pytest.mark.parametrize("version", MEMORY)
def test_the_limits_of_a_control_group_hold(version, tmp_path, monkeypatch):
    listing, controller, limit, usage, cache = MEMORY[version]
    monkeypatch.setattr(device_memory, "CGROUPS", ((controller, str(tmp_path), limit, usage, cache),))
    (tmp_path / "self").write_text(listing)
    free = device_memory._cgroup_room
    assert free(tmp_path / "nothing") == free(tmp_path / "self") == float("inf")
    for folder, most, used, cached in (("a/b", "max", 70, 0), ("a", "100", 70, 20), (".", "1000", 70, 0)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, text in ((limit, most), (usage, str(used)), ("memory.stat", f"anon 3\n{cache} {cached}\n")):
            (tmp_path / folder / name).write_text(text)
    assert free(tmp_path / "self") == 100 - 70 + 20, "the narrowest of all around it, what is mere cache given back"
    (tmp_path / "self").write_text(listing.replace("/a/b", "/of/the/host"))
    assert free(tmp_path / "self") == 1000 - 70
