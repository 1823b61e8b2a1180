"""End tokens, stop strings in the text of every kind of tokenizer, and ids that are no text."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.stopping import Stops, check_stop_strings, check_vocabulary, scored_text
from tests import checkpoints

TEXT = (
    "User: hello there, the cat's mat isn't red. こんにちは世界 안녕 🙂🙃 naïve café\n\nAssistant: don't stop, the end."
)


def wrapped(raw: Tokenizer, **settings) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", **settings)


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen: tokens are bytes, a character may take several."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    raw.train_from_iterator([TEXT] * 3, trainer)
    return wrapped(raw)


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma: spaces are part of words, the first one is dropped; rare characters are bytes."""
    pieces = ["<unk>", "<eos>", "▁", "▁the", "▁cat", "cat", "s", "'", "▁is", "n", "'t", ".", ",", "st", "op", "▁st"]
    pieces += ["▁▁", "\n", "世", "世界", "a", "b", "e", "▁e", "nd", "r", "ed", "▁mat", "hello"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    raw = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(raw, unk_token="<unk>")


def word_pieces() -> PreTrainedTokenizerFast:
    """As the toy world: "##" glues, and spaces before punctuation are cleaned away."""
    pieces = ["<eos>", "the", "cat", "##s", "##at", "m", "##st", "##op", "is", "n", "'", "t", ".", ",", "end", "do"]
    raw = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="<eos>"))
    raw.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return wrapped(raw, clean_up_tokenization_spaces=True)


def words() -> PreTrainedTokenizerFast:
    """No decoder: tokens with spaces between them; one of them has no text at all."""
    pieces = ["<eos>", "", "a", "b", "c", "stop", "the", "end", "."]
    return wrapped(Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<eos>")))


KINDS = [byte_level, sentencepiece, word_pieces, words]


def drawn(tokenizer, random: random.Random, length: int) -> list[int]:
    """Ids that make words, whole characters in bytes, halves of such, and special tokens among it all."""
    vocabulary = tokenizer.get_vocab()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    parts = {index for piece, index in vocabulary.items() if piece.startswith("<0x") or piece in alphabet}
    whole = [index for index in range(len(vocabulary)) if index not in parts]
    ids = []
    while len(ids) < length:
        kind = random.random()
        if kind < 0.5:
            ids.append(random.choice(whole))
        elif kind < 0.6:
            ids.append(random.randrange(len(vocabulary)))
        elif kind < 0.7:
            ids.append(tokenizer.eos_token_id)
        elif "<0x41>" in vocabulary:
            ids += [vocabulary[f"<0x{byte:02X}>"] for byte in random.choice("世界é🙂A ").encode()]
        else:
            ids += tokenizer(random.choice(TEXT.split(" ")), add_special_tokens=False)["input_ids"]
    return ids[:length]


def naive_stop(tokenizer, ids: list[int], strings: list[str]) -> int | None:
    """After how many tokens: the whole text anew for every token."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=True)
        if any(string in text for string in strings):
            return count
    return None


def stop(stops: Stops, ids: list[int]) -> int | None:
    for count in range(1, len(ids) + 1):
        if stops.reached(torch.tensor([ids[:count]]), count - 1).item():
            return count
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_stops_where_a_search_of_the_whole_text_does(kind):
    tokenizer, rng = kind(), random.Random(0)
    stopped = 0
    for _ in range(400):
        ids = drawn(tokenizer, rng, 40)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        at = [rng.randrange(len(text)) for _ in range(2)]
        strings = [text[i : i + rng.randint(2, 9)] for i in at]
        strings = [s for s in strings if "\ufffd" not in s] + ["not there"]
        expected = naive_stop(tokenizer, ids, strings)
        assert stop(Stops([], strings, tokenizer), ids) == expected, (ids, strings)
        stopped += expected is not None
    assert stopped > 200


def test_a_search_goes_over_few_tokens():
    tokenizer = byte_level()
    stops = Stops([], ["the end"], tokenizer)
    ids = np.array(tokenizer("hello there, " * 200)["input_ids"])
    assert len(ids) - stops._start(ids, len(ids) - 1) <= len("the end") + 4


def test_a_string_may_begin_and_end_inside_tokens():
    """By hand: "he", "ll", "o!" hold "ello" from the middle of the first to the middle of the last."""
    raw = Tokenizer(models.BPE({"he": 0, "ll": 1, "o!": 2, "<eos>": 3}, []))
    raw.decoder = decoders.ByteLevel()
    stops = Stops([3], ["ello"], wrapped(raw))
    assert [stops.reached(torch.tensor([[0, 1, 2][:n]]), n - 1).item() for n in (1, 2, 3)] == [False, False, True]
    assert stops.reached(torch.tensor([[0, 1, 2], [1, 1, 2], [1, 1, 3]]), 2).tolist() == [True, False, True]


def test_a_character_in_bytes_is_found_when_its_last_byte_comes():
    tokenizer = sentencepiece()
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary["cat"], *(vocabulary[f"<0x{byte:02X}>"] for byte in "é🙂".encode())]
    assert stop(Stops([], ["é"], tokenizer), ids) == 3
    assert stop(Stops([], ["é🙂"], tokenizer), ids) == 7
    assert stop(Stops([], ["🙂"], tokenizer), ids) == 7


def test_tokens_that_do_not_show_do_not_count():
    """However many special tokens, and spaces that are cleaned away, lie between two letters."""
    tokenizer = byte_level()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    eos, (space, quote, a, b) = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(["Ġ", "'", "a", "b"])
    assert stop(Stops([], ["ab"], tokenizer), [a] + [eos] * 30 + [b]) == 32
    ids = [a] + [space, quote, space, b] * 9
    assert tokenizer.decode(ids) == "a" + "'b" * 9
    assert stop(Stops([], ["a" + "'b" * 9], tokenizer), ids) == len(ids)


def test_what_an_unfinished_character_hides_is_found_when_it_is_finished():
    """As a response whose search begins, after min_new_tokens, in the middle of a character."""
    tokenizer = sentencepiece()
    ids = tokenizer.convert_tokens_to_ids(["cat", *(f"<0x{byte:02X}>" for byte in "éA🙂".encode())])
    stops = Stops([], ["é"], tokenizer)
    assert not stops.reached(torch.tensor([ids[:-1]]), 0).item(), "the broken character spoils its neighbours"
    assert stops.reached(torch.tensor([ids]), len(ids) - 1).item()


def test_a_search_does_not_begin_inside_a_character_that_a_special_token_parts():
    tokenizer = sentencepiece()
    ids = tokenizer.convert_tokens_to_ids(["<0xC3>", "<eos>", "<0xA9>", *["<0x41>"] * 4, "<0x42>"])
    assert tokenizer.decode(ids, skip_special_tokens=True) == "éAAAAB"
    assert stop(Stops([], ["AB"], tokenizer), ids) == 8


def test_marks_of_a_tail_are_no_text():
    """Text made from the middle of a response starts with a glue mark that the whole doesn't have."""
    tokenizer = word_pieces()
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary["m"]] + [vocabulary["##at"], vocabulary["##s"]] * 20
    assert stop(Stops([], ["##"], tokenizer), ids) is None


