"""The update's options (terms of the loss, importance weights, whose log-probs are the old ones) against a plain update
without the engine."""

from __future__ import annotations

import math
from dataclasses import replace

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
    "importance": {"ppo": {"importance_cap": 1.1}},
    "on_policy": {
        "kl": {"placement": "loss", "estimator": "k2"},
        "ppo": {"old_logprobs": "on_policy", "epochs": 1, "minibatch_sequences": 7},
    },
    "cold_full": {"kl": {"placement": "loss", "estimator": "full"}, "generation": {"temperature": 0.6}},
}


class FullReference(Reference):
    """`Reference` with every term of the loss, written once more from the papers; one row and one token at a time."""

    def __init__(self, recipe):
        super().__init__(recipe)
        self.base = tiny.llama()
        self.dual_clipped = 0
        self.weights_seen = []

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

    def old_logprob(self, logprob, experience, row, t):
        on_policy = self.recipe.ppo.old_logprobs == "on_policy"
        return logprob.detach() if on_policy else experience.evaluation.old_logprobs[row, t]

    def weight(self, experience, row, t):
        old, sampler = experience.evaluation.old_logprobs[row, t], experience.rollout.sampler_logprobs[row, t]
        self.weights_seen.append(min(math.exp(old - sampler), self.recipe.ppo.importance_cap or 0))
        return self.weights_seen[-1] if self.recipe.ppo.importance_cap else 1.0

    def policy_term(self, logprob, experience, row, t):
        settings = self.recipe.ppo
        advantage = experience.advantages[row, t]
        ratio = (logprob - self.old_logprob(logprob, experience, row, t)).exp()
        objective = torch.min(
            ratio * advantage, ratio.clamp(1 - settings.clip_ratio, 1 + settings.clip_ratio) * advantage
        )
        if settings.dual_clip is not None and advantage < 0 and objective < settings.dual_clip * advantage:
            self.dual_clipped += 1
            objective = settings.dual_clip * advantage
        return -objective * self.weight(experience, row, t)

    def kl_term(self, p, q, token, ref_logprob, experience, row, t):
        if self.recipe.kl.estimator == "full":
            return (p.exp() * (p - q)).sum()
        d = p[token] - ref_logprob
        ratio = (p[token] - self.old_logprob(p[token], experience, row, t)).exp().detach()
        return ratio * (d**2 / 2 if self.recipe.kl.estimator == "k2" else (-d).exp() - 1 + d)

    def value_term(self, value, experience, row, t):
        target, before = experience.returns[row, t], experience.evaluation.old_values[row, t]
        limit = self.recipe.ppo.value_clip
        near = before + (value - before).clamp(-limit, limit)
        return 0.5 * torch.max((value - target) ** 2, (near - target) ** 2)


def sampled_elsewhere():
    """`tiny.experience` from a sampler whose log-probs are clearly others than the old ones."""
    plain = tiny.experience()
    noise = 0.3 * torch.randn(plain.advantages.shape, generator=torch.Generator().manual_seed(9))
    return replace(plain, rollout=replace(plain.rollout, sampler_logprobs=plain.evaluation.old_logprobs + noise))


@pytest.fixture(scope="module")
def expected():
    """Norms and weights of the plain update for each choice of terms, made when first asked for."""
    found = {}

    def of(terms: str):
        if terms not in found:
            reference = FullReference(tiny.recipe(**TERMS[terms]))
            norms = reference.update(sampled_elsewhere())
            found[terms] = (norms, reference.weights(), reference.dual_clipped, reference.weights_seen)
        return found[terms]

    return of


def run_update(settings: dict) -> dict:
    recipe = tiny.recipe(**settings)
    engine = tiny.engine(recipe)
    base = engine.frozen_hash()
    stats = update(engine, sampled_elsewhere(), recipe, iteration=0, kl_coef=KL_COEF, frozen=frozenset())
    weights = trained_weights(engine)
    moved = engine.frozen_hash() != base
    engine.close()
    return {
        "weights": weights,
        "norms": stats.grad_norms,
        "sums": dict(stats.sums),
        "base_moved": moved,
        "sampler_kl": stats.sampler_kl,
        "first_ratio_deviation": stats.first_ratio_deviation,
    }


