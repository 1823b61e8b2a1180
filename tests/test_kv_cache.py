"""Rows that come and go: no work on finished ones, no prefill twice, no copy of the cache; every family of models."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from engine import causal, dist, kv_cache
from engine import rollout as rollout_module
from engine.config import GenerationConfig
from engine.kv_cache import MovingRows, can_move_rows, can_stand_still
from engine.rollout import AGREE_EVERY, generate
from engine.stopping import Stops
from tests import families, tiny
from tests.decoding import assert_same_row, naive, several_each, take

END = (7, 11)
STOPS = Stops(END)


class Watched:
    """What each forward of a module was given: `(rows, tokens)`, and the cache's buffers after it."""

    def __init__(self, monkeypatch):
        self.forwards, self.storages, self.gaps, self.widths, self.caches = [], [], [], [], []
        monkeypatch.setattr(rollout_module.causal, "call", self._call)

    def _call(self, module, ids, mask, *, past_key_values, call=causal.call, **keywords):
        output = call(module, ids, mask, past_key_values=past_key_values, **keywords)
        self.forwards.append(tuple(ids.shape))
        if ids.shape[1] == 1:
            layers = past_key_values.layers
            self.storages.append(
                [s.untyped_storage().data_ptr() for layer in layers for s in (layer.keys, layer.values)]
            )
            self.gaps += [not s.is_contiguous() for layer in layers for s in (layer.keys, layer.values)]
            self.widths.append(layers[0].keys.shape[2])
        self.caches.append(weakref.ref(past_key_values))
        return output

    @property
    def prefills(self):
        return [shape for shape in self.forwards if shape[1] > 1]

    @property
    def decoded_rows(self):
        return [rows for rows, tokens in self.forwards if tokens == 1]


def prompts_of(lengths, samples: int = 1):
    lengths = torch.tensor(lengths)
    return several_each(dataclasses.replace(tiny.prompts(rows=len(lengths)), prompt_lengths=lengths), samples)


@pytest.mark.parametrize("concurrent", [1, 4, 64])
def test_no_forward_holds_a_finished_row(concurrent, monkeypatch):
    watched, prompts = Watched(monkeypatch), prompts_of([5, 8, 2, 8, 3, 4, 2, 6, 7, 5])
    settings = GenerationConfig(max_new_tokens=15, max_concurrent_sequences=concurrent)
    rollout = generate(tiny.llama(), prompts, settings, STOPS, seed=0)
    assert rollout.response_lengths.unique().numel() > 4, "lengths differ"
    assert sum(watched.decoded_rows) == (rollout.response_lengths - 1).sum()
    assert max(watched.decoded_rows) <= concurrent
    if concurrent == 4:
        waiting = len(prompts) - torch.tensor(watched.decoded_rows).eq(4).sum()
        assert waiting < len(prompts), "slots are refilled"
    whole = settings.model_copy(update={"continuous_batching": False})
    watched.forwards.clear()
    again = generate(tiny.llama(), prompts, whole, STOPS, seed=0)
    assert torch.equal(again.response_ids, rollout.response_ids)
    batches = rollout.response_lengths.split(concurrent)
    assert sum(watched.decoded_rows) == sum(len(batch) * (int(batch.max()) - 1) for batch in batches)


@pytest.mark.parametrize("concurrent", [2, 3, 5, 64])
def test_identical_prompts_prefill_once(concurrent, monkeypatch):
    watched, prompts = Watched(monkeypatch), prompts_of([5, 8, 2], samples=4)
    settings = GenerationConfig(max_new_tokens=9, max_concurrent_sequences=concurrent)
    rollout = generate(tiny.llama(), prompts, settings, STOPS, seed=0)
    assert sum(rows for rows, _ in watched.prefills) == 3
    assert watched.prefills[0][1] == 8, "the longest prompt comes first"
    for samples in rollout.response_ids.split(4):
        assert len(samples.unique(dim=0)) == 4, "each sample is its own"


