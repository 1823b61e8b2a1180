"""Reward sources: a function's mistakes are named on every rank; a model's scores are those of plain transformers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from engine import dist, reward_sources, zero
from engine.batch import Rollout, take_rows
from engine.errors import RunError
from engine.evaluation import evaluate, score
from engine.reward_sources import RewardFunction, RewardModel, Texts
from tests import tiny

THIS = "tests/test_reward_sources.py"
END = 7

# Reward functions of the tests ----------------------------------------------------------------------------------


def uses_columns(prompts, responses, difficulty, answer):
    """Every argument is a list with an entry per response."""
    assert all(isinstance(x, list) and len(x) == len(prompts) for x in (prompts, responses, difficulty, answer))
    return [d + 10 * len(a) + 100 * len(r) for d, a, r in zip(difficulty, answer, responses, strict=True)]


def wrong_count(prompts, responses, **columns):
    return [0.0] * (len(prompts) + 1)


def not_a_number(prompts, responses, **columns):
    return [math.nan if prompt == "prompt 1" else 0.0 for prompt in prompts]


def infinite(prompts, responses, **columns):
    return [math.inf if prompt == "prompt 1" else 0.0 for prompt in prompts]


def a_word(prompts, responses, **columns):
    return ["excellent"] * len(prompts)


def nothing(prompts, responses, **columns):
    return None


def raises(prompts, responses, **columns):
    return [{}[prompt] for prompt in prompts]


def fails_on_the_last_prompt(prompts, responses, **columns):
    """The last of seven prompts is on rank 1."""
    if "prompt 6" in prompts:
        raise RuntimeError("the judge is out to lunch")
    return [0.0] * len(prompts)


def function(name: str) -> RewardFunction:
    return RewardFunction(tiny.recipe(rewards=[{"function": f"{THIS}:{name}"}]).rewards[0])


def texts(rows, columns=None) -> Texts:
    rows = list(rows)
    return Texts(tuple(f"prompt {r}" for r in rows), ["yes" * r for r in rows], columns or ({},) * len(rows))


def test_columns_arrive_as_lists_under_their_names():
    columns = ({"difficulty": 3, "answer": "ab"}, {"difficulty": 4, "answer": ""})
    scores = function("uses_columns").score(tiny.rollout(rows=2), texts((0, 2), columns))
    assert scores.dtype == torch.float32 and scores.tolist() == [23.0, 604.0]


class Words:
    """Decodes as tokenizers that put the space into the word do: the first space is gone, and so are special tokens."""

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(f"w{i}" for i in row if i != END) for row in rows]


def test_texts_of_a_rollout_are_its_real_tokens():
    rollout = tiny.rollout(rows=3)
    found = Texts.of(tiny.prompts(rows=3), rollout, Words())
    assert found.prompts == ["prompt 0", "prompt 1", "prompt 2"]
    for row, response in enumerate(found.responses):
        assert response.split() == [f"w{i}" for i in rollout.response_ids[row, : rollout.response_lengths[row]]]
        assert found.continuations[row] == " " + response


def test_a_continuation_goes_on_from_the_last_token_of_the_prompt():
    rollout = take_rows(tiny.rollout(rows=4), torch.tensor([0, 0, 0]))
    rollout.prompt_ids[:, -1] = torch.tensor([3, END, 3])  # no text comes before what follows a special token
    rollout.response_lengths[:] = 2
    rollout.response_ids[:, :2] = torch.tensor([[4, 5], [4, 5], [END, END]])
    found = Texts.of(tiny.prompts(rows=3), rollout, Words())
    assert found.responses == ["w4 w5", "w4 w5", ""]
    assert found.continuations == [" w4 w5", "w4 w5", ""]


class Bytes:
    """Decodes bytes to text."""

    def batch_decode(self, rows, skip_special_tokens):
        return [bytes(row).decode("utf-8", errors="replace") for row in rows]


def test_a_character_that_prompt_and_response_share():
    rollout = take_rows(tiny.rollout(rows=2), torch.tensor([0]))
    first, second = "é".encode()
    rollout.prompt_ids[0, -1], rollout.response_ids[0, 0], rollout.response_ids[0, 1] = first, second, ord("a")
    rollout.response_lengths[0] = 2
    assert Texts.of(tiny.prompts(rows=1), rollout, Bytes()).continuations == ["\ufffda"]


@pytest.mark.parametrize(
    "stops, response",
    [((), "w4 w5 w6"), (("w7",), "w4 w5 w6"), (("5",), "w4 w"), (("6", " w5", "w6"), "w4"), ((" w4",), "w4 w5 w6")],
)
def test_a_response_goes_up_to_its_first_stop_string(stops, response):
    rollout = take_rows(tiny.rollout(rows=2), torch.tensor([0]))
    rollout.response_ids[0, :3], rollout.response_lengths[0] = torch.tensor([4, 5, 6]), 3
    found = Texts.of(tiny.prompts(rows=1), rollout, Words(), stop_strings=stops)
    assert found.responses == [response] and found.continuations == [" " + response]


@pytest.mark.parametrize(
    "name, prompt, says",
    [
        ("raises", "prompt 0", "KeyError"),
        ("wrong_count", "prompt 0", "3 scores for 2"),
        ("not_a_number", "prompt 1", "nan"),
        ("infinite", "prompt 1", "inf"),
        ("a_word", "prompt 0", "excellent"),
        ("nothing", "prompt 0", "NoneType"),
    ],
)
def test_a_mistake_names_the_function_and_a_prompt(name, prompt, says):
    with pytest.raises(RunError) as caught:
        function(name).score(tiny.rollout(rows=2), texts(range(2)))
    for part in (f"{THIS}:{name}", repr(prompt), says):
        assert part in str(caught.value)


def test_no_rows_need_no_call():
    assert function("raises").score(take_rows(tiny.rollout(), torch.arange(0)), texts(())).shape == (0,)


# On two ranks ---------------------------------------------------------------------------------------------------


def my_rows(rows: int = 7) -> torch.Tensor:
    return torch.arange(rows).tensor_split(dist.world_size())[dist.rank()]


def evaluated(*names: str) -> str | list:
    """Through the real evaluation: what a rank raises, or its scores."""
    recipe = tiny.recipe(rewards=[{"function": f"{THIS}:{name}", "name": f"{i}"} for i, name in enumerate(names)])
    engine = tiny.engine(recipe)
    rows = my_rows()
    try:
        with engine.inference():
            sources = reward_sources.build(recipe, engine=None, tokenizer=None)
            scores = score(sources, take_rows(tiny.rollout(), rows), texts(rows.tolist()))
            return evaluate(engine, tiny.rollout(), scores, recipe).source_scores.tolist()
    except RuntimeError as error:
        return str(error)
    finally:
        engine.close()


@pytest.mark.dist
def test_a_failure_on_one_rank_stops_all_with_its_message(pool):
    first, second = pool.run(evaluated, "fails_on_the_last_prompt")
    assert first == second
    for part in ("rank 1", f"{THIS}:fails_on_the_last_prompt", "prompt 4", "out to lunch"):
        assert part in first


@pytest.mark.dist
def test_the_second_source_fails_where_the_first_is_fine(pool):
    first, second = pool.run(evaluated, "shouts", "not_a_number")
    assert first == second and "rank 0" in first and "'prompt 1'" in first


def shouts(prompts, responses, **columns):
    return [float(len(response)) for response in responses]


@pytest.mark.dist
def test_several_sources_are_columns_in_the_recipes_order(pool):
    for found in pool.run(evaluated, "shouts", "zeros"):
        assert found == [[3.0 * row, 0.0] for row in range(7)]


def zeros(prompts, responses, **columns):
    return [0.0] * len(prompts)


# Reward models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A tiny classifier whose padding token is its end token."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        max_position_embeddings=64,
        num_labels=1,
        pad_token_id=END,
        eos_token_id=END,
        attention_dropout=0.5,  # frozen or not, a score is no matter of luck
    )
    folder = tmp_path_factory.mktemp("scorer")
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def responses_with_end_tokens() -> Rollout:
    """Responses that end with the end token, some with several, and padding that is the end token as well."""
    plain = tiny.rollout()
    ids = torch.where(plain.response_mask, plain.response_ids, END)
    for row, length in enumerate(plain.response_lengths.tolist()):
        if row % 3 != 2:
            ids[row, length - 1] = END
        if row % 3 == 1:
            ids[row, max(0, length - 2)] = END
    return Rollout(**{**vars(plain), "response_ids": ids})


def plainly(path: str, rollout: Rollout) -> list[float]:
    """One row at a time without padding: backbone, score head, last position."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    found = []
    for row in range(len(rollout)):
        p, r = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
        ids = torch.cat([rollout.prompt_ids[row, -p:], rollout.response_ids[row, :r]])[None]
        with torch.no_grad():
            found.append(model.score(model.model(input_ids=ids).last_hidden_state)[0, -1, 0].item())
    return found