def on_stage(stage: str, terms: str) -> dict:
    return {"zero": {"ds_config": tiny.ds_config(stage)}, **TERMS[terms]}


@pytest.mark.parametrize("terms", TERMS)
def test_two_ranks_make_the_plain_update(pool, expected, terms):
    norms, weights, dual_clipped, seen = expected(terms)
    for result in pool.run(run_update, on_stage("zero3", terms)):
        assert_same(result, norms, weights)
        assert result["sums"]["policy/dual_clipped"] == dual_clipped
        if terms == "importance":
            assert 0 < result["sums"]["importance/capped"] == seen.count(1.1) < len(seen)
            assert result["sums"]["importance/weight_sum"] == pytest.approx(sum(seen), rel=1e-5)
    assert (dual_clipped > 0) == ("dual_clip" in TERMS[terms].get("ppo", {})), "nothing was dual-clipped: a weak test"


@pytest.mark.parametrize("terms", ["full", "all"])
def test_one_rank_at_stage_0_makes_it_too(single, expected, terms):
    norms, weights, *_ = expected(terms)
    (result,) = single.run(run_update, on_stage("zero0", terms))
    assert_same(result, norms, weights)


@pytest.mark.parametrize("terms", ["full", "all"])
def test_recomputed_activations_make_it_too(pool, expected, terms):
    """The full KL runs the reference inside the actor's forward: each must be recomputed with its own adapter."""
    norms, weights, *_ = expected(terms)
    settings = on_stage("zero3", terms)
    settings["zero"]["activation_checkpointing"] = True
    for result in pool.run(run_update, settings):
        assert_same(result, norms, weights)


def test_each_term_changes_the_actor(expected):
    """Else the comparisons above would compare nothing."""
    plain = Reference(tiny.recipe())
    plain_norms = plain.update(tiny.experience())
    for terms in ("k2", "k3", "full", "dual_clip", "entropy", "importance"):
        norms, *_ = expected(terms)
        assert abs(norms[0][ACTOR] / plain_norms[0][ACTOR] - 1) > 1e-2, terms
        assert norms[0][CRITIC] == pytest.approx(plain_norms[0][CRITIC], rel=1e-5), terms


def deviations(experience, logprobs_of) -> tuple[float, float]:
    """Mean k3 of the sampler's log-probs against others', and largest |ratio - 1|, over every token, in floats."""
    k3, largest = [], 0.0
    for row, length in enumerate(experience.rollout.response_lengths.tolist()):
        for sampler, other in zip(*(x[:length] for x in logprobs_of(row)), strict=True):
            ratio = math.exp(other - sampler)
            k3.append(ratio - 1 - (other - sampler))
            largest = max(largest, abs(ratio - 1))
    return math.fsum(k3) / len(k3), largest


def test_the_samplers_deviation_from_a_pass_of_its_own(pool):
    """recompute: rollout/train_kl compares the sampler with the old log-probs, whatever the update does."""
    made = sampled_elsewhere()
    wanted, _ = deviations(
        made, lambda row: (made.rollout.sampler_logprobs[row].tolist(), made.evaluation.old_logprobs[row].tolist())
    )
    for result in pool.run(run_update, on_stage("zero0", "importance")):
        assert wanted > 1e-2 and result["sampler_kl"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("mode", ["rollout", "on_policy"])
def test_the_samplers_deviation_from_the_first_minibatch(pool, mode):
    """Without the pass, `old_logprobs` are the sampler's, and the update's first forward is the first to disagree."""
    settings = {**on_stage("zero3", "on_policy"), "ppo": {**TERMS["on_policy"]["ppo"], "old_logprobs": mode}}
    made, start = sampled_elsewhere(), Reference(tiny.recipe(**settings))

    def both(row):
        with torch.no_grad():
            return made.evaluation.old_logprobs[row].tolist(), start.sequence(made, row)[0].tolist()

    wanted, largest = deviations(made, both)
    for result in pool.run(run_update, settings):
        assert wanted > 1e-2 and result["sampler_kl"] == pytest.approx(wanted, rel=1e-4)
        assert result["first_ratio_deviation"] == pytest.approx(largest, rel=1e-4)