def test_prefills_are_grouped_and_bounded(monkeypatch):
    watched, prompts = Watched(monkeypatch), prompts_of([8] * 6 + [4] * 34)
    settings = GenerationConfig(max_new_tokens=12, max_concurrent_sequences=32)
    wanted = generate(tiny.llama(), prompts, settings, STOPS, seed=0)
    assert watched.prefills[0] == (32, 8)
    assert all(rows >= 4 for rows, _ in watched.prefills), "an eighth of the slots at a time"
    watched.forwards.clear()
    monkeypatch.setattr(rollout_module, "PREFILL_TOKENS", 24)
    bounded = generate(tiny.llama(), prompts, settings, STOPS, seed=0)
    assert max(rows * tokens for rows, tokens in watched.prefills) == 24
    assert torch.equal(bounded.response_ids, wanted.response_ids)


def test_the_buffers_stay_and_then_go(monkeypatch):
    monkeypatch.setattr(kv_cache, "BLOCK", 4)
    watched, prompts = Watched(monkeypatch), prompts_of([5, 8, 2, 8, 3, 4])
    rollout = generate(tiny.llama(), prompts, GenerationConfig(max_new_tokens=15, max_concurrent_sequences=3), STOPS, 0)
    assert rollout.response_lengths.unique().numel() > 3, "rows come and go"
    assert len(watched.storages) > 15 and all(storages == watched.storages[0] for storages in watched.storages)
    assert len(set(watched.storages[0])) == 4, "two layers, keys and values"
    assert not any(watched.gaps)
    assert min(watched.widths) == 8 + kv_cache.BLOCK and max(watched.widths) < 8 + 15 + kv_cache.BLOCK
    gc.collect()
    assert not any(cache() for cache in watched.caches)


def test_buffers_are_as_large_as_needed(monkeypatch):
    sizes = []

    class Recorded(MovingRows):
        def __init__(self, *given, whole):
            sizes.append(given)
            super().__init__(*given, whole=whole)

    monkeypatch.setattr(rollout_module, "MovingRows", Recorded)
    prompts, limits = prompts_of([5, 8, 2]), torch.tensor([7, 3, 9])
    prompts = dataclasses.replace(prompts, max_new_tokens=limits)
    for concurrent in (64, 2):
        settings = GenerationConfig(max_new_tokens=15, max_concurrent_sequences=concurrent)
        generate(tiny.llama(), prompts, settings, STOPS, seed=0)
    assert sizes == [(3, 8, 8 + 9), (2, 8, 8 + 9 + kv_cache.BLOCK)]


@pytest.mark.parametrize("whole", [True, False])
def test_what_an_earlier_row_left_is_not_seen(whole, monkeypatch):
    """Nor multiplied by 0: its keys may be nan, where a 16-bit model has overflown."""
    monkeypatch.setattr(kv_cache, "BLOCK", 2)
    module, prompts = tiny.llama(), prompts_of([8, 3, 8, 5])

    def prefilled(rows, width=8, spoilt=()):
        ids, mask = prompts.prompt_ids[rows, -width:], prompts.prompt_mask[rows, -width:]
        cache = DynamicCache(config=module.config)
        causal.call(module, ids, mask, past_key_values=cache, use_cache=True)
        for layer, row in itertools.product(cache.layers, spoilt):
            layer.keys[row], layer.values[row] = torch.nan, torch.nan
        return cache, prompts.prompt_lengths[rows]

    def decode(rows, times):
        for _ in range(times):
            output = causal.call(
                module, torch.tensor([[1]] * 3), rows.next_mask(), past_key_values=rows.cache, use_cache=True
            )
            rows.advance()
        return output.logits[:, -1]

    rows = MovingRows(rows=3, prompt_columns=8, columns=14, whole=whole)
    rows.append(*prefilled([2, 1, 0], spoilt=[0, 1]), torch.arange(3))
    decode(rows, 2)
    rows.keep(torch.tensor([2]))
    rows.append(*prefilled([3, 1], width=5), torch.tensor([1, 0]))  # narrower than what attention sees
    logits = decode(rows, 3)
    for row, (prompt, ones) in enumerate([(0, 5), (1, 3), (3, 3)]):
        ids = prompts.prompt_ids[prompt, 8 - int(prompts.prompt_lengths[prompt]) :].tolist() + [1] * ones
        wanted = module(torch.tensor([ids]), use_cache=False).logits[0, -1]
        assert torch.allclose(logits[row], wanted, atol=1e-5)