def scored(path: str, offload: str, rows_on_rank_0: int | None, cut: dict) -> dict:
    """On a rank: its scores, and the state of the frozen parameters around the scoring."""
    recipe = tiny.recipe(rewards=[{"model": path, "offload_param": offload}], ppo=cut)
    source = RewardModel(recipe.rewards[0], recipe, tokenizer=None)  # it has none of its own: it reads ids
    rows = my_rows()
    if rows_on_rank_0 is not None:
        rows = (torch.arange(rows_on_rank_0), torch.arange(rows_on_rank_0, 7))[dist.rank()]
    named = list(source.engine.module.named_parameters())
    before = zero.shards_hash(named)
    scores = source.score(take_rows(responses_with_end_tokens(), rows), texts(rows.tolist()))
    result = {
        "scores": scores.tolist(),
        "gathered": [name for name, p in named if zero.is_gathered(p)],
        "partitioned": all(p.ds_tensor.numel() < p.ds_numel for _, p in named),
        "elsewhere": [name for name, p in named if p.ds_tensor.device.type != "cpu"],
        "whole_elements": sum(p.data.numel() for _, p in named),
        "moved": zero.shards_hash(named) != before,
        "trainable": [name for name, p in named if p.requires_grad],
    }
    source.close()
    return result


@pytest.mark.dist
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize(
    "rows_on_rank_0, cut",
    [
        (None, {"micro_batch_sequences": 2}),
        (7, {"micro_batch_sequences": 3}),
        (0, {"micro_batch_sequences": 4}),
        (5, {"tokens_per_micro_batch": 24}),
        (7, {"tokens_per_micro_batch": 1}),
    ],
)
def test_two_ranks_score_as_plain_transformers(pool, checkpoint, offload, rows_on_rank_0, cut):
    expected = plainly(checkpoint, responses_with_end_tokens())
    assert max(expected) - min(expected) > 0.5, "scores that hardly differ prove nothing"
    results = pool.run(scored, checkpoint, offload, rows_on_rank_0, cut)
    found = [score for result in results for score in result["scores"]]
    assert found == pytest.approx(expected, abs=1e-5)
    for result in results:
        assert result["partitioned"], "the model isn't sharded at all"
        assert result["gathered"] == [] and result["whole_elements"] == 0, "a parameter stayed gathered after scoring"
        assert not result["moved"] and result["trainable"] == []
        if offload == "cpu":
            assert result["elsewhere"] == []


