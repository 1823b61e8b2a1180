"""Metrics against loops in float64, over ranks of unequal size, and the glossary against what is really emitted."""

from __future__ import annotations

import ast
import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import dist, reward_sources, stories
from engine.advantages import ScoreCombiner, make_experience
from engine.batch import map_rows, take_rows
from engine.config import REPOSITORY
from engine.heldout import HeldOut
from engine.metrics import (
    MetricSinks,
    PhaseClock,
    append_jsonl,
    console_line,
    memory_metrics,
    padding_fraction,
    read_jsonl,
    rollout_metrics,
    update_metrics,
)
from engine.run_folder import RunFolder
from engine.stopping import Stops
from engine.update import UpdateStats, update
from tests import tiny

SOURCES = ["length", "other"]


def settings(**sections):
    function = "tests/tiny.py:length_reward"
    rewards = [{"name": "length", "function": function}, {"name": "other", "function": function, "weight": -0.5}]
    return tiny.recipe(rewards=rewards, scores={"normalize": True, "missing_eos_penalty": 0.3}, **sections)


def experience():
    """Seven rows whose every tensor differs from 0 on real tokens."""
    plain = tiny.experience()
    generator = torch.Generator().manual_seed(8)
    mask = plain.rollout.response_mask
    sampler = torch.where(mask, plain.evaluation.old_logprobs + 0.1 * torch.randn(mask.shape, generator=generator), 0.0)
    rollout = type(plain.rollout)(**{**vars(plain.rollout), "sampler_logprobs": sampler})
    scores = torch.randn(len(rollout), 2, generator=generator)
    evaluation = type(plain.evaluation)(**{**vars(plain.evaluation), "source_scores": scores})
    return make_experience(rollout, evaluation, settings(), ScoreCombiner(settings()), kl_coef=0.1)


def mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def std(values) -> float:
    values = list(values)
    return math.sqrt(mean((v - mean(values)) ** 2 for v in values))


def looped(experience) -> dict[str, float]:
    """Every rollout metric, value by value in Python's floats."""
    rollout, evaluation = experience.rollout, experience.evaluation
    lengths = rollout.response_lengths.tolist()
    tokens = [(row, t) for row, length in enumerate(lengths) for t in range(length)]

    def of(tensor):
        table = tensor.tolist()
        return [table[row][t] for row, t in tokens]

    def sums(values):
        return [math.fsum(v for v, (row, _) in zip(values, tokens, strict=True) if row == r) for r in range(7)]

    first, second = (evaluation.source_scores[:, s].tolist() for s in (0, 1))
    raw = [a - 0.5 * b for a, b in zip(first, second, strict=True)]
    used = [
        (a - mean(first)) / std(first) - 0.5 * (b - mean(second)) / std(second) - 0.3 * (not ended)
        for a, b, ended in zip(first, second, rollout.ended.tolist(), strict=True)
    ]
    old, ref = of(evaluation.old_logprobs), of(evaluation.ref_logprobs)
    values, returns = of(evaluation.old_values), of(experience.returns)
    errors = [r - v for r, v in zip(returns, values, strict=True)]
    return {
        "score/mean": mean(raw),
        "score/std": std(raw),
        "score/used_mean": mean(used),
        "score/length/mean": mean(first),
        "score/length/std": std(first),
        "score/other/mean": mean(second),
        "score/other/std": std(second),
        "kl/token_mean": mean(of(evaluation.kl)),
        "kl/sequence_mean": mean(sums(of(evaluation.kl))),
        "kl/k1_sequence_mean": mean(sums([o - r for o, r in zip(old, ref, strict=True)])),
        "value/explained_variance": 1 - std(errors) ** 2 / std(returns) ** 2,
        "value/mean": mean(values),
        "returns/mean": mean(returns),
        "rollout/prompt_tokens_mean": mean(rollout.prompt_lengths.tolist()),
        "rollout/response_tokens_mean": mean(lengths),
        "rollout/eos_fraction": mean(rollout.ended.tolist()),
        "rollout/tokens": len(tokens),
    }


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_rollout_metrics_against_loops():
    made = experience()
    assert_equal(rollout_metrics(made, ScoreCombiner(settings()).raw(made.evaluation), SOURCES), looped(made))


