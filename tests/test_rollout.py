"""Decoding against the naive way, whatever decodes beside it; what ends a response."""

from __future__ import annotations

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers import models as token_models
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from engine import kv_cache, models
from engine.batch import Prompts
from engine.config import DataConfig, GenerationConfig
from engine.prompts import PromptSource, load_prompts
from engine.role_config import ModelConfig
from engine.rollout import generate
from engine.stopping import Stops
from tests import checkpoints, tiny
from tests.decoding import assert_same_row, naive, several_each, take

END = (7, 11)
STOPS = Stops(END)
PIECES = [*"abcdefgh", *(x + y for x in "abcd" for y in "abcdefgh"), "Ġa", "Ġb", "Ã", "©", "<eos>"]
IDS = {piece: index for index, piece in enumerate(PIECES)}
STRINGS = ["ab", "cg", "é", " ad"]


@pytest.fixture(scope="module")
def letters():
    """Byte-level pieces of one and two letters, and é in two halves: 45 of the model's 50 ids."""
    raw = Tokenizer(token_models.BPE(IDS, []))
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")


def assert_naive(module, prompts: Prompts, settings: GenerationConfig, seed: int, tokenizer=None):
    """Sample, and compare every row with the naive way."""
    rollout = generate(module, prompts, settings, Stops(END, settings.stop_strings, tokenizer), seed)
    for row in range(len(prompts)):
        assert_same_row(rollout, row, naive(module, prompts, row, settings, seed, END, tokenizer))
    return rollout


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
    "drawing",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.8, "min_new_tokens": 5},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.7},
    ],
    ids=str,
)
def test_however_it_is_batched_decoding_is_the_naive_one(module, drawing, monkeypatch):
    monkeypatch.setattr(kv_cache, "BLOCK", 2)  # the cache moves to the front of its buffers again and again
    settings = GenerationConfig(max_new_tokens=12, **drawing)
    limits = torch.tensor([12, 12, 3, 12, 1, 12, 8, 12, 12])
    prompts = dataclasses.replace(several_each(tiny.prompts(rows=3), 3), max_new_tokens=limits)
    expected = [naive(module, prompts, row, settings, 5, END) for row in range(len(prompts))]
    for concurrent, continuous in itertools.product((1, 3, 64), (True, False)):
        changes = {"max_concurrent_sequences": concurrent, "continuous_batching": continuous}
        rollout = generate(module, prompts, settings.model_copy(update=changes), STOPS, seed=5)
        for row, wanted in enumerate(expected):
            assert_same_row(rollout, row, wanted)


@pytest.mark.parametrize("least", [0, 6])
def test_stop_strings_end_responses(module, letters, least):
    settings = GenerationConfig(
        max_new_tokens=24, min_new_tokens=least, stop_strings=STRINGS, max_concurrent_sequences=9
    )
    rollout = assert_naive(module, tiny.prompts(rows=24), settings, 5, letters)
    last = rollout.response_ids[torch.arange(24), rollout.response_lengths - 1]
    stopped = rollout.ended & ~torch.isin(last, torch.tensor(END))
    assert stopped.sum() > 5 and (rollout.response_lengths[rollout.ended] > least).all()
    if least:
        assert (rollout.response_lengths[stopped] == least + 1).any(), "an early stop string waits for the minimum"


@pytest.mark.parametrize("settings", [GenerationConfig(max_new_tokens=20, temperature=t) for t in (1.5, 0.0)])
def test_ids_that_are_no_token_are_not_drawn(module, letters, settings):
    """Log-probs stay those of the softmax over all ids: `assert_naive` looks."""
    prompts = tiny.prompts(rows=16)
    assert generate(module, prompts, settings, STOPS, 5).response_ids.max() >= len(PIECES), "it would draw them"
    assert assert_naive(module, prompts, settings, 5, letters).response_ids.max() < len(PIECES)


def test_each_prompt_has_its_own_limit(module):
    """Its response is the unlimited one up to there, whoever decodes beside it for longer."""
    free, settings = tiny.prompts(rows=12), GenerationConfig(max_new_tokens=20, max_concurrent_sequences=5)
    limits = torch.tensor([1, 20, 3, 2, 7, 12, 1, 20, 5, 4, 9, 16])
    whole = generate(module, free, settings, STOPS, seed=3)
    cut = generate(module, dataclasses.replace(free, max_new_tokens=limits), settings, STOPS, seed=3)
    assert torch.equal(cut.response_lengths, whole.response_lengths.minimum(limits))
    assert torch.equal(cut.ended, whole.ended & (whole.response_lengths <= limits))
    assert (cut.ended.any(), (~cut.ended).any(), cut.response_ids.shape) == (True, True, (12, 20))
    for row, length in enumerate(cut.response_lengths):
        assert torch.equal(cut.response_ids[row, :length], whole.response_ids[row, :length])
        assert cut.response_ids[row, length:].eq(0).all()


