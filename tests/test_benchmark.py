"""The benchmark: FLOPs against PyTorch's own counter, memory against tensors of known size, and a run of it all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaForCausalLM, LlamaForSequenceClassification

from engine import benchmark, benchmark_report, flops, logprob_memory, machine, models, workloads
from engine.config import Recipe
from engine.prompts import load_prompts
from engine.role_config import LoraSettings
from engine.roles import Layout
from tests import tiny
from tests.launching import launch, launch_plain

ROWS, LENGTH, RESPONSE, RANK = 3, 12, 5, 4
IDS = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % tiny.VOCABULARY
# What eager attention computes: every pair, masked ones too.
EVERY_PAIR = flops.Work(positions=ROWS * LENGTH, pairs=ROWS * LENGTH**2, outputs=ROWS * RESPONSE)
LORA = LoraSettings(rank=RANK, alpha=8.0)


def counted(work) -> int:
    """FLOPs as PyTorch counts them, operation by operation."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def eager(kind=LlamaForCausalLM, **changes):
    torch.manual_seed(0)
    return kind(tiny.config(attn_implementation="eager", **changes))


def with_adapter(model, task: TaskType, targets="all-linear"):
    return get_peft_model(model, LoraConfig(task_type=task, r=RANK, target_modules=targets))


DECODER = flops.Decoder.of(tiny.config())


class TestFlops:
    """Against torch.utils.flop_counter on real models, with grouped queries."""

    def test_a_frozen_base_with_an_adapter(self):
        model = with_adapter(eager(), TaskType.CAUSAL_LM)
        kept: list = []
        ahead = counted(lambda: kept.append(model(IDS, logits_to_keep=RESPONSE, use_cache=False).logits))
        back = counted(lambda: kept[0].sum().backward())
        assert ahead == flops.forward(DECODER, EVERY_PAIR, tiny.VOCABULARY, LORA)
        assert back == flops.backward(DECODER, EVERY_PAIR, tiny.VOCABULARY, LORA)

    def test_an_adapter_on_some_layers(self):
        lora = LoraSettings(rank=RANK, targets=["q_proj", "down_proj"])
        model = with_adapter(eager(), TaskType.CAUSAL_LM, ["q_proj", "down_proj"])
        kept: list = []
        ahead = counted(lambda: kept.append(model(IDS, logits_to_keep=RESPONSE, use_cache=False).logits))
        back = counted(lambda: kept[0].sum().backward())
        assert ahead == flops.forward(DECODER, EVERY_PAIR, tiny.VOCABULARY, lora)
        # Nothing that trains lies below k and v of layer 0: autograd leaves these two of the attention's products out.
        unasked = 2 * 2 * EVERY_PAIR.pairs * DECODER.attention_width
        assert back == flops.backward(DECODER, EVERY_PAIR, tiny.VOCABULARY, lora) - unasked

    def test_everything_trains(self):
        model = eager()
        kept: list = []
        ahead = counted(lambda: kept.append(model(IDS, logits_to_keep=RESPONSE, use_cache=False).logits))
        back = counted(lambda: kept[0].sum().backward())
        assert ahead == flops.forward(DECODER, EVERY_PAIR, tiny.VOCABULARY)
        assert back == flops.backward(DECODER, EVERY_PAIR, tiny.VOCABULARY, lora=None)

    def test_a_critic_whose_head_trains_too(self):
        base = eager(LlamaForSequenceClassification, num_labels=1, pad_token_id=0)
        model = with_adapter(base, TaskType.SEQ_CLS).get_base_model()
        kept: list = []

        def values():
            hidden = model.model(IDS, use_cache=False).last_hidden_state
            kept.append(model.score(hidden[:, -RESPONSE:]))

        assert counted(values) == flops.forward(DECODER, EVERY_PAIR, 1, LORA)
        back = counted(lambda: kept[0].sum().backward())
        assert back == flops.backward(DECODER, EVERY_PAIR, 1, LORA, head_trains=True)

    def test_sampling_goes_over_each_position_once(self):
        """Prefill, then one token at a time; of the prefill's attention the half above the diagonal is not useful."""
        model, prompt = eager(), LENGTH - RESPONSE

        def sample():
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model(IDS[:, :prompt], past_key_values=cache, logits_to_keep=1)
                for step in range(RESPONSE - 1):
                    model(IDS[:, prompt + step, None], past_key_values=cache, logits_to_keep=1)

        useful = flops.forward(DECODER, flops.Work.of_policy([(prompt, RESPONSE)] * ROWS), tiny.VOCABULARY)
        above = 4 * ROWS * prompt * (prompt - 1) // 2 * DECODER.attention_width * DECODER.layers
        assert counted(sample) == useful + above

    def test_work_by_a_plain_loop(self):
        lengths = [(3, 2), (1, 4)]
        pairs = sum(1 for p, r in lengths for query in range(p + r - 1) for key in range(query + 1))
        assert flops.Work.of_policy(lengths) == flops.Work(4 + 4, pairs, 2 + 4)
        whole = sum(1 for p, r in lengths for query in range(p + r) for key in range(query + 1))
        assert flops.Work.of_score(lengths) == flops.Work(5 + 5, whole, 2)