def test_looking_at_metrics_does_not_count_the_scores_again():
    combiner = ScoreCombiner(settings())
    rollout_metrics(experience(), combiner.raw(experience().evaluation), SOURCES)
    assert combiner.moments[0].count == 0


def metrics_from_unequal_ranks() -> dict[str, float]:
    """Rank 0 brings 5 rows and rank 1 brings 2, as after sampling."""
    plain, recipe = experience(), settings()
    mine = torch.arange(5) if dist.rank() == 0 else torch.arange(5, 7)
    parts = (take_rows(record, mine) for record in (plain.rollout, plain.evaluation))
    rollout, evaluation = (map_rows(part, dist.all_gather_rows) for part in parts)
    combiner = ScoreCombiner(recipe)
    made = make_experience(rollout, evaluation, recipe, combiner, 0.1)
    return rollout_metrics(made, combiner.raw(evaluation), SOURCES)


@pytest.mark.dist
def test_ranks_of_unequal_size_give_the_global_mean(pool):
    for found in pool.run(metrics_from_unequal_ranks):
        assert_equal(found, looped(experience()))


STATS = UpdateStats(
    sums=Counter(
        {
            "policy/tokens": 40,
            "policy/loss_sum": -2.0,
            "policy/clipped": 5,
            "policy/dual_clipped": 1,
            "policy/approx_kl_sum": 0.8,
            "entropy_sum": 100.0,
            "value/tokens": 40,
            "value/loss_sum": 30.0,
            "value/clipped": 10,
            "kl_loss/loss_sum": 6.0,
            "importance/weight_sum": 50.0,
            "importance/capped": 2,
        }
    ),
    first_ratio_deviation=1e-6,
    sampler_kl=3e-5,
    grad_norms={"actor": [1.0, 2.0, 6.0], "critic": [0.5, 0.25, 0.0]},
    learning_rates={"actor": 1e-4, "critic": 3e-4},
    steps=3,
    overflows=2,
    skipped=1,
    real_tokens=60,
    padded_tokens=95,
)


def test_update_metrics_by_hand():
    expected = {
        "policy/loss": -0.05,
        "policy/clip_fraction": 0.125,
        "policy/dual_clip_fraction": 0.025,
        "policy/approx_kl": 0.02,
        "policy/entropy": 2.5,
        "policy/first_ratio_deviation": 1e-6,
        "policy/importance_weight": 1.25,
        "policy/importance_capped_fraction": 0.05,
        "rollout/train_kl": 3e-5,
        "value/loss": 0.75,
        "value/clip_fraction": 0.25,
        "kl/loss": 0.15,
        "update/steps": 3,
        "update/overflows": 2,
        "update/skipped_minibatches": 1,
        "grad_norm/actor": 3.0,
        "grad_norm/critic": 0.25,
        "lr/actor": 1e-4,
        "lr/critic": 3e-4,
    }
    assert_equal(update_metrics(STATS), expected)


def test_an_iteration_without_a_step_has_the_same_keys():
    found = update_metrics(UpdateStats(sums=STATS.sums, skipped=4))
    assert found.keys() == update_metrics(STATS).keys()
    assert [found[f"{kind}/{role}"] for kind in ("grad_norm", "lr") for role in ("actor", "critic")] == [0.0] * 4


