"""The records that phases hand to each other: typed, checked once when made, never patched.

Shapes: `[B]` one per sequence, `[B, T]` with T the prompt's padded length P or the response's padded length R.
Prompts are padded on the left, where sampling goes on at the right; responses, and both together, on the right.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """`[B, width]`, True on the first `lengths[b]` positions of row b. Masks come from lengths, never from ids."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


@dataclass(frozen=True)
class Prompts:
    """Prompts of one iteration: this rank's rows."""

    prompt_ids: Tensor  # [B, P] int64, padded on the left
    prompt_lengths: Tensor  # [B] int64, at least 1
    draws: Tensor  # [B] int64, prompts drawn since the run began: never repeats
    samples: Tensor  # [B] int64, index among the responses to the same prompt
    max_new_tokens: Tensor  # [B] int64, at least 1: the longest response that this prompt may get
    texts: tuple[str, ...]  # B prompts as text
    columns: tuple[dict, ...]  # B rows of the dataset's other columns

    def __post_init__(self):
        rows = self.prompt_ids.shape[0]
        for name, value in vars(self).items():
            assert len(value) == rows, f"{name} has other rows than prompt_ids"
        assert rows == 0 or int(self.max_new_tokens.min()) >= 1, "a prompt that may get no response"

    @property
    def prompt_mask(self) -> Tensor:
        """`[B, P]`, True on real prompt tokens."""
        return length_mask(self.prompt_lengths, self.prompt_ids.shape[1]).flip(1)

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]


@dataclass(frozen=True)
class Rollout:
    """Sampled responses."""

    prompt_ids: Tensor  # [B, P] int64, padded on the left
    prompt_lengths: Tensor  # [B] int64
    response_ids: Tensor  # [B, R] int64, padded on the right
    response_lengths: Tensor  # [B] int64, what ended it included
    ended: Tensor  # [B] bool, an end token or a stop string came before the limit
    sampler_logprobs: Tensor  # [B, R] float32, as the sampler saw them
    draws: Tensor  # [B] int64
    samples: Tensor  # [B] int64

    def __post_init__(self):
        rows, responses = self.response_ids.shape
        assert self.prompt_ids.shape[0] == rows and self.sampler_logprobs.shape == (rows, responses)
        assert all(len(value) == rows for value in vars(self).values())
        assert rows == 0 or int(self.response_lengths.min()) >= 1, "an empty response"

    @property
    def response_mask(self) -> Tensor:
        """`[B, R]`, True on real response tokens, the end token included."""
        return length_mask(self.response_lengths, self.response_ids.shape[1])

    @property
    def sequence_lengths(self) -> Tensor:
        """`[B]` tokens of prompt and response."""
        return self.prompt_lengths + self.response_lengths

    @property
    def sequences(self) -> Tensor:
        """`[B, L]` prompt and response, L tokens the longest, padded on the right."""
        at = torch.arange(self._longest) + (self.prompt_ids.shape[1] - self.prompt_lengths)[:, None]
        both = torch.cat([self.prompt_ids, self.response_ids], dim=1)
        return both.gather(1, at.clamp(max=both.shape[1] - 1))

    @property
    def sequence_mask(self) -> Tensor:
        """`[B, L]`, True on real tokens: what the model may attend to."""
        return length_mask(self.sequence_lengths, self._longest)

    @property
    def _longest(self) -> int:
        return int(self.sequence_lengths.max()) if len(self) else 0

    def __len__(self) -> int:
        return self.response_ids.shape[0]


@dataclass(frozen=True)
class Evaluation:
    """What the frozen weights of the iteration say of a rollout. Padding holds 0."""

    old_logprobs: Tensor  # [B, R] float32
    ref_logprobs: Tensor  # [B, R] float32
    kl: Tensor  # [B, R] float32, the penalty's estimator
    old_values: Tensor  # [B, R] float32, V read before response token t
    source_scores: Tensor  # [B, S] float32, raw, one column per reward source
    padded_lengths: Tensor  # [B] int64, tokens that the row took up in its forward, padding included

    def __post_init__(self):
        per_token = (self.old_logprobs, self.ref_logprobs, self.kl, self.old_values)
        assert len({x.shape for x in per_token}) == 1 and len(self.source_scores) == len(self.kl)


@dataclass(frozen=True)
class Experience:
    """What the update learns from: the rows of all ranks, the same on every rank."""

    rollout: Rollout
    evaluation: Evaluation
    scores: Tensor  # [B] float32, after normalisation, weights, clip and penalty
    rewards: Tensor  # [B, R] float32
    advantages: Tensor  # [B, R] float32, whitened over all rows
    returns: Tensor  # [B, R] float32, raw advantages + old_values

    def __post_init__(self):
        per_token = (self.rewards, self.advantages, self.returns, self.evaluation.kl, self.rollout.response_ids)
        assert len({x.shape for x in per_token}) == 1 and self.scores.shape == (len(self.rollout),)


@dataclass
class UpdateStats:
    """Sums and counts over all real tokens that the iteration's update saw, on all ranks: never means."""

    sums: Counter = field(default_factory=Counter)
    """policy/..., value/... and kl_loss/... sums of `ppo`'s stats, entropy_sum."""
    first_ratio_deviation: float = 0.0
    """Largest |ratio - 1| over the first minibatch: 0 but for rounding, or sampler and trainer disagree."""
    sampler_kl: float = 0.0
    """Mean k3 between the sampler's log-probs and what the trainer's same weights say of its tokens."""
    grad_norms: dict[str, list[float]] = field(default_factory=dict)
    """By role, one per optimizer step, before clipping."""
    learning_rates: dict[str, float] = field(default_factory=dict)
    """By role, at the last optimizer step."""
    steps: int = 0
    """Minibatches that reached the optimizer."""
    overflows: int = 0
    """Steps among them that a role passed over because its float16 gradient overflowed."""
    skipped: int = 0
    """Minibatches that the KL stop passed over."""
    real_tokens: int = 0
    """Prompt and response tokens that went through forwards."""
    padded_tokens: int = 0
    """The same with the padding of these forwards."""


def map_rows(record, function):
    """A record of the same type whose tensors are `function` of their list; a nested record gets a call of its own."""
    fields = vars(record)
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    changed = dict(zip(tensors, function(list(tensors.values())), strict=True))
    nested = {name: map_rows(value, function) for name, value in fields.items() if name not in tensors}
    return type(record)(**changed, **nested)


def take_rows(record, rows: Tensor | slice):
    """The rows `rows` (int64 indices or a slice) of a record of tensors."""
    return map_rows(record, lambda tensors: [tensor[rows] for tensor in tensors])