class TestPhases:
    """Which passes an iteration is made of."""

    LENGTHS = ((7, 3), (2, 9))

    def of(self, own_reward: bool = True, **sections) -> dict[str, flops.Parts]:
        recipe = tiny.recipe(**sections)
        return flops.phases(recipe, DECODER, [DECODER if own_reward else None], list(self.LENGTHS))

    def test_the_default_homes(self):
        found = self.of(ppo={"epochs": 1, "old_logprobs": "rollout"})
        assert list(found["inference"]) == ["reference", "critic", "length_reward"]
        assert list(found["training"]) == ["actor forward", "actor backward", "critic forward", "critic backward"]
        # The sampler's adapter is merged, the reference has none.
        assert found["generation"]["actor"] == found["inference"]["reference"] < found["training"]["actor forward"]

    def test_recomputed_logprobs_are_one_more_pass(self):
        found = self.of(ppo={"epochs": 1})
        assert found["inference"]["actor"] == found["training"]["actor forward"]

    def test_epochs_repeat_the_training(self):
        once, thrice = (self.of(ppo={"epochs": epochs})["training"] for epochs in (1, 3))
        assert thrice == {name: 3 * count for name, count in once.items()}

    def test_on_the_trunk_values_cost_a_head_alone(self):
        found = self.of(critic={"home": "trunk"}, ppo={"epochs": 1, "old_logprobs": "rollout"})
        assert list(found["training"]) == ["actor forward", "actor backward", "value head"]
        positions = sum(response for _, response in self.LENGTHS)
        assert found["training"]["value head"] == 3 * 2 * positions * DECODER.hidden
        # The old values still need the actor's layers, without its output head.
        head = 2 * positions * DECODER.hidden * DECODER.vocabulary
        assert found["inference"]["actor"] == found["training"]["actor forward"] - head

    def test_a_full_critic_has_no_adapter(self):
        full = self.of(critic={"home": "model", "train": "full", "path": "x"})["training"]
        lora = self.of(critic={"home": "model", "path": "x"})["training"]
        assert full["critic forward"] < lora["critic forward"] and full["critic backward"] > lora["critic backward"]

    def test_in_16_bit_the_sampler_computes_its_adapter(self):
        found = self.of(model={"dtype": "bfloat16"})
        assert found["generation"]["actor"] == found["training"]["actor forward"] / 2  # two epochs

    def test_a_function_costs_nothing(self):
        assert "length_reward" not in self.of(own_reward=False)["inference"]


