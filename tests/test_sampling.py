"""Draws as a pure function of seed, draw, sample, position and logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.config import GenerationConfig
from engine.randomness import Stream
from engine.sampling import sample, token_uniforms


def test_draw_sample_seed_and_stream_are_the_key():
    def first(seed=0, stream=Stream.TRAINING, draw=3, sample_index=0):
        return token_uniforms(seed, stream, torch.tensor([draw]), torch.tensor([sample_index]), 6)

    assert torch.equal(first(), first())
    others = [first(seed=1), first(stream=Stream.EVALUATION), first(draw=4), first(sample_index=1)]
    for other in others:
        assert not torch.isclose(first(), other).any()
    # More positions don't shift the earlier ones.
    longer = token_uniforms(0, Stream.TRAINING, torch.tensor([3]), torch.tensor([0]), 50)
    assert torch.equal(longer[:, :6], first())


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20000, 4)
    uniforms = torch.from_numpy(np.random.default_rng(0).random(20000))
    tokens, _ = sample(logits, uniforms, GenerationConfig(temperature=2.0))
    expected = (torch.tensor([0.0, 0.5, 1.0, -0.5]).double()).softmax(0)
    counted = torch.bincount(tokens, minlength=4) / 20000
    assert torch.allclose(counted.double(), expected, atol=0.012)  # about 3.5 standard deviations


def test_top_k_and_top_p_restrict_the_draw_and_leave_the_logprobs_alone():
    # Probabilities 0.4, 0.3, 0.2, 0.1, in this order of ids: 2, 0, 3, 1.
    probabilities = torch.tensor([[0.3, 0.1, 0.4, 0.2]])
    logits = probabilities.log()

    def drawn(**settings):
        grid = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
        tokens, logprobs = sample(logits.expand(1000, 4), grid, GenerationConfig(**settings))
        assert torch.allclose(logprobs.exp(), probabilities[0, tokens], atol=1e-6), "log-probs of the full softmax"
        counts = torch.bincount(tokens, minlength=4) / 1000
        return [round(c, 2) for c in counts.tolist()]

    assert drawn() == [0.3, 0.1, 0.4, 0.2]
    assert drawn(top_k=2) == [0.43, 0.0, 0.57, 0.0]  # 3/7, 4/7
    assert drawn(top_p=0.6) == [0.43, 0.0, 0.57, 0.0]  # 0.4 is not enough, 0.7 is
    assert drawn(top_p=0.3) == [0.0, 0.0, 1.0, 0.0]  # the likeliest always stays
    assert drawn(top_k=3, top_p=0.75) == [0.43, 0.0, 0.57, 0.0]  # of the 0.9 kept, 0.675 is reached by two
    tied, _ = sample(torch.zeros(1, 4), torch.tensor([0.99], dtype=torch.float64), GenerationConfig(top_k=2))
    assert tied.item() == 1, "ties: the lower ids stay"


@pytest.mark.parametrize("settings", [{}, {"top_k": 4}, {"top_p": 0.6}, {"top_k": 6, "top_p": 0.55}], ids=str)
def test_draws_against_a_loop(settings):
    """Few different logits, so that ties abound, and some tokens banned, among them the likeliest."""
    numbers = np.random.default_rng(1)
    logits = torch.from_numpy(numbers.integers(-2, 3, (300, 12)).astype(np.float32))
    banned = torch.from_numpy(numbers.random((300, 12)) < 0.3)
    banned[:, 0] = False
    uniforms = torch.from_numpy(numbers.random(300))
    chosen = GenerationConfig(temperature=0.8, **settings)
    given = logits.clone()
    tokens, logprobs = sample(given, uniforms, chosen, banned)
    assert torch.equal(given, logits), "the caller's logits stay"
    full = (logits.double() / 0.8).log_softmax(-1)
    for row in range(300):
        ids = sorted((i for i in range(12) if not banned[row, i]), key=lambda i: (-logits[row, i], i))
        kept = ids[: chosen.top_k or None]
        weights = {i: float(full[row, i].exp()) for i in kept}
        reach, total, nucleus = chosen.top_p * sum(weights.values()), 0.0, []
        for i in kept:
            if total < reach - 1e-9 or chosen.top_p == 1:
                nucleus.append(i)
            total += weights[i]
        target, running = float(uniforms[row]) * sum(weights[i] for i in nucleus), 0.0
        expected = None
        for i in sorted(nucleus):
            running += weights[i]
            if expected is None and running > target:
                expected = i
        assert tokens[row] == expected
        assert logprobs[row].item() == pytest.approx(float(full[row, expected]), abs=1e-5), "of the full softmax"


def test_a_banned_giant_hides_nobody():
    logits, banned = torch.tensor([[1e4, 0.0, 1.0]]), torch.tensor([[True, False, False]])
    for temperature, expected in ((1.0, 2), (0.0, 2)):
        tokens, logprobs = sample(
            logits, torch.tensor([0.9]).double(), GenerationConfig(temperature=temperature), banned
        )
        assert tokens.item() == expected and logprobs.item() == pytest.approx(1 - 1e4)
