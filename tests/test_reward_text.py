"""A reward model with a tokenizer of its own: the ids are written by hand, its scores are plain transformers'."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from engine import dist
from engine.batch import Prompts, Rollout, take_rows
from engine.errors import RunError
from engine.reward_sources import RewardModel, Texts
from engine.reward_text import RewardText, other_tokenizer
from tests import checkpoints, tiny
from tests.launching import launch_plain

BOS, EOS = 0, 1


def wrapped(raw: Tokenizer, single: str, **changes) -> PreTrainedTokenizerFast:
    """With special tokens <s> and </s>, put around every text as `single` says."""
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, **{"bos_token": "<s>", "eos_token": "</s>", **changes})


def bpe(single: str = "<s> $A", **changes) -> PreTrainedTokenizerFast:
    """a=3 b=4 space=5, and the merges ab=6 and " ab"=7."""
    vocabulary = {"<s>": BOS, "</s>": EOS, "<unk>": 2, "a": 3, "b": 4, " ": 5, "ab": 6, " ab": 7}
    return wrapped(Tokenizer(models.BPE(vocabulary, [("a", "b"), (" ", "ab")], unk_token="<unk>")), single, **changes)


USER, ASSISTANT, END = 2, 3, 4
LETTERS = {letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz \n", 5)}
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content | trim }}{{ '<|end|>' }}{% endfor %}"
)


def letters(template: str | None = None, **changes) -> PreTrainedTokenizerFast:
    """One token per letter behind a BOS, and <|user|> 2, <|assistant|> 3, <|end|> 4."""
    special = {"<s>": BOS, "</s>": EOS, "<|user|>": USER, "<|assistant|>": ASSISTANT, "<|end|>": END}
    raw = Tokenizer(models.WordLevel({**special, **LETTERS}, unk_token=" "))
    raw.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return wrapped(raw, "<s> $A", chat_template=template, **changes)


def spelled(text: str) -> list[int]:
    return [LETTERS[letter] for letter in text]


# Plain prompts --------------------------------------------------------------------------------------------------


def test_prompt_and_response_are_tokenised_together():
    # "a" + "b ab": on their own they would be a | b " ab".
    assert RewardText(bpe()).plain("a", "b ab", ended=False) == [BOS, 6, 7]
    assert RewardText(bpe()).plain("ab", " ab", ended=True) == [BOS, 6, 7, EOS]


@pytest.mark.parametrize("single", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("ended", [False, True])
def test_end_and_begin_whatever_the_tokenizer_adds(single, ended):
    """An EOS says that the response ended, and nothing else."""
    begin = [BOS] if "<s>" in single else []
    assert RewardText(bpe(single)).plain("ab", "a", ended) == [*begin, 6, 3] + [EOS] * ended


@pytest.mark.parametrize("single", ["$A", "<s> $A </s>"])
def test_a_begin_or_end_that_the_text_spells_is_not_doubled(single):
    assert RewardText(bpe(single)).plain("<s>ab", "a</s>", ended=True) == [BOS, 6, 3, EOS]
    assert RewardText(bpe(single)).plain("<s>ab", "a", ended=False) == [BOS, 6, 3]


def test_words_without_special_tokens():
    raw = Tokenizer(models.WordLevel({"red": 0, "blue": 1, "green": 2}))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    text = RewardText(PreTrainedTokenizerFast(tokenizer_object=raw))
    assert text.plain("red blue", " green", ended=True) == [0, 1, 2]
    with pytest.raises(ValueError, match="makes no token of '  '"):
        text.plain(" ", " ", ended=True)
    with pytest.raises(ValueError, match="failed on 'red now'"):
        text.plain("red", " now", ended=True)


def test_special_tokens_of_another_model_are_ordinary_characters():
    found = RewardText(bpe(unk_token="<unk>")).plain("<|im_start|>ab", " ab", ended=False)
    assert len(found) > 4 and found[0] == BOS and found[-2:] == [6, 7] and set(found[1:-2]) == {2, 3}


def test_too_long_a_text_keeps_its_end_and_its_begin():
    assert RewardText(bpe(), longest=4).fit([BOS, 3, 4, 5, 6, 7]) == [BOS, 5, 6, 7]
    assert RewardText(bpe(), longest=4).fit([3, 3, 4, 5, 6, 7]) == [4, 5, 6, 7]
    assert RewardText(bpe(), longest=1).fit([3, 4]) == [4]
    for longest in (6, None):
        assert RewardText(bpe(), longest).fit([BOS, 3, 4, 5, 6, 7]) == [BOS, 3, 4, 5, 6, 7]


# Chats ----------------------------------------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("response", "read"),
    [("ok", "ok"), ("", ""), (" \n", ""), ("a b ", "a b"), ("end", "end"), ("assistant", "assistant"), ("hi", "hi")],
)
def test_a_chat_in_the_reward_models_own_template(response, read):
    """The template trims. Words that its own markers hold are no trap."""
    text = RewardText(letters(CHAT))
    opened = [BOS, USER, *spelled("hi"), END, ASSISTANT, *spelled(read)]
    assert text.chat(HELLO, response, ended=False) == opened
    assert text.chat(HELLO, response, ended=True) == [*opened, END]


def test_the_templates_own_end_is_the_only_one():
    text = RewardText(letters("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}\n"))
    assert text.chat(HELLO, "ok", ended=True) == [*spelled("hi"), EOS, *spelled("ok"), EOS]
    assert text.chat(HELLO, "ok", ended=False) == [*spelled("hi"), EOS, *spelled("ok")]


def test_a_template_that_takes_thoughts_out():
    """transformers' continue_final_message refuses this response: it isn't in the rendered chat as it is."""
    text = RewardText(letters(CHAT.replace("m.content", "m.content.split('so')[-1]")))
    opened = [BOS, USER, *spelled("hi"), END, ASSISTANT, *spelled("ok")]
    assert text.chat(HELLO, "i think so ok", ended=False) == opened
    assert text.chat(HELLO, "i think so ok", ended=True) == [*opened, END]


def test_templates_that_cannot_be_used():
    with pytest.raises(ValueError, match="template failed.*no system here"):
        RewardText(letters("{{ raise_exception('no system here') }}")).chat(HELLO, "ok", ended=True)
    with pytest.raises(ValueError, match="leaves the assistant's message out"):
        RewardText(letters("{{ messages[0].content }}")).chat(HELLO, "ok", ended=False)


# Which tokenizers are the same ----------------------------------------------------------------------------------


def saved(tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_same_tokenizer_takes_ids(tmp_path):
    policy = letters(CHAT)
    assert other_tokenizer(str(tmp_path), policy, chat=True) is None, "no tokenizer: trained on the policy's ids"
    for index, same in enumerate([policy, letters(), letters(CHAT, pad_token="<|end|>")]):
        assert other_tokenizer(saved(same, tmp_path / str(index)), policy, chat=True) is None


def test_another_vocabulary_end_or_template_takes_text(tmp_path):
    policy = letters(CHAT)
    swapped = json.loads(policy.backend_tokenizer.to_str())
    ids = swapped["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    folder = Path(saved(policy, tmp_path / "swapped"))
    (folder / "tokenizer.json").write_text(json.dumps(swapped))
    assert other_tokenizer(str(folder), policy, chat=False).get_vocab()["a"] == LETTERS["b"]
    for name, token in (("eos_token", "<|end|>"), ("bos_token", None)):
        folder = saved(letters(CHAT, **{name: token}), tmp_path / name)
        assert other_tokenizer(folder, policy, chat=False) is not None, name
    folder = saved(letters(CHAT.replace("| trim", "")), tmp_path / "template")
    assert other_tokenizer(folder, policy, chat=False) is None
    assert other_tokenizer(folder, policy, chat=True) is not None


# Scores on two ranks --------------------------------------------------------------------------------------------

WORDS = ["<s>", "</s>", "▁red", "▁green", "▁blue", "s"]
ROWS = [  # prompt, response ids of the policy, ended, the response's text behind the prompt
    ("a red", [3, 5, 1], True, " greens"),
    ("green", [4], False, " blue"),
    ("one", [5], False, "s"),
    ("blue", [1], True, ""),
    ("the red and the blue", [2, 3, 4, 3], False, " red green blue green"),
    ("so", [4, 0, 4, 1], True, " blue blue"),
    ("a long tale of blue and red", [4, 1], True, " blue"),
]
LONGEST = 30


def policy_tokenizer() -> PreTrainedTokenizerFast:
    """Words that carry their space, which decoding takes from the first one, as Llama 2's does."""
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="s"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def save_reward(folder: Path, tokenizer: PreTrainedTokenizerFast, longest: int = LONGEST) -> str:
    torch.manual_seed(6)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=40, max_position_embeddings=longest, initializer_range=0.3, num_labels=1, **sizes)
    config.pad_token_id = EOS
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return saved(tokenizer, folder)