def test_padding_fraction_by_hand():
    """Prompts of 2 and 4, responses of 3 and 1: 10 real tokens of 2 x (4 + 3) = 14 in one forward, then 60 of 95."""
    made = take_rows(experience(), torch.arange(2))
    rollout = replace(made.rollout, prompt_lengths=torch.tensor([2, 4]), response_lengths=torch.tensor([3, 1]))
    evaluation = replace(made.evaluation, padded_lengths=torch.tensor([7, 7]))
    made = replace(made, rollout=rollout, evaluation=evaluation)
    assert padding_fraction(made, STATS) == pytest.approx(1 - 70 / 109)


def updated(micro_batch_sequences: int) -> dict[str, float]:
    """On a rank: metrics of an update of seven rows, which two ranks share unequally."""
    recipe = tiny.recipe(ppo={"micro_batch_sequences": micro_batch_sequences, "epochs": 1, "minibatch_sequences": 7})
    engine = tiny.engine(recipe)
    found = update_metrics(update(engine, tiny.experience(), recipe, 0, 0.0, frozenset()))
    engine.close()
    return found


def looped_update() -> dict[str, float]:
    """One minibatch of everything: the mean over its tokens, from `tests.reference`'s forward of one row at a time."""
    from tests.reference import Reference

    recipe, plain = tiny.recipe(), tiny.experience()
    reference = Reference(recipe)
    found: dict[str, list[float]] = {name: [] for name in ("loss", "clip", "kl", "entropy", "value", "value_clip")}
    for row in range(len(plain.rollout)):
        with torch.no_grad():
            logprobs, entropy, values = (x.tolist() for x in reference.sequence(plain, row))
        found["entropy"] += entropy
        for t, (logp, v) in enumerate(zip(logprobs, values, strict=True)):
            old, a = plain.evaluation.old_logprobs[row, t].item(), plain.advantages[row, t].item()
            ratio = math.exp(logp - old)
            free, bound = -a * ratio, -a * min(max(ratio, 0.8), 1.2)
            found["loss"].append(max(free, bound))
            found["clip"].append(bound > free)
            found["kl"].append(ratio - 1 - (logp - old))
            before, target = plain.evaluation.old_values[row, t].item(), plain.returns[row, t].item()
            free, bound = (v - target) ** 2 / 2, (min(max(v, before - 0.2), before + 0.2) - target) ** 2 / 2
            found["value"].append(max(free, bound))
            found["value_clip"].append(bound > free)
    return {
        "policy/loss": mean(found["loss"]),
        "policy/clip_fraction": mean(found["clip"]),
        "policy/approx_kl": mean(found["kl"]),
        "policy/entropy": mean(found["entropy"]),
        "value/loss": mean(found["value"]),
        "value/clip_fraction": mean(found["value_clip"]),
    }


@pytest.mark.dist
@pytest.mark.parametrize("micro", [1, 4])
def test_update_metrics_of_unequal_ranks_are_means_over_all_tokens(pool, micro):
    expected = looped_update()
    assert 0 < expected["policy/clip_fraction"] < 1 and 0 < expected["value/clip_fraction"] < 1
    for found in pool.run(updated, micro):
        assert_equal({name: found[name] for name in expected}, expected)


def test_phase_clock_adds_up():
    clock = PhaseClock()
    for _ in range(2):
        with clock.phase("training"):
            sum(range(200_000))
    found = clock.metrics()
    assert found["cpu/training_seconds"] > 0 and 0 < found["time/training_seconds"] <= found["time/iteration_seconds"]


def clocked() -> dict[str, float]:
    dist.all_reduce(torch.ones(100))  # before the iteration
    clock = PhaseClock()
    with clock.phase("inference"):
        dist.all_gather_rows([torch.ones(5, 2)])
    with clock.phase("training"):
        dist.all_reduce(torch.ones(3))
    dist.all_reduce(torch.ones(1))  # between phases
    return clock.metrics()


