"""One score per sequence, read from a sequence-classification model at the last real position.

Training a reward model and asking it for scores share this function: read at two different places, the model would be
asked about a position it never learned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine import causal


def last_token_scores(model: nn.Module, input_ids: Tensor, mask: Tensor, packed: bool = False) -> Tensor:
    """`[B]` float32 scores of sequences, whatever side they are padded on.

    transformers' own classifiers look for the last id other than `pad_token_id`. With pad = EOS that is one token
    before the EOS, so they never see whether a response ended. Here the position comes from the mask.

    Args:
        model: a transformers sequence-classification model with a linear head `.score` of one output.
        input_ids: `[B, L]`; padding can hold any id.
        mask: `[B, L]` bool, True on each sequence's one contiguous run of real tokens, which has at least one.
        packed: as for `causal.hidden_states`.
    """
    check_scorable(model)
    assert input_ids.shape == mask.shape and mask.dtype == torch.bool
    hidden = causal.hidden_states(model, input_ids, mask, packed)
    rows = torch.arange(len(input_ids), device=input_ids.device)
    return model.score(hidden[rows, last_positions(mask)]).squeeze(-1).float()


def last_positions(mask: Tensor) -> Tensor:
    """`[B]` the last True position of each row of `mask` `[B, L]`."""
    assert bool(mask.any(dim=1).all()), "a sequence without real tokens has no last position"
    return mask.shape[1] - 1 - mask.flip(1).long().argmax(dim=1)


def check_scorable(model: nn.Module) -> None:
    """Refuse a model that has no linear head `.score`, or one with more outputs than a single score."""
    name = type(model).__name__
    if not isinstance(getattr(model, "score", None), nn.Module):
        raise ValueError(
            f"{name} has no head named `score`, so no score can be read at a position of our choice; "
            "use a sequence-classification model that ends in one, as LlamaForSequenceClassification does"
        )
    if model.config.num_labels != 1:
        raise ValueError(
            f"{name} has {model.config.num_labels} labels, and a reward model needs exactly one; "
            "load it with num_labels=1, or train one with launch/reward.py"
        )