# ---- families


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return lambda name: families.make(name, tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_decodes_as_whole_sequences_do(name, checkpoint, monkeypatch):
    """Rows come, go and move: windows, latent attention, alibi, states of recurrent layers and all."""
    monkeypatch.setattr(kv_cache, "BLOCK", 3)
    module = AutoModelForCausalLM.from_pretrained(checkpoint(name)).eval()
    assert can_move_rows(module.config)
    limits = torch.tensor([10, 4, 7, 10, 2, 10, 10, 5, 3, 10])
    prompts = dataclasses.replace(prompts_of([5, 8, 2, 7, 3], samples=2), max_new_tokens=limits)
    settings = GenerationConfig(max_new_tokens=10, max_concurrent_sequences=4)
    assert worst_logprob(module, prompts, settings) < 1e-5
    if can_stand_still(module):
        monkeypatch.setattr(rollout_module, "_compiled", lambda module: module)
        monkeypatch.setattr(rollout_module, "COMPILED_COLUMNS", 1)  # the buffers' end is met, too
        assert worst_logprob(module, prompts, settings.model_copy(update={"compile": True})) < 1e-5


def worst_logprob(module, prompts, settings) -> float:
    """The largest deviation of the sampler's log-probs from those of whole sequences."""
    worst = 0.0
    with torch.no_grad():
        rollout = generate(module, prompts, settings, Stops(()), seed=1)
        for row in range(len(prompts)):
            p, r = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
            ids = torch.cat([rollout.prompt_ids[row, -p:], rollout.response_ids[row, :r]])
            logprobs = module(ids[None], use_cache=False).logits[0, p - 1 : -1].log_softmax(-1)
            wanted = logprobs.gather(-1, ids[p:, None])[:, 0]
            worst = max(worst, (wanted - rollout.sampler_logprobs[row, :r]).abs().max().item())
    return worst


def test_a_cache_that_cannot_be_taken_apart(monkeypatch):
    """Its rows come and go together, in transformers' own cache."""
    monkeypatch.setattr(rollout_module, "can_move_rows", lambda config: False)
    module, prompts = tiny.llama(), prompts_of([5, 8, 2], samples=2)
    prompts = dataclasses.replace(prompts, max_new_tokens=torch.tensor([9, 1, 9, 4, 9, 9]))
    settings = GenerationConfig(max_new_tokens=9, max_concurrent_sequences=4)
    rollout = generate(module, prompts, settings, STOPS, seed=3)
    for row in range(len(prompts)):
        assert_same_row(rollout, row, naive(module, prompts, row, settings, 3, END))


# ---- ranks that fetch weights while decoding keep step


def test_free_running_code_asks_nobody(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", None)
    generate(tiny.llama(), prompts_of([5, 8, 2]), GenerationConfig(max_new_tokens=20), STOPS, seed=0)


def in_step(works: tuple[int, int]) -> dict:
    """A rank's passes: a collective stands for the weights that each would fetch, so ranks out of step would hang."""
    passes = {"computed": 0, "idle": 0}
    reduced, all_reduce = [], dist.all_reduce
    module, prompts = tiny.llama(), take(prompts_of([5, 8, 2, 8, 3, 4]), range(works[dist.rank()]))

    def fetch(kind: str) -> None:
        passes[kind] += 1
        all_reduce(torch.ones(1))

    def counted(tensor, op="sum"):
        reduced.append(len(reduced))
        return all_reduce(tensor, op)

    handle = module.register_forward_pre_hook(lambda *_: fetch("computed"))
    settings = GenerationConfig(max_new_tokens=20, max_concurrent_sequences=2)
    alone = generate(tiny.llama(), prompts, settings, STOPS, seed=0)
    dist.all_reduce = counted
    try:
        rollout = generate(module, prompts, settings, STOPS, seed=0, idle=lambda: fetch("idle"))
    finally:
        dist.all_reduce = all_reduce
        handle.remove()
    return {**passes, "flags": len(reduced), "same": torch.equal(alone.response_ids, rollout.response_ids)}


@pytest.mark.dist
@pytest.mark.parametrize("works", [(6, 1), (0, 5), (0, 0), (3, 3)])
def test_ranks_make_equally_many_passes(works, pool):
    ranks = pool.run(in_step, works)
    total, other = (rank["computed"] + rank["idle"] for rank in ranks)
    assert total == other and total % AGREE_EVERY == 0
    assert all(rank["flags"] == total // AGREE_EVERY + 1 and rank["same"] for rank in ranks)
    longest = max(rank["computed"] for rank in ranks)
    assert longest <= total < longest + AGREE_EVERY
