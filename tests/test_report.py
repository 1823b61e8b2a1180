"""What a person reads after a run, made from real files."""

from __future__ import annotations

import json

import matplotlib.image
import pytest

from engine.heldout import Look
from engine.metrics import append_jsonl, rollout_metrics, update_metrics
from engine.report import SHOWN_SAMPLES, before_after, draw_learning_curve, read_jsonl
from engine.update import UpdateStats
from tests import tiny

PIXELS = (770, 1540, 4)  # 7 by 14 inches at 110 dots per inch


def look(happy: float, response: str, rows: int = SHOWN_SAMPLES + 2) -> Look:
    return Look(
        metrics={"eval/score_mean": 10 * happy, "eval/happy_fraction": happy},
        prompts=[f"prompt number {row}" for row in range(rows)],
        responses=[f"{response} {row}" for row in range(rows)],
        scores=[happy + row for row in range(rows)],
    )


def test_before_and_after_stand_side_by_side():
    page = before_after(look(0.25, "a sad end"), look(0.5, "a happy end"))
    lines = page.splitlines()
    (numbers,) = [line for line in lines if "happy_fraction" in line]
    assert numbers.index("0.250") < numbers.index("0.500")
    (sample,) = [line for line in lines if "prompt number 1" in line]
    assert sample.index("a sad end 1 [+1.25]") < sample.index("a happy end 1 [+1.50]")
    assert f"prompt number {SHOWN_SAMPLES - 1}" in page and f"prompt number {SHOWN_SAMPLES}" not in page
    assert all(len(line) <= 140 for line in lines)


def test_fewer_prompts_than_shown_samples():
    assert "prompt number 1" in before_after(look(0.1, "x", rows=2), look(0.2, "y", rows=2))


def test_text_that_looks_like_markup_is_shown_as_written():
    page = before_after(look(0.1, ":smile: [bold]loud[/bold]"), look(0.2, "[/] [red]"))
    assert ":smile: [bold]loud[/bold] 0" in page and "[/] [red] 0" in page


def test_a_long_response_is_wrapped_and_not_cut():
    words = [f"word{n}" for n in range(60)]
    page = before_after(look(0.1, " ".join(words), rows=1), look(0.2, "short", rows=1))
    assert all(word in page for word in words)


@pytest.fixture
def folder(tmp_path):
    """A run of three iterations; metrics as they are really emitted, so that a curve without its key fails."""
    emitted = rollout_metrics(
        tiny.experience(), tiny.experience().evaluation.source_scores[:, 0], ["length"]
    ) | update_metrics(UpdateStats())
    for iteration in (1, 2, 3):
        append_jsonl(tmp_path / "metrics.jsonl", [{"iteration": iteration, **emitted, "score/mean": iteration**2}])
    return tmp_path


def drawn(folder):
    path = draw_learning_curve(folder)
    assert path == folder / "learning_curve.png"
    return matplotlib.image.imread(path)


def test_learning_curve_with_and_without_held_out_prompts(folder):
    without = drawn(folder)
    for iteration, happy in ((0, 0.5), (3, 0.9)):
        append_jsonl(folder / "evaluation.jsonl", [{"iteration": iteration, **look(happy, "").metrics}])
    with_looks = drawn(folder)
    assert without.shape == with_looks.shape == PIXELS
    panel = slice(400, None), slice(1050, None)  # the last of two by three
    assert (without[panel] != with_looks[panel]).any(), "the held-out curve is not drawn"


def test_the_score_is_drawn(folder):
    first = drawn(folder)
    append_jsonl(folder / "metrics.jsonl", [{**read_jsonl(folder / "metrics.jsonl")[0], "iteration": 4}])
    assert (first[:350, :450] != drawn(folder)[:350, :450]).any()


def test_jsonl_comes_back_as_written(tmp_path):
    rows = [{"a": 1.5, "text": "line\nbreak, ünïcode"}, {"a": 2}]
    append_jsonl(tmp_path / "x.jsonl", rows[:1])
    append_jsonl(tmp_path / "x.jsonl", rows[1:])
    assert read_jsonl(tmp_path / "x.jsonl") == rows
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 2
    assert [json.loads(line) for line in (tmp_path / "x.jsonl").open()] == rows
