"""generation.compile: the same tokens, and one compiled step for all of them, in this iteration and the next."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from engine import rollout as rollout_module
from engine.config import GenerationConfig
from engine.rollout import generate
from engine.stopping import Stops
from tests import families, tiny

STOPS = Stops((7, 11))
SETTINGS = GenerationConfig(max_new_tokens=15, max_concurrent_sequences=4)
COMPILED = SETTINGS.model_copy(update={"compile": True})


def prompts_of(*lengths: int):
    return dataclasses.replace(tiny.prompts(rows=len(lengths)), prompt_lengths=torch.tensor(lengths))


def assert_same(module, prompts, seed: int) -> None:
    with torch.inference_mode():
        plain, compiled = (generate(module, prompts, settings, STOPS, seed) for settings in (SETTINGS, COMPILED))
    assert torch.equal(compiled.response_ids, plain.response_ids)
    assert torch.equal(compiled.response_lengths, plain.response_lengths)
    assert plain.response_lengths.unique().numel() > 2, "rows come and go"
    assert torch.allclose(compiled.sampler_logprobs, plain.sampler_logprobs, atol=1e-5)


@pytest.fixture
def graphs():
    """How many graphs were compiled since the start of the test."""
    torch.compiler.reset()
    counters.clear()
    yield lambda: (counters["stats"]["unique_graphs"], dict(counters["graph_break"]))
    torch.compiler.reset()


def test_by_inductor(graphs):
    module = tiny.llama()
    assert_same(module, prompts_of(5, 8, 2, 8, 3, 4, 2, 6, 7, 5), seed=0)
    assert graphs() == (1, {})
    for parameter in module.parameters():  # as the replica's are: gathered anew in every iteration, at other places
        parameter.data = parameter.data * 1.1
    assert_same(module, prompts_of(4, 3, 6, 6, 3, 5, 2), seed=1)
    assert graphs() == (1, {}), "weights, rows and prompts of another length compile nothing anew"


@pytest.mark.parametrize("name", ["Mistral", "Gemma 2", "GPT-J", "BLOOM", "DeepSeek-V3"])
def test_one_graph_for_other_families(name, graphs, tmp_path):
    """Traced alone: what inductor makes of it is the same for all."""
    module = AutoModelForCausalLM.from_pretrained(families.make(name, tmp_path)).eval()
    traced = torch.compile(module, dynamic=False, backend="eager")
    with mock.patch.object(rollout_module, "_compiled", lambda module: traced):
        assert_same(module, prompts_of(5, 8, 2, 8, 3, 4, 2, 6, 7, 5), seed=0)
    assert graphs() == (1, {})


def test_a_compiled_step_on_a_gpu_is_a_cuda_graph():
    on_gpu = mock.Mock(**{"parameters.side_effect": lambda: iter([mock.Mock(**{"device.type": "cuda"})])})
    with mock.patch("torch.compile") as compiler:
        rollout_module._compiled(on_gpu)
    assert compiler.call_args.kwargs == {"dynamic": False, "mode": "reduce-overhead"}
