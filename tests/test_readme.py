"""What README and the recipes show is what the code takes: commands are parsed, snippets run, every file is loaded."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from engine.checks import warnings_of
from engine.command_line import load_recipe, parse
from engine.workloads import recipe_of
from tests.launching import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line.split(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


def test_there_is_something_to_check():
    assert len(commands()) >= 8 and len(blocks("python")) == 2


@pytest.mark.parametrize("command", [c for c in commands() if "launch/train.py" in c and "--help" not in c])
def test_training_commands_parse(command):
    words = shlex.split(command)
    arguments = words[words.index("launch/train.py") + 1 :]
    if "recipe.yaml" in arguments:  # stands for the reader's own
        arguments[arguments.index("recipe.yaml")] = "launch/recipes/quickstart.yaml"
    assert parse(arguments).iterations > 0


def benchmarks() -> list[str]:
    """The benchmark's commands, here and on its own page."""
    page = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/performance.md").read_text(), flags=re.DOTALL)
    lines = commands() + [line for block in page for line in block.splitlines()]
    return [line for line in lines if "launch/bench.py" in line]


@pytest.mark.parametrize("command", benchmarks())
def test_benchmark_commands_parse(command, tmp_path):
    words = shlex.split(command)
    name, *overrides = words[words.index("launch/bench.py") + 1 :]
    if "--json" in overrides:  # the benchmark's own; the rest is the recipe's
        at = overrides.index("--json")
        del overrides[at : at + 2]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(name, tmp_path)))
    assert parse([str(tmp_path / "recipe.yaml"), *overrides]).iterations == 4


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_make_commands_exist(command):
    done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_make_target_is_known():
    assert {"make quickstart", "make test"} <= set(commands())


def test_the_reward_function_runs():
    names: dict = {}
    exec(blocks("python")[0], names)
    assert names["brevity"](["a", "b"], ["", "long enough"], number=[1, 2]) == [0.0, -0.11]


@pytest.mark.parametrize("path", sorted((ROOT / "launch/recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem and warnings_of(recipe) == []


def test_every_path_that_is_named_exists():
    """Links, and the tree under `How it is built`."""
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    fenced = re.findall(r"^```\w*\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    tree = next(block for block in fenced if "engine/trainer.py" in block)
    for name in re.findall(r"[\w/]+\.(?:py|yaml)", tree):
        found = [ROOT / name, ROOT / "engine" / name, ROOT / "launch/recipes" / name, ROOT / "tests" / name]
        assert any(path.exists() for path in found), name


def test_the_snippet_loads_an_actor(tmp_path, monkeypatch):
    """On a run folder made by hand: peft's own format, where the quickstart leaves it."""
    from peft import get_peft_model

    from engine.adapters import lora_config
    from tests import checkpoints, tiny

    policy = checkpoints.save_policy(tmp_path / "runs/toyworld/policy")
    from transformers import AutoModelForCausalLM

    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(policy), lora_config(tiny.recipe().actor.lora))
    adapter.save_pretrained(tmp_path / "runs/NAME/final/actor")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(blocks("python")[1], names)
    assert sum(".lora_A." in name for name, _ in names["policy"].named_parameters()) > 0


def test_no_path_of_this_machine_is_named():
    for path in [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        *(ROOT / "docs").glob("*.md"),
        ROOT / "ds_configs/README.md",
    ]:
        assert str(Path.home()) + "/" not in path.read_text()