def test_pooling_by_padding_ids_would_differ(checkpoint):
    """The trap that the test above is about: transformers' own classifier, with pad = EOS, reads an earlier token."""
    rollout = responses_with_end_tokens()
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        pooled = model(input_ids=rollout.sequences, attention_mask=rollout.sequence_mask.long()).logits[:, 0]
    assert (pooled - torch.tensor(plainly(checkpoint, rollout))).abs().max() > 0.1


def model_and_function(path: str) -> list:
    recipe = tiny.recipe(rewards=[{"model": path, "weight": 2.0}, {"function": f"{THIS}:shouts"}])
    engine = tiny.engine(recipe)
    sources = reward_sources.build(recipe, engine=None, tokenizer=None)
    rows = my_rows()
    with engine.inference():
        scores = score(sources, take_rows(responses_with_end_tokens(), rows), texts(rows.tolist()))
        evaluation = evaluate(engine, responses_with_end_tokens(), scores, recipe)
    for source in sources:
        source.close()
    engine.close()
    return evaluation.source_scores.tolist()


@pytest.mark.dist
def test_a_model_and_a_function_beside_the_trained_engine(pool, checkpoint):
    for found in map(torch.tensor, pool.run(model_and_function, checkpoint)):
        assert found[:, 0].tolist() == pytest.approx(plainly(checkpoint, responses_with_end_tokens()), abs=1e-5)
        assert found[:, 1].tolist() == [3.0 * row for row in range(7)]
