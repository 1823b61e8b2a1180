"""Predicted bytes of the KV cache and of the buffers of log-probs against those of two ranks."""

from __future__ import annotations

import dataclasses
from unittest.mock import patch

import pytest
import torch

from engine import kv_cache, planner, shapes, vocabulary_head
from engine.ds_config import read_ds_config
from engine.logprob_memory import LiveBytes
from engine.rollout import generate
from engine.stopping import Stops
from tests import live_storages, tiny
from tests.test_planner import HOMES, ODD, PROMPT, RESPONSE, ROWS, engine_of, longest_rows, recipe_of, with_sizes

pytestmark = pytest.mark.dist

SEQUENCES = 7
CONCURRENT = {"all at once": 64, "slots are used again": 3}
CHUNK = 4 * ODD["vocab_size"] * 50
"""Bytes: 50 tokens, where a micro-batch has up to 92."""


def cached(path: str, stage: str, dtype: str, changes: dict) -> int:
    """The most bytes of keys and values, of as many of the longest prompts as this rank gets."""
    engine, settings = engine_of(path, stage, dtype, 3, changes)
    mine = (SEQUENCES + 1) // 2
    prompts = tiny.prompts(mine, width=PROMPT)
    prompts = dataclasses.replace(prompts, prompt_lengths=torch.full((mine,), PROMPT))
    found, append = [], kv_cache.MovingRows.append

    def watched(rows, *arguments) -> None:
        append(rows, *arguments)
        memory = [buffer for layer in rows.cache.layers for buffer in layer.memory]
        found.append(live_storages.fresh_bytes(memory, set()))

    with patch.object(kv_cache.MovingRows, "append", watched), engine.generation() as module:
        generate(module, prompts, settings.generation, Stops(()), 0, idle=engine.idle_pass)
    engine.close()
    return max(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("concurrent", CONCURRENT)
def test_a_kv_cache_to_the_byte(pool, tmp_path, concurrent, dtype):
    changes = with_sizes(
        {
            "data": {"prompts_per_iteration": SEQUENCES},
            "generation": {"max_concurrent_sequences": CONCURRENT[concurrent]},
        }
    )
    settings = recipe_of(tmp_path, "zero3", dtype, 3, changes)
    raw = read_ds_config(settings.zero.ds_config)
    generation = planner.phases(settings, raw, 2, on_cuda=False)["generation"]
    predicted = generation[shapes.SHARED].device[planner.CACHE]
    assert pool.run(cached, str(tmp_path), "zero3", dtype, changes) == [predicted] * 2


CASES = {
    "as it is": {},
    "temperature": {"generation": {"temperature": 0.7}},
    "reference apart": {"reference": HOMES["actor, full"]["reference"]},
    "full KL in the reward": {"kl": {"estimator": "full"}},
    "full KL in the loss": {"kl": {"placement": "loss", "estimator": "full"}},
    "entropy": {"ppo": {"entropy_coef": 0.01}},
}


def measured(path: str, dtype: str, changes: dict) -> list[int]:
    """The most bytes of `[n, V]` tensors at once, in an inference forward and in one that learns."""
    engine, settings = engine_of(path, "zero3", dtype, 3, changes)
    rollout, ppo, kl = longest_rows(different=False), settings.ppo, settings.kl
    full, found = kl.estimator == "full", []

    def wide(tensor: torch.Tensor) -> bool:
        return tensor.dim() > 1 and tensor.shape[-1] == ODD["vocab_size"]

    with patch.object(vocabulary_head, "LOGITS_BYTES", CHUNK):
        with LiveBytes(wide) as counter, engine.inference():
            in_reward = full and kl.placement == "reward"
            engine.forward(rollout, torch.arange(ROWS), ref_logprobs=True, values=True, full_kl=in_reward)
        found.append(counter.peak_bytes)
        with LiveBytes(wide) as counter:
            wanted = {"entropy": True, "entropy_grad": ppo.entropy_coef > 0, "values": True}
            output = engine.forward(rollout, torch.arange(ROWS), full_kl=full and kl.placement == "loss", **wanted)
            engine.backward(output.logprobs.sum(), output.values.sum(), last=True)
        found.append(counter.peak_bytes)
    engine.close()
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_log_prob_buffers_to_the_byte(pool, tmp_path, monkeypatch, case, dtype):
    monkeypatch.setattr(vocabulary_head, "LOGITS_BYTES", CHUNK)
    changes = with_sizes(CASES[case])
    settings = recipe_of(tmp_path, "zero3", dtype, 3, changes)
    shared, *_ = shapes.homes(settings)
    predicted = [planner.logits_bytes(settings, shared, learning) for learning in (False, True)]
    assert RESPONSE * ROWS > 50
    assert pool.run(measured, str(tmp_path), dtype, changes) == [predicted] * 2