def test_summary_of_made_up_iterations():
    """The first iteration, ten times as slow, is warm-up; a rank's share of 80 FLOPs on two ranks is 40."""

    def iteration(first: float, second: float) -> dict:
        seconds = {"generation": [first, second], "iteration": [2 * first, 2 * second]}
        return {"cpu_seconds": seconds, "wall_seconds": seconds}

    result = {
        "iterations": [iteration(10, 10), iteration(1, 3), iteration(3, 5), iteration(3, 13)],
        "limit_flops_per_second": [20.0, 40.0, 30.0],
        "flops": {"generation": {"a": 60.0, "b": 20.0}},
        "response_tokens": 130,
        "ranks": 2,
        "machine": {"device": "cpu"},
    }
    found = benchmark.summary(result)
    assert found["generation"] == {
        "cpu_seconds": {"min": 2, "median": 4},  # means over ranks: 2, 4, 8
        "wall_seconds": {"min": 3, "median": 5},  # the slower rank: 3, 5, 13
        "response_tokens_per_second": 26.0,
        "flops_of_a_rank": 40.0,
        "flops_per_second": 10.0,
        "share_of_limit": 0.25,
    }
    assert found["iteration"]["cpu_seconds"] == {"min": 4, "median": 8}
    result["machine"]["device"] = "Some GPU"
    assert benchmark.summary(result)["generation"]["flops_per_second"] == 8.0


class TestMachine:
    def test_the_limit_is_that_of_a_product(self):
        """More than a tenth of a GFLOP/s, and the same work by the wall clock can't be many times faster."""
        rate = machine.matrix_flops_per_second(torch.float32, torch.device("cpu"))
        assert 1e8 < rate < 1e13

    def test_the_peak_starts_anew(self):
        machine.reset_peaks(torch.device("cpu"))
        before = machine.peak_rss_bytes()
        block = torch.ones(50_000_000)
        grown = machine.peak_rss_bytes()
        del block
        machine.reset_peaks(torch.device("cpu"))
        assert 190e6 < grown - before < 260e6
        assert machine.peak_rss_bytes() < grown - 100e6


class TestLogprobMemory:
    def test_live_bytes_by_hand(self):
        start = torch.ones(1000)
        with logprob_memory.LiveBytes() as counter:
            start.view(10, 100).t()  # views of what was there
            assert counter.peak_bytes == 0
            a = start * 2  # 4000
            b = a[:500]
            del a
            c = b + 1  # 2000 more, the view keeps the first
            assert counter.peak_bytes == 6000
            del b, c
            d = torch.cat([start, start[:200]])  # 4800, all else is gone
            assert counter.peak_bytes == 6000 and d.numel() == 1200
            torch.empty(1501)
        assert counter.peak_bytes == 4800 + 6004

    def test_the_written_out_formula_is_the_engines(self):
        roles = tiny.roles(tiny.recipe(generation={"temperature": 0.7}))
        layout = Layout(IDS, torch.ones_like(IDS, dtype=torch.bool), torch.full((len(IDS),), RESPONSE))
        pairs = zip(
            logprob_memory.engine_outputs(roles, layout), logprob_memory.naive_outputs(roles, layout), strict=True
        )
        for ours, naive in pairs:
            assert (ours - naive).abs().max() < 1e-5

    def test_what_the_formula_keeps(self, tmp_path):
        """Its graph holds logits, their log-softmax and its exponential; a gradient comes on top."""
        sizes = workloads.Sizes("x", vocabulary=4096, layers=1, hidden=16, heads=2, inner=16)
        LlamaForCausalLM(sizes.config()).save_pretrained(tmp_path)
        recipe = Recipe.model_validate({"model": {"path": str(tmp_path)}, "rewards": [{"function": "f.py:f"}]})
        found = logprob_memory.compare(recipe, rows=4, prompt_tokens=4, response_tokens=32)
        assert found["float32_logits_bytes"] == 4 * 4 * 32 * 4096
        assert found["naive_bytes"] > 3 * found["float32_logits_bytes"]
        assert found["ratio"] == found["engine_bytes"] / found["naive_bytes"]


