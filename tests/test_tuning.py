"""The search for the fastest setting: on made-up costs few trials find the best of many; then real trials."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from engine import candidates, planner, trials, tuning_space
from engine.config import REPOSITORY, Recipe
from engine.ds_config import read_ds_config
from engine.errors import RecipeError, RunError
from engine.tuning import FAILED, FIRST, NO_MEMORY, RAN, SURVIVE, Search, Trial
from engine.tuning_space import PHASES, Axis, Space
from tests import checkpoints

AXES = (
    Axis("zero.ds_config", ("a", "b", "c", "d")),
    Axis("zero_optimization.reduce_bucket_size", ("auto", 1)),
    Axis("generation.max_concurrent_sequences", (16, 32, 64)),
    Axis("ppo.tokens_per_micro_batch", (None, 100, 200, 400)),
    Axis("zero.activation_checkpointing", (False, True)),
)
POINTS = list(itertools.product(*(range(len(axis.values)) for axis in AXES)))
OWN = (0,) * len(AXES)


class MadeUp:
    """Seconds of a phase: a factor for each value that acts on it, one for each pair of values, and 2% of noise."""

    def __init__(self, seed: int, interplay: float, fails=lambda point: None):
        self.draw, self.interplay, self.fails = random.Random(seed), interplay, fails
        self.factors: dict[tuple, float] = {}
        self.exact = {point: sum(self.seconds(point, phase) for phase in PHASES) for point in POINTS}
        self.made: list[tuple[tuple, int]] = []

    def seconds(self, point, phase: str) -> float:
        values = [(i, point[i]) for i, axis in enumerate(AXES) if phase in axis.phases]
        found = 2.0
        for one in values:
            found *= self.factors.setdefault((phase, one), self.draw.uniform(0.6, 1.6))
        for pair in itertools.combinations(values, 2):
            found *= self.factors.setdefault((phase, pair), self.draw.uniform(1 - self.interplay, 1 + self.interplay))
        return found

    def measure(self, point, iterations: int) -> Trial:
        self.made.append((point, iterations))
        settings = {axis.key: axis.values[index] for axis, index in zip(AXES, point, strict=True)}
        if status := self.fails(point):
            return Trial(settings, iterations, status)
        return Trial(settings, iterations, RAN, {p: self.seconds(point, p) * self.draw.gauss(1, 0.02) for p in PHASES})

    def point_of(self, trial: Trial) -> tuple:
        return tuple(axis.values.index(trial.settings[axis.key]) for axis in AXES)


@pytest.mark.parametrize(("interplay", "within_5_percent"), [(0.0, 30), (0.15, 26)])
def test_few_trials_find_the_best_of_many(interplay, within_5_percent):
    """It knows a factor for each value; that pairs of values help each other by 15% is beyond it."""
    off = []
    for seed in range(30):
        costs = MadeUp(seed, interplay)
        search = Search(AXES, dict.fromkeys(POINTS, 1), OWN, costs.measure)
        expected = search.expected_trials()
        winner = search.fastest()
        off.append(costs.exact[costs.point_of(winner)] / min(costs.exact.values()) - 1)
        assert len(costs.made) <= expected <= 24, "of 192"
        assert [iterations for _, iterations in costs.made].count(2 * SURVIVE) <= SURVIVE
        assert winner.iterations == 2 * SURVIVE, "the proposed setting was measured at length"
    assert sum(one < 0.05 for one in off) >= within_5_percent, sorted(off)


def test_the_first_trials_say_something_of_every_value_with_as_few_as_can_be():
    costs = MadeUp(0, 0.0)
    search = Search(AXES, dict.fromkeys(POINTS, 1), OWN, costs.measure)
    # 1 + 3 + 1 for what acts on all phases; then as many as training needs: 3 for tokens, 1 for checkpointing.
    assert search.expected_trials() == 9 + FIRST + SURVIVE
    search.fastest()
    first = [point for point, _ in costs.made[:9]]
    assert first[0] == OWN and {point[3] for point in first} == {0, 1, 2, 3}
    assert {point[2] for point in first} == {0, 1, 2}, "generation's values are tried in the trials of training's"


def test_a_device_that_holds_less_than_planned_is_not_asked_again():
    """Plans of 1 to 192; the device gives up from 120 on."""
    planned = {point: 1 + index for index, point in enumerate(POINTS)}
    costs = MadeUp(3, 0.1, lambda point: NO_MEMORY if planned[point] >= 120 else None)
    winner = Search(AXES, dict(planned), OWN, costs.measure).fastest()
    assert planned[costs.point_of(winner)] < 120
    least = 10**9
    for point, _ in costs.made:
        assert planned[point] < least, "more than what was too much"
        least = min(least, planned[point]) if planned[point] >= 120 else least
    assert least < 10**9, "nothing failed: this test tests nothing"


def test_a_setting_that_fails_is_not_proposed_and_its_axis_is_measured_elsewhere():
    broken = {point for point in POINTS if point[0] == 1 and point[1] == 0}
    costs = MadeUp(5, 0.0, lambda point: FAILED if point in broken else None)
    winner = Search(AXES, dict.fromkeys(POINTS, 1), OWN, costs.measure).fastest()
    working = {point: seconds for point, seconds in costs.exact.items() if point not in broken}
    assert working[costs.point_of(winner)] < 1.05 * min(working.values())
    assert Search(AXES, dict.fromkeys(POINTS, 1), OWN, MadeUp(0, 0, lambda point: NO_MEMORY).measure).fastest() is None
    costs = MadeUp(0, 0, lambda point: FAILED)
    with pytest.raises(RunError, match="the first 3 trials failed"):
        Search(AXES, dict.fromkeys(POINTS, 1), OWN, costs.measure).fastest()
    assert len(costs.made) == 3


def test_a_value_that_never_runs_is_given_up():
    broken = {point for point in POINTS if point[0] == 1}
    costs = MadeUp(5, 0.0, lambda point: FAILED if point in broken else None)
    assert Search(AXES, dict.fromkeys(POINTS, 1), OWN, costs.measure).fastest() is not None
    assert sum(point in broken for point, _ in costs.made) == 2


def test_what_spares_memory_comes_into_play_when_the_faster_has_too_little():
    """Checkpointing is needless by plan; without it the device gives up, whatever else is set."""
    costs = MadeUp(2, 0.0, lambda point: NO_MEMORY if point[4] == 0 else None)
    planned = {point: 100 if point[4] == 0 else 50 for point in POINTS}
    instead = {point: {(*point[:4], 0)} for point in POINTS if point[4] == 1}
    own = (0, 0, 0, 0, 1)
    search = Search(AXES, planned, own, costs.measure, instead=instead)
    assert set(search.candidates()) == {point for point in POINTS if point[4] == 0} | {own}
    winner = search.fastest()
    assert winner.settings["zero.activation_checkpointing"] is True
    working = {point: seconds for point, seconds in costs.exact.items() if point[4] == 1}
    assert working[costs.point_of(winner)] < 1.05 * min(working.values())
    assert sum(point[4] == 0 for point, _ in costs.made) == 1


def test_all_of_them_at_length_for_comparison():
    costs = MadeUp(1, 0.1)
    Search(AXES, dict.fromkeys(POINTS, 1), OWN, costs.measure).exhaustive()
    assert sorted(costs.made) == [(point, 2 * SURVIVE) for point in POINTS]


# --- what can be tried


def recipe(folder, **sections) -> Recipe:
    return Recipe.model_validate(yaml.safe_load(checkpoints.save_recipe(folder, **sections).read_text()))


def axes_file(folder, text: str):
    (folder / "axes.yaml").write_text(text)
    return folder / "axes.yaml"


def test_only_what_leaves_the_result_as_it_is(tmp_path):
    asked = {
        "ppo.epochs: [1, 2]": "ppo.epochs is not among the settings that leave the result as it is",
        "zero_optimization.stage: [1]": "zero_optimization.stage is not among the settings",
        "ppo.packing: true": "ppo.packing takes a list of values to try, got True",
        "ppo.micro_batch_sequences: [[1, 2]]": "takes a list of values to try, got [[1, 2]]",
        "zero.ds_config: [3]": "zero.ds_config takes names of files, got [3]",
        "zero.activation_checkpointing: [false, true]": None,
    }
    with pytest.raises(RecipeError) as told:
        tuning_space.read_axes(recipe(tmp_path), axes_file(tmp_path, "\n".join(asked)))
    wanted = [said for said in asked.values() if said]
    assert len(told.value.problems) == len(wanted)
    assert all(said in problem for said, problem in zip(wanted, told.value.problems, strict=True))
    with pytest.raises(RecipeError, match="ppo.packing is given twice"):
        tuning_space.read_axes(recipe(tmp_path), axes_file(tmp_path, "ppo.packing: [true]\nppo.packing: [false]\n"))


def test_what_can_not_be_is_said_with_its_reason(tmp_path):
    asked = recipe(tmp_path)

    def problem(text: str, changed: Recipe = asked) -> str:
        space = Space(changed, tuning_space.read_axes(changed, axes_file(tmp_path, text)))
        with pytest.raises(RecipeError) as told:
            candidates.candidates(space, 2, False, 10**9)
        return str(told.value)

    assert "'5e8' goes with no other value of the search: " in problem("zero_optimization.reduce_bucket_size: [5e8]")
    assert "must be a number of elements, got '5e8'" in problem("zero_optimization.reduce_bucket_size: [5e8]")
    missing = asked.model_copy(update={"data": asked.data.model_copy(update={"dataset": f"{tmp_path}/none.jsonl"})})
    assert "none.jsonl" in problem("zero.activation_checkpointing: [true]", missing)


def test_a_knob_without_use_is_not_turned(tmp_path):
    file = axes_file(
        tmp_path,
        "zero.ds_config: [ds_configs/zero0.json, ds_configs/zero2.json, ds_configs/zero3.json]\n"
        "zero_optimization.reduce_bucket_size: [1000, 2000]\n"
        "zero_optimization.stage3_prefetch_bucket_size: [0]\n",
    )
    asked = recipe(tmp_path, zero={"ds_config": "ds_configs/zero3.json"})
    space = Space(asked, tuning_space.read_axes(asked, file))
    found = [space.settings(point) for point in space.points()]
    assert len(found) == 1 + 3 + 3 * 2, "one without buckets, three buckets, three buckets with and without prefetch"
    assert space.own in space.points()
    settings = found[-1]
    other, raw = tuning_space.changed(asked, settings)
    assert raw["zero_optimization"]["reduce_bucket_size"] == settings["zero_optimization.reduce_bucket_size"]
    assert other.zero.ds_config == settings["zero.ds_config"]
    with pytest.raises(RecipeError, match="unknown key"):
        tuning_space.changed(asked, {"zero_optimization.reduce_buket_size": 1})


def test_what_spares_memory_is_tried_where_there_is_none(tmp_path):
    """A plan over the budget is no candidate; what needs less than the budget for no reason is none either."""
    asked = recipe(
        tmp_path, generation={"max_new_tokens": 40}, ppo={"minibatch_sequences": 5, "micro_batch_sequences": 5}
    )
    axes = (
        Axis("zero.activation_checkpointing", (False, True)),
        Axis("ppo.micro_batch_sequences", (5, 1)),
    )
    space = Space(asked, axes)

    def peak(point) -> int:
        other, raw = tuning_space.changed(asked, space.settings(point))
        phases = planner.phases(other, raw, 2, False, 10**9)
        return max(sum(sum(of.device.values()) for of in homes.values()) for homes in phases.values())

    sizes = {point: peak(point) for point in space.points()}
    assert sizes[0, 0] > sizes[1, 0] > sizes[1, 1] and sizes[0, 0] > sizes[0, 1]
    assert candidates.candidates(space, 2, False, 10**9) == sizes
    assert tuning_space.needless(space, sizes, False) == {(1, 0): {(0, 0)}, (1, 1): {(0, 1)}}
    tight = max(sizes[0, 1], sizes[1, 0])
    fitting = candidates.candidates(space, 2, False, tight)
    assert set(fitting) == {(0, 1), (1, 0), (1, 1)}
    assert tuning_space.needless(space, fitting, False) == {(1, 1): {(0, 1)}}, "a large micro-batch needs it now"
    with pytest.raises(RecipeError, match="no combination of these values fits"):
        candidates.candidates(space, 2, False, 10)


def test_offload_is_no_saving_on_a_cpu_and_one_on_cuda():
    axes = (Axis("zero.ds_config", ("ds_configs/zero3.json", "ds_configs/zero3_cpu_optimizer.json")),)
    space = Space(Recipe(), axes)
    assert tuning_space.needless(space, [(0,), (1,)], on_cuda=True) == {(1,): {(0,)}}
    assert tuning_space.needless(space, [(1,)], on_cuda=True) == {}
    assert tuning_space.needless(space, [(0,), (1,)], on_cuda=False) == {}


def test_why_a_trial_failed():
    log = "a\nTraceback (most recent call last):\ntorch.OutOfMemoryError: no room\n[ERROR] sigkill_handler [x]\n"
    assert trials._reason(log) == "torch.OutOfMemoryError: no room" and trials.WITHOUT_MEMORY.search(log)
    assert trials._reason("error: this trial stopped: nan\n  File x\n") == "error: this trial stopped: nan"
    assert (
        not trials.WITHOUT_MEMORY.search("error: this trial stopped: nan") and trials._reason("") == "it said nothing"
    )


def test_default_axes_hold_the_recipe_itself_and_can_all_be_read():
    for on_cuda in (False, True):
        space = Space(Recipe(), tuning_space.default_axes(Recipe(), 2, on_cuda))
        assert space.own in space.points()
        for point in list(space.points())[::97]:
            try:
                _, raw = tuning_space.changed(space.recipe, space.settings(point))
            except ValueError:  # offloading activations without checkpointing
                continue
            assert raw["gradient_clipping"] == 0.0


# --- real trials

KILLED = """
import os, sys, yaml

