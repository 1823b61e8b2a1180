"""Two hosts, a rank on each: the same numbers as on one; a cut link ends both in time, and the run goes on bitwise."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import psutil
import pytest

from engine import checkpoint_store
from engine.watchdog import FILE
from tests import checkpoints, hosts
from tests.hosts import TwoHosts
from tests.launching import ROOT, launch
from tests.test_resume import record

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(hosts.why_not() is not None, reason=hosts.why_not() or "there can be two hosts"),
]

SECONDS = 16.0
"""Of the watchdog."""
DWELL_SECONDS = 5.0
HEARD_SECONDS = 2.5
"""After which the other host has been told of the phase."""
LAUNCH_SECONDS = 200
TRAIN = ROOT / "launch/train.py"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    with TwoHosts(tmp_path_factory.mktemp("hosts")) as found:
        yield found


def run(two: TwoHosts, log: Path, *arguments, status: int = 0, cwd: Path = ROOT) -> str:
    """A launch on both hosts, to its end; what it said."""
    launched = two.start(TRAIN, *arguments, log=log, cwd=cwd)
    try:
        assert launched.wait(timeout=LAUNCH_SECONDS) == status, log.read_text()
    finally:
        launched.kill()
    assert not [process for host in two.hosts for process in host.ranks()], log.read_text()
    return log.read_text()


@pytest.mark.slow
def test_the_quickstart_over_a_hostfile_gives_the_numbers_of_one_host(two, full_world, tmp_path):
    newcomer, few = full_world.parent.parent, ("--iterations", "2", "--evaluation.prompts", "32")
    one = launch("--output", tmp_path / "one", *few, cwd=newcomer, OMP_NUM_THREADS="1")
    assert one.returncode == 0, one.stderr
    text = run(two, tmp_path / "log.txt", "--output", tmp_path / "two", *few, cwd=newcomer)
    assert "alpha: iteration 2/2" in text
    assert record(tmp_path / "two") == record(tmp_path / "one")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Two layers of width 32 with random weights: launching takes the time, not the model."""
    folder = tmp_path_factory.mktemp("clusters")
    return checkpoints.save_recipe(
        folder, iterations=6, watchdog_seconds=SECONDS, kl={"target": 1.0}, checkpoint={"every_iterations": 100}
    )


def cut_in(two: TwoHosts, recipe: Path, output: Path, phase: str) -> dict:
    """Start or go on, cut the link in a phase of the process's second iteration, and see who is left for how long."""
    log, marker = recipe.parent / f"{phase}.txt", recipe.parent / f"{phase}-"
    slow = {"SLOW": phase, "MARKER": str(marker), "DWELL_SECONDS": str(DWELL_SECONDS)}
    script, arguments = ROOT / "tests/slow_train.py", (recipe, "--output", output, "--resume", "auto")
    launched, end = two.start(script, *arguments, log=log, **slow), time.monotonic() + LAUNCH_SECONDS
    while not all(Path(f"{marker}{rank}").exists() for rank in (0, 1)):
        assert launched.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    ranks = {host.name: host.ranks() for host in two.hosts}
    assert {name: len(found) for name, found in ranks.items()} == {"alpha": 1, "beta": 1}
    time.sleep(HEARD_SECONDS)
    two.cut()
    cut, seconds = time.monotonic(), {}
    try:
        while len(seconds) < 2 and time.monotonic() < cut + 60:
            ended = [name for name, (process,) in ranks.items() if name not in seconds and has_ended(process)]
            seconds |= dict.fromkeys(ended, time.monotonic() - cut)
            time.sleep(0.05)
        launched.wait(timeout=60)
        seconds["launcher"] = time.monotonic() - cut
    finally:
        two.mend()
        launched.kill()
    newest = checkpoint_store.finished(output / "checkpoints")[0]
    return {
        "seconds": seconds,
        "status": launched.returncode,
        "text": log.read_text(),
        "checkpoint": newest.name,
        "problem": checkpoint_store.problem_of(newest),
        "failures": [json.loads(line) for line in (output / FILE).read_text().splitlines()],
    }


def has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_host_that_is_cut_off_in_each_phase_ends_both_in_time_and_the_run_goes_on_bitwise(two, recipe, whole):
    output = recipe.parent / "run"
    cases = [
        ("generation", 2, "000001"),
        ("inference", 3, "000002.1-generation"),
        ("training", 4, "000002.1-generation"),
    ]
    for count, (phase, iteration, checkpoint) in enumerate(cases, start=1):
        found = cut_in(two, recipe, output, phase)
        print(phase, found["seconds"], found["status"], found["checkpoint"])
        assert found["seconds"]["alpha"] < SECONDS and found["seconds"]["beta"] < SECONDS, found
        # By ServerAlive of tests/hosts.py ssh gives the other host up, too.
        assert found["seconds"]["launcher"] < SECONDS + 10 and found["status"] == 255, found
        assert (found["checkpoint"], found["problem"]) == (checkpoint, None), found["text"]
        reports = sorted(found["failures"][2 * count - 2 :], key=lambda failure: failure["told_by"])
        assert [failure["told_by"] for failure in reports] == [0, 1], "each side has its say"
        for told, name, address in ((reports[0], "beta", "10.0.0.2"), (reports[1], "alpha", "10.0.0.1")):
            (culprit,), (other,) = told["culprits"], told["others"]
            assert culprit["host"] == f"{name} ({address})" and other["rank"] == told["told_by"]
            assert (culprit["phase"], culprit["iteration"]) == (phase, iteration), told
        assert re.search(r"alpha: rank 1 on beta \(10.0.0.2\) gives no sign of life for \d+ s", found["text"])
    run(two, recipe.parent / "last.txt", recipe, "--output", output, "--resume", "auto")
    assert record(output) == record(whole)


def test_a_file_that_one_host_lacks_is_named_with_it_before_anything_starts(two, recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    with two.beta.own_disk(recipe.parent / "policy", tmp_path / "empty"):
        text = run(two, tmp_path / "log.txt", recipe, "--output", tmp_path / "run", status=2)
    said = f"on beta (rank 1): model.path: {recipe.parent / 'policy'} has no config.json; name the folder of a"
    for host in ("alpha", "beta"):
        assert f"{host}:   - {said}" in text, text
    assert "starting DeepSpeed" not in text and "Traceback" not in text, text
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def whole(recipe) -> Path:
    """The same by two ranks on one host, uninterrupted."""
    done = launch(recipe, "--output", recipe.parent / "whole", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return recipe.parent / "whole"