class TestWorkloads:
    def test_lengths_are_what_the_engine_reads(self, tmp_path):
        """The table of ragged: prompts over their whole range, responses geometric with a mean near 64, cut at 256."""
        workload = workloads.WORKLOADS["ragged"]
        folder = tmp_path / "34m-v1"
        folder.mkdir()
        workloads._save_prompts(folder / "ragged.jsonl", workload)
        recipe = Recipe.model_validate(workloads.recipe_of("ragged", tmp_path))
        found = load_prompts(recipe.data, recipe.generation, workloads.tokenizer(8192))
        prompts = np.array([len(record.ids) for record in found.records])
        responses = np.array([record.max_new_tokens for record in found.records])
        assert len(prompts) == recipe.data.prompts_per_iteration == 64
        assert prompts.min() < 24 and prompts.max() > 120 and prompts.min() >= 16 and prompts.max() <= 128
        assert 50 < responses.mean() < 78 and responses.min() < 8 and 200 < responses.max() <= 256

    def test_fixed_is_the_peers(self):
        recipe = Recipe.model_validate(workloads.recipe_of("fixed", Path("x")))
        config = workloads.WORKLOADS["fixed"].sizes.config()
        assert flops.Decoder.of(config).weights() * 8 == 8 * (4 * 512**2 + 3 * 512 * 1376)
        assert (config.vocab_size, recipe.generation.max_new_tokens, recipe.data.max_prompt_tokens) == (8192, 64, 64)
        assert (recipe.ppo.minibatch_sequences, recipe.ppo.micro_batch_sequences, recipe.ppo.epochs) == (32, 8, 1)

    @pytest.mark.parametrize("name", workloads.WORKLOADS)
    def test_every_recipe_is_valid(self, name):
        assert Recipe.model_validate(workloads.recipe_of(name, Path("x"))).iterations == 4

    def test_what_is_there_is_used_again(self, tmp_path):
        workloads.build("tiny", tmp_path)
        files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        before = [(path, path.stat().st_mtime_ns) for path in files]
        workloads.build("tiny", tmp_path)
        assert [(path, path.stat().st_mtime_ns) for path in files] == before and len(files) > 5

    def test_the_reward_adapter_can_be_read(self, tmp_path, monkeypatch):
        from dataclasses import replace

        from engine import adapters

        small = replace(workloads.WORKLOADS["tiny"], reward_adapter=True)
        monkeypatch.setitem(workloads.WORKLOADS, "small", small)
        workloads.build("small", tmp_path)
        recipe = Recipe.model_validate(workloads.recipe_of("small", tmp_path))
        saved = adapters.read(recipe.rewards[0].adapter, reward=True)
        assert saved.head.shape == (1, 64) and saved.config.r == recipe.actor.lora.rank
        assert all(weight.abs().max() > 0 for weight in saved.weights.values())
        assert models.load_causal(recipe.model).config.num_hidden_layers == 2


@pytest.mark.dist
def test_the_command(tmp_path):
    """Two ranks, the real trainer, an override, every file, and the page that it prints."""
    done = launch(
        *("tiny", "--assets", tmp_path / "assets", "--json", tmp_path / "result.json", "--iterations", "2"),
        *("--output", tmp_path / "run", "--critic.home", "trunk"),
        script="launch/bench.py",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert json.loads((tmp_path / "run" / "benchmark.json").read_text()) == result
    assert result["command"].endswith("--critic.home trunk") and "local_rank" not in result["command"]
    assert len(result["iterations"]) == 2 and result["ranks"] == 2 and len(result["limit_flops_per_second"]) == 3
    lengths = [json.loads(line) for line in (tmp_path / "assets" / "tiny-v1" / "tiny.jsonl").read_text().splitlines()]
    assert result["response_tokens"] == sum(row["response_tokens"] for row in lengths)
    assert "value head" in result["flops"]["training"]
    for phase in result["phases"].values():
        assert 0 < phase["share_of_limit"] < 1 and 0 < phase["cpu_seconds"]["min"] <= phase["cpu_seconds"]["median"]
    parts = sum(result["phases"][name]["cpu_seconds"]["median"] for name in benchmark.PHASES)
    assert 0 < parts <= result["phases"]["iteration"]["cpu_seconds"]["median"]
    assert all(1e8 < peak < 1e11 for peak in result["iterations"][1]["peak_rss_bytes"])
    assert 0.1 < result["generation_against_plain"]["ratio"] < 10
    page = benchmark_report.page(result)
    assert page.strip() in done.stdout and (tmp_path / "run" / "benchmark.txt").read_text() == page
    assert (tmp_path / "run" / "phases.png").read_bytes().startswith(b"\x89PNG")


def test_a_workload_that_is_none():
    done = launch_plain("--critic.home", "trunk", "fixed", script="launch/bench.py")
    assert done.returncode == 2 and "workload trunk: unknown; name one of fixed, ragged" in done.stderr