@pytest.mark.dist
def test_phase_clock_counts_what_comes_from_the_other_rank(pool):
    counted = {
        "comm/inference_gathered_bytes": 8 + 40,  # how many rows, and they
        "comm/inference_reduced_bytes": 0,
        "comm/training_gathered_bytes": 0,
        "comm/training_reduced_bytes": 12,
        "comm/gathered_bytes": 48,
        "comm/reduced_bytes": 16,
    }
    for found in pool.run(clocked):
        assert {name: value for name, value in found.items() if name.startswith("comm/")} == counted


def memory_of_unequal_ranks() -> float:
    with pytest.MonkeyPatch.context() as patch:
        usage = type("Usage", (), {"ru_maxrss": 1000 + dist.rank()})
        patch.setattr("resource.getrusage", lambda who: usage)
        return memory_metrics()["memory/rss_peak_bytes"]


@pytest.mark.dist
def test_memory_is_that_of_the_largest_rank(pool):
    unit = 1 if sys.platform == "darwin" else 1024
    assert pool.run(memory_of_unequal_ranks) == [1001 * unit] * 2


def test_memory_is_in_bytes():
    assert memory_metrics()["memory/rss_peak_bytes"] > 1e8, "a process with torch takes more than 100 MB"


# The glossary ---------------------------------------------------------------------------------------------------


def glossary() -> set[str]:
    """Keys of the tables of docs/metrics.md whose header is key, formula, unit, how to read it."""
    keys, inside = [], False
    for line in (REPOSITORY / "docs/metrics.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells == ["key", "formula", "unit", "how to read it"]:
            inside = True
        elif inside and not set(line) <= set("|-"):
            assert len(cells) == 4 and all(cells), f"a glossary line with an empty cell: {line}"
            keys.append(re.fullmatch(r"`(.+)`", cells[0])[1])
    assert len(keys) == len(set(keys)), "a key has two lines"
    return set(keys)


def trainer_source() -> ast.FunctionDef:
    """`Trainer.iterate`, where the parts of a metrics line are put together."""
    tree = ast.parse((REPOSITORY / "engine/trainer.py").read_text())
    (found,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "iterate"]
    return found


def keys_added_by_the_trainer() -> set[str]:
    (metrics,) = [
        node.value
        for node in ast.walk(trainer_source())
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "metrics"
    ]
    calls = {ast.unparse(v).partition("(")[0] for k, v in zip(metrics.keys, metrics.values, strict=True) if k is None}
    assert calls == {"rollout_metrics", "update_metrics", "clock.metrics", "memory_metrics"}, "this test knows fewer"
    return {key.value for key in metrics.keys if key is not None}


def emitted_by_an_iteration() -> dict[str, float]:
    clock = PhaseClock()
    for node in ast.walk(trainer_source()):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "clock.phase":
            with clock.phase(node.args[0].value):
                pass
    added = dict.fromkeys(keys_added_by_the_trainer(), 0.0)
    sampled = rollout_metrics(experience(), ScoreCombiner(settings()).raw(experience().evaluation), SOURCES)
    return {**sampled, **update_metrics(STATS), **clock.metrics(), **memory_metrics(), **added}


class Words:
    """Decodes ids to words."""

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(f"w{i}" for i in row) for row in rows]


def emitted_by_a_look() -> dict[str, float]:
    recipe = tiny.recipe()
    engine = tiny.engine(recipe)
    look = HeldOut(recipe, tiny.prompts(), Words(), Stops((7, 11)), judge=None).look(
        engine, reward_sources.build(recipe, engine, None)
    )
    engine.close()
    return look.metrics


def as_documented(keys) -> set[str]:
    """Keys with the names of this test's reward sources written as NAME."""
    return {re.sub(rf"^score/({'|'.join(SOURCES)})/", "score/NAME/", key) for key in keys}


TOY_JUDGE = {f"eval/{name}" for name in stories.judge([], [])}


