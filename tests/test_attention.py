"""Attention on a CPU: in float32 whatever the inputs, a token's as products, by every model whose attention is sdpa."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from engine import attention, models
from engine.role_config import ModelConfig
from tests import tiny


@pytest.fixture
def registered():
    """What a test registers goes again."""
    yield AttentionInterface._global_mapping
    AttentionInterface.register("sdpa", sdpa_attention_forward)


def inputs(dtype, heads=4, kv_heads=2, queries=9):
    torch.manual_seed(0)
    shapes = [(2, heads, queries, 8), (2, kv_heads, 9, 8), (2, kv_heads, 9, 8)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def outputs(function, tensors, mask, **settings):
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    output = function(module, *tensors, mask, **settings)[0]
    output.backward(torch.ones_like(output) * torch.arange(8).to(output.dtype))
    return [output, *(x.grad for x in tensors)]


def exact(tensors, mask, scaling=None):
    wide = [x.detach().double().requires_grad_() for x in tensors]
    query, key, value = wide[0], *(x.repeat_interleave(2, dim=1) for x in wide[1:])
    output = scaled_dot_product_attention(query, key, value, mask, scale=scaling).transpose(1, 2)
    output.backward(torch.ones_like(output) * torch.arange(8))
    return [output, *(x.grad for x in wide)]


def assert_rounded_once(found, wanted, dtype):
    for own, other in zip(found, wanted, strict=True):
        assert own.dtype == dtype
        # What is left is one rounding, of the result: half a unit in the last place.
        error, allowed = (own.double() - other).abs(), torch.finfo(dtype).eps / 2 * other.abs()
        assert (error <= 1.01 * allowed + 4e-6 * other.abs().max()).all()


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_against_float64(dtype, kind):
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    mask[1, ..., 0] = False
    mask[1, :, 0, 0] = True
    wanted = exact(inputs(dtype), mask)
    given = mask if kind == "bool" else as_floats(mask, dtype)
    assert_rounded_once(outputs(attention._sdpa, inputs(dtype), given), wanted, dtype)


def as_floats(mask, dtype):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@pytest.mark.parametrize("kind", ["bool", "float", "each head its own", "none"])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_token_against_float64(dtype, scaling, kind, monkeypatch):
    """What a decoding step asks for: heads share keys, columns on both sides are not to be seen."""
    mask = torch.ones(2, 4 if kind == "each head its own" else 1, 1, 9, dtype=torch.bool)
    mask[..., 8], mask[1, ..., :3], mask[1, -1:, :, 5] = False, False, False
    wanted = exact(inputs(dtype, queries=1), None if kind == "none" else mask, scaling)
    given = {"float": as_floats(mask, dtype), "none": None}.get(kind, mask)
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)
    assert_rounded_once(outputs(attention._sdpa, inputs(dtype, queries=1), given, scaling=scaling), wanted, dtype)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sequences_end_to_end_against_float64(dtype, window):
    """Sequences of 4, 1 and 4 tokens in each row's place: each sees its own, as far back as the window."""
    lengths, mask = [4, 1, 4], torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    for start, end in ((0, 4), (4, 5), (5, 9)):
        mask[..., start:end, start:end] = torch.ones(end - start, end - start).tril().triu(1 - (window or 9)).bool()
    tensors = [x[:1].detach().requires_grad_() for x in inputs(dtype)]
    wanted = exact(tensors, mask)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    for given in [mask] if window else [mask, None]:  # a family that makes no mask of its own is plainly causal
        fresh = [x.detach().clone().requires_grad_() for x in tensors]
        assert_rounded_once(outputs(attention._sdpa, fresh, given, cu_seq_lens_q=ends), wanted, dtype)


def test_what_is_special_is_left_to_transformers(monkeypatch):
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *given, **settings: (given[1], settings))
    tensors = inputs(torch.float32, queries=1)
    for special in ({"dropout": 0.1}, {"softcap": 30.0}, {"position_bias": torch.zeros(2, 4, 1, 9)}):
        assert attention._sdpa(nn.Module(), *tensors, None, **special)[1].keys() == special.keys()


def test_a_loaded_model_computes_so(tmp_path, registered, monkeypatch):
    tiny.llama().save_pretrained(tmp_path)
    seen, plain = [], attention.sdpa_attention_forward

    def watched(module, query, *rest, **settings):
        seen.append(query.dtype)
        return plain(module, query, *rest, **settings)

    monkeypatch.setattr(attention, "sdpa_attention_forward", watched)
    model = models.load_causal(ModelConfig(path=str(tmp_path), dtype="bfloat16"))
    logits = model(torch.arange(6)[None]).logits
    assert logits.dtype == torch.bfloat16
    assert seen == [torch.float32] * model.config.num_hidden_layers
