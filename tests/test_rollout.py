"""Sampling as a pure function of weights, seed, draw, sample and position; decoding against the naive way."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from engine.batch import Prompts
from engine.config import GenerationConfig
from engine.randomness import Stream
from engine.rollout import generate, sample, token_uniforms
from tests import tiny

END = (7, 11)


def take(prompts: Prompts, rows: list[int]) -> Prompts:
    index = torch.tensor(rows, dtype=torch.int64)
    tensors = {
        f.name: getattr(prompts, f.name)[index]
        for f in dataclasses.fields(prompts)
        if isinstance(getattr(prompts, f.name), torch.Tensor)
    }
    return Prompts(
        **tensors,
        texts=tuple(prompts.texts[r] for r in rows),
        columns=tuple(prompts.columns[r] for r in rows),
    )


def naive(module, prompts: Prompts, row: int, settings: GenerationConfig, seed: int, stream=Stream.TRAINING):
    """One row alone: no padding, no cache, the whole sequence again for every token, the draw as a Python loop."""
    length = int(prompts.prompt_lengths[row])
    ids = prompts.prompt_ids[row, -length:].tolist()
    counter = [0, 0, int(prompts.samples[row]), int(prompts.draws[row])]
    uniforms = np.random.Generator(np.random.Philox(key=[seed, stream], counter=counter)).random(100)
    response, logprobs, margins = [], [], []
    for position in range(settings.max_new_tokens):
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([ids + response])).logits[0, -1].double()
        scaled = logits / (settings.temperature or 1.0)
        p = (scaled - scaled.logsumexp(0)).exp().tolist()
        weights = list(p)
        if position < settings.min_new_tokens:
            weights = [0.0 if token in END else w for token, w in enumerate(weights)]
        if settings.temperature == 0:
            token = max(range(len(weights)), key=lambda i: (weights[i], -i))
        else:
            target, running, token = uniforms[position] * sum(weights), 0.0, None
            for candidate, weight in enumerate(weights):
                running += weight
                margins.append(abs(running - target))
                if running > target and token is None:
                    token = candidate
        response.append(token)
        logprobs.append(float(np.log(p[token])))
        if token in END:
            break
    return response, logprobs, min(margins, default=1.0)


@pytest.fixture(scope="module", params=["rotary", "absolute"])
def module(request):
    """Rotary positions forgive a common shift; GPT-2's absolute ones don't."""
    if request.param == "rotary":
        return tiny.llama().eval()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tiny.VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    "settings",
    [
        GenerationConfig(max_new_tokens=12, batch_sequences=3),
        GenerationConfig(max_new_tokens=12, temperature=0.7, batch_sequences=64),
        GenerationConfig(max_new_tokens=12, temperature=0.0),
        GenerationConfig(max_new_tokens=12, min_new_tokens=5, temperature=1.5),
    ],
)
def test_cached_batched_decoding_is_the_naive_one(module, settings):
    prompts = tiny.prompts(rows=8)
    rollout = generate(module, prompts, settings, END, seed=5)
    for row in range(8):
        response, logprobs, margin = naive(module, prompts, row, settings, seed=5)
        length = int(rollout.response_lengths[row])
        assert margin > 1e-6, "the draw lies on a boundary: choose another seed for this test"
        assert rollout.response_ids[row, :length].tolist() == response
        assert rollout.sampler_logprobs[row, :length].tolist() == pytest.approx(logprobs, abs=1e-4)
        assert bool(rollout.ended[row]) == (response[-1] in END)
        assert rollout.response_ids[row, length:].eq(0).all(), "a finished response must not be written on"


def test_a_response_does_not_depend_on_its_company(module):
    prompts, settings = tiny.prompts(rows=8), GenerationConfig(max_new_tokens=10)
    together = generate(module, prompts, settings, END, seed=1)
    for rows in ([5], [6, 1, 3], [0, 2, 4, 7]):
        apart = generate(module, take(prompts, rows), settings, END, seed=1)
        assert torch.equal(apart.response_ids, together.response_ids[rows])
        assert torch.allclose(apart.sampler_logprobs, together.sampler_logprobs[rows], atol=1e-5)


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


def test_no_rows_and_one_token():
    module = tiny.llama().eval()
    nothing = generate(module, take(tiny.prompts(), []), GenerationConfig(max_new_tokens=4), END, seed=0)
    assert len(nothing) == 0 and nothing.response_ids.shape == (0, 4)
    one = generate(module, tiny.prompts(rows=2), GenerationConfig(max_new_tokens=1), END, seed=0)
    assert one.response_lengths.tolist() == [1, 1]


def test_end_token_equal_to_padding_id_counts():
    """Token 0 fills the padding; as an end token it is a response token like any other."""
    module = tiny.llama().eval()
    rollout = generate(module, tiny.prompts(rows=16), GenerationConfig(max_new_tokens=40), (0,), seed=2)
    assert rollout.ended.any()
    for row in torch.nonzero(rollout.ended).flatten():
        length = int(rollout.response_lengths[row])
        assert rollout.response_ids[row, length - 1] == 0
        assert rollout.response_mask[row].sum() == length
        assert rollout.sampler_logprobs[row, length - 1] < 0
