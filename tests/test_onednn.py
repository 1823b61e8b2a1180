"""Linear layers by oneDNN compute what torch's do, forwards and backwards; packed weights leave no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from engine import onednn
from engine.onednn import packed_linears, take_over
from tests import tiny

SHAPES = pytest.mark.parametrize("shape", [(1, 37), (5, 37), (2, 3, 37), (300, 37), (0, 37)], ids=str)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("bias", [True, False])
@SHAPES
def test_against_products_in_float64(dtype, tolerance, bias, shape):
    torch.manual_seed(0)
    layer, x = nn.Linear(37, 19, bias=bias).to(dtype), torch.randn(shape).to(dtype).requires_grad_()
    exact, exact_x = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    wanted, slope = exact(exact_x), torch.randn(*shape[:-1], 19).to(dtype)
    wanted.backward(slope.double())
    assert take_over(layer) == [layer]

    def assert_close(found, expected):
        assert found.dtype == dtype and found.shape == expected.shape
        assert torch.allclose(found.double(), expected, atol=tolerance, rtol=tolerance)

    found = layer(x)
    found.backward(slope)
    assert_close(found, wanted)
    for own, other in [(x, exact_x), *zip(layer.parameters(), exact.parameters(), strict=True)]:
        assert_close(own.grad, other.grad)
    with torch.inference_mode(), packed_linears(layer):
        assert (layer.packed is not None) == onednn._can_pack(layer.weight)
        assert_close(layer(x), wanted)


def test_float32_asks_onednn():
    layer, seen = nn.Linear(8, 8), []
    take_over(layer)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x = torch.randn(4, 8, requires_grad=True)
    with Watch():
        layer(x).sum().backward()
    assert sum("mkldnn._linear_pointwise" in name for name in seen) == 2, "the layer's output and its input's gradient"


def test_the_input_is_kept_for_a_weight_that_learns_alone():
    layer, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    take_over(layer)
    for learns in (True, False):
        layer.weight.requires_grad_(learns)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.shape) or t, lambda t: t):
            layer(x)
        assert (x.shape in kept) == learns


def test_only_plain_linears_and_packed_only_inside():
    class Odd(nn.Linear):
        pass

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.odd, self.wide = nn.Linear(4, 4), Odd(4, 4), nn.Linear(4, 4).double()

    model, x = Model(), torch.randn(3, 4)
    with pytest.raises(KeyError), packed_linears(model):
        assert model.plain.packed is not None and model.wide.packed is None
        assert type(model.odd) is Odd
        raise KeyError
    assert model.plain.packed is None and not any("packed" in vars(part) for part in model.modules())
    assert torch.allclose(model.wide(x.double()), nn.functional.linear(x.double(), model.wide.weight) + model.wide.bias)


def test_a_later_change_of_a_weight_is_seen_the_next_time():
    module, ids = tiny.llama().eval(), torch.arange(12)[None]
    with torch.no_grad():
        for _ in range(2):
            wanted = module(ids).logits
            with packed_linears(module):
                assert torch.allclose(module(ids).logits, wanted, atol=1e-5)
            module.lm_head.weight.data *= 2