def sampled() -> tuple[Prompts, Rollout]:
    """ROWS as the sampler would give them; each prompt is a message too."""
    texts, responses, ended, _ = zip(*ROWS, strict=True)
    count, width = len(ROWS), max(map(len, responses))
    ids = torch.full((count, width), 3)
    for row, response in enumerate(responses):
        ids[row, : len(response)] = torch.tensor(response)
    asked = replace(
        tiny.prompts(count),
        prompt_ids=torch.full((count, 2), WORDS.index("▁blue")),
        prompt_lengths=torch.full((count,), 2),
        texts=texts,
        columns=tuple({"chat": [{"role": "user", "content": text}]} for text in texts),
    )
    return asked, replace(
        tiny.rollout(count),
        prompt_ids=asked.prompt_ids,
        prompt_lengths=asked.prompt_lengths,
        response_ids=ids,
        response_lengths=torch.tensor(list(map(len, responses))),
        ended=torch.tensor(ended),
        sampler_logprobs=torch.zeros(count, width),
    )


def plainly(path: str, sequences: list[list[int]]) -> list[float]:
    """One sequence at a time without padding: backbone, score head, last position."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return [
            model.score(model.model(input_ids=torch.tensor([ids])).last_hidden_state)[0, -1, 0].item()
            for ids in sequences
        ]


IN_PAIRS = {"micro_batch_sequences": 2}


def scored(path: str, chat: bool, rows_on_rank_0: int | None, cut: dict) -> tuple[list[float] | str, list[str]]:
    """On a rank: the scores of its rows (or what it raises), and what it logs."""
    said = []

    class Listener(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    listener, logger = Listener(), logging.getLogger("engine.reward_sources")
    logger.addHandler(listener)
    logger.setLevel("INFO")
    settings = {"messages_column": "chat"} if chat else {}
    recipe = tiny.recipe(rewards=[{"model": path, "name": "judge"}], ppo=cut, data=settings)
    source = RewardModel(recipe.rewards[0], recipe, policy_tokenizer())
    rows = torch.arange(len(ROWS)).tensor_split(dist.world_size())[dist.rank()]
    if rows_on_rank_0 is not None:
        rows = (torch.arange(rows_on_rank_0), torch.arange(rows_on_rank_0, len(ROWS)))[dist.rank()]
    asked, rollout = sampled()
    mine = [int(row) for row in rows]
    asked = Prompts(*(x[rows] if torch.is_tensor(x) else tuple(x[r] for r in mine) for x in vars(asked).values()))
    rollout = take_rows(rollout, rows)
    try:
        return source.score(rollout, Texts.of(asked, rollout, policy_tokenizer())).tolist(), said
    except RunError as error:
        return str(error), said
    finally:
        source.close()
        logger.removeHandler(listener)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("rows_on_rank_0", "cut"),
    [(None, IN_PAIRS), (7, {"micro_batch_sequences": 3}), (0, IN_PAIRS), (4, {"tokens_per_micro_batch": 50})],
)
def test_two_ranks_score_the_text_as_plain_transformers(pool, tmp_path, rows_on_rank_0, cut):
    path = save_reward(tmp_path, letters())
    sequences = [[*spelled(prompt + text), *[EOS] * ended] for prompt, _, ended, text in ROWS]
    # The BOS takes a position too: the fifth and the last text are longer than the model's.
    assert [1 + len(ids) > LONGEST for ids in sequences] == [False] * 4 + [True, False, True]
    expected = plainly(path, [[BOS, *ids[-(LONGEST - 1) :]] for ids in sequences])
    assert max(expected) - min(expected) > 0.5, "scores that hardly differ prove nothing"
    (first, said), (second, nothing) = pool.run(scored, path, False, rows_on_rank_0, cut)
    assert first + second == pytest.approx(expected, abs=1e-5)
    assert said == [
        "reward judge reads text: its tokenizer is another one",
        "reward judge: 2 texts were longer than its 30 positions and lost their beginning",
    ]
    assert nothing == []


@pytest.mark.dist
def test_two_ranks_score_chats_in_the_reward_models_template(pool, tmp_path):
    path = save_reward(tmp_path, letters(CHAT), longest=64)
    expected = plainly(
        path,
        [
            [BOS, USER, *spelled(prompt), END, ASSISTANT, *spelled(text.strip()), *[END] * ended]
            for prompt, _, ended, text in ROWS
        ],
    )
    (first, said), (second, _) = pool.run(scored, path, True, None, IN_PAIRS)
    assert first + second == pytest.approx(expected, abs=1e-5)
    assert said == ["reward judge reads text: its tokenizer is another one"]


@pytest.mark.dist
def test_a_text_that_cannot_be_read_stops_all_ranks(pool, tmp_path):
    """The conversation is on rank 1; rank 0 would wait for it in the next collective."""
    template = CHAT + "{% if 'tale' in messages[0].content %}{{ raise_exception('no tales') }}{% endif %}"
    (first, _), (second, _) = pool.run(scored, save_reward(tmp_path, letters(template)), True, None, IN_PAIRS)
    assert first == second
    for part in ("rank 1", "reward judge", "no tales", "a long tale"):
        assert part in first


# A whole run ----------------------------------------------------------------------------------------------------


@pytest.mark.dist
def test_a_run_with_a_reward_model_of_another_tokenizer(tmp_path):
    reward = save_reward(tmp_path / "judge", letters(), longest=64)
    recipe = checkpoints.save_recipe(tmp_path, rewards=[{"model": reward}], iterations=1)
    done = launch_plain(recipe)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("reward judge reads text: its tokenizer is another one") == 1
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 5
    for sample in samples:
        # The policy's tokenizer decodes to letters with spaces between them; the reward's unknown token is its space.
        whole = " ".join([sample["prompt"], *sample["response"].split()])
        ids = [BOS, *spelled(whole.replace("Ġ", " "))]
        either = plainly(reward, [ids, [*ids, EOS]])
        assert any(sample["score"] == pytest.approx(score, abs=1e-4) for score in either), sample
