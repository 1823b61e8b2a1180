"""The main job on the embedded default, as the README shows it: PPO makes the stories happy, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launching import launch

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def looks(folder: Path) -> tuple[dict, dict]:
    """Held-out metrics before the first iteration and after the last."""
    rows = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    assert rows[0]["iteration"] == 0
    return rows[0], rows[-1]


def run(world: Path, name: str, *arguments) -> Path:
    folder = world.parent / name
    done = launch("--output", folder, *arguments, cwd=world.parent.parent)
    assert done.returncode == 0, done.stderr
    return folder


def test_ppo_makes_stories_happy_and_keeps_them_stories(full_world):
    folder = run(full_world, "quickstart")
    before, after = looks(folder)
    assert before["eval/happy_fraction"] <= 0.60
    assert after["eval/happy_fraction"] >= 0.90
    assert after["eval/grammatical_fraction"] >= 0.90
    assert after["eval/characters_kept_fraction"] >= 0.90
    assert after["eval/distinct_stories"] >= 0.5 * before["eval/distinct_stories"]
    assert after["eval/kl_sequence_mean"] <= 25
    assert after["eval/response_tokens_mean"] == pytest.approx(before["eval/response_tokens_mean"], rel=0.3)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(row["policy/first_ratio_deviation"] for row in metrics) < 1e-4
    assert max(row["rollout/train_kl"] for row in metrics) < 1e-6
    shards = json.loads((folder / "base_shards.json").read_text())
    assert len(set(shards["sha256_by_rank_before"])) == 2, "two ranks hold different shards"
    assert shards["sha256_by_rank_before"] == shards["sha256_by_rank_after"]
    assert (folder / "before_after.txt").read_text().count("Once there was") >= 6


def test_without_a_score_nothing_happens(full_world):
    before, after = looks(run(full_world, "no-score", "--scores.scale=0", "--iterations", "15"))
    assert after["eval/happy_fraction"] == pytest.approx(before["eval/happy_fraction"], abs=0.10)


def test_a_negated_score_makes_stories_sad(full_world):
    _, after = looks(run(full_world, "negated", "--scores.scale=-1"))
    assert after["eval/happy_fraction"] < 0.20
