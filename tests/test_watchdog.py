"""Ranks that die, are stopped, hang and fail, in real runs: all are gone in time, and the report says who and where."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from engine import checkpoint_store
from engine.watchdog import FAILED_EXIT_STATUS, FILE, Watchdog
from tests import checkpoints
from tests.test_interruption import Launched

pytestmark = pytest.mark.dist

SECONDS = 14.0
PATIENCE = 10.5
"""What is left of them: a quarter is for the end."""
KILLED = 247
"""What DeepSpeed makes of SIGKILL."""

REWARD = """
import os, time
from pathlib import Path

calls = 0


class Unforeseen(BaseException):
    pass


def brevity(prompts, responses, **columns):
    global calls
    calls += 1
    if calls == 2 and ("HANGS" in os.environ or "RAISES" in os.environ):
        Path(os.environ["MARKER"] + os.environ["RANK"]).touch()
    if calls == 2 and os.environ.get("HANGS") == os.environ["RANK"]:
        time.sleep(10000)
    if calls == 2 and os.environ.get("RAISES") == os.environ["RANK"]:
        raise Unforeseen("out of the blue")
    return [-float(len(response)) for response in responses]
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("watchdog")
    (folder / "reward.py").write_text(REWARD)
    return checkpoints.save_recipe(
        folder,
        iterations=6,
        watchdog_seconds=SECONDS,
        rewards=[{"function": f"{folder / 'reward.py'}:brevity"}],
        checkpoint={"every_iterations": 100},
    )


def test_without_seconds_nobody_watches():
    with Watchdog(None) as watchdog:
        assert not watchdog.on and not watchdog.explains_a_signal() and watchdog.failure is None
        watchdog.say_goodbye()


def until_all_are_gone(recipe: Path, phase: str, level: str = "", number: signal.Signals | None = None) -> dict:
    """Go on with the run until the phase of the process's second iteration, do it, and look at what is left."""
    launched = Launched(recipe, recipe.parent / "run", phase, recipe.parent, dwell_seconds=3 if number else 0)
    launched.wait_for_the_phase()
    tree, begun = launched.tree(), time.monotonic()
    if number is not None:
        tree[level].send_signal(number)
    gone, alive = psutil.wait_procs(tree.values(), timeout=60)
    for process in alive:
        process.kill()
    newest = checkpoint_store.finished(recipe.parent / "run" / "checkpoints")[0]
    return {
        "alive": alive,
        "seconds": time.monotonic() - begun,
        "status": tree["runner"].returncode,
        "text": launched.text(),
        "checkpoint": newest.name,
        "problem": checkpoint_store.problem_of(newest),
        "failures": [json.loads(line) for line in (recipe.parent / "run" / FILE).read_text().splitlines()],
    }


def test_whatever_befalls_a_rank_all_are_gone_in_time_and_it_goes_on(recipe, monkeypatch):
    cases = [
        # what is done, to whom, when; what the report says; in time; statuses; what there is to go on from
        (("generation", "rank 1", signal.SIGKILL), "died", 6, "generation", 2, {FAILED_EXIT_STATUS, KILLED}, "000001"),
        (("training", "rank 0", signal.SIGKILL), "died", 6, "training", 3, {FAILED_EXIT_STATUS, KILLED}, "000001"),
        (("inference", "rank 0", signal.SIGSTOP), "sign of life", SECONDS, "inference", 3, None, "000001"),
        (("generation", "rank 1", signal.SIGSTOP), "sign of life", SECONDS, "generation", 3, None, "000002"),
        ("HANGS", "has not moved", SECONDS, "inference", 4, {FAILED_EXIT_STATUS}, "000003.1-generation"),
        ("RAISES", "failed: Unforeseen: out of the blue", SECONDS, "inference", 5, {1}, "000004.1-generation"),
    ]
    for count, (how, what, seconds, phase, iteration, statuses, checkpoint) in enumerate(cases, start=1):
        if isinstance(how, str):
            monkeypatch.setenv(how, "1")
            rank, found = 1, until_all_are_gone(recipe, "training")  # which never comes
            monkeypatch.delenv(how)
            place = "reward.py"
        else:
            rank, found = int(how[1][-1]), until_all_are_gone(recipe, *how)
            place = ""
        assert not found["alive"], found["text"]
        assert found["seconds"] < seconds + 3, found  # DeepSpeed's launcher and its runner look once a second
        assert found["status"] in (statuses or {FAILED_EXIT_STATUS, KILLED}), found["text"]
        assert len(found["failures"]) == count, found["text"]
        (culprit,), (other,) = found["failures"][-1]["culprits"], found["failures"][-1]["others"]
        assert (culprit["rank"], culprit["phase"], culprit["iteration"]) == (rank, phase, iteration), found["text"]
        assert what in culprit["what"] and place in culprit["place"], culprit
        assert culprit["collectives"] > 100 and culprit["collective"] != "none" and other["rank"] == 1 - rank
        said = f"rank {rank} on {culprit['host']} {culprit['what']}; it was in {phase}, iteration {iteration}, last "
        assert found["text"].count(said) == 1 and "stopped: SIGTERM" not in found["text"], found["text"]
        assert found["checkpoint"] == checkpoint and found["problem"] is None, found["text"]
        if how == "HANGS":
            assert "the main thread of rank 1:" in found["text"] and "time.sleep(10000)" in found["text"]
            assert other["inside"] and not culprit["inside"]
        if how == "RAISES":
            assert "Traceback" in found["text"] and 'raise Unforeseen("out of the blue")' in found["text"]

    # All of them stopped together, as by Ctrl-Z, for longer than their patience: nobody is to blame, and it goes on.
    launched = Launched(recipe, recipe.parent / "run", "inference", recipe.parent, dwell_seconds=2)
    launched.wait_for_the_phase()
    ranks = [launched.tree()[name] for name in ("rank 0", "rank 1")]
    for process in ranks:
        process.suspend()
    time.sleep(PATIENCE + 1.5)
    for process in ranks:
        process.resume()
    assert launched.process.wait(timeout=200) == 0, launched.text()
    lines = (recipe.parent / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert len((recipe.parent / "run" / FILE).read_text().splitlines()) == len(cases)
