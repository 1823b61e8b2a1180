"""Decoding the naive way: one row alone, no padding, no cache, the whole sequence again for every token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.batch import Prompts, Rollout
from engine.config import GenerationConfig

BOUNDARY = 1e-5
"""Rounding moves a cumulative probability by less: nearer to it than that, a draw may fall on the other side."""


@dataclass(frozen=True)
class Naive:
    """A response, and how far each draw lay from the nearest boundary between two tokens."""

    response: list[int]
    logprobs: list[float]
    margins: list[float]
    ended: bool


def take(prompts: Prompts, rows: Sequence[int]) -> Prompts:
    index = torch.tensor(rows, dtype=torch.int64)
    tensors = {n: value[index] for n, value in vars(prompts).items() if isinstance(value, torch.Tensor)}
    texts, columns = (tuple(values[row] for row in rows) for values in (prompts.texts, prompts.columns))
    return Prompts(**tensors, texts=texts, columns=columns)


def several_each(prompts: Prompts, samples: int) -> Prompts:
    """So many rows for each prompt, a sample each."""
    rows = torch.arange(len(prompts)).repeat_interleave(samples).tolist()
    return dataclasses.replace(take(prompts, rows), samples=torch.arange(samples).repeat(len(prompts)))


def naive(
    module, prompts: Prompts, row: int, settings: GenerationConfig, seed: int, ends: Sequence[int], tokenizer=None
) -> Naive:
    """The draw as a Python loop, in float64 from the logits on.

    With a tokenizer its ids alone are drawn, and the settings' stop strings end the response: all its text, every time.
    """
    ids = prompts.prompt_ids[row, -int(prompts.prompt_lengths[row]) :].tolist()
    counter = [0, 0, int(prompts.samples[row]), int(prompts.draws[row])]
    uniforms = np.random.Generator(np.random.Philox(key=[seed, 0], counter=counter)).random(100)
    found = Naive([], [], [], False)
    for position in range(min(settings.max_new_tokens, int(prompts.max_new_tokens[row]))):
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([ids + found.response]), use_cache=False).logits[0, -1].double()
        scaled = logits / (settings.temperature or 1.0)
        p = (scaled - scaled.logsumexp(0)).exp().tolist()
        early = ends if position < settings.min_new_tokens else ()
        known = len(p) if tokenizer is None else len(tokenizer)
        weights = [w if token < known and token not in early else 0.0 for token, w in enumerate(p)]
        token, margin = _argmax(weights) if not settings.temperature else _draw(weights, uniforms[position], settings)
        found.response.append(token)
        found.logprobs.append(float(np.log(p[token])))
        found.margins.append(margin)
        late = tokenizer is not None and position >= settings.min_new_tokens
        text = tokenizer.decode(found.response) if late else ""
        if token in ends or any(string in text for string in settings.stop_strings):
            return dataclasses.replace(found, ended=True)
    return found


def _argmax(weights: list[float]) -> tuple[int, float]:
    first, second = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[:2]
    return first, weights[first] - weights[second]


def _draw(weights: list[float], uniform: float, settings: GenerationConfig) -> tuple[int, float]:
    kept, total = sorted((i for i, w in enumerate(weights) if w), key=lambda i: (-weights[i], i)), 0.0
    kept = kept[: settings.top_k or None]
    reach = settings.top_p * sum(weights[i] for i in kept)
    for count, i in enumerate(kept, 1):
        total += weights[i]
        if settings.top_p < 1 and total >= reach:
            kept = kept[:count]
            break
    total = sum(weights[i] for i in kept)
    running, token, margin = 0.0, None, 1.0
    for i in sorted(kept):
        running += weights[i] / total
        margin = min(margin, abs(running - uniform))
        if running > uniform and token is None:
            token = i
    return token, margin


def assert_same_row(rollout: Rollout, row: int, expected: Naive) -> None:
    """Token for token; a first difference is allowed only within `BOUNDARY`, and what follows it is another text."""
    length = int(rollout.response_lengths[row])
    response, logprobs = rollout.response_ids[row, :length].tolist(), rollout.sampler_logprobs[row, :length].tolist()
    for position, (token, wanted) in enumerate(zip(response, expected.response, strict=False)):
        if token != wanted:
            assert expected.margins[position] < BOUNDARY, f"row {row}, position {position}: {token}, not {wanted}"
            return
    assert response == expected.response and bool(rollout.ended[row]) == expected.ended
    assert np.allclose(logprobs, expected.logprobs, atol=1e-4)
    assert rollout.response_ids[row, length:].eq(0).all(), "a finished response must not be written on"
    assert rollout.response_mask[row].sum() == length
