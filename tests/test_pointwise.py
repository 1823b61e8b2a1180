"""Norms and rotary positions against transformers' own forward and autograd's backward, and where they may stand."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from engine import pointwise
from tests import families


def run(module: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    """Output, and the gradients of x and of the weight."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    output = module(x)
    output.backward(upstream.to(output.dtype))
    return [output.detach(), x.grad, module.weight.grad]


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_a_norm_is_llamas(scale):
    torch.manual_seed(0)
    module, x, upstream = LlamaRMSNorm(48), scale * torch.randn(3, 7, 48), torch.randn(3, 7, 48)
    nn.init.normal_(module.weight)
    expected = run(module, x, upstream)
    pointwise.take_over(module)
    for found, wanted in zip(run(module, x, upstream), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6 * wanted.abs().max().item())


def test_a_norm_of_bfloat16_rounds_where_llamas_does():
    torch.manual_seed(0)
    module, x, upstream = (
        LlamaRMSNorm(48).bfloat16(),
        torch.randn(3, 7, 48).bfloat16(),
        torch.randn(3, 7, 48).bfloat16(),
    )
    nn.init.normal_(module.weight)
    expected = run(module, x, upstream)
    pointwise.take_over(module)
    output, to_x, to_weight = run(module, x, upstream)
    assert output.dtype == to_x.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected[0], rtol=2**-8, atol=0)
    torch.testing.assert_close(to_x, expected[1], rtol=2**-7, atol=2**-8)
    torch.testing.assert_close(to_weight, expected[2], rtol=2**-6, atol=2**-5)


def test_a_norms_weight_may_be_frozen_and_its_input_a_leaf():
    module = LlamaRMSNorm(8)
    pointwise.take_over(module)
    module.weight.requires_grad_(False)
    assert module(torch.randn(2, 8, requires_grad=True)).requires_grad and not module(torch.randn(2, 8)).requires_grad


def turned(function, q, k, cos, sin, unsqueeze_dim) -> list[torch.Tensor]:
    q, k = (x.detach().clone().requires_grad_() for x in (q, k))
    heads = (x.transpose(1, 2) if unsqueeze_dim == 1 else x for x in (q, k))  # laid out as attention has them
    found = function(*heads, cos, sin, unsqueeze_dim=unsqueeze_dim)
    weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for x in found]
    sum((x * weight).sum() for x, weight in zip(found, weights, strict=True)).backward()
    return [*found, q.grad, k.grad]


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_rotary_positions_are_llamas(unsqueeze_dim):
    """In float64, with halves of cosines and sines that differ."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 5, heads, 8, dtype=torch.float64) for heads in (4, 2))
    cos, sin = (torch.randn(2, 5, 8, dtype=torch.float64) for _ in range(2))
    original = modeling_llama.apply_rotary_pos_emb
    original = original.args[0] if isinstance(original, partial) else original
    expected = turned(original, q, k, cos, sin, unsqueeze_dim)

    def refuse(*_):
        raise AssertionError("left to transformers")

    found = turned(partial(pointwise.rotary, refuse), q, k, cos, sin, unsqueeze_dim)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


BOTH = {"Llama", "Qwen2", "Qwen3", "Mistral", "Granite", "SmolLM 3", "Mixtral", "Qwen3-MoE", "DeepSeek-V3", "Jamba"}
BOTH |= {"Falcon-H1", "LFM2"}
KNOWN_NORMS = BOTH | {"Phi-3", "GLM-4"}
KNOWN_ROTARY = BOTH | {"Gemma", "Gemma 2", "Gemma 3 (text)", "Falcon", "Falcon (alibi)", "Phi", "StableLM"}
KNOWN_ROTARY |= {"StarCoder 2", "DBRX"}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_outputs_and_gradients_of_every_family(name, tmp_path):
    """Which families have norms and rotary positions that we know stands above."""
    model, found = families.plain(families.make(name, tmp_path / "model")), []
    ids = torch.arange(24).view(2, 12) % model.config.get_text_config().vocab_size
    file = sys.modules[type(model).__module__]
    ours = getattr(file, "apply_rotary_pos_emb", None)
    if isinstance(ours, partial):  # an earlier test's
        file.apply_rotary_pos_emb = ours.args[0]
    for known in (False, True):
        if known:
            pointwise.take_over(model)
            norms = sum("forward" in vars(module) for module in model.modules())
            assert (norms > 0) == (name in KNOWN_NORMS)
            assert isinstance(getattr(file, "apply_rotary_pos_emb", None), partial) == (name in KNOWN_ROTARY)
        output = model(ids).logits.float()
        (output.log_softmax(-1) * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        found.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
        found[-1]["logits"] = output.detach()
        with torch.no_grad():
            found[-1]["logits, no graph"] = model(ids).logits.float()
        model.zero_grad()
    largest = max(value.abs().max().item() for value in found[0].values())  # some are noise
    for key, value in found[0].items():
        atol = max(1e-4 * value.abs().max().item(), 1e-6 * largest)
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=atol, msg=key)