class Scripted(torch.nn.Module):
    """Says what is written for a prompt, which begins with its line's number, and then "h"; it reads the cache."""

    _can_compile_fullgraph = False

    def __init__(self, *lines: str, prompt: int):
        super().__init__()
        self.script = [[IDS[piece] for piece in line.split()] + [IDS["h"]] * 50 for line in lines]
        self.config, self.weight, self.prompt = tiny.config(), torch.nn.Parameter(torch.zeros(1)), prompt

    def forward(self, input_ids, attention_mask, past_key_values, use_cache, logits_to_keep):
        states = input_ids[:, None, :, None].expand(-1, 2, -1, -1).float()
        for layer in range(self.config.num_hidden_layers):
            keys, values = past_key_values.update(states, -states, layer)
        assert torch.equal(keys, -values)
        read = [ids[real].int().tolist() for ids, real in zip(keys[:, 0, :, 0], attention_mask.bool(), strict=True)]
        said = torch.tensor([self.script[ids[0]][len(ids) - self.prompt] for ids in read])
        return SimpleNamespace(logits=1e4 * functional.one_hot(said, len(PIECES))[:, None].float())


def said(letters, *lines: str, prompt: str = "h", end_ids=(IDS["<eos>"],), limits=None, **settings):
    """(response, ended) of every line."""
    ids = [IDS[piece] for piece in prompt.split()]
    prompts = dataclasses.replace(
        tiny.prompts(rows=len(lines)),
        prompt_ids=torch.tensor([[row, *ids] for row in range(len(lines))]),
        prompt_lengths=torch.full((len(lines),), 1 + len(ids)),
        **({"max_new_tokens": torch.tensor(limits)} if limits else {}),
    )
    chosen = GenerationConfig(**{"max_new_tokens": 6, "stop_strings": STRINGS, **settings})
    module, stops = Scripted(*lines, prompt=1 + len(ids)), Stops(end_ids, chosen.stop_strings, letters)
    rollout = generate(module, prompts, chosen, stops, seed=0)
    rows = zip(rollout.response_ids.tolist(), rollout.response_lengths.tolist(), rollout.ended.tolist(), strict=True)
    return [(" ".join(PIECES[i] for i in ids[:length]), ended) for ids, length, ended in rows]


def test_stop_strings_by_hand(letters):
    lines = ["h ab c", "ca bg c", "h c g c", "Ã © c", "Ã h ©", "h Ġa db c", "ad h ad h", "h <eos> ab"]
    assert said(letters, *lines) == [
        ("h ab", True),
        ("ca bg", True),  # begins in one token, ends in another, whose text goes on
        ("h c g", True),
        ("Ã ©", True),  # a character in two tokens
        ("Ã h © h h h", False),
        ("h Ġa db", True),
        ("ad h ad h h h", False),  # " ad" has a space
        ("h <eos>", True),
    ]
    # What stands in the prompt, or begins there, is no part of the response.
    assert said(letters, "b h h h h h", prompt="ab a") == [("b h h h h h", False)]
    # A stop string that comes before the minimum ends the response behind it.
    lines = ["ab c d e", "c ab d e", "c d ab e", "c d e ab"]
    assert said(letters, *lines, min_new_tokens=2) == [
        ("ab c d", True),
        ("c ab d", True),
        ("c d ab", True),
        ("c d e ab", True),
    ]
    assert said(letters, "ab", min_new_tokens=30, max_new_tokens=40) == [("ab" + " h" * 30, True)]
    # Ended at the limit is ended; one token later is not.
    assert said(letters, "c d ab", "c d e ab", max_new_tokens=3) == [("c d ab", True), ("c d e", False)]
    assert said(letters, "c d ab", "c d e ab", limits=[2, 4]) == [("c d", False), ("c d e ab", True)]


def test_a_response_does_not_depend_on_its_company(module, letters):
    prompts = dataclasses.replace(tiny.prompts(rows=8), max_new_tokens=torch.tensor([10, 3, 10, 5, 10, 10, 8, 10]))
    settings, stops = GenerationConfig(max_new_tokens=10), Stops(END, STRINGS, letters)
    together = generate(module, prompts, settings, stops, seed=1)
    for rows in ([5], [6, 1, 3], [0, 2, 4, 7]):
        apart = generate(module, take(prompts, rows), settings, stops, seed=1)
        assert torch.equal(apart.response_ids, together.response_ids[rows])
        assert torch.allclose(apart.sampler_logprobs, together.sampler_logprobs[rows], atol=1e-5)


