"""From raw scores to advantages: every step against hand-worked numbers or numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.advantages import KLController, RunningMoments, ScoreCombiner, make_experience
from engine.batch import Evaluation, Rollout
from engine.config import KLConfig
from tests import tiny


def rollout(lengths: list[int], ended: list[bool], width: int = 3) -> Rollout:
    rows = len(lengths)
    return Rollout(
        prompt_ids=torch.zeros(rows, 1, dtype=torch.int64),
        prompt_lengths=torch.ones(rows, dtype=torch.int64),
        response_ids=torch.zeros(rows, width, dtype=torch.int64),
        response_lengths=torch.tensor(lengths),
        ended=torch.tensor(ended),
        sampler_logprobs=torch.zeros(rows, width),
        draws=torch.arange(rows),
        samples=torch.zeros(rows, dtype=torch.int64),
    )


def evaluation(source_scores, kl=None, old_values=None, width: int = 3) -> Evaluation:
    source_scores = torch.tensor(source_scores)
    nothing = torch.zeros(len(source_scores), width)
    return Evaluation(
        old_logprobs=nothing,
        ref_logprobs=nothing,
        kl=nothing if kl is None else torch.tensor(kl),
        old_values=nothing if old_values is None else torch.tensor(old_values),
        source_scores=source_scores,
        padded_lengths=torch.ones(len(source_scores), dtype=torch.int64),
    )


def two_sources(**scores):
    function = "tests/tiny.py:length_reward"
    rewards = [{"name": "a", "function": function}, {"name": "b", "function": function, "weight": 2.0}]
    return tiny.recipe(rewards=rewards, scores=scores)


def test_running_moments_are_those_of_everything_so_far():
    generator = torch.Generator().manual_seed(0)
    parts = [1000.0 + 3 * torch.randn(size, generator=generator) for size in (5, 1, 17, 2)]
    moments = RunningMoments()
    for index, part in enumerate(parts):
        moments.add(part)
        seen = np.concatenate([p.double().numpy() for p in parts[: index + 1]])
        assert moments.count == len(seen)
        assert moments.mean == pytest.approx(seen.mean(), rel=1e-12)
        assert moments.std == pytest.approx(seen.std(), rel=1e-9)


def test_running_moments_of_nothing():
    assert RunningMoments().std == 0.0


def test_the_score_chain_by_hand():
    """Normalise, weigh, clip, penalise, scale: each step decides at least one of the four rows."""
    combiner = ScoreCombiner(two_sources(normalize=True, clip=2.0, missing_eos_penalty=0.5, scale=-1.0))
    ended = [True, True, False, False]
    found = combiner.combine(rollout([1] * 4, ended), evaluation([[0.0, 10.0], [2.0, 10.0], [0.0, 30.0], [2.0, 30.0]]))
    # a: mean 1, deviation 1 -> -1 1 -1 1.  b: mean 20, deviation 10 -> -1 -1 1 1.
    # a + 2 b: -3 -1 1 3.  clip at 2: -2 -1 1 2.  minus 0.5 for the last two: -2 -1 0.5 1.5.  times -1.
    assert found.tolist() == pytest.approx([2.0, 1.0, -0.5, -1.5], abs=1e-6)


def test_normalisation_uses_everything_seen_so_far():
    combiner = ScoreCombiner(tiny.recipe(scores={"normalize": True}))
    everything = []
    for part in ([1.0, 5.0], [3.0, 3.0, 9.0]):
        everything += part
        found = combiner.combine(rollout([1] * len(part), [True] * len(part)), evaluation([[x] for x in part]))
        expected = (np.array(part) - np.mean(everything)) / np.std(everything)
        assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_raw_is_the_weighted_sum_and_nothing_else():
    combiner = ScoreCombiner(two_sources(normalize=True, clip=0.1, missing_eos_penalty=9.0, scale=0.0))
    assert combiner.raw(evaluation([[1.0, 2.0], [-3.0, 0.5]])).tolist() == [5.0, -2.0]
    assert combiner.moments[0].count == 0, "looking at the raw scores must not count them"


def test_without_normalisation_scores_are_the_raw_sum():
    found = ScoreCombiner(two_sources()).combine(rollout([1, 1], [True, False]), evaluation([[1.0, 2.0], [-3.0, 0.5]]))
    assert found.tolist() == [5.0, -2.0]


@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3, 1e6 / 3])
def test_a_constant_source_normalises_to_nothing(constant):
    combiner = ScoreCombiner(tiny.recipe(scores={"normalize": True}))
    for rows in (7, 3):
        found = combiner.combine(rollout([1] * rows, [True] * rows), evaluation([[constant]] * rows))
        assert found.abs().max() < 1e-3


def test_fixed_kl_coefficient_stays():
    controller = KLController(KLConfig(kl_coef=0.3))
    controller.update(1000.0, 64)
    assert controller.kl_coef == 0.3


def test_adaptive_kl_coefficient_by_hand():
    controller = KLController(KLConfig(kl_coef=0.1, target=6.0, horizon=1000.0))
    controller.update(6.6, 100)  # 10% above: 0.1 * (1 + 0.1 * 100/1000) = 0.101
    assert controller.kl_coef == pytest.approx(0.101)
    controller.update(600.0, 50)  # far above, error clipped to 0.2: 0.101 * (1 + 0.2 * 0.05) = 0.10201
    assert controller.kl_coef == pytest.approx(0.10201)
    controller.update(-3.0, 500)  # far below, clipped to -0.2: 0.10201 * (1 - 0.2 * 0.5) = 0.091809
    assert controller.kl_coef == pytest.approx(0.091809)


LENGTHS = [3, 1, 2]
KL = [[0.1, -0.2, 0.4], [0.3, 7.0, 7.0], [0.0, 0.5, 7.0]]
VALUES = [[0.5, 0.25, -0.5], [1.0, 9.0, 9.0], [0.0, 2.0, 9.0]]
SCORES = [1.0, -2.0, 0.5]


def looped(kl_coef: float, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards, raw advantages and returns, token by token in float64."""
    rewards, advantages, returns = np.zeros((3, 3)), np.zeros((3, 3)), np.zeros((3, 3))
    for row, length in enumerate(LENGTHS):
        after, value_after = 0.0, 0.0
        for t in reversed(range(length)):
            rewards[row, t] = -kl_coef * KL[row][t] + (SCORES[row] if t == length - 1 else 0.0)
            delta = rewards[row, t] + gamma * value_after - VALUES[row][t]
            after = advantages[row, t] = delta + gamma * lam * after
            value_after = VALUES[row][t]
            returns[row, t] = advantages[row, t] + VALUES[row][t]
    return rewards, advantages, returns


