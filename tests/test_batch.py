"""Records are checked when made; masks come from lengths alone."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from engine.batch import length_mask, map_rows, take_rows
from tests import tiny


def test_length_mask_by_hand():
    assert length_mask(torch.tensor([0, 2, 3]), 3).tolist() == [[False] * 3, [True, True, False], [True] * 3]


@pytest.fixture
def rollout():
    """Prompts of 1 and 3 tokens, responses of 2 and 1; every id the same, so that only lengths can tell."""
    return replace(
        tiny.rollout(rows=2),
        prompt_ids=torch.full((2, 3), 7),
        prompt_lengths=torch.tensor([1, 3]),
        response_ids=torch.full((2, 2), 7),
        response_lengths=torch.tensor([2, 1]),
        sampler_logprobs=torch.zeros(2, 2),
    )


def test_masks_of_a_rollout_by_hand(rollout):
    assert rollout.response_mask.int().tolist() == [[1, 1], [1, 0]]
    assert rollout.sequence_mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert rollout.sequence_lengths.tolist() == [3, 4] and len(rollout) == 2


def test_sequences_by_hand(rollout):
    """Contiguous, padded on the right to the longest one, whatever its prompt and its response were padded to."""
    prompt_ids, response_ids = torch.tensor([[0, 0, 1], [2, 3, 4]]), torch.tensor([[5, 6, 0], [7, 0, 0]])
    made = replace(rollout, prompt_ids=prompt_ids, response_ids=response_ids, sampler_logprobs=torch.zeros(2, 3))
    assert made.sequences[made.sequence_mask].tolist() == [1, 5, 6, 2, 3, 4, 7] and made.sequences.shape == (2, 4)
    assert take_rows(made, torch.empty(0, dtype=torch.int64)).sequences.shape == (0, 0)


def test_prompts_are_padded_on_the_left():
    prompts = replace(tiny.prompts(rows=2, width=3), prompt_lengths=torch.tensor([1, 3]))
    assert prompts.prompt_mask.int().tolist() == [[0, 0, 1], [1, 1, 1]]


def test_records_cannot_be_patched(rollout):
    with pytest.raises(FrozenInstanceError):
        rollout.ended = torch.ones(2, dtype=torch.bool)


@pytest.mark.parametrize("name", [field.name for field in fields(tiny.prompts()) if field.name != "prompt_ids"])
def test_prompts_with_a_row_too_few_are_refused(name):
    with pytest.raises(AssertionError):
        replace(tiny.prompts(), **{name: getattr(tiny.prompts(), name)[:-1]})


def test_a_prompt_without_room_for_a_response_is_refused():
    with pytest.raises(AssertionError, match="no response"):
        replace(tiny.prompts(rows=2), max_new_tokens=torch.tensor([3, 0]))


@pytest.mark.parametrize("name", [field.name for field in fields(tiny.rollout())])
def test_rollouts_with_a_row_too_few_are_refused(name):
    with pytest.raises(AssertionError):
        replace(tiny.rollout(), **{name: getattr(tiny.rollout(), name)[:-1]})


def test_rollouts_of_other_widths_or_without_a_token_are_refused():
    plain = tiny.rollout()
    with pytest.raises(AssertionError):
        replace(plain, sampler_logprobs=plain.sampler_logprobs[:, :-1])
    with pytest.raises(AssertionError, match="empty response"):
        replace(plain, response_lengths=plain.response_lengths * 0)


@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs", "kl", "old_values"])
@pytest.mark.parametrize("cut", [(slice(-1),), (slice(None), slice(-1))])
def test_evaluations_of_other_shapes_are_refused(name, cut):
    plain = tiny.experience().evaluation
    with pytest.raises(AssertionError):
        replace(plain, **{name: getattr(plain, name)[cut]})


@pytest.mark.parametrize("name", ["rewards", "advantages", "returns"])
@pytest.mark.parametrize("cut", [(slice(-1),), (slice(None), slice(-1))])
def test_experiences_of_other_shapes_are_refused(name, cut):
    plain = tiny.experience()
    with pytest.raises(AssertionError):
        replace(plain, **{name: getattr(plain, name)[cut]})


def test_take_rows_takes_them_from_every_tensor():
    plain = tiny.experience()
    rows = torch.tensor([5, 0, 5])
    taken = take_rows(plain, rows)
    assert type(taken) is type(plain) and len(taken.rollout) == 3
    for record, source in ((taken, plain), (taken.rollout, plain.rollout), (taken.evaluation, plain.evaluation)):
        for field in fields(record):
            value = getattr(record, field.name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, torch.stack([getattr(source, field.name)[r] for r in (5, 0, 5)])), field.name


def test_take_no_rows():
    assert len(take_rows(tiny.rollout(), torch.arange(0))) == 0


def test_map_rows_leaves_the_record_as_it_was():
    plain = tiny.rollout()
    before = plain.response_ids.clone()
    doubled = map_rows(plain, lambda tensors: [torch.cat([x, x]) for x in tensors])
    assert len(doubled) == 14 and torch.equal(plain.response_ids, before)