def test_no_rows_and_one_token():
    module = tiny.llama().eval()
    nothing = generate(module, take(tiny.prompts(), []), GenerationConfig(max_new_tokens=4), STOPS, seed=0)
    assert len(nothing) == 0 and nothing.response_ids.shape == (0, 4)
    one = generate(module, tiny.prompts(rows=2), GenerationConfig(max_new_tokens=1), STOPS, seed=0)
    assert one.response_lengths.tolist() == [1, 1]


def test_end_token_equal_to_padding_id_counts():
    """Token 0 fills the padding; as an end token it is a response token like any other."""
    module = tiny.llama().eval()
    rollout = generate(module, tiny.prompts(rows=16), GenerationConfig(max_new_tokens=40), Stops((0,)), seed=2)
    assert rollout.ended.any()
    for row in torch.nonzero(rollout.ended).flatten():
        length = int(rollout.response_lengths[row])
        assert rollout.response_ids[row, length - 1] == 0
        assert rollout.response_mask[row].sum() == length
        assert rollout.sampler_logprobs[row, length - 1] < 0


# ---- from a checkpoint, as users bring them


def sampled_from(folder, rows: int = 40, **generation):
    """Everything between a folder and a rollout, as the trainer does it."""
    settings, chosen = ModelConfig(path=str(folder)), GenerationConfig(max_new_tokens=12, **generation)
    tokenizer = models.load_tokenizer(settings)
    data = DataConfig(dataset=str(checkpoints.save_prompts(folder / "prompts.jsonl")))
    prompts = PromptSource(load_prompts(data, chosen, tokenizer), seed=0, prompts_per_iteration=rows).batch(0)
    base = models.load_causal(settings)
    stops = Stops(models.end_token_ids(tokenizer, base, chosen.end_tokens), chosen.stop_strings, tokenizer)
    return prompts, generate(base, prompts, chosen, stops, seed=0), tokenizer


def test_three_end_tokens_of_a_generation_config(tmp_path):
    """As Llama 3's: the tokenizer names one of them, generation_config.json all."""
    folder = checkpoints.save_policy(tmp_path)
    names = ["<eos>", "q", "x"]
    ids = checkpoints.tokenizer().convert_tokens_to_ids(names)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": ids}))
    _, rollout, tokenizer = sampled_from(folder)
    assert tokenizer.eos_token_id == ids[0]
    ended_by = set()
    for row, length in enumerate(rollout.response_lengths.tolist()):
        response = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        assert len(response) == length and not set(response[:-1]) & set(ids)
        assert bool(rollout.ended[row]) == (response[-1] in ids) == (length < 12 or response[-1] in ids)
        ended_by |= {response[-1]} & set(ids)
    assert ended_by == set(ids), "each of the three ends some response"


def test_a_tokenizer_without_padding(tmp_path):
    folder = checkpoints.save_policy(tmp_path)
    padded, expected, _ = sampled_from(folder)
    bare = checkpoints.tokenizer()
    bare.pad_token = None
    bare.save_pretrained(folder)
    assert json.loads((folder / "tokenizer_config.json").read_text()).get("pad_token") is None
    prompts, rollout, tokenizer = sampled_from(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    assert (prompts.prompt_lengths < prompts.prompt_ids.shape[1]).any(), "something is padded"
    assert torch.equal(prompts.prompt_mask, padded.prompt_mask)
    assert torch.equal(rollout.response_ids, expected.response_ids), "what pads must not matter"
    assert torch.equal(rollout.response_lengths, expected.response_lengths)
    assert rollout.ended.any(), "EOS ends a response though it pads prompts"


def test_an_embedding_larger_than_the_tokenizer(tmp_path):
    """32 rows for 30 tokens: the two are never drawn."""
    folder = checkpoints.save_policy(tmp_path)
    prompts, rollout, tokenizer = sampled_from(folder, temperature=3.0)
    assert len(tokenizer) == 30 and 25 < rollout.response_ids.max() < 30
    settings, stops = GenerationConfig(max_new_tokens=12, temperature=3.0), Stops((1,))
    free = generate(models.load_causal(ModelConfig(path=str(folder))), prompts, settings, stops, seed=0)
    assert free.response_ids.max() >= 30, "they would be"