def whitened(raw: np.ndarray) -> np.ndarray:
    """Over all real tokens, population variance; padding 0."""
    found = np.zeros_like(raw)
    tokens = [(row, t) for row, length in enumerate(LENGTHS) for t in range(length)]
    mean = sum(raw[at] for at in tokens) / len(tokens)
    variance = sum((raw[at] - mean) ** 2 for at in tokens) / len(tokens)
    for at in tokens:
        found[at] = (raw[at] - mean) / np.sqrt(variance + 1e-8)
    return found


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("placement, estimator", [("reward", "k1"), ("loss", "k2")])
def test_experience_against_loops(placement, estimator, whiten):
    recipe = tiny.recipe(
        ppo={"gamma": 0.9, "gae_lambda": 0.8, "whiten_advantages": whiten},
        kl={"placement": placement, "estimator": estimator},
    )
    sampled = rollout(LENGTHS, [True] * 3)
    judged = evaluation([[score] for score in SCORES], KL, VALUES)
    found = make_experience(sampled, judged, recipe, ScoreCombiner(recipe), kl_coef=0.5)
    # With the KL in the loss there is none in the rewards: it would be counted twice.
    rewards, advantages, returns = looped(0.5 if placement == "reward" else 0.0, 0.9, 0.8)
    assert found.scores.tolist() == SCORES
    for name, expected in (
        ("rewards", rewards),
        ("advantages", whitened(advantages) if whiten else advantages),
        ("returns", returns),  # of the raw advantages, whitened or not
    ):
        np.testing.assert_allclose(getattr(found, name).numpy(), expected, atol=1e-5, err_msg=name)
