"""Log-probs, entropy and full KL by chunks against the formulas written out on all logits, gradients by autograd."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from engine import causal, vocabulary_head
from engine.vocabulary_head import Asked, VocabularyHead
from tests import families, tiny

TOKENS, HIDDEN, TEMPERATURE = 7, 32, 0.7
LEARNING = ("logprobs", "entropy", "full_kl")
HEADS = {  # by hand, from what lm_head gives
    "Llama": lambda model, x: x,
    "Gemma 2": lambda model, x: 2 * (x / 2).tanh(),
    "Cohere": lambda model, x: model.config.logit_scale * x,
    "Phi": lambda model, x: x + model.lm_head.bias,
}


def model_of(family: str, seed: int = 0):
    torch.manual_seed(seed)
    config = families.config_of(family)
    causal.without_noise(config)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # no bias at 0, no norm at 1
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return model


class Case:
    """A head and that of a reference, hidden states of some tokens, and a loss with a weight for each value."""

    def __init__(self, family: str = "Llama", dtype: torch.dtype = torch.float32, count: int = TOKENS):
        self.family, (self.model, self.other) = family, (model_of(family, seed).to(dtype) for seed in (0, 1))
        self.head, self.ref_head = (VocabularyHead(m, TEMPERATURE) for m in (self.model, self.other))
        draw = torch.Generator().manual_seed(1)
        self.hidden, self.ref_hidden = (torch.randn(count, HIDDEN, generator=draw).to(dtype) for _ in range(2))
        self.hidden.requires_grad_()
        self.ids = torch.randint(0, tiny.VOCABULARY, (count,), generator=draw)
        self.weights = dict(zip(LEARNING, torch.randn(3, count, generator=draw), strict=True))

    def asked(self, **changes) -> Asked:
        everything = {"logits": self.head.logits, "entropy": True, "entropy_grad": True, "full_kl": True}
        reference = {"ref_hidden": self.ref_hidden, "ref_logits": self.ref_head.logits}
        return Asked(self.ids, **{**everything, **reference, **changes})

    def measured(self, **changes) -> dict[str, torch.Tensor]:
        return self.head.measure(self.hidden, self.asked(**changes))

    def naive(self, impossible: tuple[torch.Tensor, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """All tokens at once."""
        both = []
        for index, (model, hidden) in enumerate(((self.model, self.hidden), (self.other, self.ref_hidden))):
            weight = model.lm_head.weight
            logits = HEADS[self.family](model, hidden @ weight.T)
            if impossible is not None:
                logits = logits.masked_fill(impossible[index], -torch.inf)
            both.append((logits.to(torch.promote_types(logits.dtype, torch.float32)) / TEMPERATURE).log_softmax(-1))
        logp, logq = both[0], both[1].detach()
        p, chosen = logp.exp(), (torch.arange(len(self.ids)), self.ids)
        return {
            "logprobs": logp[chosen],
            "entropy": -torch.where(p > 0, p * logp, 0).sum(-1),
            "full_kl": torch.where(p > 0, p * (logp - logq), 0).sum(-1),
            "ref_logprobs": logq[chosen],
        }

    def gradients(self, values: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Of the weighed values: to the hidden states, and to the head's weights where they learn."""
        loss = sum((self.weights[name] * values[name]).sum() for name in LEARNING)
        wanted = [self.hidden, *(p for p in self.head.parameters() if p.requires_grad)]
        return torch.autograd.grad(loss, wanted)


def chunks_of(monkeypatch, tokens: int) -> None:
    monkeypatch.setattr(vocabulary_head, "LOGITS_BYTES", 4 * tiny.VOCABULARY * tokens)


