"""The update's optional terms (KL in the loss, dual clip, entropy bonus) against a plain update without the engine."""

from __future__ import annotations

import pytest
import torch

from engine.roles import ACTOR, CRITIC
from engine.update import update
from tests import tiny
from tests.reference import Reference
from tests.test_hybrid_engine import assert_same, trained_weights

pytestmark = pytest.mark.dist

KL_COEF = 0.7
TERMS = {
    "k2": {"kl": {"placement": "loss", "estimator": "k2"}},
    "k3": {"kl": {"placement": "loss", "estimator": "k3"}},
    "full": {"kl": {"placement": "loss", "estimator": "full"}},
    "dual_clip": {"ppo": {"dual_clip": 1.5}},
    "entropy": {"ppo": {"entropy_coef": 5.0}},
    "all": {"kl": {"placement": "loss", "estimator": "k2"}, "ppo": {"dual_clip": 1.5, "entropy_coef": 5.0}},
    "cold_full": {"kl": {"placement": "loss", "estimator": "full"}, "generation": {"temperature": 0.6}},
}


class FullReference(Reference):
    """`Reference` with every term of the loss, written once more from the papers; one row and one token at a time."""

    def __init__(self, recipe):
        super().__init__(recipe)
        self.base = tiny.llama()
        self.dual_clipped = 0

    def distributions(self, experience, row):
        """Log-probabilities `[R, V]` of policy and reference, and the chosen ids `[R]`, without any padding."""
        sampled = experience.rollout
        p, r = int(sampled.prompt_lengths[row]), int(sampled.response_lengths[row])
        ids = torch.cat([sampled.prompt_ids[row, -p:], sampled.response_ids[row, :r]])[None]
        temperature = self.recipe.generation.temperature
        policy, reference = (
            (model(input_ids=ids).logits[0, p - 1 : p + r - 1] / temperature).log_softmax(-1)
            for model in (self.actor, self.base)
        )
        return policy, reference.detach(), ids[0, p:]

    def loss(self, experience, rows):
        settings, kl = self.recipe.ppo, self.recipe.kl
        total, tokens = 0.0, 0
        for row in rows.tolist():
            policy, reference, chosen = self.distributions(experience, row)
            values = self.sequence(experience, row)[2]
            for t, token in enumerate(chosen.tolist()):
                p = policy[t]
                total = total + self.policy_term(p[token], experience, row, t)
                total = total - settings.entropy_coef * -(p.exp() * p).sum()
                if kl.placement == "loss":
                    ref_logprob = experience.evaluation.ref_logprobs[row, t]
                    total = total + KL_COEF * self.kl_term(p, reference[t], token, ref_logprob, experience, row, t)
                total = total + settings.value_coef * self.value_term(values[t], experience, row, t)
            tokens += len(chosen)
        return total / tokens

    def policy_term(self, logprob, experience, row, t):
        settings = self.recipe.ppo
        advantage = experience.advantages[row, t]
        ratio = (logprob - experience.evaluation.old_logprobs[row, t]).exp()
        objective = torch.min(
            ratio * advantage, ratio.clamp(1 - settings.clip_ratio, 1 + settings.clip_ratio) * advantage
        )
        if settings.dual_clip is not None and advantage < 0 and objective < settings.dual_clip * advantage:
            self.dual_clipped += 1
            objective = settings.dual_clip * advantage
        return -objective

    def kl_term(self, p, q, token, ref_logprob, experience, row, t):
        if self.recipe.kl.estimator == "full":
            return (p.exp() * (p - q)).sum()
        d = p[token] - ref_logprob
        ratio = (p[token] - experience.evaluation.old_logprobs[row, t]).exp().detach()
        return ratio * (d**2 / 2 if self.recipe.kl.estimator == "k2" else (-d).exp() - 1 + d)

    def value_term(self, value, experience, row, t):
        target, before = experience.returns[row, t], experience.evaluation.old_values[row, t]
        limit = self.recipe.ppo.value_clip
        near = before + (value - before).clamp(-limit, limit)
        return 0.5 * torch.max((value - target) ** 2, (near - target) ** 2)


@pytest.fixture(scope="module")
def expected():
    """Norms and weights of the plain update for each choice of terms, made when first asked for."""
    found = {}

    def of(terms: str):
        if terms not in found:
            reference = FullReference(tiny.recipe(**TERMS[terms]))
            norms = reference.update(tiny.experience())
            found[terms] = (norms, reference.weights(), reference.dual_clipped)
        return found[terms]

    return of


def run_update(settings: dict) -> dict:
    recipe = tiny.recipe(**settings)
    engine = tiny.engine(recipe)
    base = engine.frozen_hash()
    stats = update(engine, tiny.experience(), recipe, iteration=0, kl_coef=KL_COEF, frozen=frozenset())
    weights = trained_weights(engine)
    moved = engine.frozen_hash() != base
    engine.close()
    return {"weights": weights, "norms": stats.grad_norms, "sums": dict(stats.sums), "base_moved": moved}


def on_stage(stage: str, terms: str) -> dict:
    return {"zero": {"ds_config": tiny.ds_config(stage)}, **TERMS[terms]}


@pytest.mark.parametrize("terms", TERMS)
def test_two_ranks_make_the_plain_update(pool, expected, terms):
    norms, weights, dual_clipped = expected(terms)
    for result in pool.run(run_update, on_stage("zero3", terms)):
        assert_same(result, norms, weights)
        assert result["sums"]["policy/dual_clipped"] == dual_clipped
    assert (dual_clipped > 0) == ("dual_clip" in TERMS[terms].get("ppo", {})), "nothing was dual-clipped: a weak test"


@pytest.mark.parametrize("terms", ["full", "all"])
def test_one_rank_at_stage_0_makes_it_too(single, expected, terms):
    norms, weights, _ = expected(terms)
    (result,) = single.run(run_update, on_stage("zero0", terms))
    assert_same(result, norms, weights)


@pytest.mark.parametrize("terms", ["full", "all"])
def test_recomputed_activations_make_it_too(pool, expected, terms):
    """The full KL runs the reference inside the actor's forward: each must be recomputed with its own adapter."""
    norms, weights, _ = expected(terms)
    settings = on_stage("zero3", terms)
    settings["zero"]["activation_checkpointing"] = True
    for result in pool.run(run_update, settings):
        assert_same(result, norms, weights)


def test_each_term_changes_the_actor(expected):
    """Else the comparisons above would compare nothing."""
    plain = Reference(tiny.recipe())
    plain_norms = plain.update(tiny.experience())
    for terms in ("k2", "k3", "full", "dual_clip", "entropy"):
        norms, _, _ = expected(terms)
        assert abs(norms[0][ACTOR] / plain_norms[0][ACTOR] - 1) > 1e-2, terms
        assert norms[0][CRITIC] == pytest.approx(plain_norms[0][CRITIC], rel=1e-5), terms