def score(prompts, responses, **columns):
    \"\"\"At ZeRO stage 2 this process ends as one that the system took the memory of.\"\"\"
    recipe = yaml.safe_load(open(next(word for word in sys.argv if word.endswith(".yaml"))))
    if '"stage": 2' in open(recipe["zero"]["ds_config"]).read():
        os.kill(os.getpid(), 9)
    return [float(len(response)) for response in responses]
"""


@pytest.mark.slow
@pytest.mark.dist
def test_a_search_that_is_broken_off_goes_on_and_a_killed_trial_is_a_result(tmp_path):
    (tmp_path / "rewards.py").write_text(KILLED)
    file = checkpoints.save_recipe(tmp_path, rewards=[{"function": f"{tmp_path}/rewards.py:score"}])
    axes = axes_file(tmp_path, "zero.ds_config: [ds_configs/zero0.json, ds_configs/zero2.json]\n")
    folder = tmp_path / "search"
    command = [sys.executable, str(REPOSITORY / "launch/tune.py"), str(file), "--gpus", "2", "--axes", str(axes)]
    command += ["--search", str(folder), "--trial-iterations", "1", "--by", "cpu"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    second = folder / "trials/002"
    deadline = time.monotonic() + 300
    while not (second / "log.txt").exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=100)
    assert first.returncode == 143, said
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]
    kept = (folder / "trials/001" / trials.RESULT).stat()
    assert not (second / trials.RESULT).exists()

    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=500)
    assert done.returncode == 0, done.stderr
    assert (folder / "trials/001" / trials.RESULT).stat().st_mtime_ns == kept.st_mtime_ns, "it was made twice"
    made = [Trial(**one) for one in json.loads((folder / "trials.json").read_text())]
    assert [trial.iterations for trial in made] == [1, 1, 1, SURVIVE, SURVIVE]
    states = {trial.settings["zero.ds_config"]: trial.status for trial in made}
    assert states == {"ds_configs/zero0.json": RAN, "ds_configs/zero2.json": NO_MEMORY, "ds_configs/zero3.json": RAN}
    assert "out of memory" in done.stdout and "5 trials, 3 combinations that fit" in done.stdout
    winner = min(made[3:], key=lambda trial: trial.iteration_seconds)
    best = Recipe.model_validate(yaml.safe_load((folder / "recipe.yaml").read_text()))
    assert best.zero.ds_config == str(folder / "ds_config.json")
    assert read_ds_config(best.zero.ds_config) == read_ds_config(winner.settings["zero.ds_config"])
    assert best.iterations == 2 and best.output == str(tmp_path / "run"), "the rest is the user's recipe"
    assert (folder / "trials.png").read_bytes().startswith(b"\x89PNG")

    other = subprocess.run([*command, "--gpus", "4"], capture_output=True, text=True, cwd=REPOSITORY, timeout=100)
    assert other.returncode == 2 and "holds a search of another recipe, with other options or" in other.stderr
