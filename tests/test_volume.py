"""Predicted traffic of an iteration against what two ranks received in one."""

from __future__ import annotations

import pytest

from engine import traffic, volume
from engine.ds_config import read_ds_config
from engine.evaluation import evaluate
from engine.update import update
from tests import tiny
from tests.test_planner import engine_of, recipe_of

pytestmark = pytest.mark.dist

ROWS = {"data": {"prompts_per_iteration": 7, "max_prompt_tokens": 5}, "generation": {"max_new_tokens": 9}}
CASES = {
    "kept for a phase": {"zero": {"keep_gathered_bytes": 10**9}},
    "for each micro-batch": {"zero": {"keep_gathered_bytes": 0}},
    "trunk": {"zero": {"keep_gathered_bytes": 0}, "critic": {"home": "trunk"}},
    "a critic and a reference of their own": {
        "zero": {"keep_gathered_bytes": 0},
        "critic": {"home": "model", "train": "full"},
        "reference": {"home": "model"},
    },
    "an actor in full": {
        "zero": {"keep_gathered_bytes": 0},
        "actor": {"train": "full"},
        "critic": {"home": "trunk"},
        "reference": {"home": "model"},
    },
}


def sections(changes: dict) -> dict:
    return ROWS | {name: tiny._merge(ROWS.get(name, {}), section) for name, section in changes.items()}


def received(path: str, stage: str, changes: dict) -> dict[str, dict[str, float]]:
    """In the third iteration, when DeepSpeed knows every order: bytes that weights and gradients took, by phase."""
    engine, settings = engine_of(path, stage, "float32", 3, changes)
    rollout, experience = tiny.rollout(), tiny.experience()
    scores, found = experience.evaluation.source_scores, {}

    def counted(phase: str, run) -> None:
        before = dict(traffic.received)
        run()
        found[phase] = {kind: traffic.received[kind] - before[kind] for kind in before}

    def sample() -> None:
        with engine.generation():
            pass

    def infer() -> None:
        with engine.inference():
            evaluate(engine, rollout, scores, settings)

    for iteration in range(3):
        counted("generation", sample)
        counted("inference", infer)
        counted("training", lambda at=iteration: update(engine, experience, settings, at, 0.0, frozenset()))
    engine.close()
    return found


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3", "all sharded"])
@pytest.mark.parametrize("case", CASES)
def test_an_iteration(pool, tmp_path, case, stage):
    """Within 5% of the model's own bytes: ranks exchange rows and counts besides."""
    changes = sections(CASES[case])
    settings = recipe_of(tmp_path, stage, "float32", 3, changes)
    predicted = volume.of_iteration(settings, read_ds_config(settings.zero.ds_config), 2, on_cuda=False)
    for real in pool.run(received, str(tmp_path), stage, changes):
        for phase, of in predicted.items():
            for kind in ("gathered", "reduced"):
                wanted = getattr(of, kind)
                assert real[phase][kind] == pytest.approx(wanted, rel=0.05, abs=6000), (phase, kind, real, predicted)
