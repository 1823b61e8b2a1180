"""Log-probs on two ranks under DeepSpeed: what is fetched, whole gradients of a head that trains, roles elsewhere."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from engine import dist, traffic, vocabulary_head
from engine.hybrid_engine import HybridEngine
from engine.roles import ACTOR, Layout, ReferenceModel, RolesModel
from tests import tiny

pytestmark = pytest.mark.dist


def gathered_bytes(vocabulary: int) -> list[tuple[float, float]]:
    """What a rank fetches in three forwards of all roles and in their backwards."""
    recipe = tiny.recipe(zero={"ds_config": tiny.ds_config("zero3")})
    base = LlamaForCausalLM(tiny.config(vocab_size=vocabulary)).requires_grad_(False)
    engine, found = HybridEngine(RolesModel(base, recipe), recipe), []
    for _ in range(3):
        start = traffic.received["gathered"]
        output = engine.forward(tiny.rollout(), torch.arange(7), entropy=True, values=True, ref_logprobs=True)
        middle = traffic.received["gathered"]
        engine.backward(output.logprobs.sum(), output.values.sum(), last=True)
        found.append((middle - start, traffic.received["gathered"] - middle))
        engine.step()
    engine.close()
    return found


def test_a_frozen_head_is_fetched_once(pool):
    """By two vocabularies: what grows is a matrix of hidden size x tokens, half of which a rank of two lacks.

    At first that is the embedding for each of three roles, and the head for actor and reference together. Once
    DeepSpeed knows the order, it keeps the embedding for the next role.
    """
    small, large = (pool.run(gathered_bytes, vocabulary)[0] for vocabulary in (50, 1050))
    matrix = 1000 * tiny.config().hidden_size * 4 / 2
    growth = [((b[0] - a[0]) / matrix, (b[1] - a[1]) / matrix) for a, b in zip(small, large, strict=True)]
    assert growth == [(4, 0), (2, 0), (2, 0)], "forward and backward"


def gradient_norm(stage: str, tied: bool, chunk: int) -> float:
    """Of an actor that trains in full, as two ranks with different numbers of tokens find it."""
    vocabulary_head.LOGITS_BYTES = 4 * tiny.VOCABULARY * chunk
    try:
        homes = {"actor": {"train": "full"}, "reference": {"home": "model"}, "critic": {"home": "trunk"}}
        recipe = tiny.recipe(**homes, zero={"ds_config": tiny.ds_config(stage)})
        engine = HybridEngine(RolesModel(full_llama(tied), recipe), recipe, None, None)
        mine = torch.arange(7)[dist.rank() * 5 :][: (5, 2)[dist.rank()]]
        output = engine.forward(tiny.rollout(), mine, entropy=True, entropy_grad=True, values=True)
        engine.backward((output.logprobs - 3 * output.entropy).sum(), 0 * output.values.sum(), last=True)
        norm = engine.step()[ACTOR]
        engine.close()
    finally:
        vocabulary_head.LOGITS_BYTES = 64 * 2**20
    return norm


def full_llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny.config(tie_word_embeddings=tied))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_a_head_that_trains_gets_its_whole_gradient(pool, stage, tied):
    model, rollout, total = full_llama(tied), tiny.rollout(), 0.0
    for row in range(len(rollout)):
        p, r = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
        ids = torch.cat([rollout.prompt_ids[row, -p:], rollout.response_ids[row, :r]])[None]
        logp = model(ids).logits[0, p - 1 : p + r - 1].log_softmax(-1)
        total = total + logp[torch.arange(r), ids[0, p:]].sum() + 3 * (logp.exp() * logp).sum()
    (total / 2).backward()  # ranks are averaged
    wanted = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    for chunk in (3, 1000):
        assert pool.run(gradient_norm, stage, tied, chunk) == pytest.approx([wanted] * 2, rel=1e-5)


def without_log_probs(stage: str) -> list[float]:
    """How far values and reference log-probs, asked for alone, are from those asked for with the actor's log-probs.

    And the reference's from those of its model without an engine.
    """
    homes = {"critic": {"home": "model"}, "reference": {"home": "model"}}
    engine, sampled = tiny.engine(tiny.recipe(**homes, zero={"ds_config": tiny.ds_config(stage)})), tiny.rollout()
    layout = Layout.of(sampled)
    apart, found = ReferenceModel(tiny.llama(seed=8), engine.roles.temperature)(layout), []
    for _ in range(3):
        with engine.inference():
            few, all_of_them = (
                engine.forward(sampled, torch.arange(7), logprobs=wanted, values=True, ref_logprobs=True)
                for wanted in (False, True)
            )
        assert few.logprobs is None
        found += [(few.values - all_of_them.values).abs().max(), (few.ref_logprobs - apart).abs().max()]
        found.append((all_of_them.ref_logprobs - apart).abs().max())
    engine.close()
    return [difference.item() for difference in found]


@pytest.mark.parametrize("stage", ["zero0", "zero3"])
def test_a_shared_engine_may_have_nothing_to_do(pool, stage):
    assert max(max(found) for found in pool.run(without_log_probs, stage)) < 1e-5
