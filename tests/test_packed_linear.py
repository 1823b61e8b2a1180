"""Packed weights compute what the plain ones do, and leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.packed_linear import packed_linears
from tests import tiny


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("shape", [(1, 37), (5, 37), (2, 3, 37), (300, 37)], ids=str)
def test_against_a_product_in_float64(dtype, tolerance, shape):
    torch.manual_seed(0)
    for bias in (True, False):
        layer, x = nn.Linear(37, 19, bias=bias).to(dtype), torch.randn(shape).to(dtype)
        wanted = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
        with torch.inference_mode(), packed_linears(layer):
            found = layer(x)
        assert found.dtype == dtype and (found.double() - wanted).abs().max() < tolerance


def test_only_plain_linears_and_only_inside():
    class Odd(nn.Linear):
        pass

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.odd, self.double = nn.Linear(4, 4), Odd(4, 4), nn.Linear(4, 4).double()
            self.patched = nn.Linear(4, 4)
            self.patched.forward = self.mine = lambda x: x

    model = Model()
    with pytest.raises(KeyError), packed_linears(model):
        assert "forward" in vars(model.plain)
        assert not {"forward"} & (vars(model.odd).keys() | vars(model.double).keys())
        assert model.patched.forward is model.mine
        raise KeyError
    assert "forward" not in vars(model.plain) and model.patched.forward is model.mine


def test_a_later_change_of_a_weight_is_seen_the_next_time():
    module, ids = tiny.llama().eval(), torch.arange(12)[None]
    with torch.no_grad():
        for _ in range(2):
            wanted = module(ids).logits
            with packed_linears(module):
                assert torch.allclose(module(ids).logits, wanted, atol=1e-5)
            module.lm_head.weight.data *= 2
