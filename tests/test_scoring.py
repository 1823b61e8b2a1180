"""Scores are read at the last real position, wherever padding is and whatever id it holds."""

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from engine.scoring import last_positions, last_token_scores
from tests import families

END = 2


@pytest.fixture(scope="module")
def scorer():
    """Two layers, and pad = EOS: the case that transformers' own pooling gets wrong."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        num_labels=1,
        initializer_range=0.5,
        pad_token_id=END,
        eos_token_id=END,
    )
    return LlamaForSequenceClassification(config)


def padded(rows, side, width, fill):
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, place], mask[index, place] = torch.tensor(row), True
    return ids, mask


ROWS = [[5, 3, 9, END], [4], [7, 8, END, END], [1, 6, 10, 3, 8, 9, END]]


def alone(scorer, row):
    """Independent: every position's score of the unpadded sequence, of which the last one counts."""
    with torch.no_grad():
        hidden = scorer.model(torch.tensor([row])).last_hidden_state
        return (hidden @ scorer.score.weight.T)[0, -1, 0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fill", [0, END, 10])
@pytest.mark.parametrize("width", [7, 12])
def test_scores_do_not_depend_on_padding(scorer, side, fill, width):
    with torch.no_grad():
        scores = last_token_scores(scorer, *padded(ROWS, side, width, fill))
    expected = torch.stack([alone(scorer, row) for row in ROWS])
    assert expected.std() > 0.1  # the test could tell rows apart
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", [n for n, f in families.FAMILIES.items() if f.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES]
)
@torch.no_grad()
def test_every_family_that_classifies_scores_alike_on_either_side(name):
    """Against its own pooling of each unpadded sequence, in which no id is the padding's."""
    torch.manual_seed(0)
    config = families.config_of(name)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config).eval()
    rows = [[5, 3, 9, 2], [4], [17, 8, 2, 2], [1, 6, 10, 3, 8, 9, 2, 30]]
    expected = torch.stack([model(torch.tensor([row])).logits[0, 0] for row in rows])
    assert expected.std() > 0.05
    for side in ("left", "right"):
        torch.testing.assert_close(
            last_token_scores(model, *padded(rows, side, 11, 40)), expected, atol=1e-5, rtol=1e-5
        )


def test_the_end_token_is_read_where_padding_looks_like_it(scorer):
    """transformers reads one token earlier here; if that changes, this function may go."""
    ids, mask = padded([[5, 3, 9, END]], "right", 6, END)
    with torch.no_grad():
        ours = last_token_scores(scorer, ids, mask)[0]
        theirs = scorer(input_ids=ids, attention_mask=mask.long()).logits[0, 0]
    torch.testing.assert_close(ours, alone(scorer, [5, 3, 9, END]))
    torch.testing.assert_close(theirs, alone(scorer, [5, 3, 9]))
    assert abs(ours - theirs) > 1e-3


def test_last_positions():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    assert last_positions(mask).tolist() == [1, 3, 2, 3, 0]


def test_an_empty_sequence_has_no_score(scorer):
    ids, mask = padded([[5, 3]], "right", 4, 0)
    with pytest.raises(AssertionError, match="without real tokens"):
        last_token_scores(scorer, ids, mask & False)


def test_a_model_without_a_score_head_is_refused_by_name():
    config = BertConfig(
        vocab_size=11, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    model = BertForSequenceClassification(config)
    with pytest.raises(ValueError, match="BertForSequenceClassification has no head named `score`"):
        last_token_scores(model, *padded(ROWS, "right", 7, 0))


def test_a_head_of_several_labels_is_refused(scorer):
    config = LlamaConfig(**{**scorer.config.to_dict(), "num_labels": 3})
    with pytest.raises(ValueError, match="3 labels"):
        last_token_scores(LlamaForSequenceClassification(config), *padded(ROWS, "right", 7, 0))