def test_whole_text_is_searched_where_none_was_before():
    stops = Stops([], ["cat"], word_pieces())
    ids = torch.tensor([word_pieces().convert_tokens_to_ids(["cat"] + ["the"] * 30)])
    assert not stops.reached(ids, 30).item() and stops.reached(ids, 0).item()


def test_every_end_token_ends_alone_and_only_at_the_end():
    stops = Stops([3, 5, 9])
    assert stops.reached(torch.tensor([[1, 3], [1, 5], [1, 9], [3, 1], [1, 4]]), 1).tolist() == [True] * 3 + [False] * 2


# ---- what is scored


def test_scored_text_by_hand():
    assert scored_text("one two three", []) == "one two three"
    assert scored_text("one two three", ["four"]) == "one two three"
    assert scored_text("one two three two", ["three", "two"]) == "one "
    assert scored_text("two", ["two"]) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_scored_text_holds_no_stop_string(kind):
    tokenizer, rng = kind(), random.Random(1)
    for _ in range(100):
        text = tokenizer.decode(drawn(tokenizer, rng, 20), skip_special_tokens=True)
        strings = [text[3:5], text[6:9], "e"]
        scored = scored_text(text, [s for s in strings if s])
        assert text.startswith(scored) and not any(s in scored for s in strings if s)


def test_stop_strings_that_no_text_holds():
    tokenizer = checkpoints.tokenizer()
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True), AddedToken("<tool>", special=False)])
    assert check_stop_strings(tokenizer, ["\n", "<tool>", "User:"]) == []
    (said,) = check_stop_strings(tokenizer, ["x<|im_end|>"])
    assert "'x<|im_end|>'" in said and "generation.end_tokens" in said
    assert "empty" in check_stop_strings(tokenizer, [""])[0]


# ---- vocabularies of two sizes


def test_ids_beyond_the_tokenizer_are_banned_and_end_tokens_early():
    tokenizer = checkpoints.tokenizer()  # ids 0 to 29
    stops = Stops([1, 31], (), tokenizer)
    assert stops.banned(34, early=False).tolist() == [30, 32, 33]
    assert sorted(stops.banned(34, early=True).tolist()) == [1, 30, 31, 32, 33]
    assert stops.banned(30, early=False) is None and stops.banned(20, early=False) is None
    assert Stops([1]).banned(34, early=False) is None


def test_a_tokenizer_with_holes_keeps_its_last_token():
    raw = Tokenizer(models.WordLevel({"a": 0, "b": 5, "<eos>": 9}, unk_token="<eos>"))
    assert Stops([9], (), wrapped(raw)).banned(12, early=False).tolist() == [10, 11]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_beyond_the_tokenizer_have_no_text_but_do_no_harm(kind):
    tokenizer = kind()
    inside = tokenizer.get_vocab()["the" if kind in (word_pieces, words) else "e"]
    beyond = len(tokenizer) + 7
    assert tokenizer.batch_decode([[inside, beyond]], skip_special_tokens=True) == [tokenizer.decode([inside])]
    assert not Stops([], ["zzz"], tokenizer).reached(torch.tensor([[beyond, inside, beyond]]), 2).item()


def test_a_token_without_an_embedding_is_refused_where_it_is_used():
    tokenizer = checkpoints.tokenizer()
    assert check_vocabulary(tokenizer, 30) == check_vocabulary(tokenizer, 64) == []
    tokenizer.add_tokens(["<think>"])  # id 30, which the model lacks, and nothing uses
    assert check_vocabulary(tokenizer, 30, used=range(30)) == []
    (said,) = check_vocabulary(tokenizer, 30, used=[3, 30, 30])
    assert "'<think>' (30) lies beyond the model's 30 embeddings" in said and "resize_token_embeddings" in said
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # the classic
    assert "'[PAD]' (31)" in check_vocabulary(tokenizer, 30)[0]
    assert check_vocabulary(tokenizer, 32, used=range(32)) == []
