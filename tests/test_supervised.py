"""One fit for demonstrations and preference pairs: plain loops give the same losses, every layout the same steps."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from engine.role_config import OptimizerSettings
from engine.supervised import (
    Demonstration,
    FitSettings,
    Preference,
    batches_of_rows,
    deal,
    fit,
    pad_right,
    preference_accuracy,
    preference_loss,
    sft_loss,
)

pytestmark = pytest.mark.usefixtures("alone")

SIZES = dict(
    vocab_size=13,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    initializer_range=0.3,
)
DEMONSTRATIONS = [
    Demonstration([5, 3, 9, 2], 2),
    Demonstration([7, 8, 1, 4, 11, 12, 2], 3),
    Demonstration([6, 2], 1),
    Demonstration([0, 0, 0, 10, 0, 2], 1),
    Demonstration([4, 9, 9, 9, 2], 4),
]
PREFERENCES = [
    Preference([5, 3, 9, 2], [5, 3, 8]),
    Preference([7, 1, 2], [7, 4, 11, 12, 10, 2]),
    Preference([6, 6, 2], [6, 2]),
    Preference([1, 2], [1, 1, 2]),
    Preference([3, 10, 0, 2], [3, 0, 0, 2]),
]
# A large epsilon makes a step nearly linear in the gradient, so that weights compare gradients and not their signs.
SMOOTH = OptimizerSettings(learning_rate=0.1, epsilon=0.1, schedule="linear", warmup_steps=1, weight_decay=0.01)


def language_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def reward_model() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1, pad_token_id=2))


def looped_sft_loss(model, examples) -> float:
    """Independent: one sequence and one token at a time, float64, no padding; a plain sum over response tokens."""
    model, total = model.double(), 0.0
    for example in examples:
        for position in range(example.prompt_tokens, len(example.ids)):
            logits = model(torch.tensor([example.ids[:position]])).logits[0, -1]
            weights = [math.exp(logit) for logit in logits.tolist()]
            total -= math.log(weights[example.ids[position]] / sum(weights))
    return total


def looped_scores(model, rows) -> list[float]:
    return [(model.model(torch.tensor([row])).last_hidden_state[0, -1] @ model.score.weight[0]).item() for row in rows]


def looped_preference_loss(model, examples) -> float:
    """Independent: -log sigmoid(d) = log(1 + exp(-d)), one unpadded sequence at a time, float64."""
    model = model.double()
    chosen = looped_scores(model, [e.chosen for e in examples])
    rejected = looped_scores(model, [e.rejected for e in examples])
    return sum(math.log1p(math.exp(r - c)) for c, r in zip(chosen, rejected, strict=True))


def test_sft_loss_is_a_sum_over_response_tokens():
    loss = sft_loss(language_model(), DEMONSTRATIONS, 4.0).item()
    assert loss == pytest.approx(looped_sft_loss(language_model(), DEMONSTRATIONS) / 4.0, rel=1e-5)


def test_counts_are_response_tokens():
    assert [example.count for example in DEMONSTRATIONS] == [2, 4, 1, 5, 1]


def test_preference_loss():
    loss = preference_loss(reward_model(), PREFERENCES, 4.0).item()
    assert loss == pytest.approx(looped_preference_loss(reward_model(), PREFERENCES) / 4.0, rel=1e-5)


def test_preference_accuracy_counts_strict_wins():
    model = reward_model()
    chosen = looped_scores(model, [e.chosen for e in PREFERENCES])
    rejected = looped_scores(model, [e.rejected for e in PREFERENCES])
    expected = sum(c > r for c, r in zip(chosen, rejected, strict=True)) / 5
    assert 0 < expected < 1
    for size in (1, 2, 8):
        assert preference_accuracy(model, PREFERENCES, micro_batch_sequences=size) == pytest.approx(expected)
    assert preference_accuracy(model, [Preference([1, 2], [1, 2])]) == 0


def test_pad_right():
    ids, mask = pad_right([[4, 5], [6], [7, 8, 9]])
    assert ids.tolist() == [[4, 5, 0], [6, 0, 0], [7, 8, 9]]
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_every_example_is_dealt_once_and_ranks_run_equally_often(world_size, size, count):
    dealt = [deal(list(range(count)), rank, world_size, size) for rank in range(world_size)]
    assert len({len(micro_batches) for micro_batches in dealt}) == 1
    real = [example for micro_batches in dealt for examples, counts in micro_batches if counts for example in examples]
    assert sorted(real) == list(range(count))
    assert all(0 < len(examples) <= size for micro_batches in dealt for examples, _ in micro_batches)


def test_the_order_is_seeded_and_covers_every_epoch():
    settings = FitSettings(epochs=2, batch_sequences=4, seed=7)
    batches = list(batches_of_rows(10, settings))
    assert [len(rows) for rows in batches] == [4, 4, 2, 4, 4, 2]
    epochs = [sum(batches[:3], []), sum(batches[3:], [])]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
    assert batches == list(batches_of_rows(10, settings))
    assert batches != list(batches_of_rows(10, settings.model_copy(update={"seed": 8})))
    assert batches[:4] == list(batches_of_rows(10, settings.model_copy(update={"steps": 4})))


def trained(kind: str, batch_sequences: int, micro_batch_sequences: int) -> tuple[list[float], list[list[float]]]:
    """Losses and final weights of a few steps; the same call runs in one process and on every rank of a pool."""
    model, examples, loss = {
        "sft": (language_model(), DEMONSTRATIONS, sft_loss),
        "preference": (reward_model(), PREFERENCES, preference_loss),
    }[kind]
    sizes = dict(batch_sequences=batch_sequences, micro_batch_sequences=micro_batch_sequences)
    report = fit(model, examples, loss, FitSettings(optimizer=SMOOTH, epochs=3, **sizes))
    return list(report.losses), [p.detach().flatten().tolist() for p in model.parameters()]


def assert_same(one, other) -> None:
    torch.testing.assert_close(torch.tensor(one[0]), torch.tensor(other[0]), atol=1e-5, rtol=1e-5)
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_micro_batches_do_not_change_the_result(kind):
    whole = trained(kind, 3, 64)
    assert len(whole[0]) == 6
    for size in (1, 2):
        assert_same(trained(kind, 3, size), whole)


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_fit_takes_the_steps_of_plain_pytorch(kind):
    """Independent: AdamW on the batch mean of the float64 loops, whole batch, no ranks."""
    model, examples, looped = {
        "sft": (language_model(), DEMONSTRATIONS, looped_sft_loss),
        "preference": (reward_model(), PREFERENCES, looped_preference_loss),
    }[kind]
    first_loss = looped(model, examples) / sum(example.count for example in examples)
    losses, _ = trained(kind, 5, 2)
    assert losses[0] == pytest.approx(first_loss, rel=1e-5)
    # Step 0 of 3: rate 0.1 * 1/1 (a warm-up of one step), gradients clipped at norm 1.
    model = {"sft": language_model, "preference": reward_model}[kind]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, eps=0.1, weight_decay=0.01)
    loss = {"sft": sft_loss, "preference": preference_loss}[kind]
    loss(model, examples, sum(example.count for example in examples)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert losses[1] == pytest.approx(looped(model, examples) / sum(e.count for e in examples), rel=1e-3)


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["sft", "preference"])
@pytest.mark.parametrize("batch_sequences", [3, 5])
def test_two_ranks_train_as_one(pool, kind, batch_sequences):
    """3 and 5 over 2 ranks, one at a time: the second rank has idle micro-batches."""
    first, second = pool.run(trained, kind, batch_sequences, 1)
    assert first == second
    assert_same(first, trained(kind, batch_sequences, 64))


def test_fit_learns():
    report = fit(
        language_model(),
        DEMONSTRATIONS,
        sft_loss,
        FitSettings(optimizer=OptimizerSettings(learning_rate=1e-2), epochs=40, batch_sequences=5),
    )
    assert report.steps == 40 and report.losses[-1] < 0.2 * report.losses[0]


def test_frozen_parameters_stay():
    model = reward_model()
    model.model.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    fit(model, PREFERENCES, preference_loss, FitSettings(optimizer=SMOOTH, epochs=2))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"score.weight"}


def test_a_loss_that_is_not_finite_stops_before_the_optimizer():
    model = language_model()
    before = [p.clone() for p in model.parameters()]

    def broken(model, examples, denominator):
        return sft_loss(model, examples, denominator) * math.nan

    with pytest.raises(FloatingPointError, match="toy: the loss of step 0 is nan"):
        fit(model, DEMONSTRATIONS, broken, FitSettings(), "toy")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_no_examples_is_an_error():
    with pytest.raises(ValueError, match="no examples"):
        fit(language_model(), [], sft_loss, FitSettings())