def assert_close(found, wanted, tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", families.FAMILIES)
@torch.no_grad()
def test_the_copy_gives_every_familys_own_logits(family):
    """Whatever the family does after its backbone: to the bit."""
    model, ids = model_of(family), torch.arange(14).view(2, 7) + 20
    mask = torch.ones_like(ids, dtype=torch.bool)
    hidden = causal.call(causal.backbone(model), ids, mask, use_cache=False).last_hidden_state
    own = causal.call(model, ids, mask, use_cache=False).logits
    head = VocabularyHead(model, temperature=1.0)
    assert torch.equal(head.logits(hidden.flatten(0, 1)).view_as(own), own)
    assert torch.equal(head.whole_copy()(hidden.flatten(0, 1)).view_as(own), own)
    assert all(any(p is q for q in model.parameters()) for p in head.parameters()), "the weights are the model's own"
    assert sum(p.numel() for p in head.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
@pytest.mark.parametrize("chunk", [1, 3, TOKENS])
@pytest.mark.parametrize("family", HEADS)
def test_values_and_gradients_are_those_of_the_formulas(monkeypatch, family, chunk, trains):
    chunks_of(monkeypatch, chunk)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        case = Case(family, dtype)
        case.model.lm_head.requires_grad_(trains)
        found, wanted = case.measured(), case.naive()
        assert_close([found[name] for name in wanted], wanted.values(), tolerance)
        assert_close(case.gradients(found), case.gradients(wanted), tolerance)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
@pytest.mark.parametrize("name", LEARNING)
def test_each_value_has_its_own_gradient(monkeypatch, name, trains):
    """Numerically: one value alone, the others unused."""
    chunks_of(monkeypatch, 3)
    case = Case("Gemma 2", torch.float64, count=4)
    case.model.lm_head.requires_grad_(trains)

    def value(hidden):
        return case.head.measure(hidden, case.asked())[name]

    assert torch.autograd.gradcheck(value, case.hidden)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
def test_bfloat16_rounds_logits_alone(monkeypatch, trains):
    chunks_of(monkeypatch, 3)
    case = Case(dtype=torch.bfloat16)
    case.model.lm_head.requires_grad_(trains)
    found, wanted = case.measured(), case.naive()
    assert all(value.dtype == torch.float32 for value in found.values())
    assert_close([found[name] for name in wanted], wanted.values(), 1e-5)
    for one, other in zip(case.gradients(found), case.gradients(wanted), strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
def test_impossible_tokens_add_nothing(trains):
    case = Case()
    case.model.lm_head.requires_grad_(trains)
    never = torch.zeros(TOKENS, tiny.VOCABULARY, dtype=torch.bool)
    never[:, 10:20] = True
    never[torch.arange(TOKENS), case.ids] = False
    for ref_never in (never, torch.zeros_like(never)):
        found = case.measured(
            logits=lambda hidden: case.head.logits(hidden).masked_fill(never, -torch.inf),
            ref_logits=lambda hidden, mask=ref_never: case.ref_head.logits(hidden).masked_fill(mask, -torch.inf),
        )
        wanted = case.naive((never, ref_never))
        assert_close([found[name] for name in wanted], wanted.values(), 1e-5)
        assert all(gradient.isfinite().all() for gradient in case.gradients(found))
    found = case.measured(ref_logits=lambda hidden: case.ref_head.logits(hidden).masked_fill(never, -torch.inf))
    assert found["full_kl"].eq(torch.inf).all(), "what the reference never says is infinitely far"


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
def test_a_broken_logit_is_not_hidden(trains):
    case = Case()
    case.model.lm_head.requires_grad_(trains)
    case.hidden.data[2, 0] = torch.nan
    found = case.measured()
    assert all(found[name][2].isnan() and found[name][:2].isfinite().all() for name in LEARNING)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
def test_only_what_is_asked_for(trains):
    case, asked_with_graph = Case(), []
    case.model.lm_head.requires_grad_(trains)

    def logits(hidden):
        asked_with_graph.append(hidden.requires_grad)
        return case.head.logits(hidden)

    found = case.measured(logits=logits, entropy_grad=False, full_kl=False)
    assert set(found) == {"logprobs", "entropy", "ref_logprobs"}
    assert [name for name, value in found.items() if value.requires_grad] == ["logprobs"]
    assert set(case.measured(entropy=False, entropy_grad=False, full_kl=False, ref_hidden=None)) == {"logprobs"}
    asked_with_graph.clear()
    with torch.no_grad():
        silent = case.measured(logits=logits, full_kl=False)
    assert asked_with_graph == [False], "no gradient is prepared where none will be asked for"
    assert torch.equal(silent["logprobs"], found["logprobs"]), "or the first ratio would not be 1"


class Logits(TorchDispatchMode):
    """Inside, counts living tensors `[chunk, V]`, and those that are larger."""

    def __init__(self, chunk: int):
        super().__init__()
        self.chunk, self.live, self.most, self.larger = chunk, {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.live = {key: reference for key, reference in self.live.items() if not reference.expired()}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.shape[-1:] == (tiny.VOCABULARY,) and x.is_floating_point():
                self.larger += x.numel() > self.chunk * tiny.VOCABULARY
                if x.numel() == self.chunk * tiny.VOCABULARY:
                    self.live[x.untyped_storage()._cdata] = StorageWeakRef(x.untyped_storage())
        self.most = max(self.most, len(self.live))
        return result


@pytest.mark.parametrize("learning", [LEARNING, LEARNING[:1]], ids=["everything", "logprobs"])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
def test_three_buffers_of_a_chunk_at_most(monkeypatch, trains, learning):
    chunks_of(monkeypatch, 40)
    case = Case(count=200)
    case.model.lm_head.requires_grad_(trains)
    wanted = {"entropy": "entropy" in learning, "entropy_grad": "entropy" in learning, "full_kl": "full_kl" in learning}
    for graph in (True, False):
        with Logits(chunk=40) as seen, torch.set_grad_enabled(graph):
            found = case.measured(**wanted)
            if graph:
                sum(found[name].sum() for name in learning).backward()
        assert seen.most == 3 and not seen.larger