@pytest.mark.dist
def test_glossary_and_emitted_keys_are_the_same(single):
    iteration = as_documented(emitted_by_an_iteration()) | {"iteration"}
    (look,) = single.run(emitted_by_a_look)
    emitted = iteration | set(look) | {"eval/METRIC"} | TOY_JUDGE
    assert emitted - glossary() == set(), "emitted, but not in docs/metrics.md"
    assert glossary() - emitted == set(), "in docs/metrics.md, but never emitted"


REQUIRED = [
    "iteration",
    "score/mean",
    "score/std",
    "kl/token_mean",
    "kl/sequence_mean",
    "kl_coef",
    "policy/loss",
    "policy/clip_fraction",
    "policy/approx_kl",
    "policy/entropy",
    "policy/first_ratio_deviation",
    "value/loss",
    "value/clip_fraction",
    "value/explained_variance",
    "rollout/prompt_tokens_mean",
    "rollout/response_tokens_mean",
    "rollout/eos_fraction",
    "rollout/tokens",
    "rollout/train_kl",
    "grad_norm/actor",
    "grad_norm/critic",
    "lr/actor",
    "lr/critic",
    "time/generation_seconds",
    "time/inference_seconds",
    "time/training_seconds",
    "time/iteration_seconds",
    "cpu/generation_seconds",
    "cpu/inference_seconds",
    "cpu/training_seconds",
    "memory/rss_peak_bytes",
]


def test_the_promised_keys_are_emitted(tmp_path):
    sinks = MetricSinks(tmp_path)
    sinks.write(1, emitted_by_an_iteration())
    sinks.close()
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert set(REQUIRED) <= row.keys()


def test_samples_have_the_fields_of_the_glossary(tmp_path):
    RunFolder(tmp_path).add_samples(3, "training", [("a prompt", "a response", 0.5)])
    (row,) = read_jsonl(tmp_path / "samples.jsonl")
    assert row == {"iteration": 3, "kind": "training", "prompt": "a prompt", "response": "a response", "score": 0.5}
    page = (REPOSITORY / "docs/metrics.md").read_text().partition("## samples.jsonl")[2]
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(row)


# Sinks ----------------------------------------------------------------------------------------------------------


def strict(text: str) -> dict:
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_an_iteration_is_one_strict_json_line_and_tensorboard_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sinks = MetricSinks(tmp_path)
    for iteration in (1, 2):
        sinks.write(iteration, {"score/mean": 0.1 * iteration, "rollout/tokens": 12})
    sinks.close()
    rows = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"iteration": 1, "score/mean": 0.1, "rollout/tokens": 12},
        {"iteration": 2, "score/mean": 0.2, "rollout/tokens": 12},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("score/mean")] == [(1, 0.1), (2, 0.2)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_named_and_not_written(tmp_path, value):
    sinks = MetricSinks(tmp_path)
    with pytest.raises(FloatingPointError, match="iteration 5.*policy/loss"):
        sinks.write(5, {"policy/loss": value, "score/mean": 1.0})
    sinks.close()
    assert not (tmp_path / "metrics.jsonl").exists()
    with pytest.raises(ValueError):
        append_jsonl(tmp_path / "other.jsonl", [{"x": value}])
    assert (tmp_path / "other.jsonl").read_text() == ""


def not_finite(folder: str) -> str:
    sinks = MetricSinks(Path(folder))
    try:
        sinks.write(1, {"score/mean": math.nan})
    except FloatingPointError as error:
        return str(error)
    finally:
        sinks.close()
    return "written"


@pytest.mark.dist
def test_every_rank_stops_at_a_metric_that_is_not_finite(pool, tmp_path):
    """Were rank 0 alone to raise, the others would wait in their next collective."""
    first, second = pool.run(not_finite, str(tmp_path))
    assert first == second and "score/mean" in first


def test_the_console_line_is_one_line():
    line = console_line(3, 40, emitted_by_an_iteration())
    assert line.startswith("iteration  3/40  score ") and "\n" not in line
